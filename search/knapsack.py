"""Multiple-choice knapsack: one item of each class, least value in all, weights within a capacity.

Dynamic programming over lists of partial choices of which none is both lighter and better than another (Pareto lists,
Nemhauser and Ullmann 1969). A Lagrange multiplier on the weights bounds from below what a partial choice can still come
to, and gives a first complete choice: what can not beat it leaves the lists. Lists that are still too long are thinned,
and the result says how far from the best it can be for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import BudgetInfeasible, OptionError

Weights = NDArray[np.int64]
Values = NDArray[np.float64]
POINTS = 10_000
_HALVINGS = 100
_SLACK = 1e-9  # relative, of comparisons with the bound: what ties with the best choice stays


@dataclass(frozen=True)
class Solution:
    """One item of each class.

    Attributes:
        choice: Number of the item of each class.
        weight: Sum of their weights, at most the capacity.
        value: Sum of their values.
        gap: The best value is no less than `value - gap`; 0 when the choice is proven to be the best.
    """

    choice: tuple[int, ...]
    weight: int
    value: float
    gap: float


def knapsack(weights: Sequence[Weights], values: Sequence[Values], capacity: int, points: int = POINTS) -> Solution:
    """Picks one item of each class so that the values sum to as little as the capacity allows.

    Args:
        weights: Whole numbers, 0 or more, shape [items] for each class.
        values: Shape [items] for each class; an infinite one is an item that may not be picked.
        capacity: Of the sum of weights; it is never exceeded.
        points: Partial choices that are kept at a time. Where there are more, of those whose values lie within the
            same `points`-th of the range the lightest stays. It stands in for values that are smaller by less than
            that: values are rounded up, weights never.

    Returns:
        The choice. Of choices of equal value the lightest.

    Raises:
        OptionError: Shapes differ, a weight is negative, or a value is not a number or minus infinity.
        BudgetInfeasible: Nothing fits; `attainable` is the least sum of weights.
    """
    classes = [_Class.of(i, w, v) for i, (w, v) in enumerate(zip(weights, values, strict=True))]
    least = sum(int(c.weights[0]) for c in classes)
    if least > capacity:
        raise BudgetInfeasible(f"capacity: the least weight is {least}, above {capacity}", least)
    relaxed = _relaxed(classes, capacity)
    order = sorted(range(len(classes)), key=lambda i: int(np.ptp(classes[i].weights)))
    steps, lost = _lists([classes[i] for i in order], capacity, relaxed, points)
    picked = relaxed.choice
    if steps is not None:
        traced = _traced(steps)
        picked = [traced[order.index(i)] for i in range(len(classes))]
    weight = sum(int(c.weights[j]) for c, j in zip(classes, picked, strict=True))
    value = float(sum(c.values[j] for c, j in zip(classes, picked, strict=True)))
    gap = max(0.0, min(lost, value - relaxed.bound)) if lost else 0.0
    return Solution(tuple(int(c.items[j]) for c, j in zip(classes, picked, strict=True)), weight, value, gap)


@dataclass(frozen=True, eq=False)
class _Class:
    """The items that no other one of the class beats, by weight ascending and value descending."""

    weights: Weights
    values: Values
    items: Weights

    @staticmethod
    def of(number: int, weights: Weights, values: Values) -> _Class:
        weights, values = np.asarray(weights, dtype=np.int64), np.asarray(values, dtype=np.float64)
        if weights.shape != values.shape or weights.ndim != 1:
            raise OptionError(f"values: class {number} has weights of shape {weights.shape}, values {values.shape}")
        if (weights < 0).any():
            raise OptionError(f"weights: class {number} has a negative one")
        if np.isnan(values).any() or np.isneginf(values).any() or not np.isfinite(values).any():
            raise OptionError(f"values: class {number} needs a finite one, and none that is not a number")
        chosen = np.flatnonzero(np.isfinite(values))
        chosen = chosen[_undominated(weights[chosen], values[chosen])]
        return _Class(weights[chosen], values[chosen], chosen)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """What the Lagrange relaxation gives.

    Attributes:
        price: The multiplier, value per weight.
        bound: No choice within the capacity has a value below it.
        choice: A choice within the capacity.
        value: Its value.
    """

    price: float
    bound: float
    choice: list[int]
    value: float


@dataclass(frozen=True, eq=False)
class _Step:
    """For each partial choice of a list, the one of the list before that it extends, and by which item."""

    before: Weights
    item: Weights


def _undominated(weights: Weights, values: Values) -> Weights:
    """Places of the pairs that no other pair beats, by weight ascending."""
    order = np.lexsort((values, weights))
    sorted_values = values[order]
    best = np.minimum.accumulate(np.concatenate([[np.inf], sorted_values[:-1]]))
    found: Weights = order[sorted_values < best]
    return found


def _relaxed(classes: list[_Class], capacity: int) -> _Relaxed:
    """The multiplier that bounds best, by bisection: a higher price makes the choice lighter."""

    def at(price: float) -> list[int]:
        return [int(np.argmin(c.values + price * c.weights)) for c in classes]

    def total(choice: list[int]) -> tuple[int, float]:
        chosen = list(zip(classes, choice, strict=True))
        return sum(int(c.weights[j]) for c, j in chosen), float(sum(c.values[j] for c, j in chosen))

    low, high = 0.0, max((float(np.ptp(c.values)) for c in classes), default=0.0) + 1.0  # weights differ by 1 at least
    found = _Relaxed(0.0, -np.inf, [0] * len(classes), np.inf)
    for price in (0.0, high, *[None] * _HALVINGS):
        tried = (low + high) / 2 if price is None else price
        choice = at(tried)
        weight, value = total(choice)
        bound = value + tried * (weight - capacity)
        best = choice if weight <= capacity and value < found.value else found.choice
        if bound > found.bound:
            found = _Relaxed(tried, bound, found.choice, found.value)
        found = _Relaxed(found.price, found.bound, best, total(best)[1])
        if weight <= capacity:
            high = tried
        else:
            low = tried
    return _improved(classes, capacity, found)


def _improved(classes: list[_Class], capacity: int, found: _Relaxed) -> _Relaxed:
    """Spends what capacity the choice leaves on the exchanges of one item that lower the value most."""
    choice, value = list(found.choice), found.value
    room = capacity - sum(int(c.weights[j]) for c, j in zip(classes, choice, strict=True))
    while True:
        best, gain = (-1, -1), 0.0
        for i, (c, j) in enumerate(zip(classes, choice, strict=True)):
            last = int(np.searchsorted(c.weights, c.weights[j] + room, side="right")) - 1
            if c.values[j] - c.values[last] > gain:
                best, gain = (i, last), float(c.values[j] - c.values[last])
        if best[0] < 0:
            return _Relaxed(found.price, found.bound, choice, value)
        i, last = best
        room -= int(classes[i].weights[last] - classes[i].weights[choice[i]])
        choice[i], value = last, value - gain


def _lists(classes: list[_Class], capacity: int, relaxed: _Relaxed, points: int) -> tuple[list[_Step] | None, float]:
    """The lists of all classes, None when nothing in them beats the relaxation's choice; and what thinning can cost."""
    rest_weight = np.cumsum([0, *(int(c.weights[0]) for c in reversed(classes))])[::-1]
    cheapest = [float((c.values + relaxed.price * c.weights).min()) for c in reversed(classes)]
    rest_bound = np.cumsum([-relaxed.price * capacity, *cheapest])[::-1]
    worth = relaxed.value + _SLACK * max(abs(relaxed.value), abs(relaxed.bound), abs(rest_bound[0]))
    weights, values = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps, lost = [], 0.0
    for n, c in enumerate(classes, start=1):
        joint_weights = (weights[:, None] + c.weights).ravel()
        joint_values = (values[:, None] + c.values).ravel()
        promising = joint_values + relaxed.price * joint_weights + rest_bound[n] <= worth
        where = np.flatnonzero(promising & (joint_weights + rest_weight[n] <= capacity))
        where = where[_undominated(joint_weights[where], joint_values[where])]
        thinned, cost = _thinned(joint_values[where], points)
        where, lost = where[thinned], lost + cost
        if not len(where):
            return None, lost
        weights, values = joint_weights[where], joint_values[where]
        steps.append(_Step(where // len(c.weights), where % len(c.weights)))
    return (steps, lost) if not classes or values[-1] <= relaxed.value else (None, lost)


def _thinned(values: Values, points: int) -> tuple[Weights, float]:
    """Places of at most `points` of a list, and by how much at most one that stays is worse than one it stands for.

    Args:
        values: Of the list, descending while weights ascend.
        points: How many may stay.
    """
    if len(values) <= points:
        return np.arange(len(values)), 0.0
    part = np.minimum((values[0] - values) / (values[0] - values[-1]) * points, points - 1).astype(np.int64)
    first = np.flatnonzero(np.diff(part, prepend=-1))
    last = np.append(first[1:], len(values)) - 1
    return first, float((values[first] - values[last]).max())


def _traced(steps: list[_Step]) -> list[int]:
    """The items of the last, best choice of the last list, class by class."""
    place, found = -1, []
    for step in reversed(steps):
        found.append(int(step.item[place]))
        place = int(step.before[place])
    return found[::-1]
