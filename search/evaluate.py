"""Evaluation of configurations: each once, counted, and kept for a search that is taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metaprune.graphs.errors import OptionError
from metaprune.search.division import Division
from metaprune.search.front import Front, Point, nondominated
from metaprune.search.ledger import Ledger, Result
from metaprune.search.space import Configs, SearchSpace

REPAIRS = ("least_squares", "recalibrate", "none")
SAMPLES = 500
_ROUNDING = 1e-9  # of shares that are added up


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
MeasureAll: TypeAlias = Callable[[Configs, Fidelity], Iterable[Result]]
"""Results of many configurations, shape [n, variables], in their order, each as soon as it is there."""
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
        evaluations: Whole networks that were evaluated; each pair of configuration and fidelity counts once.
        failed: Those of them that do not run or gave a value that is not finite.
        spent: What counts against the evaluations that are allowed: 1 for a whole network, for a part its share.
        forwards: The cost, as forward passes of one sample through the dense network.
        division: The network's parts, where it was divided.
        fault: Why the last of the networks that failed did.
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
        division: Division | None = None,
        measure_all: MeasureAll | None = None,
        dense: Mapping[str, float] | None = None,
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
            division: The network's parts, for back ends that look at them one by one.
            measure_all: `measure` for many at once, such as by several processes; by default one after the other.
            dense: Objectives of the dense network by name, for fronts to tell.

        Raises:
            OptionError: Fewer than one evaluation.
        """
        if type(evaluations) is not int or evaluations < 1:
            raise OptionError(f"evaluations: at least 1 is needed, not {evaluations!r}")
        self.space = space
        self.objectives = tuple(objectives)
        self.fidelity = fidelity or Fidelity()
        self.evaluations = self.failed = 0
        self.fault = ""
        self.spent = 0.0
        self.forwards = forwards
        self.division = division
        self._allowed = evaluations
        self._measure_all = measure_all or (lambda rows, level: (measure(row, level) for row in rows))
        self._ledger = ledger
        self._watch = watch
        self._provenance = dict(provenance or {})
        self._about = self._provenance | ({} if dense is None else {"dense": dict(dense)})
        self._seen: dict[str, _Evaluation] = {}
        self._parts: dict[str, Result] = {}
        self._steps: list[tuple[float, tuple[float, ...]]] = []

    @property
    def left(self) -> int:
        """Whole networks that may still be evaluated."""
        return int(self._allowed - self.spent + _ROUNDING)

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
        results = self._results(list(new), list(new.values()), lambda some: self._measure_all(some, level))
        for key, result in results:
            self._take(key, new[key], level, result)
        missing = (math.inf,) * len(self.objectives)
        values = [self._seen[key].result.values or missing for key in keys]
        return np.array(values, dtype=float).reshape(-1, len(self.objectives))

    def part(self, number: int, configs: ArrayLike) -> NDArray[np.float64]:
        """How far the outputs of one part of the network are from the dense part's, shape [n]; infinite if it fails.

        Each counts against the evaluations by the part's share of the network's operations.

        Args:
            number: Of the part in `division`.
            configs: Configurations, shape [n, variables], of which only the part's own variables count.

        Raises:
            OptionError: There are no parts, or fewer evaluations are left than this takes.
        """
        if self.division is None:
            raise OptionError("division: the network was not divided into parts")
        division, part = self.division, self.division.parts[number]
        rows = self.space.whole.repeat(len(np.asarray(configs)), axis=0)
        rows[:, list(part.variables)] = self.space.checked(configs)[:, list(part.variables)]
        keys = [f"{self.space.key(row)} part {number} {self.fidelity}" for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._parts}
        if self.spent + len(new) * part.share > self._allowed + _ROUNDING:
            raise OptionError(f"evaluations: {len(new)} of a part are asked for, {self.left} whole ones are left")
        if not self._parts:
            self.forwards += division.forwards
        results = self._results(
            list(new), list(new.values()), lambda some: (division.measure(number, row, self.fidelity) for row in some)
        )
        for key, result in results:
            self._parts[key] = result
            self.spent += part.share
            self.forwards += result.forwards
            if self._watch is not None:
                self._watch(self)
        return np.array([(self._parts[key].values or (math.inf,))[0] for key in keys], dtype=float)

    def affordable(self, number: int) -> int:
        """Configurations of a part that may still be evaluated."""
        if self.division is None:
            return 0
        return int((self._allowed - self.spent + _ROUNDING) / self.division.parts[number].share)

    def known(self, config: ArrayLike, fidelity: Fidelity | None = None) -> bool:
        """Whether a configuration, shape [variables], was evaluated in this run, so that it costs nothing."""
        return f"{self.space.key(config)} {fidelity or self.fidelity}" in self._seen

    def archive(self) -> tuple[Configs, NDArray[np.float64]]:
        """All configurations that were evaluated in this run at the evaluator's own fidelity, and their objectives."""
        own = [made for made in self._seen.values() if made.fidelity == self.fidelity]
        missing = (math.inf,) * len(self.objectives)
        values = np.array([made.result.values or missing for made in own], dtype=float)
        return self.space.checked([made.config for made in own]), values.reshape(-1, len(self.objectives))

    def fresh(self, configs: Configs) -> Configs:
        """Those of some configurations that were not evaluated yet, each once, as many as may be evaluated."""
        _, first = np.unique(configs, axis=0, return_index=True)
        new = [i for i in np.sort(first).tolist() if not self.known(configs[i])]
        return configs[new[: self.left]]

    def _results(
        self, keys: Sequence[str], rows: Sequence[NDArray[np.int64]], measure: Callable[[Configs], Iterable[Result]]
    ) -> Iterator[tuple[str, Result]]:
        """Results by key, in order, from the ledger as far as it goes, else measured and written down."""
        known = {} if self._ledger is None else self._ledger.results
        missing = [row for key, row in zip(keys, rows, strict=True) if key not in known]
        made = iter(measure(np.stack(missing)) if missing else ())
        for key in keys:
            result = known.get(key)
            if result is None:
                result = _finite(next(made))
                if self._ledger is not None:
                    self._ledger.add(key, result)
            yield key, result

    def _take(self, key: str, row: NDArray[np.int64], level: Fidelity, result: Result) -> None:
        """Counts a whole network and keeps it in mind."""
        self.evaluations += 1
        if result.values is None:
            self.failed += 1
            self.fault = result.note
        self.spent += 1
        self.forwards += result.forwards
        self._seen[key] = _Evaluation(self.evaluations, tuple(row.tolist()), level, result)
        if result.values is not None and level == self.fidelity and self._improves(result.values):
            self._steps.append((self.spent, result.values))
        if self._watch is not None:
            self._watch(self)

    def _improves(self, values: tuple[float, ...]) -> bool:
        """Whether no step so far is as good in everything."""
        if not self._steps:
            return True
        before = np.array([step for _, step in self._steps])
        return not bool((before <= np.array(values)).all(axis=1).any())

    def front(self) -> Front:
        """The front of all that was evaluated in this run at the evaluator's own fidelity."""
        chosen = [e for e in self._seen.values() if e.fidelity == self.fidelity and e.result.values is not None]
        values = np.array([e.result.values for e in chosen], dtype=float).reshape(-1, len(self.objectives))
        points = [self._point(chosen[i]) for i in np.flatnonzero(nondominated(values)).tolist()]
        front = Front.of(self.objectives, points, self.evaluations, self.forwards, self._about)
        return replace(front, failed=self.failed, history=tuple(self._steps))

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
