"""Optima of a separable model along the front, convex hulls and what is between; and the surroundings of a front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from pymoo.util.ref_dirs import get_reference_directions

from metaprune.search.budget import Budget
from metaprune.search.dynamic import dynamic
from metaprune.search.evaluate import Evaluator
from metaprune.search.lagrange import hull
from metaprune.search.problem import Counts
from metaprune.search.separation import Separable
from metaprune.search.space import Configs, SearchSpace

Mix: TypeAlias = Mapping[str, float]
"""Weights of costs; they add up to 1."""

_PARTS = 4  # in which weights of several costs are shared out
_NARROW = 1 / 64  # of the range of a cost: a gap in which nothing is looked for


class Sweep:
    """Evaluates what a model takes for the best.

    A place on the front is a weighted sum of kept fractions of costs.

    Attributes:
        model: The model.
        costs: The costs that the front is over.
        mixes: Weights of the costs, evenly spread.
    """

    def __init__(
        self,
        model: Separable,
        evaluate: Evaluator,
        costs: Sequence[str],
        coefficients: Callable[[Mix, float], Counts | None] = lambda mix, place: None,
    ) -> None:
        """Takes a model, what evaluates, and costs.

        Args:
            model: The model.
            evaluate: Evaluates.
            costs: The costs that the front is over.
            coefficients: Logarithms of the curves' coefficients at a place, shape [variables]; None for all alike.
        """
        self.model, self.costs = model, tuple(costs)
        rows = get_reference_directions("das-dennis", len(self.costs), n_partitions=_PARTS)
        self.mixes: list[Mix] = [dict(zip(self.costs, row, strict=True)) for row in rows.tolist()]
        self._evaluate, self._coefficients = evaluate, coefficients

    def places(self, mix: Mix, configs: Configs) -> Counts:
        """Places of configurations, shape [configurations]."""
        total = np.zeros(len(configs))
        for cost, weight in mix.items():
            total += weight * self.model.space.fractions(cost, configs)
        return total

    def ends(self, mix: Mix) -> tuple[float, float]:
        """The places of the least network and of the widest one within the budget whose variables are all alike."""
        space = self.model.space
        low, high = self.places(mix, np.concatenate([space.least, space.repair(space.whole, self.model.budget)]))
        return float(low), float(high)

    def corners(self, mix: Mix, place: float) -> Configs:
        """The convex hull of harm against cost with the coefficients of a place, within the budget, cheapest first."""
        instance = self.model.instance([self.model.limit(mix)], self._coefficients(mix, place))
        return self.model.within(hull(instance))

    def optimum(self, mix: Mix, place: float) -> NDArray[np.int64]:
        """The configuration of least harm up to a place and within the budget, shape [variables]."""
        limits = [self.model.limit(mix, place)]
        if self.model.budget is not None:
            limits += [self.model.limit({cost: 1.0}, fraction) for cost, fraction in self.model.budget.limits]
        return dynamic(self.model.instance(limits, self._coefficients(mix, place))).choice

    def run(self, parts: int) -> None:
        """Evaluates corners, and what is between them, until nothing is left.

        Args:
            parts: The range of places is divided into so many; corners in each are those of its middle.
        """
        found = [self._corners(mix, parts) for mix in self.mixes]
        every = np.concatenate(found)
        fractions = [self.model.space.fractions(cost, every) for cost in self.costs]
        self._evaluate(self._evaluate.fresh(every[scattered(np.stack(fractions, axis=1))]))
        gaps = [
            (low, high, number)
            for number, (mix, configs) in enumerate(zip(self.mixes, found, strict=True))
            for low, high in pairwise(np.unique([*self.places(mix, configs), *self.ends(mix)]).tolist())
        ]
        while gaps and self._evaluate.left:
            gaps.sort(key=lambda gap: gap[1] - gap[0])
            low, high, number = gaps.pop()
            if high - low < _NARROW:
                return
            mix, middle = self.mixes[number], (low + high) / 2
            choice = self.optimum(mix, middle)[None]
            self._evaluate(self._evaluate.fresh(self.model.within(choice)))
            gaps += [(low, float(self.places(mix, choice)[0]), number), (middle, high, number)]

    def _corners(self, mix: Mix, parts: int) -> Configs:
        edges = np.linspace(*self.ends(mix), parts + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        edges[[0, -1]] = -np.inf, np.inf
        found = []
        for low, high, middle in zip(edges[:-1], edges[1:], middles.tolist(), strict=True):
            corners = self.corners(mix, middle)
            places = self.places(mix, corners)
            found.append(corners[(low <= places) & (places < high)])
        return np.concatenate(found)


def walk(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, costs: Sequence[str]) -> None:
    """Evaluates the neighbours of points of the front, one level away, until nothing is left or all are known.

    Each time it is the point furthest from the others, in the order of `scattered`, that has neighbours to evaluate:
    Pareto local search (Paquete, Chiarandini and Stuetzle 2004).
    """
    found = True
    while evaluate.left and found:
        configs = space.checked([point.config for point in evaluate.front().points])
        fractions = np.stack([space.fractions(cost, configs) for cost in costs], axis=1)
        found = False
        for config in configs[scattered(fractions)]:
            around = space.neighbours(config)
            around = evaluate.fresh(around[space.excess(around, budget) <= 1])
            if len(around):
                evaluate(around)
                found = True
                break


def scattered(places: Counts) -> NDArray[np.int64]:
    """An order of points, shape [points, costs], that begins at the least: each is the furthest from all before it."""
    order = [int(places.sum(axis=1).argmin())] if len(places) else []
    apart = np.full(len(places), np.inf)
    while len(order) < len(places):
        apart = np.minimum(apart, np.abs(places - places[order[-1]]).max(axis=1))
        apart[order[-1]] = -1.0
        order.append(int(apart.argmax()))
    return np.array(order, dtype=np.int64)
