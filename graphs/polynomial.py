"""Polynomials in the kept counts of groups: sizes of axes, and sums of products of sizes, compiled for many plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
_BLOCK = 4_000_000  # numbers held at a time


@dataclass(frozen=True, eq=False)
class Size:
    """Size of an axis, a polynomial in the kept counts.

    Attributes:
        constant: What always stays.
        groups: Groups that stand on the axis alone, shape [terms].
        weights: Positions per unit of each of them, shape [terms].
        products: Coefficient and groups of the terms of higher degree.
    """

    constant: float
    groups: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    weights: Counts = field(default_factory=lambda: np.empty(0))
    products: tuple[tuple[float, tuple[int, ...]], ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether no group stands on the axis."""
        return not len(self.groups) and not self.products

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal polynomials."""
        return (self.constant, self.groups.tobytes(), self.weights.tobytes(), self.products)

    def times(self, factor: float) -> Size:
        """The polynomial times a number."""
        products = tuple((coefficient * factor, groups) for coefficient, groups in self.products)
        return Size(self.constant * factor, self.groups, self.weights * factor, products)


Term = tuple[Size, ...]


class Polynomial:
    """A sum of products of sizes, evaluated for many vectors of kept counts at once."""

    def __init__(self, terms: Iterable[Term]) -> None:
        sizes: dict[tuple[object, ...], int] = {}
        self._sizes: list[Size] = []
        self._constant = 0.0
        merged: dict[tuple[int, ...], float] = {}
        for term in terms:
            coefficient = prod(size.constant for size in term if size.is_constant)
            moving = [size for size in term if not size.is_constant]
            for size in moving:
                if size.key not in sizes:
                    sizes[size.key] = len(self._sizes)
                    self._sizes.append(size)
            if moving:
                factors = tuple(sorted(sizes[size.key] for size in moving))
                merged[factors] = merged.get(factors, 0.0) + coefficient
            else:
                self._constant += coefficient
        self._terms = []
        for degree in sorted({len(factors) for factors in merged}):
            chosen = [(factors, value) for factors, value in merged.items() if len(factors) == degree]
            self._terms.append((np.array([f for f, _ in chosen]), np.array([value for _, value in chosen])))
        self._affine()

    def _affine(self) -> None:
        """The linear parts of all sizes as one flat list of (group, weight), with where each size begins."""
        none, zero = np.zeros(1, dtype=np.int64), np.zeros(1)
        pairs = [(s.groups, s.weights) if len(s.groups) else (none, zero) for s in self._sizes]
        self._groups = np.concatenate([groups for groups, _ in pairs] or [none])
        self._weights = np.concatenate([weights for _, weights in pairs] or [zero])
        self._starts = np.cumsum([0, *(len(groups) for groups, _ in pairs)])[: len(pairs)]
        self._constants = np.array([size.constant for size in self._sizes])
        self._higher = [
            (i, coefficient, list(groups))
            for i, size in enumerate(self._sizes)
            for coefficient, groups in size.products
        ]

    def at(self, kept: Counts) -> Counts:
        """Values for kept counts of shape [plans, groups]; shape [plans]."""
        width = max(1, len(self._groups), *(ids.size for ids, _ in self._terms), 0)
        step = max(1, _BLOCK // width)
        parts = [self._block(kept[start : start + step]) for start in range(0, len(kept), step)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _block(self, kept: Counts) -> Counts:
        total = np.full(len(kept), self._constant)
        if not self._sizes:
            return total
        sizes = np.add.reduceat(kept[:, self._groups] * self._weights, self._starts, axis=1) + self._constants
        for i, coefficient, groups in self._higher:
            sizes[:, i] += coefficient * kept[:, groups].prod(axis=1)
        for factors, coefficients in self._terms:
            total += sizes[:, factors].prod(axis=2) @ coefficients
        return total


Monomials = dict[tuple[int, ...], float]
"""Coefficient of each monomial: an ascending tuple of variables, one that is squared stands twice."""


def expanded(terms: Iterable[Term], sizes: Counts, place: Mapping[int, int]) -> Monomials:
    """A sum of products of sizes, multiplied out.

    Args:
        terms: The sum.
        sizes: Kept count of every group, shape [groups], for those that are no variables.
        place: Number of each variable by its group.
    """
    total: Monomials = {}
    for term in terms:
        product: Monomials = {(): 1.0}
        for size in term:
            product = _multiplied(product, _monomials(size, sizes, place))
        for key, coefficient in product.items():
            total[key] = total.get(key, 0.0) + coefficient
    return {key: coefficient for key, coefficient in total.items() if coefficient}


def _monomials(size: Size, sizes: Counts, place: Mapping[int, int]) -> Monomials:
    parts = [
        (size.constant, ()),
        *((w, (g,)) for g, w in zip(size.groups.tolist(), size.weights.tolist(), strict=True)),
    ]
    found: Monomials = {}
    for coefficient, groups in [*parts, *size.products]:
        key = tuple(sorted(place[g] for g in groups if g in place))
        fixed = prod(float(sizes[g]) for g in groups if g not in place)
        found[key] = found.get(key, 0.0) + coefficient * fixed
    return found


def _multiplied(left: Monomials, right: Monomials) -> Monomials:
    found: Monomials = {}
    for a, x in left.items():
        for b, y in right.items():
            key = tuple(sorted(a + b))
            found[key] = found.get(key, 0.0) + x * y
    return found
