"""SPDY: the exact solver's answer, corrected by how much each group's curve should count, as the measured loss tells.

Summed harms of single groups are not the loss of a network in which all of them shrink. Frantar and Alistarh (SPDY,
ICML 2022, arXiv 2201.13096, section 3.2) give every layer's curve a coefficient, let a solver find the best allocation
for the coefficients, so that each candidate meets the budget, and search over them with the measured loss. Here
the loss of an allocation's neighbours says where the coefficients should go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError
from metaprune.search.coefficients import corrected, evolved, neighbours
from metaprune.search.instance import Instance, from_problem
from metaprune.search.lagrange import lagrange
from metaprune.search.layer_adaptive import curves_of, finite_only, ladder
from metaprune.search.problem import Counts, Kept, Problem, allocator, filled, finite, least_kept, proportional

EVALUATIONS = 128
_ROUNDS = 3  # of corrections
_SHARE = 0.7  # of the evaluations goes into them, at most
_SPREAD = 0.4  # of the logarithms of kept fractions, to begin with


@allocator
def spdy(problem: Problem) -> Kept:
    """The allocation of least measured loss among those that some coefficients of the curves lead to, and near it.

    All coefficients alike are tried first, and equal widths as well, so the answer is measured to be no worse than
    either. Then the coefficients follow the slopes of the loss at the allocations that they lead to (see
    `coefficients.corrected`). As the solver leads to few different allocations of a small network, the rest of the
    evaluations goes into CMA-ES on the kept fractions themselves, around the best allocation that was found.

    Raises:
        OptionError: Losses can not be measured, for want of data.
    """
    if problem.measure is None:
        raise OptionError("data: allocator 'spdy' needs calibration data")
    problem = replace(problem, minimum=least_kept(problem))  # no start, and nothing around one, is below the floor
    search = _Search(problem)
    groups = len(problem.free)
    starts = search.tried([search.allocated(np.zeros(groups)), proportional(problem, np.ones(groups))])
    fractions = search.improved() / problem.sizes

    def losses(points: Counts) -> Counts:
        return search.tried([proportional(problem, fractions * np.exp(point)) for point in points])

    evolved(losses, groups, problem.seed, EVALUATIONS - search.count, _SPREAD)
    best = search.best()
    loss, of_solver, of_uniform = map(finite, [*search.tried([best]).tolist(), *starts.tolist()])
    problem.record.update(measured=search.count, loss=loss, loss_of_solver=of_solver, loss_of_uniform=of_uniform)
    return best


class _Search:
    """Allocations that were measured, and those that coefficients lead to.

    Attributes:
        count: Number of networks that were measured.
    """

    def __init__(self, problem: Problem) -> None:
        self.count = 0
        self._problem = problem
        self._curves = curves_of(problem)
        self._levels = finite_only(ladder(problem.minimum, problem.sizes, problem.step), self._curves)
        self._instance = from_problem(problem, self._curves, self._levels)
        self._losses: dict[tuple[int, ...], float] = {}

    def allocated(self, logarithms: Counts) -> Kept:
        """The allocation for coefficients exp(logarithms), shape [free], filled up to the budget."""
        factors = np.exp(logarithms)
        harm = [h * factor for h, factor in zip(self._instance.harm, factors.tolist(), strict=True)]
        found = lagrange(Instance(self._levels, harm, self._instance.limits))
        kept = np.array([lv[i] for lv, i in zip(self._levels, found.choice, strict=True)], dtype=np.int64)
        curves = zip(self._curves, factors.tolist(), kept.tolist(), strict=True)
        last = np.array([factor * (c[k] - c[min(k + 1, len(c) - 1)]) for c, factor, k in curves])
        return filled(self._problem, kept, order=np.argsort(-last, kind="stable"))

    def improved(self) -> Kept:
        """The best allocation after a few corrections of the coefficients, shape [free]."""
        logarithms = np.zeros(len(self._levels))
        for number in range(_ROUNDS):
            kept = self.allocated(logarithms)
            loss = float(self.tried([kept])[0])
            others = neighbours(kept, self._levels, self._curves)
            room = int(_SHARE * EVALUATIONS) - self.count
            if not np.isfinite(loss) or (number and room < len(others)):
                break
            others = others[:room]
            logarithms = corrected(logarithms, self._curves, kept, loss, others, self._measured(others))
            self.tried([self.allocated(logarithms)])
        return self.best()

    def tried(self, allocations: Sequence[Kept]) -> NDArray[np.float64]:
        """The measured loss of each allocation; none is measured twice."""
        keys = [tuple(kept.tolist()) for kept in allocations]
        new = [key for key in dict.fromkeys(keys) if key not in self._losses]
        if new:
            losses = self._measured(np.array(new, dtype=np.int64))
            self._losses.update(zip(new, losses.tolist(), strict=True))
        return np.array([self._losses[key] for key in keys])

    def _measured(self, allocations: Kept) -> Counts:
        assert self._problem.measure is not None
        self.count += len(allocations)
        return self._problem.measure(allocations)

    def best(self) -> Kept:
        """The allocation of least loss."""
        return np.array(min(self._losses, key=lambda key: (self._losses[key], key)), dtype=np.int64)
