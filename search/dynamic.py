"""The dynamic program of layer-adaptive pruning, exact for costs that multiply groups with each other.

Xu et al. (ICCV 2023, arXiv 2308.10438, eq. 7) add layer after layer to a table over all budgets. Here variables are
eliminated instead (see `elimination`), a budget is a list of the pairs of cost and harm that no other pair dominates,
and a pair goes when the Lagrangian bound on everything else shows that it can not become better than a choice that is
known. Costs are never rounded, so no budget is exceeded and none is left over. Where a list grows beyond bounds it is
thinned; the least bound of what went stays in the answer's gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from metaprune.search.elimination import Elimination, Step, order_of
from metaprune.search.instance import TOLERANCE, Choice, Instance, Solution
from metaprune.search.lagrange import best_of, oracle_of, relaxed
from metaprune.search.problem import Counts

_ROUGH, _FINE = 32, 4096  # pairs per list: to find a good choice, and to prove the best
_SEVERAL = 64  # the same where there are several limits, and fewer pairs beat each other
_BLOCK = 256
_STATES = 20_000  # levels of variables that meet, in all and over the number of limits squared; each is looked at
_PAIRS = 1 << 20  # pairs that are looked at together
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Pairs:
    """Harm and costs of what has been eliminated, and how it came about.

    Attributes:
        harm: Shape [pairs].
        costs: Over the bounds, shape [pairs, limits].
        level: Level of the variable that went last, shape [pairs].
        origin: For each list that came in, which of its pairs, shape [pairs, inputs].
    """

    harm: Counts
    costs: Counts
    level: NDArray[np.int64]
    origin: NDArray[np.int64]

    def taken(self, chosen: NDArray[np.int64]) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.harm[chosen], self.costs[chosen], self.level[chosen], self.origin[chosen])


def dynamic(instance: Instance) -> Solution:
    """The least harm within the limits.

    The gap is 0 unless lists had to be thinned. Where too many levels are left to look at, as several limits may leave
    of large networks, the relaxation's answer stands with its gap; where too many groups meet for elimination nothing
    is proven.

    Raises:
        BudgetInfeasible: No choice is within the limits.
    """
    order = order_of(instance)
    oracle, exact = oracle_of(instance)
    found = relaxed(instance, oracle, exact)
    best = best_of(instance, found.columns, found.bound, "Lagrangian relaxation")
    if order is None:
        return best
    for most in (_ROUGH, _FINE if len(instance.limits) == 1 else _SEVERAL):
        if best.gap == 0:
            return best
        allowed, smaller = reduced(instance, order, found.prices, best.harm)
        counts = [len(levels) for levels in smaller.levels]
        if (
            sum(prod(counts[v] for v in (variable, *rest)) for variable, rest in order)
            > _STATES / len(instance.limits) ** 2
        ):
            return best
        table = _Table(smaller, order, found.prices, best.harm, most)
        choice = table.run()
        bound = max(best.bound, min(best.harm, table.dropped))
        if choice is not None:
            level = np.array([np.flatnonzero(mask)[c] for mask, c in zip(allowed, choice, strict=True)])
            better = best_of(instance, np.stack([level, best.choice]), bound, "dynamic program")
            bound = min(bound, better.harm)
            best = Solution(better.choice, better.harm, bound, better.notes)
        else:
            best = Solution(best.choice, best.harm, bound, best.notes)
    return best


def reduced(
    instance: Instance, order: Sequence[tuple[int, tuple[int, ...]]], prices: Counts, known: float
) -> tuple[list[NDArray[np.bool_]], Instance]:
    """The levels that may be part of a choice better than the known one, and the instance with only those."""
    lowest, _, _ = Elimination(instance, order).bounds(prices)
    allowed = [bounds <= known + _TINY * max(1.0, abs(known)) for bounds in lowest]
    allowed = [mask if mask.any() else bounds == bounds.min() for mask, bounds in zip(allowed, lowest, strict=True)]
    return allowed, instance.restricted(allowed)


class _Table:
    """One run of the dynamic program.

    Attributes:
        dropped: Least bound of the pairs that went without being shown useless.
    """

    def __init__(
        self,
        instance: Instance,
        order: Sequence[tuple[int, tuple[int, ...]]],
        prices: Counts,
        known: float,
        most: int,
    ) -> None:
        """Takes the instance, the order of elimination, prices, a harm to beat and the most pairs a list may hold."""
        self.dropped = np.inf
        self._instance = instance
        self._elimination = Elimination(instance, order)
        self._prices = prices
        _, self._inside, self._outside = self._elimination.bounds(prices)
        self._known = known - _TINY * max(1.0, abs(known))
        self._most = most

    def run(self) -> Choice | None:
        """A choice that is better than the known one, the best unless pairs were dropped; None if none was found."""
        lists: list[dict[tuple[int, ...], Pairs]] = []
        for number, step in enumerate(self._elimination.steps):
            counts = [len(self._instance.levels[v]) for v in step.rest]
            lists.append({at: self._pairs(number, step, at, lists) for at in np.ndindex(*counts)})
        choice = np.zeros(len(self._elimination.steps), dtype=np.int64)
        within = np.zeros(len(self._instance.limits)) + 1 + TOLERANCE - self._elimination.constant
        roots = [n for n, step in enumerate(self._elimination.steps) if not step.rest]
        joint = _nothing(len(within))
        others = float(self._prices @ (self._elimination.constant - 1)) + sum(float(self._inside[r]) for r in roots)
        for root in roots:
            others -= float(self._inside[root])
            joint = self._crossed(joint, lists[root][()], others)
        fits = np.flatnonzero((joint.costs <= within).all(axis=1))
        if not len(fits):
            return None
        best = fits[int(np.argmin(joint.harm[fits]))]
        left = list(zip(roots, joint.origin[best].tolist(), strict=True))
        while left:
            number, pair = left.pop()
            step = self._elimination.steps[number]
            at = tuple(int(choice[v]) for v in step.rest)
            pairs = lists[number][at]
            choice[step.variable] = pairs.level[pair]
            left += zip(step.inputs, pairs.origin[pair].tolist(), strict=True)
        return choice

    def _pairs(
        self, number: int, step: Step, at: tuple[int, ...], lists: Sequence[dict[tuple[int, ...], Pairs]]
    ) -> Pairs:
        """The pairs of a step for given levels of the variables that are left."""
        level_of = dict(zip(step.rest, at, strict=True))
        found = []
        for level in range(len(step.harm)):
            level_of[step.variable] = level
            place = (level, *(0 if n == 1 else i for i, n in zip(at, step.costs.shape[2:], strict=True)))
            own = step.costs.reshape(len(step.costs), -1)[:, np.ravel_multi_index(place, step.costs.shape[1:])]
            inputs = [(c, tuple(level_of[v] for v in self._elimination.steps[c].rest)) for c in step.inputs]
            others = float(self._outside[number][at]) + sum(float(self._inside[c][i]) for c, i in inputs)
            pairs = Pairs(step.harm[level : level + 1], own[None], np.array([level]), np.zeros((1, 0), dtype=np.int64))
            for child, index in inputs:
                others -= float(self._inside[child][index])
                pairs = self._crossed(pairs, lists[child][index], others)
            found.append(pairs)
        joint = Pairs(
            np.concatenate([p.harm for p in found]),
            np.concatenate([p.costs for p in found]),
            np.concatenate([p.level for p in found]),
            np.concatenate([p.origin for p in found]),
        )
        bounds = joint.harm + joint.costs @ self._prices + float(self._outside[number][at])
        return self._thinned(joint.taken(np.flatnonzero(bounds < self._known)), float(self._outside[number][at]))

    def _crossed(self, left: Pairs, right: Pairs, others: float) -> Pairs:
        """Every pair of one list with every pair of another that may do, given a bound on all that is in neither."""
        bounds = np.add.outer(left.harm + left.costs @ self._prices + others, right.harm + right.costs @ self._prices)
        i, j = np.nonzero(bounds < self._known)
        joint = Pairs(
            left.harm[i] + right.harm[j],
            left.costs[i] + right.costs[j],
            left.level[i],
            np.concatenate([left.origin[i], j[:, None]], axis=1),
        )
        return self._thinned(joint, others)

    def _thinned(self, pairs: Pairs, others: float) -> Pairs:
        """The pairs that no other one beats, at most so many of them, given a bound on everything else."""
        bounds = pairs.harm + pairs.costs @ self._prices + others
        most = _PAIRS if pairs.costs.shape[1] == 1 else 4 * self._most
        if len(bounds) > most:
            pairs, bounds = self._nearest(pairs, bounds, most)
        chosen = _undominated(pairs.harm, pairs.costs)
        pairs, bounds = pairs.taken(chosen), bounds[chosen]
        return pairs if len(bounds) <= self._most else self._nearest(pairs, bounds, self._most)[0]

    def _nearest(self, pairs: Pairs, bounds: Counts, most: int) -> tuple[Pairs, Counts]:
        """The pairs of least bound; what the others might have come to is noted."""
        order = np.argsort(bounds, kind="stable")
        self.dropped = min(self.dropped, float(bounds[order[most]]))
        chosen = np.sort(order[:most])
        return pairs.taken(chosen), bounds[chosen]


def _nothing(limits: int) -> Pairs:
    return Pairs(np.zeros(1), np.zeros((1, limits)), np.zeros(1, dtype=np.int64), np.zeros((1, 0), dtype=np.int64))


def _undominated(harm: Counts, costs: Counts) -> NDArray[np.int64]:
    """Numbers of the pairs that no other pair equals or beats in harm and in every cost."""
    order = np.lexsort((harm, *costs.T[::-1]))
    if costs.shape[1] == 1:
        least = np.minimum.accumulate(harm[order])
        return order[np.concatenate([[True], harm[order][1:] < least[:-1]])] if len(order) else order
    values = np.column_stack([costs, harm])[order]
    kept = np.zeros(0, dtype=np.int64)
    for first in range(0, len(order), _BLOCK):  # whatever beats a pair stands before it
        block = np.arange(first, min(first + _BLOCK, len(order)))
        block = block[~_beaten(values[block], values[kept])]
        before = np.tri(len(block), k=-1, dtype=bool)
        kept = np.concatenate([kept, block[~(_no_worse(values[block], values[block]) & before).any(axis=1)]])
    return order[kept]


def _no_worse(values: Counts, others: Counts) -> NDArray[np.bool_]:
    """Whether another pair is nowhere above a pair, shape [pairs, others]."""
    return np.asarray((others[None] <= values[:, None]).all(axis=2))


def _beaten(values: Counts, others: Counts) -> NDArray[np.bool_]:
    return np.asarray(_no_worse(values, others).any(axis=1))
