"""Products of axes solved into independent families of units.

A reshape that splits an axis into two says: an element stays when its row and its column stay. The solution of all
such constraints together is a set of *families*. A family labels positions; in every constraint its labels lie along
one factor only (or nowhere), so removing a label removes whole rows or whole columns, and every reshape stays
rectangular. Heads and head dimensions, key-value groups and the queries in them, convolution groups and the channels
in them are families found this way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.atoms import Ids, Product


@dataclass(frozen=True, eq=False)
class Family:
    """Labels of some atom classes: `labels[i]` (from 0) is the unit of class `roots[i]`."""

    roots: Ids
    labels: Ids


class _Conflict(Exception):
    """A labelling that no factor can carry."""


class _Labelling:
    """One family under construction: labels from 1, merged by union-find, 0 for none."""

    def __init__(self, system: _System, seed: Ids) -> None:
        self._system = system
        self._label = system.scratch
        self._parent: list[int] = [0]
        self._touched: list[Ids] = []
        self._queue: deque[int] = deque()
        self._queued: set[int] = set()
        self.factors: set[bytes] = set()
        roots = np.unique(seed)
        self._parent += list(range(1, len(roots) + 1))
        self._set(roots, np.arange(1, len(roots) + 1))

    def spread(self) -> Family:
        """Carries the labels through all constraints; raises `_Conflict` if they do not fit."""
        try:
            while self._queue:
                index = self._queue.popleft()
                self._queued.discard(index)
                self._step(self._system.products[index], self._system.wholes[index], self._system.factors[index])
            roots = np.unique(np.concatenate(self._touched))
            _, labels = np.unique(self._canonical(self._label[roots]), return_inverse=True)
            return Family(roots, labels.astype(np.int64))
        finally:
            for roots in self._touched:
                self._label[roots] = 0

    def _find(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def _canonical(self, labels: Ids) -> Ids:
        table = np.fromiter((self._find(i) for i in range(len(self._parent))), np.int64, len(self._parent))
        return table[labels]

    def _union(self, labels: Iterable[int]) -> None:
        found = sorted({self._find(label) for label in labels})
        for other in found[1:]:
            self._parent[other] = found[0]

    def _set(self, roots: Ids, labels: Ids) -> None:
        """Labels classes (0 leaves them alone); what changes is looked at again."""
        chosen = labels > 0
        roots, labels = roots[chosen], labels[chosen]
        old = self._label[roots]
        for a, b in {(int(a), int(b)) for a, b in zip(old, labels, strict=True) if a and a != b}:
            self._union((a, b))
        new = old == 0
        if not new.any():
            return
        order = np.unique(roots[new], return_index=True)
        fresh, first = order
        given = labels[new]
        self._label[fresh] = given[first]
        for root, label in zip(roots[new], given, strict=True):
            if self._label[root] != label:
                self._union((int(self._label[root]), int(label)))
        self._touched.append(fresh)
        for index in self._system.touching(fresh):
            if index not in self._queued:
                self._queued.add(index)
                self._queue.append(index)

    def _step(self, product: Product, whole: Ids, factors: tuple[Ids, ...]) -> None:
        table = self._canonical(self._label[whole])
        along = [self._canonical(self._label[factor]) for factor in factors]
        labelled = [i for i, labels in enumerate(along) if labels.any()]
        if len(labelled) > 1:
            raise _Conflict
        if labelled:
            chosen = labelled[0]
        elif table.any():
            chosen = self._fitting(product, table, factors)
        else:
            return
        where, own = product.where[chosen], along[chosen]
        size = len(factors[chosen])
        merged = own.copy()
        pairs = np.unique(np.stack([where[table > 0], table[table > 0]]), axis=1)
        for position, label in pairs.T.tolist():
            if merged[position] == 0:
                merged[position] = label
            elif merged[position] != label:
                self._union((int(merged[position]), label))
        assert len(merged) == size
        self.factors.add(factors[chosen].tobytes())
        self._set(factors[chosen], merged)
        self._set(whole, merged[where])

    def _fitting(self, product: Product, table: Ids, factors: tuple[Ids, ...]) -> int:
        """The factor along which the labels of a merged axis lie."""
        best: tuple[bool, int, int] | None = None
        for i, factor in enumerate(factors):
            where = product.where[i]
            low = np.full(len(factor), np.iinfo(np.int64).max)
            high = np.zeros(len(factor), dtype=np.int64)
            np.minimum.at(low, where[table > 0], table[table > 0])
            np.maximum.at(high, where, table)
            if ((low == high) | (high == 0)).all():
                count = np.bincount(where, minlength=len(factor))
                filled = np.bincount(where, weights=table > 0, minlength=len(factor))
                complete = bool(((filled == 0) | (filled == count)).all())
                candidate = (complete, len(factor), i)
                best = candidate if best is None or candidate[:2] > best[:2] else best
        if best is None:
            raise _Conflict
        return best[2]


class _System:
    """All product constraints over atom classes, with an index from class to constraints."""

    def __init__(self, products: list[Product], root: Ids) -> None:
        self.products = products
        self.wholes = [root[product.whole] for product in products]
        self.factors = [tuple(root[factor] for factor in product.factors) for product in products]
        self.scratch = np.zeros(len(root), dtype=np.int64)
        members, owners = [], []
        for index, (whole, factors) in enumerate(zip(self.wholes, self.factors, strict=True)):
            for array in (whole, *factors):
                unique = np.unique(array)
                members.append(unique)
                owners.append(np.full(len(unique), index))
        flat, owner = np.concatenate(members), np.concatenate(owners)
        order = np.argsort(flat, kind="stable")
        self._owner = owner[order]
        self.involved, starts = np.unique(flat[order], return_index=True)
        self._bounds = np.append(starts, len(flat))

    def touching(self, roots: Ids) -> list[int]:
        """Constraints in which one of these classes stands."""
        at = np.searchsorted(self.involved, roots)
        at = at[(at < len(self.involved)) & (self.involved[np.minimum(at, len(self.involved) - 1)] == roots)]
        found = [self._owner[self._bounds[i] : self._bounds[i + 1]] for i in at]
        return np.unique(np.concatenate(found)).tolist() if found else []


def solve(products: list[Product], root: Ids, computed: NDArray[np.bool_]) -> tuple[list[Family], Ids]:
    """Families that satisfy every product constraint.

    Args: products: The constraints. root: Class of each atom, shape [atoms]. computed: For each class, whether some
        operator computes along it, rather than only moving it. Factors that are only moved (a channel shuffle) become
        a family only where nothing else describes the merged axis.

    Returns:
        The families, and all classes that some constraint mentions (those in no family stay).
    """
    if not products:
        return [], np.empty(0, dtype=np.int64)
    system = _System(products, root)
    merged = {whole.tobytes() for whole in system.wholes}
    seeds: dict[bytes, tuple[bool, int, Ids, list[Ids]]] = {}
    for whole, factors in zip(system.wholes, system.factors, strict=True):
        for factor in factors:
            key = factor.tobytes()
            if key not in merged:
                named = bool(computed[factor].any())
                known = seeds.get(key, (False, 0, factor, []))
                seeds[key] = (known[0] or named, len(factor), factor, [*known[3], whole])
    families: list[Family] = []
    done: set[bytes] = set()
    described = np.zeros(len(root), dtype=bool)
    for key, (named, _, factor, wholes) in sorted(seeds.items(), key=lambda s: (not s[1][0], -s[1][1])):
        if key in done or (not named and all(described[whole].all() for whole in wholes)):
            continue
        labelling = _Labelling(system, factor)
        try:
            family = labelling.spread()
        except _Conflict:
            continue
        done |= labelling.factors | {key}
        families.append(family)
        described[family.roots] = True
    return families, system.involved
