"""Variable elimination: exact minimisation of harm plus priced costs over all choices of levels at once.

Costs that multiply few variables with each other make a sparse graph: in a chain of layers each width meets its
neighbours, in a residual network a block's inner widths meet those of the stream. Eliminating one variable after the
other (Bertele and Brioschi, Nonserial Dynamic Programming, 1972) minimises over all of them exactly, in time that
grows with the largest set of variables that stands together, never with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from metaprune.search.instance import Choice, Instance
from metaprune.search.problem import Counts

WIDEST = 1 << 21  # entries of one table
_ENTRIES = 1 << 24  # of all prices' tables that are held at a time


@dataclass(frozen=True, eq=False)
class Step:
    """Elimination of one variable.

    Attributes:
        variable: The variable that goes.
        rest: The variables that it still meets, ascending; a table has the variable's axis first, then theirs.
        harm: Of each of its levels, shape [levels].
        costs: Of the limits, over their bounds, that no earlier step has counted, shape [limits, levels, *rest];
            axes that a cost does not depend on are 1 long.
        inputs: Earlier steps whose results come in here, by number.
    """

    variable: int
    rest: tuple[int, ...]
    harm: Counts
    costs: Counts
    inputs: tuple[int, ...]


class Elimination:
    """An instance's variables in the order in which they are eliminated.

    Attributes:
        instance: The instance.
        steps: One for each variable.
        constant: Cost over bound that no choice changes, shape [limits].
    """

    def __init__(self, instance: Instance, order: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Takes an instance and the order that `order_of` found."""
        self.instance = instance
        counts = [len(levels) for levels in instance.levels]
        place = {variable: number for number, (variable, _) in enumerate(order)}
        costs = [np.zeros((len(instance.limits), counts[v], *(1 for _ in rest))) for v, rest in order]
        self.constant = np.zeros(len(instance.limits))
        for m, limit in enumerate(instance.limits):
            for key, coefficient in limit.terms.items():
                if not key:
                    self.constant[m] += coefficient / limit.bound
                    continue
                first = min(set(key), key=place.__getitem__)
                axes = (first, *order[place[first]][1])
                table = np.full((1,) * len(axes), coefficient / limit.bound)
                for variable in key:
                    shape = [counts[variable] if axis == variable else 1 for axis in axes]
                    table = table * instance.levels[variable].astype(float).reshape(shape)
                costs[place[first]] = _added(costs[place[first]], m, table)
        inputs: list[list[int]] = [[] for _ in order]
        for number, (_, rest) in enumerate(order):
            if rest:
                inputs[min(place[v] for v in rest)].append(number)
        self.steps = [
            Step(variable, rest, instance.harm[variable], costs[number], tuple(inputs[number]))
            for number, (variable, rest) in enumerate(order)
        ]

    def lowest(self, prices: Counts) -> tuple[Choice, Counts]:
        """The choices of least harm + prices . (costs / bounds - 1), for each row of prices.

        Args:
            prices: Shape [rows, limits], not negative.

        Returns:
            Levels, shape [rows, variables], and the least values, shape [rows]: none of them is above the least harm
            within the limits.
        """
        counts = [len(levels) for levels in self.instance.levels]
        widest = max((prod(counts[v] for v in (s.variable, *s.rest)) for s in self.steps), default=1)
        size = max(1, _ENTRIES // widest)
        parts = [self._lowest(prices[first : first + size]) for first in range(0, len(prices), size)]
        return np.concatenate([c for c, _ in parts]), np.concatenate([v for _, v in parts])

    def _lowest(self, prices: Counts) -> tuple[Choice, Counts]:
        rows = len(prices)
        total = prices @ (self.constant - 1)
        results: list[Counts] = []
        chosen: list[NDArray[np.int64]] = []
        for step in self.steps:
            table = self.table(step, prices, results)
            chosen.append(table.argmin(axis=1))
            results.append(table.min(axis=1))
            if not step.rest:
                total = total + results[-1]
        choices = np.zeros((rows, len(self.steps)), dtype=np.int64)
        row = np.arange(rows)
        for step, found in zip(reversed(self.steps), reversed(chosen), strict=True):
            choices[:, step.variable] = found[(row, *(choices[:, v] for v in step.rest))]
        return choices, total

    def table(self, step: Step, prices: Counts, results: Sequence[Counts]) -> Counts:
        """Least value of what has been eliminated with a step's variable, shape [rows, levels, *rest]."""
        counts = [len(self.instance.levels[v]) for v in step.rest]
        harm = step.harm.reshape(1, -1, *(1 for _ in counts))
        priced = np.tensordot(prices, step.costs, axes=1)
        table = np.broadcast_to(harm + priced, (len(prices), len(step.harm), *counts))
        for number in step.inputs:
            table = table + self.spread(results[number], self.steps[number].rest, (step.variable, *step.rest))
        return table

    @staticmethod
    def spread(table: Counts, axes: tuple[int, ...], onto: tuple[int, ...]) -> Counts:
        """A table over some variables, behind a first axis of rows, with axes of length 1 for the others of `onto`."""
        order = sorted(range(len(axes)), key=lambda i: onto.index(axes[i]))
        turned = table.transpose(0, *(1 + i for i in order))
        lengths = {axes[i]: table.shape[1 + i] for i in range(len(axes))}
        return turned.reshape(table.shape[0], *(lengths.get(v, 1) for v in onto))

    def bounds(self, prices: Counts) -> tuple[list[Counts], list[Counts], list[Counts]]:
        """What the least value can be when one variable's level is given, and what others add to each step.

        Args:
            prices: Shape [limits].

        Returns:
            For each variable the least value by level, shape [levels]; for each step the least value of what has been
            eliminated by then, shape [*rest], and of everything else by the same variables.
        """
        inside: list[Counts] = []
        tables: list[Counts] = []
        for step in self.steps:
            tables.append(self.table(step, prices[None], inside))
            inside.append(tables[-1].min(axis=1))
        roots = sum(float(r[0]) for s, r in zip(self.steps, inside, strict=True) if not s.rest)
        roots += float(prices @ (self.constant - 1))
        outside: list[Counts] = [np.empty(0)] * len(self.steps)
        lowest: list[Counts] = [np.empty(0)] * len(self.steps)
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            if not step.rest:
                outside[number] = np.array([roots - float(inside[number][0])])
            belief = tables[number] + outside[number][:, None]
            lowest[step.variable] = belief[0].reshape(belief.shape[1], -1).min(axis=1)
            for child in step.inputs:
                rest = self.steps[child].rest
                gone = tuple(1 + i for i, v in enumerate((step.variable, *step.rest)) if v not in rest)
                left = [v for v in (step.variable, *step.rest) if v in rest]
                turned = belief.min(axis=gone).transpose(0, *(1 + left.index(v) for v in rest))
                outside[child] = turned - inside[child]
        return lowest, [r[0] for r in inside], [r[0] for r in outside]


def order_of(instance: Instance) -> list[tuple[int, tuple[int, ...]]] | None:
    """An order of elimination whose tables stay small, each variable with those it still meets; None if there is none.

    The variable whose table is smallest goes first, of those the one that joins fewest others that had not met.
    """
    counts = [len(levels) for levels in instance.levels]
    meets: list[set[int]] = [set() for _ in counts]
    for limit in instance.limits:
        for key in limit.terms:
            for variable in set(key):
                meets[variable].update(set(key) - {variable})
    left = set(range(len(counts)))
    order = []
    while left:
        variable = min(left, key=lambda v: (counts[v] * prod(counts[u] for u in meets[v]), v))
        rest = tuple(sorted(meets[variable]))
        if counts[variable] * prod(counts[u] for u in rest) > WIDEST:
            return None
        for other in rest:
            meets[other].update(rest)
            meets[other] -= {variable, other}
        left.remove(variable)
        order.append((variable, rest))
    return order


def _added(costs: Counts, limit: int, table: Counts) -> Counts:
    """Costs with a table added to those of one limit, broadcast to the larger of both shapes."""
    shape = np.broadcast_shapes(costs.shape[1:], table.shape)
    if shape != costs.shape[1:]:
        costs = np.broadcast_to(costs, (len(costs), *shape)).copy()
    costs[limit] += table
    return costs
