"""NSGA-II over integer levels, by pymoo: populations are asked for and told, and nothing is evaluated here.

Deb, Pratap, Agarwal and Meyarivan, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II (IEEE Transactions on
Evolutionary Computation 6, 2002). Two things are added. A population begins along the diagonal, where all variables
keep about the same share, from the least network to the whole one: levels drawn one by one make networks of middling
cost only. And several times as many children are bred as are evaluated: those are, that survive among all of them by
a guess at their objectives (see `regression`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem as Box
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from metaprune.search.regression import Regression
from metaprune.search.space import Configs

Values = NDArray[np.float64]
Known = Callable[[Configs], Values]
"""Objectives of configurations as far as they need no evaluation, shape [n, objectives]; NaN for the others."""

_LEAST, _MOST = 16, 40  # sizes of a population; between them, twice the number of variables
_BROOD = 8  # children for each that is evaluated
_CROSSED, _SPREAD = 0.9, 10.0  # probability of a crossover; index of the distributions of both operators
_PATIENCE = 3  # broods of nothing new, one after the other, after which there is none
_ROUNDS = 2  # of mating for a brood; where that does not fill it, most children are like their parents


class Evolution:
    """One population and all that it has tried.

    Attributes:
        size: Of the population.
    """

    def __init__(
        self,
        levels: NDArray[np.int64],
        known: Known,
        seed: int,
        start: Configs,
        repair: Callable[[Configs], Configs] = lambda configs: configs,
    ) -> None:
        """Takes the space and where to begin.

        Args:
            levels: Number of levels of each variable, shape [variables].
            known: Tells what needs no evaluation.
            seed: Of every random choice.
            start: Configurations that come first, shape [n, variables].
            repair: Makes configurations legal.
        """
        self.size = int(np.clip(2 * len(levels), _LEAST, _MOST))
        self._levels, self._known, self._repair = levels, known, repair
        self._generator = np.random.default_rng(seed)
        self._seed = int(self._generator.integers(2**31))
        self._start = np.concatenate([start, repair(self._diagonal())])
        self._tried: set[bytes] = set()
        self._configs: list[NDArray[np.int64]] = []
        self._values: list[Values] = []
        self._engine: Any = None

    def ask(self, most: int) -> Configs:
        """Configurations that were never asked for before, at most so many; none where nothing new is found."""
        if self._engine is None:
            rows = self._first()
            return self._new(rows)[:most]
        for _ in range(_PATIENCE):
            brood = self._engine.ask()
            if brood is None:
                return self._start[:0]
            rows = self._new(brood.get("X").astype(np.int64))
            if len(rows):
                return self._promising(rows, min(most, self.size))
        return self._start[:0]

    def tell(self, configs: Configs, values: Values) -> None:
        """Takes in objectives, shape [n, objectives], of what was asked for; where one is not finite, it is let go."""
        self._tried |= {row.tobytes() for row in configs}
        runs = np.isfinite(values).all(axis=1)
        self._configs += list(configs[runs])
        self._values += list(values[runs])
        if self._engine is not None:
            self._engine.tell(infills=_population(configs[runs], values[runs]))
        elif len(self._configs) > 1:
            self._engine = self._begun()

    def _begun(self) -> Any:
        """An engine that has taken in what there is, once that is enough to breed from."""
        configs, values = np.stack(self._configs), np.stack(self._values)
        operators = {"eta": _SPREAD, "vtype": float, "repair": RoundingRepair()}
        engine = NSGA2(
            pop_size=self.size,
            n_offsprings=_BROOD * self.size,
            sampling=_population(configs, values),
            crossover=SBX(prob=_CROSSED, **operators),
            mutation=PM(**operators),
            repair=_Repaired(self._repair),
        )
        box = Box(n_var=len(self._levels), n_obj=values.shape[1], xl=0 * self._levels, xu=self._levels - 1)
        engine.mating.n_max_iterations = _ROUNDS
        engine.setup(box, seed=self._seed, termination=NoTermination(), verbose=False)
        engine.tell(infills=engine.ask())
        return engine

    def _first(self) -> Configs:
        """What to begin with; more of the diagonal where all of that was tried and hardly anything runs."""
        for _ in range(_PATIENCE):
            if len(self._new(self._start)):
                break
            self._start = self._repair(self._diagonal())
        return self._start

    def _diagonal(self) -> Configs:
        """Levels along the diagonal, each rounded up or down at random; any first part is spread over all of it."""
        places = (np.arange(self.size)[:, None] >> np.arange(16) & 1) @ 0.5 ** np.arange(1, 17)  # van der Corput
        exact = (places / max(float(places.max()), 0.5))[:, None] * (self._levels - 1)
        found = np.floor(exact + self._generator.random(exact.shape)).astype(np.int64)
        return np.minimum(found, self._levels - 1)

    def _new(self, rows: Configs) -> Configs:
        """Those of some rows that were not tried, each once, in order."""
        keys = [row.tobytes() for row in rows]
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._tried}
        return rows[sorted(first.values())]

    def _promising(self, rows: Configs, most: int) -> Configs:
        """Those that survive by known and guessed objectives."""
        if len(rows) <= most:
            return rows
        values = self._known(rows)
        guessed = np.isnan(values).any(axis=0)
        if guessed.any():
            told = np.stack(self._values)[:, guessed]
            values[:, guessed] = Regression(self._levels, np.stack(self._configs), told)(rows)
        brood = _population(rows, values)
        brood.set("number", np.arange(len(rows)))
        chosen = RankAndCrowding().do(self._engine.problem, brood, n_survive=most, random_state=self._generator)
        numbers: NDArray[np.int64] = np.sort(chosen.get("number").astype(np.int64))
        return rows[numbers]


class _Repaired(Repair):  # type: ignore[misc]
    """A repair as pymoo wants it."""

    def __init__(self, repair: Callable[[Configs], Configs]) -> None:
        super().__init__()
        self._repair = repair

    def _do(self, problem: Box, X: Values, **_: object) -> Configs:  # noqa: N803 - pymoo passes it by this name
        return self._repair(X.astype(np.int64))


def _population(configs: Configs, values: Values) -> Any:
    return Population.new("X", configs, "F", values)
