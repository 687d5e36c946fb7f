"""Layer-adaptive allocation: the kept counts of least summed harm within the budget, by one of the exact solvers.

Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks (ICCV 2023, arXiv
2308.10438), for groups of units: each group has a curve of harm over kept counts, and costs are polynomials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from metaprune.search.dynamic import dynamic
from metaprune.search.instance import Instance, Solution, from_problem
from metaprune.search.lagrange import lagrange
from metaprune.search.milp import integer_program
from metaprune.search.problem import Counts, Kept, Problem, allocator, filled, finite, least_kept, lost

Solver = Callable[[Instance], Solution]
LEVELS = 16


@allocator
def dp(problem: Problem) -> Kept:
    """By the dynamic program, proven optimal on a ladder of kept counts where few groups meet each other."""
    return solved(problem, dynamic)


@allocator
def milp(problem: Problem) -> Kept:
    """By mixed-integer programming: several limits at once, and dense topologies, with a proven gap."""
    return solved(problem, integer_program)


@allocator
def relaxed(problem: Problem) -> Kept:
    """By Lagrangian relaxation: in milliseconds, near the optimum, with a proven gap where few groups meet."""
    return solved(problem, lagrange)


def solved(problem: Problem, solver: Solver) -> Kept:
    """A solver's allocation on a ladder of kept counts, then the relaxation's on finer ladders around it.

    The problem's record gets the harm on the first ladder, the bound that no allocation on it can do better than, and
    the gap between the two; and what harm is left in the end.
    """
    curves = curves_of(problem)
    levels = finite_only(ladder(least_kept(problem), problem.sizes, problem.step), curves)
    found = solver(from_problem(problem, curves, levels))
    problem.record.update(harm=found.harm, bound=finite(found.bound), gap=finite(found.gap), by=found.notes)
    kept = _at(levels, found)
    while any(len(lv) > 1 and int(np.diff(lv).max()) > s for lv, s in zip(levels, problem.step, strict=True)):
        lower = [lv[max(0, i - 1)] for lv, i in zip(levels, found.choice, strict=True)]
        upper = [lv[min(len(lv) - 1, i + 1)] for lv, i in zip(levels, found.choice, strict=True)]
        levels = finite_only(ladder(np.array(lower), np.array(upper), problem.step, with_=kept), curves)
        finer = from_problem(problem, curves, levels)
        before = np.array([np.flatnonzero(lv == k)[0] for lv, k in zip(levels, kept.tolist(), strict=True)])
        found = lagrange(finer, before)
        kept = _at(levels, found)
    kept = filled(problem, kept, order=np.argsort(-_steepness(curves, kept), kind="stable"))
    problem.record["reached"] = float(sum(curve[k] for curve, k in zip(curves, kept.tolist(), strict=True)))
    return kept


def curves_of(problem: Problem) -> Sequence[Counts]:
    """Harm by kept count of each free group, shape [size + 1]: as measured, or the scores of the units that go."""
    if problem.curves is not None:
        return problem.curves
    return [lost(scores) for scores in problem.scores]


def ladder(least: Kept, most: Kept, step: Kept, with_: Kept | None = None) -> list[Kept]:
    """For each group at most `LEVELS` legal kept counts from the least to the most, and those that are given.

    Args:
        least: Shape [groups].
        most: Shape [groups].
        step: Counts between the ends are multiples of this, shape [groups].
        with_: Further counts, one for each group.
    """
    found = []
    for group, (low, high, unit) in enumerate(zip(least.tolist(), most.tolist(), step.tolist(), strict=True)):
        inner = np.round(np.linspace(low, high, LEVELS) / unit).astype(np.int64) * unit
        inside = inner[(inner > low) & (inner < high)].tolist()
        given = [] if with_ is None else [int(with_[group])]
        found.append(np.array(sorted({low, high, *inside, *given}), dtype=np.int64))
    return found


def finite_only(levels: Sequence[Kept], curves: Sequence[Counts]) -> list[Kept]:
    """Kept counts at which the network gives numbers."""
    return [lv[np.isfinite(curve[lv])] for lv, curve in zip(levels, curves, strict=True)]


def _steepness(curves: Sequence[Counts], kept: Kept) -> Counts:
    """What one more unit would spare each group, shape [groups]."""
    return np.array([c[k] - c[min(k + 1, len(c) - 1)] for c, k in zip(curves, kept.tolist(), strict=True)])


def _at(levels: Sequence[Kept], solution: Solution) -> Kept:
    return np.array([lv[i] for lv, i in zip(levels, solution.choice, strict=True)], dtype=np.int64)
