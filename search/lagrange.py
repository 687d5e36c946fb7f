"""Lagrangian relaxation: limits become prices, and the best prices are found by column generation.

At fixed prices the least harm plus priced cost is a problem without limits (Everett, Generalized Lagrange Multiplier
Method, Operations Research 11, 1963). The prices that prove most come from a linear program over the choices seen so
far (Dantzig and Wolfe, Operations Research 8, 1960), for one limit or several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from metaprune.search.descent import Descent
from metaprune.search.elimination import Elimination, order_of
from metaprune.search.instance import TOLERANCE, Choice, Instance, Solution, check_attainable
from metaprune.search.problem import Counts

_ROUNDS = 200
_GRID = 48
_DECADES = 8
_CLOSE = 1e-9


Oracle = Elimination | Descent
"""Finds choices of least harm plus priced cost, for several rows of prices at once."""


@dataclass(frozen=True)
class Relaxed:
    """The relaxation's optimum.

    Attributes:
        prices: Of the limits, shape [limits].
        bound: Least harm that is possible within the limits; minus infinity where the oracle is not exact.
        columns: All choices that were seen, shape [columns, variables]; one at least is within the limits.
    """

    prices: Counts
    bound: float
    columns: Choice


def lagrange(instance: Instance, known: Choice | None = None) -> Solution:
    """The best choice within the limits that the relaxation comes upon, each variable then raised where it fits.

    Args:
        instance: The instance.
        known: A choice within the limits, shape [variables], that the answer shall be no worse than.

    Raises:
        BudgetInfeasible: No choice is within the limits.
    """
    found = relaxed(instance, *oracle_of(instance))
    columns = found.columns if known is None else np.concatenate([known[None], found.columns])
    return best_of(instance, columns, found.bound, "Lagrangian relaxation")


def best_of(instance: Instance, choices: Choice, bound: float, notes: str) -> Solution:
    """The least harm among choices of shape [choices, variables] that are within the limits, once they are raised."""
    descent = Descent(instance)
    inside = choices[instance.fits(choices)]
    nearest = inside[np.argsort(instance.harms(inside), kind="stable")[:3]]
    found = [raised(instance, choice, descent) for choice in nearest]
    harms = instance.harms(np.stack(found))
    best = int(np.argmin(harms))
    return Solution(found[best], float(harms[best]), min(bound, float(harms[best])), notes)


def raised(instance: Instance, choice: Choice, descent: Descent) -> Choice:
    """A choice with single levels changed, the one that spares most harm first, while that fits."""
    choice = choice.copy()
    while True:
        kept = instance.kept(choice[None])
        here = instance.costs(choice[None])[0]
        best: tuple[float, int, int] | None = None
        for variable, harm in enumerate(instance.harm):
            cost = descent.marginal(variable, kept)[0]
            fits = (here[:, None] + cost - cost[:, [choice[variable]]] <= 1 + TOLERANCE).all(axis=0)
            spared = np.where(fits, harm[choice[variable]] - harm, -np.inf)
            level = int(spared.argmax())
            if spared[level] > 0 and (best is None or spared[level] > best[0]):
                best = float(spared[level]), variable, level
        if best is None:
            return choice
        choice[best[1]] = best[2]


def oracle_of(instance: Instance) -> tuple[Oracle, bool]:
    """What solves the instance at fixed prices, and whether it does so exactly."""
    order = order_of(instance)
    return (Descent(instance), False) if order is None else (Elimination(instance, order), True)


def relaxed(instance: Instance, oracle: Oracle, exact: bool) -> Relaxed:
    """Column generation until no choice can improve the relaxation.

    Raises:
        BudgetInfeasible: No choice is within the limits.
    """
    check_attainable(instance)
    limits = len(instance.limits)
    ends = np.stack([np.zeros(len(instance.levels), dtype=np.int64), [len(lv) - 1 for lv in instance.levels]])
    free, _ = oracle.lowest(np.zeros((1, limits)))
    columns = np.unique(np.concatenate([ends, free]), axis=0)
    bound, prices = -np.inf, np.zeros(limits)
    for _ in range(_ROUNDS):
        harms, costs = instance.harms(columns), instance.costs(columns)
        scale = float(np.ptp(harms)) or 1.0
        master = linprog(
            harms / scale, costs.T, np.ones(limits), np.ones((1, len(columns))), [1.0], bounds=(0, None), method="highs"
        )
        if master.x is None:
            break
        asked = np.maximum(-master.ineqlin.marginals, 0.0) * scale
        found, values = oracle.lowest(asked[None])
        if exact and float(values[0]) > bound:
            bound, prices = float(values[0]), asked
        elif not exact:
            prices = asked
        known = bool((columns == found[0]).all(axis=1).any())
        if known or float(values[0]) >= master.fun * scale - _CLOSE * scale:
            break
        columns = np.concatenate([columns, found])
    return Relaxed(prices, bound, columns)


def hull(instance: Instance) -> Choice:
    """Choices on the lower convex hull of harm against the cost of the only limit, from cheapest to dearest.

    All prices of a grid are solved at once, then those at which neighbours tie, until no new choice appears: the whole
    hull where the relaxation is exact. The bound of the limit plays no part.

    Returns:
        Shape [choices, variables].
    """
    oracle, _ = oracle_of(instance)
    lowest = np.zeros(len(instance.levels), dtype=np.int64)
    scale = max(float(instance.harms(lowest[None])[0]), 1e-30)
    prices = scale * np.logspace(-_DECADES, _DECADES / 2, _GRID)[:, None]
    found = np.concatenate([lowest[None], oracle.lowest(prices)[0], oracle.lowest(np.zeros((1, 1)))[0]])
    while True:
        found = _corners(instance, found)
        if len(found) == 1:
            return found
        cost, harm = instance.costs(found)[:, 0], instance.harms(found)
        slopes = (harm[:-1] - harm[1:]) / np.maximum(cost[1:] - cost[:-1], 1e-300)
        more = oracle.lowest(slopes[:, None])[0]
        larger = _corners(instance, np.concatenate([found, more]))
        if len(larger) == len(found):
            return larger
        found = larger


def _corners(instance: Instance, choices: Choice) -> Choice:
    """Those choices that are corners of the lower left convex hull, by cost."""
    choices = np.unique(choices, axis=0)
    cost, harm = instance.costs(choices)[:, 0], instance.harms(choices)
    order = np.lexsort((harm, cost))
    stack: list[int] = []
    for i in order.tolist():
        if stack and harm[i] >= harm[stack[-1]] * (1 - _CLOSE):
            continue
        while len(stack) > 1 and _above(cost, harm, stack[-2], stack[-1], i):
            stack.pop()
        stack.append(i)
    return choices[stack]


def _above(cost: Counts, harm: Counts, left: int, middle: int, right: int) -> bool:
    """Whether the middle point is not below the line between the others."""
    across = (harm[middle] - harm[left]) * (cost[right] - cost[left])
    along = (harm[right] - harm[left]) * (cost[middle] - cost[left])
    return bool(across >= along - _CLOSE * abs(along))
