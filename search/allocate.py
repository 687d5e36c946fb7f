"""Allocators: how many units each group keeps under a budget. One function each, of the same signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.cost import Costs
from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.search.budget import Budget

Counts = NDArray[np.float64]
FLOOR = 0.1
_TRIALS = 64  # groups tried one by one once no more of them fit together


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocator is asked.

    Attributes:
        costs: Cost polynomials over all groups of the graph.
        free: Indices of the groups that may shrink.
        scores: Score of every unit of each free group, in the order of `free`, each of shape [size].
        budget: The budget.
        step: For each free group, the step its kept count moves in.
        minimum: For each free group, the least kept count.
    """

    costs: Costs
    free: Sequence[int]
    scores: Sequence[NDArray[np.float64]]
    budget: Budget
    step: NDArray[np.int64]
    minimum: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Full size of each free group."""
        return self.costs.sizes[list(self.free)].astype(np.int64)

    def full(self, kept: NDArray[np.int64]) -> Counts:
        """Kept counts of all groups, shape [plans, groups], from those of the free ones, shape [plans, free]."""
        counts = np.tile(self.costs.sizes, (len(kept), 1))
        counts[:, list(self.free)] = kept
        return counts

    def excess(self, kept: NDArray[np.int64]) -> float:
        """Cost over budget for one allocation, shape [free]; at most 1 is within budget."""
        return float(self.budget.excess(self.costs, self.full(kept[None]))[0])

    def rounded(self, kept: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Kept counts made legal: multiples of the step, never below the minimum."""
        whole = np.floor(kept / self.step + 1e-9).astype(np.int64) * self.step
        legal: NDArray[np.int64] = np.clip(whole, self.minimum, self.sizes)
        return legal


def uniform(problem: Problem) -> NDArray[np.int64]:
    """The same kept fraction for every group, the largest that the budget allows."""
    sizes = problem.sizes
    if problem.budget.width is not None:
        nearest = np.floor(problem.budget.width * sizes / problem.step + 0.5) * problem.step
        return problem.rounded(nearest.astype(float))
    _feasible(problem)
    low, high = 0.0, 1.0
    if problem.excess(sizes) <= 1:
        return sizes
    for _ in range(40):
        middle = (low + high) / 2
        if problem.excess(problem.rounded(middle * sizes)) <= 1:
            low = middle
        else:
            high = middle
    kept = problem.rounded(low * sizes)
    return _filled(problem, kept, order=np.argsort(-(low * sizes - kept), kind="stable"))


def global_(problem: Problem) -> NDArray[np.int64]:
    """Units leave in the order of their scores over all groups, down to a floor in each, until the budget is met."""
    if problem.budget.width is not None:
        return uniform(problem)
    _feasible(problem)
    floor = FLOOR
    while True:
        least = np.maximum(problem.minimum, np.ceil(floor * problem.sizes).astype(np.int64))
        if problem.excess(problem.rounded(least.astype(float))) <= 1 or floor < 1e-3:
            break
        floor /= 2
    if floor < 1e-3:
        least = problem.minimum
    group = np.concatenate([np.full(len(s) - k, i) for i, (s, k) in enumerate(zip(problem.scores, least, strict=True))])
    value = np.concatenate(
        [np.sort(s, kind="stable")[: len(s) - k] for s, k in zip(problem.scores, least, strict=True)]
    )
    order = group[np.lexsort((group, value))]

    def after(count: int) -> NDArray[np.int64]:
        gone = np.bincount(order[:count], minlength=len(problem.free))
        return problem.rounded((problem.sizes - gone).astype(float))

    low, high = 0, len(order)  # after(high) is within budget, after(low - 1) is not
    while low < high:
        middle = (low + high) // 2
        if problem.excess(after(middle)) <= 1:
            high = middle
        else:
            low = middle + 1
    last = order[max(0, low - 1) :: -1] if low else order[:0]
    return _filled(problem, after(low), order=np.array(list(dict.fromkeys(last.tolist())), dtype=np.int64))


def _feasible(problem: Problem) -> None:
    least = problem.excess(problem.minimum)
    if least > 1:
        name, fraction = problem.budget.limits[0]
        worst = max(problem.budget.limits, key=lambda limit: _ratio(problem, limit[0]) / limit[1])
        name, fraction = worst
        attainable = _ratio(problem, name)
        raise BudgetInfeasible(
            f"budget: {name}={fraction} can not be met; the least is {name}={attainable:.4f}", attainable
        )


def _ratio(problem: Problem, name: str) -> float:
    costs = problem.costs
    return float(
        costs.evaluate(name, problem.full(problem.minimum[None]))[0] / costs.evaluate(name, costs.sizes[None])[0]
    )


def _filled(problem: Problem, kept: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gives single steps back under the budget: to as long a prefix of `order` as fits, then where one more fits."""
    first = np.array(list(dict.fromkeys([*order.tolist(), *range(len(kept))])), dtype=np.int64)

    def raised(count: int) -> NDArray[np.int64]:
        more = kept.copy()
        chosen = first[:count]
        more[chosen] = np.minimum(more[chosen] + problem.step[chosen], problem.sizes[chosen])
        return more

    while True:
        low, high = 0, len(first)
        while low < high:
            middle = (low + high + 1) // 2
            if problem.excess(raised(middle)) <= 1:
                low = middle
            else:
                high = middle - 1
        if np.array_equal(raised(low), kept):
            break
        kept = raised(low)
    for group in first[low : low + _TRIALS].tolist():
        while kept[group] < problem.sizes[group]:
            more = kept.copy()
            more[group] = min(more[group] + problem.step[group], problem.sizes[group])
            if problem.excess(more) > 1:
                break
            kept = more
    return kept


ALLOCATORS: dict[str, Callable[[Problem], NDArray[np.int64]]] = {"uniform": uniform, "global": global_}


def find(name: str) -> Callable[[Problem], NDArray[np.int64]]:
    """The allocator called `name`; raises `OptionError`."""
    if name not in ALLOCATORS:
        raise OptionError(f"allocator: {name!r} is none of {', '.join(sorted(ALLOCATORS))}")
    return ALLOCATORS[name]
