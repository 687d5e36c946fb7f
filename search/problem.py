"""What an allocator is asked, and what all of them share: legality, feasibility, filling up to the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.cost import Costs
from metaprune.search.budget import Budget, infeasible

Counts = NDArray[np.float64]
Kept = NDArray[np.int64]
P = ParamSpec("P")
FLOOR = 0.1  # share of its units that a group keeps where the budget allows it
_HALVINGS = 60
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
        seed: Of allocators that draw.
        curves: Harm of keeping k units of each free group, shape [size + 1] each, where it was measured.
        measure: Loss of the pruned network for each of several allocations, shape [plans, free], where it can be
            measured.
        record: What the allocator has to say about its answer, for the plan's provenance.
    """

    costs: Costs
    free: Sequence[int]
    scores: Sequence[NDArray[np.float64]]
    budget: Budget
    step: NDArray[np.int64]
    minimum: NDArray[np.int64]
    seed: int = 0
    curves: Sequence[Counts] | None = None
    measure: Callable[[Kept], Counts] | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Full size of each free group."""
        return self.costs.sizes[list(self.free)].astype(np.int64)

    def full(self, kept: NDArray[np.int64] | Counts) -> Counts:
        """Kept counts of all groups, shape [plans, groups], from those of the free ones, shape [plans, free]."""
        counts = np.tile(self.costs.sizes, (len(kept), 1))
        counts[:, list(self.free)] = kept
        return counts

    def excess(self, kept: NDArray[np.int64]) -> float:
        """Cost over budget for one allocation, shape [free]; at most 1 is within budget."""
        return float(self.budget.excess(self.costs, self.full(kept[None]))[0])

    def at_width(self, fraction: float) -> Kept:
        """That fraction of every group, to the nearest step."""
        return self.rounded(np.floor(fraction * self.sizes / self.step + 0.5) * self.step)

    def rounded(self, kept: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Kept counts made legal: multiples of the step, never below the minimum."""
        whole = np.floor(kept / self.step + 1e-9).astype(np.int64) * self.step
        legal: NDArray[np.int64] = np.clip(whole, self.minimum, self.sizes)
        return legal


def allocator(method: Callable[Concatenate[Problem, P], Kept]) -> Callable[Concatenate[Problem, P], Kept]:
    """An allocator of a function that is asked only where the budget leaves something to decide.

    A width settles the counts by itself, and where everything fits, everything stays; what no plan can meet is refused
    (see `check_feasible`).
    """

    @wraps(method)
    def allocate(problem: Problem, /, *args: P.args, **kwargs: P.kwargs) -> Kept:
        if problem.budget.width is not None:
            return problem.at_width(problem.budget.width)
        check_feasible(problem)
        if problem.excess(problem.sizes) <= 1:
            return problem.sizes
        return method(problem, *args, **kwargs)

    return allocate


def check_feasible(problem: Problem) -> None:
    """Raises `BudgetInfeasible` with what can be attained when even the least legal plan is over budget."""
    least = problem.excess(problem.minimum)
    if least > 1:
        name, fraction = max(problem.budget.limits, key=lambda limit: _ratio(problem, limit[0]) / limit[1])
        raise infeasible(name, fraction, _ratio(problem, name))


def _ratio(problem: Problem, name: str) -> float:
    costs = problem.costs
    return float(
        costs.evaluate(name, problem.full(problem.minimum[None]))[0] / costs.evaluate(name, costs.sizes[None])[0]
    )


def least_kept(problem: Problem) -> Kept:
    """The floor of every group: a tenth of its units, or as near to that as a feasible budget allows."""
    floor = FLOOR
    while floor >= 1e-3:
        whole = np.ceil(floor * problem.sizes / problem.step - 1e-9).astype(np.int64) * problem.step
        least: Kept = np.minimum(np.maximum(problem.minimum, whole), problem.sizes)
        if problem.excess(least) <= 1:
            return least
        floor /= 2
    return problem.minimum.copy()


def finite(value: float) -> float | None:
    """A number for the record, which is written as JSON: none where it is not finite."""
    return value if math.isfinite(value) else None


def lost(scores: Counts) -> Counts:
    """Scores lost by kept count: entry k when the k best units stay, shape [size + 1]; less than 0 counts as 0."""
    ascending = np.sort(np.maximum(scores, 0.0))
    return np.concatenate([[0.0], np.cumsum(ascending)])[::-1].copy()


@allocator
def proportional(problem: Problem, weights: Counts) -> Kept:
    """The largest allocation within the budget whose kept fractions are in proportion to weights, and at most 1.

    Args:
        problem: The problem.
        weights: Shape [free], positive.
    """

    def kept(scale: float) -> Counts:
        counts: Counts = np.minimum(scale * weights, 1.0) * problem.sizes
        return counts

    return within_budget(problem, kept, 0.0, float(1 / weights.min()))


def within_budget(problem: Problem, kept: Callable[[float], Counts], within: float, beyond: float) -> Kept:
    """Follows a path of allocations as far as the budget goes, and then fills up to it.

    Args:
        problem: The problem.
        kept: Kept counts, shape [free], real numbers, as a function of one number.
        within: Where they are within the budget.
        beyond: Where they are not, or as far as the path goes.
    """
    for _ in range(_HALVINGS):
        middle = (within + beyond) / 2
        if problem.excess(problem.rounded(kept(middle))) <= 1:
            within = middle
        else:
            beyond = middle
    exact = kept(within)
    whole = problem.rounded(exact)
    return filled(problem, whole, order=np.argsort(-(exact - whole), kind="stable"))


def filled(problem: Problem, kept: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
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
