"""Coordinate descent on harm plus priced costs, where too many groups meet for variable elimination."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metaprune.search.instance import Choice, Instance
from metaprune.search.problem import Counts

_SWEEPS = 50


class Descent:
    """An instance's costs as polynomials in one variable at a time, the others given."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.constant = np.zeros(len(instance.limits))
        found: list[dict[tuple[int, int, int], tuple[list[tuple[int, ...]], list[float]]]] = [
            {} for _ in instance.levels
        ]
        for m, limit in enumerate(instance.limits):
            for key, coefficient in limit.terms.items():
                if not key:
                    self.constant[m] += coefficient / limit.bound
                for variable in set(key):
                    others = tuple(v for v in key if v != variable)
                    power = len(key) - len(others)
                    keys, values = found[variable].setdefault((m, power, len(others)), ([], []))
                    keys.append(others)
                    values.append(coefficient / limit.bound)
        self._cofactors = [
            [
                (m, power, np.array(keys, dtype=np.int64).reshape(len(keys), degree), np.array(values))
                for (m, power, degree), (keys, values) in terms.items()
            ]
            for terms in found
        ]

    def marginal(self, variable: int, kept: Counts) -> NDArray[np.float64]:
        """Costs over bounds that depend on one variable.

        Args:
            variable: Its number.
            kept: Kept counts, shape [rows, variables].

        Returns:
            Shape [rows, limits, levels].
        """
        levels = self.instance.levels[variable].astype(float)
        table = np.zeros((len(kept), len(self.instance.limits), len(levels)))
        for m, power, keys, coefficients in self._cofactors[variable]:
            cofactor = kept[:, keys].prod(axis=2) @ coefficients
            table[:, m] += cofactor[:, None] * levels**power
        return table

    def lowest(self, prices: Counts) -> tuple[Choice, Counts]:
        """Choices of small harm + prices . (costs / bounds - 1), for each row of prices, shape [rows, limits].

        Each variable in turn takes its best level until none changes, from all full and from all at their lowest.

        Returns:
            Levels, shape [rows, variables], and their values, shape [rows]; less may be possible.
        """
        top = np.array([len(levels) - 1 for levels in self.instance.levels])
        found = [self._from(np.tile(start, (len(prices), 1)), prices) for start in (top, np.zeros_like(top))]
        values = np.stack([self.instance.harms(c) + (prices * (self.instance.costs(c) - 1)).sum(1) for c in found])
        best = values.argmin(axis=0)
        row = np.arange(len(prices))
        return np.stack(found)[best, row], values[best, row]

    def _from(self, choices: Choice, prices: Counts) -> Choice:
        kept = self.instance.kept(choices)
        for _ in range(_SWEEPS):
            before = choices.copy()
            for variable, (levels, harm) in enumerate(zip(self.instance.levels, self.instance.harm, strict=True)):
                priced = np.einsum("rml,rm->rl", self.marginal(variable, kept), prices)
                choices[:, variable] = (harm + priced).argmin(axis=1)
                kept[:, variable] = levels[choices[:, variable]]
            if np.array_equal(before, choices):
                break
        return choices
