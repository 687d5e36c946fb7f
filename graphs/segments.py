"""Segments: a graph in parts at places where one value is all that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs import structure
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Meta, Node, Signature, live_nodes, verify
from metaprune.graphs.structure import Ref


@dataclass(frozen=True)
class Segment:
    """One part of a graph.

    Attributes:
        graph: The part as a network of its own. Its input node carries the name of the node that feeds it, its tensors
            are those of the whole graph; what meets its input or its output is pinned there.
        source: The node whose value it reads; empty for the first part, which reads the graph's inputs.
        end: The node whose value it gives; empty for the last part, which gives the graph's outputs.
    """

    graph: Graph
    source: str
    end: str


def narrow_cuts(graph: Graph) -> list[str]:
    """Nodes whose value, a batch of floating-point samples, is all that later nodes need of the inputs, in order.

    What depends on no input, such as a transposed weight, does not count: every part can compute it.
    """
    fed = _fed(graph)
    last: dict[str, int] = {}
    order = list(graph.nodes)
    for position, name in enumerate(order):
        last.update((ref, position) for ref in graph.nodes[name].refs() if ref in fed)
    outputs = set(structure.refs(graph.signature.output))
    last.update((ref, len(order)) for ref in outputs if ref in fed)
    found: list[str] = []
    alive: set[str] = set()
    for position, name in enumerate(order):
        if name in fed and last.get(name, -1) > position:
            alive.add(name)
        alive = {other for other in alive if last[other] > position}
        if len(alive) == 1:
            (only,) = alive
            if only not in outputs and _is_batch(graph, graph.nodes[only]) and found[-1:] != [only]:
                found.append(only)
    return found


def places(graph: Graph, cuts: Sequence[str]) -> NDArray[np.int64]:
    """The first and the last part in which each group plays a role, shape [groups, 2]; -1 where it plays none."""
    part, fed = _parts(graph, cuts), _fed(graph)
    found = np.full((len(graph.groups), 2), -1, dtype=np.int64)
    coupling = graph.coupling
    for name in fed:
        values = [graph.nodes[name], *(graph.nodes[ref] for ref in graph.nodes[name].refs() if ref not in fed)]
        groups = [
            coupling.owner[units[units >= 0]]
            for node in values
            for axes in coupling.values(node)
            for axis in axes
            for units in coupling.units(axis)
        ]
        own = np.unique(np.concatenate(groups)) if groups else np.empty(0, dtype=np.int64)
        own = own[own >= 0]
        found[own, 0] = np.where(found[own, 0] < 0, part[name], np.minimum(found[own, 0], part[name]))
        found[own, 1] = np.maximum(found[own, 1], part[name])
    return found


def segments(graph: Graph, cuts: Sequence[str]) -> list[Segment]:
    """The parts between narrow cuts.

    Args:
        graph: The graph.
        cuts: Names out of `narrow_cuts`, in its order; n of them make n + 1 parts.

    Raises:
        OptionError: A name is no narrow cut.
    """
    known = narrow_cuts(graph)
    if any(name not in known for name in cuts) or sorted(cuts, key=known.index) != list(cuts):
        raise OptionError(f"cuts: {list(cuts)} are not narrow cuts of the graph in their order")
    examples: dict[str, torch.Tensor] = {}

    def watch(node: Node, value: Any) -> None:
        if node.name in cuts:
            examples[node.name] = value

    with torch.no_grad():
        execute(graph, graph.values, graph.example, watch=watch)
    ends = [*cuts, ""]
    return [
        Segment(_part(graph, source, end, examples), source, end) for source, end in zip(["", *cuts], ends, strict=True)
    ]


def _part(graph: Graph, source: str, end: str, examples: Mapping[str, torch.Tensor]) -> Graph:
    """The part of a graph from the value of one node to that of another."""
    nodes = dict(graph.nodes)
    signature = graph.signature
    if source:
        fed = graph.nodes[source]
        inputs = {name for name, node in nodes.items() if node.op == "input"}
        nodes = {name: node for name, node in nodes.items() if name not in inputs}
        nodes[source] = Node(source, "input", (), {}, fed.meta)
        signature = Signature(("features",), ((Ref(source),), {}), signature.output)
    if end:
        signature = Signature(signature.names, signature.spec, Ref(end))
    nodes = live_nodes(nodes, structure.refs(signature.output))
    read = {node.args[0] for node in nodes.values() if node.op == "tensor"}
    tensors = {name: info for name, info in graph.tensors.items() if name in read}
    aliases = {alias for info in tensors.values() for alias in info.aliases}
    values = {name: value for name, value in graph.values.items() if name in aliases}
    example = {source: examples[source]} if source else dict(graph.example)
    part = Graph(nodes, tensors, signature, values, None, example, graph.batch)
    verify(part)
    return part


def _parts(graph: Graph, cuts: Sequence[str]) -> dict[str, int]:
    """Number of the part that computes each node; what follows a cut in the order of nodes is beyond it."""
    order = list(graph.nodes)
    ends = [order.index(name) for name in cuts]
    return {name: int(np.searchsorted(ends, position)) for position, name in enumerate(order)}


def _fed(graph: Graph) -> set[str]:
    """Nodes that depend on an input."""
    found: set[str] = set()
    for node in graph.nodes.values():
        if node.op == "input" or any(ref in found for ref in node.refs()):
            found.add(node.name)
    return found


def _is_batch(graph: Graph, node: Node) -> bool:
    """Whether a computed value has one row for each sample."""
    sizes = {
        other.meta.shape[0]
        for other in graph.nodes.values()
        if other.op == "input" and isinstance(other.meta, Meta) and other.meta.batched[:1] == (True,)
    }
    meta = node.meta
    return (
        node.op != "input"
        and isinstance(meta, Meta)
        and meta.dtype.is_floating_point
        and meta.batched[:1] == (True,)
        and {meta.shape[0]} == sizes
    )
