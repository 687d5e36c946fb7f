"""Other views of a weight graph: for torch_geometric, and for a look at how a network is wired."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from metaprune.metanet.layout import Part, Side, UnitSet

if TYPE_CHECKING:
    import networkx as nx

    from metaprune.metanet.weight_graph import WeightGraph


class Edges(NamedTuple):
    """The edges of a block from one unit set to another, one for each position of a unit on either side.

    Attributes:
        source: The unit set on the inputs.
        target: The unit set on the outputs.
        units: Input and output unit within their sets, shape [2, edges].
        positions: Input and output position within the block, shape [2, edges].
    """

    source: UnitSet
    target: UnitSet
    units: Tensor
    positions: Tensor


def edges(block: Part, units: tuple[UnitSet, ...]) -> Iterator[Edges]:
    """All edges of a block, for each pair of unit sets that it joins, outputs first."""
    outputs, inputs = (_standing(side, units) for side in block.sides)
    for target, out, at_output in outputs:
        for source, into, at_input in inputs:
            row, column = (i.flatten() for i in torch.meshgrid(*map(_numbers, (out, into)), indexing="ij"))
            pairs = torch.stack([into[column], out[row]])
            yield Edges(source, target, pairs, torch.stack([at_input[column], at_output[row]]))


def _numbers(values: Tensor) -> Tensor:
    return torch.arange(len(values))


def _standing(side: Side, units: tuple[UnitSet, ...]) -> list[tuple[UnitSet, Tensor, Tensor]]:
    """For each unit set on a side, its units and their positions, by unit and then by position."""
    found = []
    for one in units:
        inside = (side.units >= one.start) & (side.units < one.start + one.size)
        if bool(inside.any()):
            column, position = torch.nonzero(inside, as_tuple=True)
            unit = side.units[column, position] - one.start
            order = torch.argsort(unit * side.size + position)
            found.append((one, unit[order], position[order]))
    return found


def to_hetero(graph: WeightGraph) -> HeteroData:
    """A weight graph as a `torch_geometric.data.HeteroData`.

    Node types are the unit sets. Edge types are (inputs' set, tensor name, outputs' set), with

        edge_index: input and output unit, shape [2, edges];
        edge_attr: the kernel, shape [edges, K];
        position: input and output position within the block, shape [2, edges].

    A vector is stored on each set that stands on it, under its tensor's name: shape [size, positions per unit, K].
    """
    data = HeteroData()
    for one in graph.units:
        data[one.name].num_nodes = one.size
    for vector in graph.vectors:
        value = graph.values[vector.name]
        for one, _, position in _standing(vector.sides[0], graph.units):
            data[one.name][vector.name] = value[position].reshape(one.size, -1, value.shape[1])
    for block in graph.blocks:
        value = graph.values[block.name]
        for found in edges(block, graph.units):
            store = data[found.source.name, block.name, found.target.name]
            store.edge_index, store.position = found.units, found.positions
            store.edge_attr = value[found.positions[1], found.positions[0]]
    return data


def to_networkx(graph: WeightGraph) -> nx.MultiDiGraph:
    """Unit sets as nodes (`kind`, `size`, `free`) and blocks as edges from inputs to outputs, keyed by tensor name.

    An edge's `shape` is that of the block, [C_out, C_in, K]; a block whose sides belong to several sets has an edge for
    each pair of them. Vectors are listed on the nodes (`vectors`).
    """
    import networkx as nx

    view = nx.MultiDiGraph()
    for one in graph.units:
        names = [v.name for v in graph.vectors if any(one is s for s, *_ in _standing(v.sides[0], graph.units))]
        view.add_node(one.name, kind=one.kind, size=one.size, free=one.free, vectors=names)
    for block in graph.blocks:
        outputs, inputs = ([one.name for one, *_ in _standing(side, graph.units)] for side in block.sides)
        shape = tuple(graph.values[block.name].shape)
        view.add_edges_from((source, target, block.name, {"shape": shape}) for source in inputs for target in outputs)
    return view
