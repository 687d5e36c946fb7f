"""Allocation by importance removed per cost removed, for scores that are comparable between groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metaprune.search.problem import Counts, Kept, Problem, allocator, filled, least_kept, lost

_LEVELS = 64  # steps into which the largest groups are divided
_SWAPS = 200
_NEAR = 0.98  # of the budget: as much is promised where another step fits


@allocator
def cost_aware(problem: Problem) -> Kept:
    """Takes units from the group where they cost least importance per cost saved, until the budget is met; then swaps.

    The scores must be additive estimates of a loss, such as `fisher`. What a unit saves depends on the sizes of the
    groups it meets, so savings are taken afresh from the cost polynomial after each step. In the end single steps are
    exchanged between groups as long as the removed importance falls within the budget.
    """
    least = least_kept(problem)
    curves = [lost(scores) for scores in problem.scores]
    kept = _removed(problem, least, curves)
    kept = filled(problem, kept, order=np.argsort(-_last(curves, kept), kind="stable"))
    kept = _swapped(problem, kept, least, curves)
    short = problem.excess(kept) < _NEAR  # as steps are coarse, swaps can save more than they spend
    return filled(problem, kept, order=np.argsort(-_last(curves, kept), kind="stable")) if short else kept


def _at(curves: list[Counts], kept: Kept) -> Counts:
    return np.array([curve[k] for curve, k in zip(curves, kept.tolist(), strict=True)])


def _last(curves: list[Counts], kept: Kept) -> Counts:
    """Importance of the best unit that is gone, by group."""
    return np.array([c[k] - c[min(k + 1, len(c) - 1)] for c, k in zip(curves, kept.tolist(), strict=True)])


def _removed(problem: Problem, least: Kept, curves: list[Counts]) -> Kept:
    kept = problem.sizes.copy()
    stride = np.maximum(problem.step, problem.step * np.maximum(1, problem.sizes // _LEVELS // problem.step))
    here = problem.excess(kept)
    while here > 1:
        smaller = np.maximum(least, _down(kept - stride, problem.step))
        movable = np.flatnonzero(smaller < kept)
        if not len(movable):
            break
        plans = np.tile(kept, (len(movable), 1))
        plans[np.arange(len(movable)), movable] = smaller[movable]
        saved = here - problem.budget.excess(problem.costs, problem.full(plans))
        harm = _at(curves, smaller)[movable] - _at(curves, kept)[movable]
        best = int(np.argmin(np.where(saved > 0, (harm + 1e-30) / np.maximum(saved, 1e-30), np.inf)))
        if saved[best] <= 0:  # nothing saves by itself: take what curves least
            best = int(np.argmin(harm))
        kept[movable[best]] = smaller[movable[best]]
        here = problem.excess(kept)
    return kept


def _down(counts: Kept, step: NDArray[np.int64]) -> Kept:
    whole: Kept = np.maximum(counts, 0) // step * step
    return whole


def _swapped(problem: Problem, kept: Kept, least: Kept, curves: list[Counts]) -> Kept:
    """Gives one step to a group and takes steps from another while that lowers the importance lost."""
    for _ in range(_SWAPS):
        larger = np.minimum(kept + problem.step, problem.sizes)
        gain = _at(curves, kept) - _at(curves, larger)
        best: tuple[float, Kept] | None = None
        for receiver in np.argsort(-gain, kind="stable")[:8].tolist():
            if gain[receiver] <= 0:
                break
            plans, harms = [], []
            for giver in range(len(kept)):
                for steps in (1, 2, 4):
                    count = kept[giver] - steps * problem.step[giver]
                    if giver == receiver or count < least[giver] or kept[giver] % problem.step[giver]:
                        break
                    harm = curves[giver][count] - curves[giver][kept[giver]]
                    if harm < gain[receiver]:
                        plan = kept.copy()
                        plan[receiver], plan[giver] = larger[receiver], count
                        plans.append(plan)
                        harms.append(harm)
            if not plans:
                continue
            fits = problem.budget.excess(problem.costs, problem.full(np.stack(plans))) <= 1
            for plan, harm, fit in zip(plans, harms, fits, strict=True):
                if fit and (best is None or gain[receiver] - harm > best[0]):
                    best = (float(gain[receiver] - harm), plan)
        if best is None or best[0] <= 1e-12 * max(1.0, float(_at(curves, least).sum())):
            break
        kept = best[1]
    return kept
