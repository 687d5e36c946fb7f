"""SPDY: the exact solver's answer, corrected by a search for how much each group's curve should count.

Summed harms of single groups are not the loss of a network in which all of them shrink. Frantar and Alistarh (SPDY,
ICML 2022, arXiv 2201.13096, section 3.2) give every layer's curve a coefficient, let a solver find the best allocation
for the coefficients, so that each candidate meets the budget, and search over them with the measured loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.soo.nonconvex.cmaes import CMAES
from pymoo.core.problem import Problem as Box

from metaprune.graphs.errors import OptionError
from metaprune.search.instance import Instance, from_problem
from metaprune.search.lagrange import lagrange
from metaprune.search.layer_adaptive import curves_of, ladder
from metaprune.search.problem import Counts, Kept, Problem, allocator, filled, least_kept, proportional

EVALUATIONS = 64
_POPULATION = 8
_RANGE = 3.0  # of the coefficients' logarithms
_SIGMA = 0.15  # of the range, to begin with


@allocator
def spdy(problem: Problem) -> Kept:
    """The allocation of least measured loss among those that some coefficients of the curves lead to.

    All coefficients alike are tried first, and equal widths as well, so the answer is measured to be no worse than
    either. The coefficients' logarithms are searched by CMA-ES from there.

    Raises:
        OptionError: Losses can not be measured, for want of data.
    """
    if problem.measure is None:
        raise OptionError("data: allocator 'spdy' needs calibration data")
    search = _Search(problem)
    groups = len(problem.free)
    search.tried([search.allocated(np.zeros(groups)), proportional(problem, np.ones(groups))])
    draw = np.random.default_rng(problem.seed)
    engine = CMAES(
        x0=np.zeros(groups), sigma=_SIGMA, popsize=_POPULATION, randn=lambda *shape: draw.standard_normal(shape)
    )
    box = Box(n_var=groups, n_obj=1, xl=-_RANGE * np.ones(groups), xu=_RANGE * np.ones(groups))
    engine.setup(box, seed=problem.seed, verbose=False, termination=("n_eval", EVALUATIONS))
    engine.options["seed"] = np.nan  # it would go to numpy's global generator, with 0 for the time
    while engine.has_next():
        asked = engine.ask()
        losses = search.tried([search.allocated(x) for x in asked.get("X")])
        asked.set("F", losses[:, None])
        engine.tell(infills=asked)
    return search.best()


class _Search:
    """Allocations that were measured, and those that coefficients lead to."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._curves = curves_of(problem)
        self._levels = ladder(least_kept(problem), problem.sizes, problem.step)
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

    def tried(self, allocations: Sequence[Kept]) -> NDArray[np.float64]:
        """The measured loss of each allocation; none is measured twice."""
        assert self._problem.measure is not None
        keys = [tuple(kept.tolist()) for kept in allocations]
        new = [key for key in dict.fromkeys(keys) if key not in self._losses]
        if new:
            losses = self._problem.measure(np.array(new, dtype=np.int64))
            self._losses.update(zip(new, losses.tolist(), strict=True))
        return np.array([self._losses[key] for key in keys])

    def best(self) -> Kept:
        """The allocation of least loss; the problem's record gets what led to it."""
        best = min(self._losses, key=lambda key: (self._losses[key], key))
        first, second = list(self._losses.values())[:2]
        self._problem.record.update(measured=len(self._losses), loss=self._losses[best], loss_of_solver=first)
        self._problem.record.update(loss_of_uniform=second)
        return np.array(best, dtype=np.int64)
