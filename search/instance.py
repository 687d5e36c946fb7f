"""A separable allocation problem: one level per variable, harms that add up, costs that are polynomials.

This is what the solvers `dp`, `milp` and `lagrange` solve. A variable is a group, its levels are kept counts; harm is a
number per level; each limit bounds a polynomial of any degree in the kept counts, never a sum of savings per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError
from metaprune.graphs.polynomial import Monomials
from metaprune.search.budget import ROUNDING, infeasible
from metaprune.search.problem import Counts, Kept, Problem

Choice = NDArray[np.int64]
TOLERANCE = 1e-9  # of a bound; polynomials are evaluated in float64


@dataclass(frozen=True)
class Limit:
    """A cost and its bound.

    Attributes:
        name: Of the cost, such as `macs`.
        terms: Coefficient of each monomial; a monomial is the ascending tuple of its variables, with repetitions.
        bound: The most it may come to.
    """

    name: str
    terms: Monomials
    bound: float

    @cached_property
    def _by_degree(self) -> list[tuple[NDArray[np.int64], Counts]]:
        degrees: dict[int, list[tuple[int, ...]]] = {}
        for key in self.terms:
            degrees.setdefault(len(key), []).append(key)
        return [
            (np.array(keys, dtype=np.int64).reshape(len(keys), degree), np.array([self.terms[key] for key in keys]))
            for degree, keys in degrees.items()
        ]

    def at(self, kept: Counts) -> Counts:
        """Cost over its bound for kept counts of shape [plans, variables]; shape [plans]."""
        total = np.zeros(len(kept))
        for keys, coefficients in self._by_degree:
            total += kept[:, keys].prod(axis=2) @ coefficients
        return total / self.bound


@dataclass(frozen=True, eq=False)
class Instance:
    """A separable allocation problem.

    Attributes:
        levels: For each variable its kept counts, ascending, shape [levels].
        harm: For each variable the harm of each level, shape [levels], finite.
        limits: At least one.
    """

    levels: Sequence[Kept]
    harm: Sequence[Counts]
    limits: Sequence[Limit]

    def __post_init__(self) -> None:
        if not self.limits:
            raise OptionError("limits: one is needed at least")
        for number, (levels, harm) in enumerate(zip(self.levels, self.harm, strict=True)):
            if not len(levels) or levels.shape != harm.shape:
                raise OptionError(f"harm: variable {number} has {len(levels)} levels and harms {harm.shape}")
            if not bool(np.isfinite(harm).all()):
                raise OptionError(f"harm: variable {number} has a harm that is not finite")

    def kept(self, choices: Choice) -> Counts:
        """Kept counts, shape [plans, variables], of chosen levels of the same shape."""
        return np.stack([lv[choices[:, v]] for v, lv in enumerate(self.levels)], axis=1).astype(float)

    def harms(self, choices: Choice) -> Counts:
        """Total harm of chosen levels, shape [plans, variables]; shape [plans]."""
        total = np.zeros(len(choices))
        for variable, harm in enumerate(self.harm):
            total += harm[choices[:, variable]]
        return total

    def costs(self, choices: Choice) -> Counts:
        """Each limit's cost over its bound, shape [plans, limits]; at most 1 is within."""
        kept = self.kept(choices)
        return np.stack([limit.at(kept) for limit in self.limits], axis=1)

    def fits(self, choices: Choice) -> NDArray[np.bool_]:
        """Whether all limits are kept, shape [plans]."""
        return np.asarray((self.costs(choices) <= 1 + TOLERANCE).all(axis=1))

    def restricted(self, allowed: Sequence[NDArray[np.bool_]]) -> Instance:
        """The same problem with some levels only, for each variable a mask of shape [levels]."""
        levels = [lv[mask] for lv, mask in zip(self.levels, allowed, strict=True)]
        return Instance(levels, [h[mask] for h, mask in zip(self.harm, allowed, strict=True)], self.limits)


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        choice: Level of each variable, shape [variables].
        harm: Its total harm.
        bound: No choice within the limits does less harm than this; minus infinity where nothing is proven.
        notes: How it was found.
    """

    choice: Choice
    harm: float
    bound: float
    notes: str = ""

    @property
    def gap(self) -> float:
        """How far the harm may be above the least possible, as a share of it; 0 is proven optimal."""
        if self.harm - self.bound <= TOLERANCE * max(1.0, abs(self.harm)):
            return 0.0
        return (self.harm - self.bound) / max(abs(self.harm), 1e-30)


def check_attainable(instance: Instance) -> None:
    """Raises `BudgetInfeasible` when the lowest levels exceed a limit; costs grow with every kept count."""
    lowest = np.zeros((1, len(instance.levels)), dtype=np.int64)
    highest = np.array([[len(lv) - 1 for lv in instance.levels]])
    ratios = instance.costs(lowest)[0]
    if (ratios > 1 + TOLERANCE).any():
        worst = int(np.argmax(ratios))
        full = float(instance.costs(highest)[0, worst])
        raise infeasible(instance.limits[worst].name, 1 / full, float(ratios[worst]) / full)


def brute_force(instance: Instance) -> Solution:
    """The least harm by trying everything; for few small variables.

    Raises:
        BudgetInfeasible: No choice is within the limits.
    """
    check_attainable(instance)
    choices = np.array(list(product(*(range(len(levels)) for levels in instance.levels))), dtype=np.int64)
    harms = np.where(instance.fits(choices), instance.harms(choices), np.inf)
    best = int(np.argmin(harms))
    return Solution(choices[best], float(harms[best]), float(harms[best]), "brute force")


def from_problem(problem: Problem, curves: Sequence[Counts], levels: Sequence[Kept]) -> Instance:
    """The separable form of an allocation problem.

    Args:
        problem: The problem; its budget names costs.
        curves: For each free group the harm of keeping k units, shape [size + 1].
        levels: For each free group the kept counts to choose from, ascending.
    """
    costs = problem.costs
    place = {group: variable for variable, group in enumerate(problem.free)}
    limits = []
    for name, fraction in problem.budget.limits:
        full = float(costs.evaluate(name, costs.sizes[None])[0])
        bound = full * fraction * (1 + ROUNDING) / (1 + TOLERANCE)  # the tolerance is the solvers', not the budget's
        limits.append(Limit(name, costs.monomials(name, place), max(bound, 1e-30)))
    harm = [curve[lv] for curve, lv in zip(curves, levels, strict=True)]
    return Instance(list(levels), harm, limits)
