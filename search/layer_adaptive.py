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
from metaprune.search.problem import Counts, Kept, Problem, allocator, filled, least_kept, lost

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
    """The allocation of a solver on a ladder of kept counts, and again on finer ladders around what it found.

    The problem's record gets the harm, the bound that no allocation on the first ladder can do better than, and the
    gap between the two.
    """
    curves = curves_of(problem)
    least = least_kept(problem)
    levels = _finite_only(ladder(least, problem.sizes, problem.step), curves)
    first = solver(from_problem(problem, curves, levels))
    problem.record.update(
        harm=first.harm, bound=first.bound if np.isfinite(first.bound) else None, gap=_finite(first.gap), by=first.notes
    )
    kept = _at(levels, first)
    while any(len(lv) > 1 and int(np.diff(lv).max()) > s for lv, s in zip(levels, problem.step, strict=True)):
        lower = [lv[max(0, i - 1)] for lv, i in zip(levels, first.choice, strict=True)]
        upper = [lv[min(len(lv) - 1, i + 1)] for lv, i in zip(levels, first.choice, strict=True)]
        levels = _finite_only(ladder(np.array(lower), np.array(upper), problem.step, with_=kept), curves)
        first = solver(from_problem(problem, curves, levels))
        kept = _at(levels, first)
    last = np.array([c[k] - c[min(k + 1, len(c) - 1)] for c, k in zip(curves, kept.tolist(), strict=True)])
    return filled(problem, kept, order=np.argsort(-last, kind="stable"))


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


def _finite_only(levels: Sequence[Kept], curves: Sequence[Counts]) -> list[Kept]:
    """Kept counts at which the network gives numbers."""
    return [lv[np.isfinite(curve[lv])] for lv, curve in zip(levels, curves, strict=True)]


def _at(levels: Sequence[Kept], solution: Solution) -> Kept:
    return np.array([lv[i] for lv, i in zip(levels, solution.choice, strict=True)], dtype=np.int64)


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None
