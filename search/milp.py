"""The allocation as a mixed-integer linear program, solved by HiGHS: several limits at once, with a proven gap.

Every level of every variable is a binary variable. A product of a variable with anything linear is written once for
each of its levels (one level is chosen, so exactly one of the copies is the product and the others are zero), and
polynomials of higher degree by doing so again. A dense network, where a layer's cost is its width times the sum of all
widths before it, so needs one copy of the sum per level and layer and not one variable per pair of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from metaprune.graphs.polynomial import Monomials
from metaprune.search.dynamic import reduced
from metaprune.search.elimination import order_of
from metaprune.search.instance import Choice, Instance, Solution
from metaprune.search.lagrange import best_of, oracle_of, relaxed
from metaprune.search.problem import Counts

SECONDS = 4.0
_APART = 8  # cofactors of more terms are multiplied as a whole
_GAP = 1e-9


def integer_program(instance: Instance, seconds: float = SECONDS) -> Solution:
    """The least harm within the limits, with what has been proven about it when the time is up.

    Args:
        instance: The instance.
        seconds: Time that HiGHS may take.

    Raises:
        BudgetInfeasible: No choice is within the limits.
    """
    oracle, exact = oracle_of(instance)
    found = relaxed(instance, oracle, exact)
    best = best_of(instance, found.columns, found.bound, "Lagrangian relaxation")
    order = order_of(instance)
    if best.gap == 0:
        return best
    allowed = [np.ones(len(levels), dtype=bool) for levels in instance.levels]
    smaller = instance
    if order is not None:
        allowed, smaller = reduced(instance, order, found.prices, best.harm)
    choice, bound = solved(smaller, seconds)
    bound = max(best.bound, min(bound, best.harm))
    if choice is None:
        return Solution(best.choice, best.harm, bound, best.notes)
    level = np.array([np.flatnonzero(mask)[c] for mask, c in zip(allowed, choice, strict=True)])
    return best_of(instance, np.stack([level, best.choice]), bound, "HiGHS")


def solved(instance: Instance, seconds: float = SECONDS) -> tuple[Choice | None, float]:
    """What HiGHS finds in the time, None if nothing, and the least harm that it has not ruled out."""
    model = _Model(instance)
    rows = csr_matrix((model.values, (model.rows, model.columns)), shape=(len(model.lower), len(model.upper)))
    result = milp(
        model.objective,
        integrality=np.arange(len(model.upper)) < model.binaries,
        bounds=Bounds(np.minimum(0.0, model.upper), np.array(model.upper)),
        constraints=LinearConstraint(rows, model.lower, model.higher),
        options={"time_limit": seconds, "mip_rel_gap": _GAP},
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * model.scale
    if result.x is None:
        return None, np.inf if result.status == 2 else bound
    choice = np.array([int(np.argmax(result.x[first : first + n])) for first, n in model.places])
    return choice, bound


@dataclass
class _Linear:
    """A constant plus a weighted sum of columns, and the values it can have."""

    constant: float
    weights: dict[int, float] = field(default_factory=dict)
    least: float = 0.0
    most: float = 0.0

    def add(self, other: _Linear, factor: float) -> None:
        self.constant += factor * other.constant
        self.least += factor * (other.least if factor >= 0 else other.most)
        self.most += factor * (other.most if factor >= 0 else other.least)
        for column, weight in other.weights.items():
            self.weights[column] = self.weights.get(column, 0.0) + factor * weight


class _Model:
    """Columns and rows of the program."""

    def __init__(self, instance: Instance) -> None:
        self.upper: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.lower: list[float] = []
        self.higher: list[float] = []
        self._unit = [float(levels[-1]) for levels in instance.levels]
        self._shares = [levels / levels[-1] for levels in instance.levels]
        self._products: dict[tuple[int, tuple[int, ...]], _Linear] = {}
        for levels in instance.levels:
            self.places.append((len(self.upper), len(levels)))
            self.upper += [1.0] * len(levels)
            first, count = self.places[-1]
            self._row({first + i: 1.0 for i in range(count)}, 1.0, 1.0)
        self.binaries = len(self.upper)
        for limit in instance.limits:
            terms = {k: c * prod(self._unit[v] for v in k) / limit.bound for k, c in limit.terms.items()}
            cost = self._linear(terms)
            self._row(cost.weights, -np.inf, 1 - cost.constant)
        harms = np.concatenate(list(instance.harm))
        self.scale = float(np.abs(harms).max()) or 1.0
        self.objective: Counts = np.concatenate([harms / self.scale, np.zeros(len(self.upper) - self.binaries)])

    def _row(self, weights: dict[int, float], lower: float, higher: float) -> None:
        self.rows += [len(self.lower)] * len(weights)
        self.columns += weights.keys()
        self.values += weights.values()
        self.lower.append(lower)
        self.higher.append(higher)

    def _linear(self, terms: Monomials) -> _Linear:
        """A polynomial in the shares that are kept, written linearly."""
        total = _Linear(0.0)
        left: Monomials = {}
        for key, coefficient in terms.items():
            if len(set(key)) > 1:
                left[key] = coefficient
            else:
                total.add(self._power(key), coefficient)
        while left:
            counts: dict[int, int] = {}
            for key in left:
                for variable in set(key):
                    counts[variable] = counts.get(variable, 0) + 1
            pivot = max(counts, key=lambda v: (counts[v], -v))
            cofactors: dict[int, Monomials] = {}
            for key in [key for key in left if pivot in key]:
                others = tuple(v for v in key if v != pivot)
                cofactors.setdefault(len(key) - len(others), {})[others] = left.pop(key)
            for power, cofactor in cofactors.items():
                if len(cofactor) > _APART:
                    total.add(self._times(pivot, power, self._linear(cofactor)), 1.0)
                    continue
                for others, coefficient in cofactor.items():
                    total.add(self._product(pivot, power, others), coefficient)
        return total

    def _power(self, key: tuple[int, ...]) -> _Linear:
        if not key:
            return _Linear(1.0, {}, 1.0, 1.0)
        first, _ = self.places[key[0]]
        values = self._shares[key[0]] ** len(key)
        weights = {first + i: float(v) for i, v in enumerate(values)}
        return _Linear(0.0, weights, float(values.min()), float(values.max()))

    def _product(self, pivot: int, power: int, others: tuple[int, ...]) -> _Linear:
        key = pivot, (*([pivot] * power), *others)
        if key not in self._products:
            self._products[key] = self._times(pivot, power, self._linear({others: 1.0}))
        return self._products[key]

    def _times(self, variable: int, power: int, other: _Linear) -> _Linear:
        """A power of a variable times something linear: one copy of that for each level."""
        first, count = self.places[variable]
        copies = list(range(len(self.upper), len(self.upper) + count))
        self.upper += [max(other.most, 0.0)] * count
        self._row(
            {**dict.fromkeys(copies, 1.0), **{c: -w for c, w in other.weights.items()}},
            other.constant,
            other.constant,
        )
        for i, copy in enumerate(copies):
            self._row({copy: 1.0, first + i: -other.most}, -np.inf, 0.0)
            self._row({copy: 1.0, first + i: -other.least}, 0.0, np.inf)
        values = self._shares[variable] ** power
        weights = {copy: float(v) for copy, v in zip(copies, values, strict=True)}
        return _Linear(0.0, weights, float(values.min()) * other.least, float(values.max()) * other.most)
