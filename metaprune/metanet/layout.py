"""Where every number of a network's tensors stands: which units own it, as dense blocks and vectors.

A tensor with units on both of the sides of a sum is a *block* [C_out, C_in, K]; one with units on one side is a
*vector* [C, K]; what no unit owns is the *rest* [K]. Which axis is which follows from the groups' index arrays and from
how the forward pass reads the tensor (see `metaprune.metanet.reading`), never from an architecture: a concatenation is
an axis whose ranges belong to several groups, a flattening one on which a unit stands several times, heads times head
dimensions one whose positions belong to two units at once, a grouped convolution one of these on its outer side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.graphs.ir import Graph, TensorInfo
from metaprune.metanet.reading import Reading, read_tensors

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class UnitSet:
    """The units of one group of the graph; pinned groups (input channels, classes) are fixed axes.

    Attributes:
        name: The group's name.
        kind: The group's kind.
        size: Number of units.
        start: Number of its first unit, counted over all sets.
        free: Whether units of it can go.
        granularity: Most positions of one axis that go with a unit, such as the head dimension for heads.
        share: Part of the network's multiply-adds that a single unit's removal saves; 0 for a pinned group.
        first: Relative depth at which a tensor of the units is first read, 0 to 1.
        last: Relative depth at which one is last read.
    """

    name: str
    kind: str
    size: int
    start: int
    free: bool
    granularity: int
    share: float
    first: float
    last: float


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a tensor: some of its axes, flattened row by row into one.

    Attributes:
        dims: The tensor's dimensions.
        units: Numbers of the units that own each position, -1 for none, shape [owners, positions]. A position with
            several owners (head and head dimension) stays only when all of them do.
    """

    dims: tuple[int, ...]
    units: Tensor

    @property
    def size(self) -> int:
        """Number of positions."""
        return int(self.units.shape[1])


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of the network and how it is seen.

    Attributes:
        name: The tensor's name.
        shape: Its shape.
        sides: Outputs and inputs of a block, the one side of a vector, nothing for the rest.
        reading: How the forward pass reads it.
    """

    name: str
    shape: tuple[int, ...]
    sides: tuple[Side, ...]
    reading: Reading

    @property
    def kernel(self) -> tuple[int, ...]:
        """The dimensions on no side, such as kernel positions."""
        taken = {dim for side in self.sides for dim in side.dims}
        return tuple(dim for dim in range(len(self.shape)) if dim not in taken)

    @property
    def order(self) -> tuple[int, ...]:
        """All dimensions in the order of `view`."""
        return (*(dim for side in self.sides for dim in side.dims), *self.kernel)

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as [C_out, C_in, K], [C, K] or [K]; of the same storage where strides allow it."""
        return tensor.permute(self.order).reshape(*(side.size for side in self.sides), -1)

    def restore(self, value: Tensor) -> Tensor:
        """The inverse of `view`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.reshape([self.shape[dim] for dim in self.order]).permute(inverse).contiguous()


@dataclass(frozen=True, eq=False)
class Layout:
    """All units and tensors of a network.

    Attributes:
        units: Unit sets, in the order of the graph's groups.
        blocks: Parts with two sides.
        vectors: Parts with one side.
        rest: Parts without units.
    """

    units: tuple[UnitSet, ...]
    blocks: tuple[Part, ...]
    vectors: tuple[Part, ...]
    rest: tuple[Part, ...]

    @cached_property
    def parts(self) -> dict[str, Part]:
        """All parts by tensor name."""
        return {part.name: part for part in (*self.blocks, *self.vectors, *self.rest)}

    @property
    def count(self) -> int:
        """Number of units in all sets."""
        return sum(units.size for units in self.units)

    @cached_property
    def outputs(self) -> Incidence:
        """The output sides of all blocks, one after another."""
        return Incidence([block.sides[0] for block in self.blocks], self.count)

    @cached_property
    def inputs(self) -> Incidence:
        """The input sides of all blocks, one after another."""
        return Incidence([block.sides[1] for block in self.blocks], self.count)

    @cached_property
    def lines(self) -> Incidence:
        """The sides of all vectors, one after another."""
        return Incidence([vector.sides[0] for vector in self.vectors], self.count)


class Incidence:
    """Which units own which positions of a list of sides, as a sparse matrix in coordinates.

    Args:
        sides: The sides; their positions are numbered through.
        units: Number of units.

    Attributes:
        positions: Number of positions.
        units: Number of units.
        sizes: Number of positions of each side.
        position: Position of each entry, shape [entries].
        unit: Unit of each entry, shape [entries].
        weights: What states are multiplied by at each entry on their way to positions and back, shape [entries] each.
    """

    def __init__(self, sides: Sequence[Side], units: int) -> None:
        self.units, self.sizes = units, [side.size for side in sides]
        self.positions = sum(self.sizes)
        where, who, which = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)], []
        start = 0
        for number, side in enumerate(sides):
            column, at = torch.nonzero(side.units >= 0, as_tuple=True)
            where.append(at + start)
            who.append(side.units[column, at])
            which.append(torch.full_like(at, number))
            start += side.size
        self.position, self.unit = torch.cat(where), torch.cat(who)
        owners = torch.bincount(self.position, minlength=self.positions).double()
        pair = torch.cat([torch.empty(0, dtype=torch.long), *which]) * units + self.unit  # side and unit as one number
        distinct, place, standing = np.unique(pair.numpy(), return_inverse=True, return_counts=True)
        on_sides = np.bincount(distinct % max(1, units), minlength=units)
        back = torch.from_numpy(1.0 / (standing[place] * np.sqrt(on_sides[self.unit.numpy()])))
        self.weights = owners[self.position].rsqrt(), back

    def spread(self, states: Tensor) -> Tensor:
        """States of the positions: the sum of their owners' states over the root of their number.

        Args:
            states: Of the units, shape [units, width].

        Returns:
            Shape [positions, width]; zero where nobody owns a position.
        """
        position, unit, weight = (t.to(states.device) for t in (self.position, self.unit, self.weights[0]))
        entries = states[unit] * weight.to(states.dtype)[:, None]
        return states.new_zeros(self.positions, states.shape[1]).index_add(0, position, entries)

    def collect(self, messages: Tensor) -> Tensor:
        """What arrives at the units: on each side the mean over a unit's positions, summed over the root of the sides.

        Args:
            messages: Of the positions, shape [positions, width].

        Returns:
            Shape [units, width].
        """
        position, unit, weight = (t.to(messages.device) for t in (self.position, self.unit, self.weights[1]))
        entries = messages[position] * weight.to(messages.dtype)[:, None]
        return messages.new_zeros(self.units, messages.shape[1]).index_add(0, unit, entries)


def lay_out(graph: Graph) -> Layout:
    """The layout of a traced network."""
    readings = read_tensors(graph)
    starts = np.cumsum([0, *(group.size for group in graph.groups)]).tolist()
    owners = _owners(graph, starts)
    parts: dict[int, list[Part]] = {0: [], 1: [], 2: []}
    for info in graph.tensors.values():
        part = _part(graph, info, readings[info.name], owners)
        parts[len(part.sides)].append(part)
    return Layout(_unit_sets(graph, readings, starts), tuple(parts[2]), tuple(parts[1]), tuple(parts[0]))


def _unit_sets(graph: Graph, readings: Mapping[str, Reading], starts: Sequence[int]) -> tuple[UnitSet, ...]:
    costs = graph.coupling.costs
    whole = costs.sizes
    macs = costs.evaluate("macs", np.concatenate([whole[None], whole - np.eye(len(whole))])) if len(whole) else whole
    found = []
    for number, group in enumerate(graph.groups):
        depths = [readings[part.tensor].depth for part in group.slices if readings[part.tensor].node] or [0.0]
        free = not group.pinned and group.size > group.minimum
        found.append(
            UnitSet(
                group.name,
                group.kind,
                group.size,
                starts[number],
                free,
                max(part.index.shape[1] for part in group.slices),
                float(macs[0] - macs[number + 1]) / max(1.0, float(macs[0])) if free else 0.0,
                min(depths),
                max(depths),
            )
        )
    return tuple(found)


@dataclass(eq=False)
class _Owners:
    """Who owns an axis: the unit at each position in as few arrays as it takes, and the numbers of the groups."""

    rows: list[Ids] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)


def _owners(graph: Graph, starts: Sequence[int]) -> dict[tuple[str, int], _Owners]:
    """The owners of each tensor axis that has any."""
    found: dict[tuple[str, int], _Owners] = {}
    for number, group in enumerate(graph.groups):
        for part in group.slices:
            own = found.setdefault((part.tensor, part.dim), _Owners())
            row = next((row for row in own.rows if (row[part.index] < 0).all()), None)
            if row is None:
                row = np.full(graph.tensors[part.tensor].shape[part.dim], -1, dtype=np.int64)
                own.rows.append(row)
            row[part.index] = starts[number] + np.arange(group.size)[:, None]
            own.groups.add(number)
    return found


def _part(graph: Graph, info: TensorInfo, reading: Reading, owners: Mapping[tuple[str, int], _Owners]) -> Part:
    owned = {dim: owners[info.name, dim] for dim in range(len(info.shape)) if (info.name, dim) in owners}
    outer, inner = _sides(graph, {dim: own.groups for dim, own in owned.items()}, reading)
    sides = tuple(_side(info, dims, owned) for dims in (outer, inner) if dims)
    return Part(info.name, info.shape, sides, reading)


def _sides(graph: Graph, groups: Mapping[int, set[int]], reading: Reading) -> tuple[list[int], list[int]]:
    """The owned dimensions that stand for outputs and those that stand for inputs; no inputs for a vector.

    A sum's outputs are the axes with a group that only its result has. An axis whose groups are both on an operand and
    on the result is handed through, such as a stack of matrices: it fills a side that would be empty, else it goes
    with the outputs. All other axes are summed over. A tensor that is not multiplied and summed with (a table, a
    shift) belongs to its last axis that can be pruned, or just its last.

    Args:
        graph: The network.
        groups: Numbers of the groups on each owned dimension of the tensor.
        reading: How the tensor is read.
    """
    if not reading.sums or len(groups) < 2:
        free = [dim for dim, numbers in groups.items() if any(not graph.groups[n].pinned for n in numbers)]
        return (free or list(groups))[-1:], []
    outer = [dim for dim, numbers in groups.items() if numbers & (reading.results - reading.operands)]
    passed = [dim for dim, n in groups.items() if dim not in outer and n <= reading.results & reading.operands]
    inner = [dim for dim in groups if dim not in (*outer, *passed)]
    if not outer:
        outer, passed = passed[:1], passed[1:]
    if not inner:
        inner, passed = passed, []
    if not (outer and inner):
        every = [*groups]
        return every[:1], every[1:]
    return sorted([*outer, *passed]), inner


def _side(info: TensorInfo, dims: Sequence[int], owned: Mapping[int, _Owners]) -> Side:
    sizes = [info.shape[dim] for dim in dims]
    index = np.indices(sizes).reshape(len(sizes), prod(sizes))
    rows = [row[at] for dim, at in zip(dims, index, strict=True) for row in owned[dim].rows]
    return Side(tuple(dims), torch.from_numpy(np.stack(rows)))
