"""Variables of a search space: one decision each, with levels that run from the smallest network to the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import LoadError

Counts = NDArray[np.float64]
Levels = NDArray[np.int64]


class Variable(Protocol):
    """One decision. A level is a number from 0, the least network, to `levels - 1`, where nothing is taken away.

    What a level of one variable costs may depend on all the others, so a variable states kept counts and no cost.
    """

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def levels(self) -> int:
        """Number of levels."""

    @property
    def fractions(self) -> Counts:
        """What each level keeps of the variable's own units, ascending to 1, shape [levels]."""

    def write(self, levels: Levels, kept: Counts) -> None:
        """Writes what stays at these levels, shape [plans], into kept counts, shape [plans, groups]."""

    def edit(self, level: int) -> Mapping[str, tuple[int, ...]]:
        """The units that stay, by group, where any go."""

    def nearest(self, keep: Mapping[str, tuple[int, ...]]) -> int:
        """The level that comes nearest to a plan's edits."""

    def to_dict(self) -> dict[str, Any]:
        """The variable as plain data, under its kind in `READERS`."""


@dataclass(frozen=True)
class Width:
    """How many units of a group stay.

    Attributes:
        group: Name of the group.
        number: Its index among the groups of the graph.
        choices: Legal kept counts, ascending; the last is the whole group.
        order: Its units, the best first. A choice keeps a prefix, so a smaller choice never brings a unit back.
    """

    group: str
    number: int
    choices: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def name(self) -> str:
        """The group's."""
        return self.group

    @property
    def levels(self) -> int:
        """Number of choices."""
        return len(self.choices)

    @property
    def fractions(self) -> Counts:
        """Kept fractions, shape [levels]."""
        return self._counts / len(self.order)

    @cached_property
    def _counts(self) -> Counts:
        return np.array(self.choices, dtype=float)

    def write(self, levels: Levels, kept: Counts) -> None:
        """Puts the choices at `levels`, shape [plans], into the group's column of `kept`."""
        kept[:, self.number] = self._counts[levels]

    def edit(self, level: int) -> Mapping[str, tuple[int, ...]]:
        """The best units of the group; nothing where all of them stay."""
        count = self.choices[level]
        return {self.group: tuple(sorted(self.order[:count]))} if count < len(self.order) else {}

    def nearest(self, keep: Mapping[str, tuple[int, ...]]) -> int:
        """The choice whose count is nearest to the plan's, the smaller of two; which units those are does not enter."""
        count = len(keep[self.group]) if self.group in keep else len(self.order)
        return int(np.argmin(np.abs(self._counts - count)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "width",
            "group": self.group,
            "number": self.number,
            "choices": list(self.choices),
            "order": list(self.order),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Width:
        """The variable in plain data; raises `LoadError` where that is not a ladder over an order of units."""
        group, number, choices, order = (data.get(key) for key in ("group", "number", "choices", "order"))
        whole = isinstance(order, list) and sorted(map(str, order)) == sorted(map(str, range(len(order))))
        if not isinstance(group, str) or type(number) is not int or not isinstance(choices, list) or not whole:
            raise LoadError(f"search space: the width of group {group!r} is damaged")
        counts = [count for count in choices if type(count) is int]
        if counts != sorted(set(choices)) or counts[:1] < [1] or counts[-1:] != [len(order or [])]:
            raise LoadError(f"search space: the choices of group {group!r} are no ladder up to its size")
        return Width(group, number, tuple(counts), tuple(int(unit) for unit in order or ()))


READERS: dict[str, Callable[[Mapping[str, Any]], Variable]] = {"width": Width.from_dict}


def read(data: Any) -> Variable:
    """The variable in plain data; raises `LoadError` for an unknown kind."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind not in READERS:
        raise LoadError(f"search space: a variable of kind {kind!r} is unknown")
    return READERS[kind](data)


def ladder(size: int, minimum: int, step: int, levels: int) -> tuple[int, ...]:
    """At most `levels` kept counts from the least legal one to `size`, ascending and about evenly spaced.

    Args:
        size: Units of the group; always among the counts.
        minimum: The least legal count; always among them.
        step: The counts between are multiples of this.
        levels: At least 2.
    """
    legal = np.unique(np.clip(np.arange(0, size + step, step), minimum, size))
    chosen = np.unique(np.round(np.linspace(0, len(legal) - 1, min(levels, len(legal)))).astype(np.int64))
    return tuple(legal[chosen].tolist())


def best_first(scores: Sequence[float] | Counts) -> tuple[int, ...]:
    """Units in descending order of their scores, equal ones by number."""
    values = np.asarray(scores)
    return tuple(np.lexsort((np.arange(len(values)), -values)).tolist())
