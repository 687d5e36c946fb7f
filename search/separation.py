"""The separable form of a search space: what every variable does alone, as far as evaluations of it tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError
from metaprune.graphs.polynomial import Monomials
from metaprune.monotone import along, non_increasing
from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.instance import Choice, Instance, Limit
from metaprune.search.problem import Counts, Kept
from metaprune.search.space import Configs, SearchSpace

_BACKGROUNDS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the levels of the highest, where it leaves a variable no room to rise
_LEAST = 0.01  # of the mean curve: what a level does at least where the evaluations show no harm
_LEVELS = 4  # of a variable that are looked at; further ones tell less than other evaluations do
_WORST = 10.0  # times the harm of all variables together: what a network does that does not run


@dataclass(frozen=True, eq=False)
class Separable:
    """Harms that add up over the variables of a search space, and its costs.

    Attributes:
        space: The space.
        budget: What its configurations are to be within.
        levels: For each variable the kept counts at its levels, shape [levels], as far as they can be within the
            budget and were looked at; level 0 is the first.
        curves: For each variable the harm by kept count, shape [last of `levels` + 1], 0 at the last.
        place: Number of each variable by the group that it decides on.
    """

    space: SearchSpace
    budget: Budget | None
    levels: Sequence[Kept]
    curves: Sequence[Counts]
    place: Mapping[int, int]

    def limit(self, weights: Mapping[str, float], bound: float = 1.0) -> Limit:
        """A weighted sum of kept fractions of costs, which may come to `bound`."""
        terms: Monomials = {}
        sizes = np.asarray(self.space.costs.sizes, dtype=float)[None]
        for cost, weight in weights.items():
            if weight:
                full = max(float(self.space.costs.evaluate(cost, sizes)[0]), 1e-30)
                for key, value in self.space.costs.monomials(cost, self.place).items():
                    terms[key] = terms.get(key, 0.0) + weight * value / full
        return Limit("+".join(weights), terms, bound)

    def instance(self, limits: Sequence[Limit], logarithms: Counts | None = None) -> Instance:
        """The allocation problem within limits, with coefficients exp(logarithms), shape [variables], of the curves."""
        factors = np.ones(len(self.levels)) if logarithms is None else np.exp(logarithms)
        harm = [curve[lv] * factor for curve, lv, factor in zip(self.curves, self.levels, factors, strict=True)]
        return Instance(self.levels, harm, limits)

    def within(self, choices: Choice) -> Configs:
        """Those of some configurations that are within the budget."""
        return choices[self.space.excess(choices, self.budget) <= 1]

    def kept(self, choices: Choice) -> Kept:
        """Kept counts of the variables' groups, both of shape [configurations, variables]."""
        return np.stack([lv[choices[:, v]] for v, lv in enumerate(self.levels)], axis=1)


def measured(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, most: int) -> Separable:
    """Evaluates configurations in which one variable has left its level, and follows a curve through the differences.

    The others are whole. Where the whole network is over the budget, they are at the level that all can have (see
    `SearchSpace.repair`), and lower where the variable would have no room to rise. Each evaluation gives the
    difference of the first objective that is no cost, between two levels of one variable. Levels are taken in turns,
    for every variable the middle first and then those furthest from what is known. Differences are made monotone; in
    between, a curve goes with the square of what is taken away, times a factor that is interpolated. A variable for
    which no evaluation was left, or whose networks do not run, has the mean of the others' curves.

    Args:
        space: The space.
        evaluate: Evaluates.
        budget: Every configuration that is evaluated is within it.
        most: Evaluations that may be spent.

    Raises:
        OptionError: All objectives are costs, or a variable is not the width of one group.
        BudgetInfeasible: Nothing is within the budget.
    """
    column = harmful(evaluate.objectives, space)
    levels, place = _widths(space)
    backgrounds = _backgrounds(space, budget)
    levels = [lv[:count] for lv, count in zip(levels, _attainable(space, budget), strict=True)]
    asked = _asked(space, evaluate, budget, backgrounds, [len(lv) for lv in levels], most)
    values = {row.tobytes(): value for row, value in zip(asked, evaluate(asked)[:, column], strict=True)}
    found = [_points(v, backgrounds, levels[v], values) for v in range(len(levels))]
    levels = [lv[: 1 + max(points, default=len(lv) - 1)] for lv, points in zip(levels, found, strict=True)]
    return Separable(space, budget, levels, _curves(levels, found), place)


def affordable(space: SearchSpace, evaluate: Evaluator, share: float) -> int:
    """Evaluations for curves: at most a share of those that are left, and no more than a few for each variable."""
    return min(int(share * evaluate.left), 1 + _LEVELS * len(space.variables))


def harmful(objectives: Sequence[str], space: SearchSpace) -> int:
    """Number of the first objective that is not a cost; raises `OptionError` where all are."""
    for number, name in enumerate(objectives):
        if name not in space.named:
            return number
    raise OptionError(f"objectives: one that is no cost is needed, not only {', '.join(objectives)}")


def priced(objectives: Sequence[str], space: SearchSpace, budget: Budget | None) -> tuple[str, ...]:
    """The costs that a front is over: those among the objectives, else those of the budget, else the first there is."""
    limited = () if budget is None else tuple(name for name, _ in budget.limits)
    return tuple(name for name in objectives if name in space.named) or limited or space.named[:1]


def _widths(space: SearchSpace) -> tuple[list[Kept], dict[int, int]]:
    """Kept counts at the levels of each variable, and the variable of each group."""
    levels: list[Kept] = []
    place: dict[int, int] = {}
    for number, variable in enumerate(space.variables):
        written = np.full((variable.levels, len(space.costs.sizes)), np.nan)
        variable.write(np.arange(variable.levels), written)
        groups = np.flatnonzero(~np.isnan(written).all(axis=0)).tolist()
        if len(groups) != 1 or groups[0] in place:
            raise OptionError(f"search space: curves are of widths, and {variable.name!r} is more than one group's")
        place[groups[0]] = number
        levels.append(written[:, groups[0]].astype(np.int64))
    return levels, place


def _attainable(space: SearchSpace, budget: Budget | None) -> list[int]:
    """Number of levels of each variable that fit while all others are at their lowest."""
    alone = (np.stack([_moved(space.least[0], v, lv) for lv in range(n)]) for v, n in enumerate(space.levels.tolist()))
    return [int((space.excess(rows, budget) <= 1).sum()) for rows in alone]


def _moved(background: NDArray[np.int64], variable: int, level: int) -> NDArray[np.int64]:
    row = background.copy()
    row[variable] = level
    return row


def _backgrounds(space: SearchSpace, budget: Budget | None) -> Configs:
    """What the variables that are not looked at are set to: the highest levels first."""
    highest: NDArray[np.int64] = space.repair(space.whole, budget)[0]
    if (highest == space.whole[0]).all():
        return highest[None]
    return np.stack([np.floor(highest * share).astype(np.int64) for share in _BACKGROUNDS])


def _asked(
    space: SearchSpace,
    evaluate: Evaluator,
    budget: Budget | None,
    backgrounds: Configs,
    counts: Sequence[int],
    most: int,
) -> Configs:
    """What to evaluate, with every background that is needed, as far as `most` goes; what is known costs nothing."""
    orders = [_in_turn(int(known), count) for known, count in zip(backgrounds[0], counts, strict=True)]
    asked: dict[bytes, NDArray[np.int64]] = {}
    spent = 0
    for turn, variable in product(range(max(map(len, orders))), range(len(orders))):
        if turn >= len(orders[variable]):
            continue
        choices = np.stack([_moved(background, variable, orders[variable][turn]) for background in backgrounds])
        first = int((space.excess(choices, budget) <= 1).argmax())
        new = [row for row in (backgrounds[first], choices[first]) if row.tobytes() not in asked]
        price = sum(not evaluate.known(row) for row in new)
        if spent + price > most:
            break
        spent += price
        asked.update((row.tobytes(), row) for row in new)
    return space.checked(list(asked.values()))


def _in_turn(known: int, count: int) -> list[int]:
    """Levels 0 to count - 1 but the known one: first the middle of those below it, then the furthest from the rest."""
    order = [known]
    left = [level for level in range(count) if level != known]
    while left:
        level = known // 2 if len(order) == 1 and known else max(left, key=lambda lv: min(abs(lv - o) for o in order))
        left.remove(level)
        order.append(level)
    return order[1:]


def _points(variable: int, backgrounds: Configs, levels: Kept, values: Mapping[bytes, float]) -> dict[int, float]:
    """Harm by level of one variable, less that at its level in the highest background; empty if nothing is known."""
    known = int(backgrounds[0, variable])
    points = {known: 0.0}
    curve = np.zeros(levels[known] + 1)
    for number, background in enumerate(backgrounds):
        base = values.get(background.tobytes(), np.inf)
        if not np.isfinite(base):
            continue
        level_of = {_moved(background, variable, level).tobytes(): level for level in range(len(levels))}
        found = {level_of[key]: value - base for key, value in values.items() if key in level_of}
        if number == 0:
            points |= {level: harm for level, harm in found.items() if level < known}
            curve = _followed(levels, points)
        here = float(curve[levels[background[variable]]])  # where the difference begins
        for level, harm in found.items():
            if level > known and level not in points and np.isfinite(here + harm):
                points[level] = here + harm
    return points if len(points) > 1 else {}


def _followed(levels: Kept, points: Mapping[int, float]) -> Counts:
    """A curve through harms by level, shape [kept count at the highest of them + 1], 0 at the end."""
    order = sorted(points)
    kept = levels[order]
    if len(order) == 1:
        return np.zeros(int(kept[0]) + 1)
    values = non_increasing(np.array([points[level] for level in order]))
    return along(kept[:-1], (values - values[-1])[:-1], _square(int(kept[-1])), int(levels[0]), tangent=False)


def _curves(levels: Sequence[Kept], points: Sequence[Mapping[int, float]]) -> list[Counts]:
    """A finite curve for every variable, that is nowhere far below the mean one."""
    squares = [_square(int(lv[-1])) for lv in levels]
    found = [_followed(lv, own) if own else None for lv, own in zip(levels, points, strict=True)]
    looked = [
        (float(curve[lv[0]]), float(square[lv[0]]))
        for curve, lv, square in zip(found, levels, squares, strict=True)
        if curve is not None and len(lv) > 1 and np.isfinite(curve[lv[0]])
    ]
    mean = float(np.mean([harm / share for harm, share in looked])) if looked else 0.0
    worst = _WORST * (sum(harm for harm, _ in looked) + mean) or 1.0
    return [
        square * (mean or 1.0) if curve is None else np.minimum(np.maximum(curve, _LEAST * mean * square), worst)
        for curve, square in zip(found, squares, strict=True)
    ]


def _square(size: int) -> Counts:
    """Square of the share that is taken away, shape [size + 1]."""
    return np.asarray((1 - np.arange(size + 1) / size) ** 2)
