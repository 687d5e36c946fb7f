"""Atoms: one integer per position of every axis that could be pruned, tied together by union-find over whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def components(size: int, left: Ids, right: Ids) -> Ids:
    """Connected components of an undirected graph given by its edges.

    Hooking and pointer jumping over arrays (Shiloach and Vishkin, 1982): O((size + edges) log size), no object per
    atom.

    Args:
        size: Number of vertices.
        left: One end of each edge, shape [edges].
        right: The other end, shape [edges].

    Returns:
        Smallest vertex of each vertex's component, shape [size].
    """
    root = np.arange(size, dtype=np.int64)
    while left.size:
        a, b = root[left], root[right]
        apart = a != b
        if not apart.any():
            break
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped
    return root


@dataclass(frozen=True, eq=False)
class Product:
    """A constraint: position p of `whole` stays exactly when, for every factor f, `factors[f][where[f][p]]` stays.

    Attributes:
        whole: Atoms of the merged axis, shape [n].
        factors: Atoms of each factor axis, shape [size of the factor].
        where: For each factor, its index at each position of the merged axis, shape [n].
        op: The operator that merged or split, for messages.
    """

    whole: Ids
    factors: tuple[Ids, ...]
    where: tuple[Ids, ...]
    op: str


class Atoms:
    """Collects atoms, ties, pins and products during one pass over a graph."""

    def __init__(self) -> None:
        self.count = 0
        self.products: list[Product] = []
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._pins: list[tuple[Ids, str]] = []
        self._used: list[Ids] = []
        self._roles: list[tuple[Ids, str]] = []
        self._tied: set[tuple[int, int]] = set()
        self._alive: list[Ids] = []

    def fresh(self, size: int) -> Ids:
        """New atoms, tied to nothing."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def tie(self, a: Ids, b: Ids) -> None:
        """Position by position, `a` and `b` live and die together."""
        if a is b:
            return
        key = (id(a), id(b))
        if key in self._tied:
            return
        self._tied.add(key)
        self._alive += [a, b]
        self._left.append(a)
        self._right.append(b)

    def pin(self, ids: Ids, why: str) -> None:
        """These atoms always stay, and why."""
        if ids.size:
            self._pins.append((ids, why))

    def use(self, ids: Ids) -> None:
        """An operator that computes, not merely moves, reads these atoms."""
        self._used.append(ids)

    def role(self, ids: Ids, role: str) -> None:
        """What these atoms are for some operator, such as `heads`."""
        self._roles.append((ids, role))

    def roots(self) -> Ids:
        """The class of each atom, as the smallest atom in it, shape [count]."""
        empty = np.empty(0, dtype=np.int64)
        left = np.concatenate([empty, *self._left])
        right = np.concatenate([empty, *self._right])
        return components(self.count, left, right)

    def pins(self, root: Ids) -> dict[int, str]:
        """Reason by pinned root; the first reason given wins."""
        reasons: dict[int, str] = {}
        for ids, why in self._pins:
            for r in np.unique(root[ids]).tolist():
                reasons.setdefault(r, why)
        return reasons

    def used(self, root: Ids) -> NDArray[np.bool_]:
        """Whether some operator computes with the class of each atom, shape [count], by root."""
        flags = np.zeros(self.count, dtype=bool)
        for ids in self._used:
            flags[ids] = True
        by_root = np.zeros(self.count, dtype=bool)
        by_root[root[flags]] = True
        return by_root

    def roles(self, root: Ids, order: Sequence[str]) -> NDArray[np.int8]:
        """For each root the strongest role given to one of its atoms, as index into `order` (0 is the weakest)."""
        best = np.zeros(self.count, dtype=np.int8)
        for ids, role in self._roles:
            np.maximum.at(best, root[ids], np.int8(order.index(role)))
        return best
