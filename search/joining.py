"""From fronts of a network's parts to the front of the whole: a knapsack for every choice of what the parts share.

Each part is a class of which one item is taken, a configuration of the variables that are its own, with the harm that
it does. What several parts share, such as the width of a residual stream between them, is a class of its own too, but
what an item of it saves depends on what is taken elsewhere. With all shared levels fixed, costs add up over the parts
exactly, and what is left is a multiple-choice knapsack, which the allocators' solvers are for: ranking what is saved
for the harm it does, and taking it in that order, walks along the convex hull (`lagrange.hull`), and `dynamic` is
exact for one limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.polynomial import Monomials
from metaprune.search.dynamic import dynamic
from metaprune.search.front import nondominated
from metaprune.search.instance import Instance, Limit
from metaprune.search.lagrange import hull
from metaprune.search.space import Configs, SearchSpace

Values = NDArray[np.float64]

_VISITS = 100  # choices of the shared levels that are looked at
_STARTS = 9  # of them along the diagonal, to begin with
_UNIT = 2.0**-40  # of a network's cost: costs of items are whole numbers of it
_STEP = 8  # parts of a shared variable's range: a neighbour is one of them away


@dataclass(frozen=True, eq=False)
class Items:
    """A class of which one item is taken.

    Attributes:
        variables: Numbers of the variables that it decides.
        configs: Their levels, shape [items, variables of it].
        harm: What each item does, 0 where nothing is taken away, shape [items].
    """

    variables: tuple[int, ...]
    configs: Configs
    harm: Values

    def put(self, rows: Configs) -> Configs:
        """One copy of a configuration, shape [1, variables], for each item."""
        found = rows.repeat(len(self.configs), axis=0)
        found[:, list(self.variables)] = self.configs
        return found


@dataclass(frozen=True, eq=False)
class Knapsack:
    """What is left to choose when the shared levels are fixed.

    Attributes:
        instance: One variable for each part, its "kept count" being its cost beyond the least, in `_UNIT`.
        items: For each part the items at its levels.
        shared: Harm of the shared levels.
    """

    instance: Instance
    items: Sequence[NDArray[np.int64]]
    shared: float


class Joint:
    """The joint model of harm and of one cost."""

    def __init__(
        self, space: SearchSpace, parts: Sequence[Items], shared: Sequence[Items], mix: Mapping[str, float]
    ) -> None:
        """Takes a space, items of parts, items of single shared variables, and the weights of costs.

        Args:
            space: The space.
            parts: Items of variables that are one part's alone; with `shared` they hold every variable once.
            shared: Items of one variable each; item i is its level i.
            mix: Weights of kept fractions of costs.
        """
        self._space, self._parts, self._shared, self._mix = space, parts, shared, mix
        self._tops = np.array([len(items.configs) - 1 for items in shared], dtype=np.int64)
        self._known: dict[bytes, Knapsack] = {}

    def cost(self, configs: Configs) -> Values:
        """The weighted kept fraction, shape [configurations]."""
        total = np.zeros(len(configs))
        for name, weight in self._mix.items():
            total += weight * self._space.fractions(name, configs)
        return total

    def front(self) -> tuple[Configs, Values]:
        """Configurations that the model takes for the best, and their harms; cheapest first.

        Hulls for shared levels along the diagonal, then for the neighbours of the levels that are on the front.
        """
        if not len(self._tops):
            return self._hull(self._tops)
        diagonal = np.round(np.linspace(0, 1, _STARTS)[:, None] * self._tops).astype(np.int64)
        found = self._best([self._hull(levels) for levels in diagonal])
        visits = len(diagonal)
        expanded: set[bytes] = set()
        while visits < _VISITS:
            levels = [row for row in self._levels(found[0]) if row.tobytes() not in expanded]
            if not levels:
                break
            expanded.add(levels[0].tobytes())
            around = [row for row in self._around(levels[0]) if row.tobytes() not in self._known]
            visits += len(around)
            found = self._best([found, *(self._hull(row) for row in around)])
        return found

    def optimum(self, near: Configs, limit: float) -> tuple[Configs, float] | None:
        """The least harm within a cost, for the shared levels of some configurations; None where nothing fits."""
        best: tuple[Configs, float] | None = None
        for levels in self._levels(near):
            knapsack = self._knapsack(levels)
            bounded = [Limit("cost", knapsack.instance.limits[0].terms, limit)]
            instance = Instance(knapsack.instance.levels, knapsack.instance.harm, bounded)
            if instance.costs(np.zeros((1, len(self._parts)), dtype=np.int64))[0, 0] > 1:
                continue
            solution = dynamic(instance)
            if best is None or solution.harm + knapsack.shared < best[1]:
                best = self._configs(levels, solution.choice[None]), solution.harm + knapsack.shared
        return best

    def _hull(self, levels: NDArray[np.int64]) -> tuple[Configs, Values]:
        knapsack = self._knapsack(levels)
        choices = hull(knapsack.instance)
        return self._configs(levels, choices), knapsack.instance.harms(choices) + knapsack.shared

    def _knapsack(self, levels: NDArray[np.int64]) -> Knapsack:
        """The knapsack for shared levels, shape [shared]."""
        key = levels.tobytes()
        if key not in self._known:
            base = self._space.whole.copy()
            for items, level in zip(self._shared, levels.tolist(), strict=True):
                base[0, items.variables[0]] = level
            whole = constant = float(self.cost(base)[0])
            kept, harms, chosen = [], [], []
            for part in self._parts:
                saved = self.cost(part.put(base)) - whole
                order = _ascending(saved, part.harm)
                constant += float(saved[order[0]])
                kept.append(np.round((saved[order] - saved[order[0]]) / _UNIT).astype(np.int64))
                harms.append(part.harm[order])
                chosen.append(order)
            terms: Monomials = {(): constant, **{(number,): _UNIT for number in range(len(kept))}}
            shared = sum(float(items.harm[level]) for items, level in zip(self._shared, levels.tolist(), strict=True))
            self._known[key] = Knapsack(Instance(kept, harms, [Limit("cost", terms, 1.0)]), chosen, shared)
        return self._known[key]

    def _configs(self, levels: NDArray[np.int64], choices: Configs) -> Configs:
        """Configurations for shared levels and choices of the knapsack, shape [choices, parts]."""
        rows = self._space.whole.repeat(len(choices), axis=0)
        for items, level in zip(self._shared, levels.tolist(), strict=True):
            rows[:, items.variables[0]] = level
        for part, own, column in zip(self._parts, self._knapsack(levels).items, choices.T, strict=True):
            rows[:, list(part.variables)] = part.configs[own[column]]
        return rows

    def _best(self, found: Sequence[tuple[Configs, Values]]) -> tuple[Configs, Values]:
        configs, harms = np.concatenate([rows for rows, _ in found]), np.concatenate([harm for _, harm in found])
        costs = self.cost(configs)
        stays = np.flatnonzero(nondominated(np.stack([costs, harms], axis=1)))
        order = stays[np.argsort(costs[stays], kind="stable")]
        return configs[order], harms[order]

    def _levels(self, configs: Configs) -> NDArray[np.int64]:
        """The shared levels of configurations, each once, shape [n, shared]."""
        columns = [items.variables[0] for items in self._shared]
        found: NDArray[np.int64] = np.unique(configs[:, columns], axis=0) if columns else configs[:1, :0]
        return found

    def _around(self, levels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        rows = []
        for number, top in enumerate(self._tops.tolist()):
            for step in (-1, 1):
                row = levels.copy()
                row[number] = np.clip(row[number] + step * max(1, top // _STEP), 0, top)
                rows.append(row)
        return rows


def _ascending(cost: Values, harm: Values) -> NDArray[np.int64]:
    """Numbers of the items that none beats, cheapest first."""
    stays = np.flatnonzero(nondominated(np.stack([cost, harm], axis=1)))
    order: NDArray[np.int64] = stays[np.argsort(cost[stays], kind="stable")]
    return order
