"""The allocator "refined": what scores or curves say, corrected by the losses of a few networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metaprune.graphs.errors import OptionError
from metaprune.search.blends import blends
from metaprune.search.cost_aware import cost_aware
from metaprune.search.layer_adaptive import curves_of, relaxed
from metaprune.search.problem import Counts, Kept, Problem, allocator, finite, least_kept
from metaprune.search.refinement import refine

_WAY = (0.0, 1 / 3, 2 / 3)  # from equal widths to the solver's answer
_LEAST = 1e-6  # of the loss of cutting everything: what is added to a predicted loss


@allocator
def refined(problem: Problem) -> Kept:
    """The allocation of least measured loss among those to which a few measurements lead.

    It begins with the answer of the solver for summed curves, that of importance removed per cost where there are
    scores, equal widths, and what lies between; the loss that is corrected is the sum of the curves.

    Raises:
        OptionError: Losses can not be measured, for want of data.
    """
    measured = problem.measure
    if measured is None:
        raise OptionError("data: allocator 'refined' needs calibration data")
    problem = replace(problem, minimum=least_kept(problem))
    curves = curves_of(problem)
    whole = max(sum(float(curve[np.isfinite(curve)].max()) for curve in curves), np.finfo(np.float64).tiny)

    def predicted(kept: Kept) -> Counts:
        total: Counts = np.stack([curve[own] for curve, own in zip(curves, kept.T, strict=True)]).sum(0)
        return total / whole + _LEAST

    solved = relaxed(problem) if problem.curves is not None else cost_aware(problem)
    starts = {tuple(kept.tolist()) for kept in (solved, *blends(problem, solved, _WAY))}
    ahead = np.array(sorted(starts), dtype=np.int64)
    known = dict(zip(map(tuple, ahead.tolist()), measured(ahead).tolist(), strict=True))
    every = known | refine(problem, predicted, measured, known)
    best = min(every, key=lambda kept: every[kept])
    of_solver = known[tuple(solved.tolist())]
    problem.record.update(measured=len(every), loss=finite(every[best]), loss_of_solver=finite(of_solver))
    return np.array(best, dtype=np.int64)
