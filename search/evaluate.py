"""Evaluation of configurations: each once, counted, and kept for a search that is taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metaprune.graphs.errors import OptionError
from metaprune.search.front import Front, Point, nondominated
from metaprune.search.ledger import Ledger, Result
from metaprune.search.space import Configs, SearchSpace

REPAIRS = ("least_squares", "recalibrate", "none")
SAMPLES = 500


@dataclass(frozen=True)
class Fidelity:
    """How much work goes into an evaluation.

    Attributes:
        samples: Calibration samples that a cut network is repaired with.
        repair: `"least_squares"` (see `metaprune.reconstruct`), `"recalibrate"` (statistics of batch norms only) or
            `"none"`.
    """

    samples: int = SAMPLES
    repair: str = REPAIRS[0]

    def __post_init__(self) -> None:
        if type(self.samples) is not int or self.samples < 1:
            raise OptionError(f"samples: at least 1 is needed to repair a network with, not {self.samples!r}")
        if self.repair not in REPAIRS:
            raise OptionError(f"repair: {self.repair!r} is none of {', '.join(REPAIRS)}")

    def __str__(self) -> str:
        return f"{self.repair} on {self.samples}"


Measure: TypeAlias = Callable[[NDArray[np.int64], Fidelity], Result]
"""Objectives of one configuration, shape [variables]. Equal arguments give equal results to the bit."""
Watch: TypeAlias = Callable[["Evaluator"], None]
"""Called after each new evaluation."""


class Evaluator:
    """What a back end calls: objectives of configurations, each evaluated once.

    Whether a result is measured or read from a ledger makes no difference to what is returned or counted. So a search
    that is deterministic given its seed, run again from its start on the ledger of one that was killed, takes the
    same way to the same bits.

    Attributes:
        space: The search space.
        objectives: Names, in the order of the columns.
        fidelity: What an evaluation is made with unless the back end asks for another; fronts hold these only.
        left: Evaluations that may still be made; each pair of configuration and fidelity counts once.
        evaluations: Those that were made.
        forwards: Their cost, as forward passes of one sample through the dense network.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[str],
        measure: Measure,
        evaluations: int,
        fidelity: Fidelity | None = None,
        ledger: Ledger | None = None,
        watch: Watch | None = None,
        provenance: Mapping[str, Any] | None = None,
        forwards: float = 0.0,
    ) -> None:
        """Takes the space, the objectives and their measure, how many evaluations may be made, and where they go.

        Args:
            space: The search space.
            objectives: Names of what `measure` gives.
            measure: What measures a configuration.
            evaluations: How many may be made.
            fidelity: Of evaluations for which none is named.
            ledger: Where results are kept and looked up.
            watch: Called after each evaluation.
            provenance: What plans and fronts say of their origin.
            forwards: What was spent before the first evaluation.

        Raises:
            OptionError: Fewer than one evaluation.
        """
        if type(evaluations) is not int or evaluations < 1:
            raise OptionError(f"evaluations: at least 1 is needed, not {evaluations!r}")
        self.space = space
        self.objectives = tuple(objectives)
        self.fidelity = fidelity or Fidelity()
        self.left = evaluations
        self.evaluations = 0
        self.forwards = forwards
        self._measure = measure
        self._ledger = ledger
        self._watch = watch
        self._provenance = dict(provenance or {})
        self._seen: dict[str, _Evaluation] = {}

    def __call__(self, configs: ArrayLike, fidelity: Fidelity | None = None) -> NDArray[np.float64]:
        """Objectives of configurations, shape [n, variables]; shape [n, objectives].

        All are infinite for a network that does not run, or of which one is not finite.

        Raises:
            OptionError: More new configurations than evaluations are left; none is evaluated.
        """
        level = fidelity or self.fidelity
        rows = self.space.checked(configs)
        keys = [f"{self.space.key(row)} {level}" for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._seen}
        if len(new) > self.left:
            raise OptionError(f"evaluations: {len(new)} more are asked for, {self.left} are left")
        for key, row in new.items():
            self._evaluate(key, row, level)
        missing = (math.inf,) * len(self.objectives)
        values = [self._seen[key].result.values or missing for key in keys]
        return np.array(values, dtype=float).reshape(-1, len(self.objectives))

    def known(self, config: ArrayLike, fidelity: Fidelity | None = None) -> bool:
        """Whether a configuration, shape [variables], was evaluated in this run, so that it costs nothing."""
        return f"{self.space.key(config)} {fidelity or self.fidelity}" in self._seen

    def fresh(self, configs: Configs) -> Configs:
        """Those of some configurations that were not evaluated yet, each once, as many as may be evaluated."""
        _, first = np.unique(configs, axis=0, return_index=True)
        new = [i for i in np.sort(first).tolist() if not self.known(configs[i])]
        return configs[new[: self.left]]

    def _evaluate(self, key: str, row: NDArray[np.int64], level: Fidelity) -> None:
        result = self._ledger.results.get(key) if self._ledger is not None else None
        if result is None:
            result = _finite(self._measure(row, level))
            if self._ledger is not None:
                self._ledger.add(key, result)
        self.evaluations += 1
        self.left -= 1
        self.forwards += result.forwards
        self._seen[key] = _Evaluation(self.evaluations, tuple(row.tolist()), level, result)
        if self._watch is not None:
            self._watch(self)

    def front(self) -> Front:
        """The front of all that was evaluated in this run at the evaluator's own fidelity."""
        chosen = [e for e in self._seen.values() if e.fidelity == self.fidelity and e.result.values is not None]
        values = np.array([e.result.values for e in chosen], dtype=float).reshape(-1, len(self.objectives))
        points = [self._point(chosen[i]) for i in np.flatnonzero(nondominated(values)).tolist()]
        return Front.of(self.objectives, points, self.evaluations, self.forwards, self._provenance)

    def _point(self, made: _Evaluation) -> Point:
        origin = {"method": "explore", **self._provenance, "evaluation": made.number}
        plan = self.space.decode(np.array(made.config), str(self._provenance.get("budget") or ""), origin)
        info = {"evaluation": made.number, "fidelity": str(made.fidelity), "forwards": made.result.forwards}
        return Point(made.result.values or (), plan, made.config, info)


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation of this run: its number, what was evaluated and how, and what came of it."""

    number: int
    config: tuple[int, ...]
    fidelity: Fidelity
    result: Result


def _finite(result: Result) -> Result:
    if result.values is None or all(map(math.isfinite, result.values)):
        return result
    return Result(None, result.forwards, result.note or "a value is not finite")
