"""How the forward pass reads a tensor: which operator brings it together with activations, and in which role.

A weight may pass through views, norms of weights or casts first. What counts is the first operator that has both it
and a value that depends on the network's input. That operator's row in the rule table says what the tensor is, its
argument name says which part it plays, and the groups on its operands and its result say which of the tensor's axes it
sums over and which it hands on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from metaprune.graphs import operators, structure
from metaprune.graphs.cost import macs_by_node
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.rules import attention, contraction, movement, normalisation, pointwise, recurrent, selection
from metaprune.graphs.rules.rule import Rule

FAMILIES = ("none", "sum", "recurrent", "norm", "lookup", "attention", "move", "pointwise", "other")
ARGUMENTS = ("other", "weight", "bias", "running_mean", "running_var")

_TABLES: Mapping[str, Mapping[str, Rule]] = {
    "sum": contraction.ROWS,
    "recurrent": recurrent.ROWS,
    "norm": normalisation.ROWS,
    "lookup": selection.ROWS,
    "attention": attention.ROWS,
    "move": movement.ROWS,
    "pointwise": pointwise.ROWS,
}


@dataclass(frozen=True)
class Reading:
    """The operator at which a tensor meets an activation.

    Attributes:
        node: Its node; empty when the tensor meets none.
        family: Member of `FAMILIES`: what the operator does; `none` when the tensor meets no activation.
        argument: Member of `ARGUMENTS`: the operator's argument that the tensor enters.
        depth: Sums on the longest path from an input to the operator, itself included, over the most of all nodes.
        share: The operator's share of the network's multiply-adds.
        operands: Numbers of the groups on the axes of its activations.
        results: Numbers of the groups on the axes of its results.
    """

    node: str = ""
    family: str = "none"
    argument: str = "other"
    depth: float = 0.0
    share: float = 0.0
    operands: frozenset[int] = frozenset()
    results: frozenset[int] = frozenset()

    @property
    def sums(self) -> bool:
        """Whether the operator multiplies and sums."""
        return self.family in ("sum", "recurrent")


def read_tensors(graph: Graph) -> dict[str, Reading]:
    """How each tensor of a graph's table is read, by name; the first reading counts."""
    depths, macs = _depths(graph), macs_by_node(graph)
    deepest, total = max(1, *depths.values(), 0), max(1.0, sum(macs.values()))
    found = dict.fromkeys(graph.tensors, Reading())
    for node in graph.nodes.values():
        if node.op != "tensor" or found[node.args[0]].node:
            continue
        meeting = _meeting(graph, node)
        if meeting is not None:
            at, through = meeting
            bound = operators.bind(at.op, at.args, dict(at.kwargs))
            activations = [
                name for name in _tensors(graph, at) if graph.coupling.flow.is_activation(structure.Ref(name))
            ]
            found[node.args[0]] = Reading(
                at.name,
                family(at.op),
                _argument(bound, through),
                depths[at.name] / deepest,
                macs.get(at.name, 0.0) / total,
                frozenset(n for name in activations for n in _groups(graph, graph.nodes[name])),
                frozenset(_groups(graph, at)),
            )
    return found


def family(op: str) -> str:
    """What an operator does, as the rule table that it stands in; a member of `FAMILIES`."""
    for name, rows in _TABLES.items():
        rule = rows.get(op) or rows.get(op.rpartition(".")[0])
        if rule is not None:
            return name if rule.macs or name != "sum" else "lookup"  # an embedding picks, it multiplies nothing
    return "pointwise" if operators.is_pointwise(op) else "other"


def _depths(graph: Graph) -> dict[str, int]:
    """Sums on the longest path from an input to each node, itself included."""
    depths: dict[str, int] = {}
    for node in graph.nodes.values():
        own = node.op not in ("input", "tensor") and family(node.op) in ("sum", "recurrent")
        depths[node.name] = max((depths[name] for name in node.refs()), default=0) + own
    return depths


def _meeting(graph: Graph, tensor: Node) -> tuple[Node, frozenset[str]] | None:
    """The first node that reads a tensor, or what is made of tensors alone, together with an activation.

    Returns:
        The node, and the names under which the tensor reaches it; None when there is no such node.
    """
    flow = graph.coupling.flow
    derived, pending = {tensor.name}, [tensor.name]
    meetings: set[str] = set()
    while pending:
        for name in graph.users[pending.pop()]:
            others = [other for other in _tensors(graph, graph.nodes[name]) if other not in derived]
            if any(flow.is_activation(structure.Ref(other)) for other in others):
                meetings.add(name)
            elif name not in derived:
                derived.add(name)
                pending.append(name)
    first = next((node for node in graph.nodes.values() if node.name in meetings), None)
    return None if first is None else (first, frozenset(derived))


def _tensors(graph: Graph, node: Node) -> Iterator[str]:
    """The tensor values that a node reads."""
    return (name for name in dict.fromkeys(node.refs()) if isinstance(graph.nodes[name].meta, Meta))


def _argument(bound: Mapping[str, object], through: frozenset[str]) -> str:
    for name, value in bound.items():
        if name in ARGUMENTS and isinstance(value, structure.Ref) and value.name in through:
            return name
    return "other"


def _groups(graph: Graph, node: Node) -> Iterator[int]:
    """Numbers of the groups on the axes of a node's values."""
    coupling = graph.coupling
    for value in coupling.values(node):
        for axis in value:
            for units in coupling.units(axis):
                yield from (n for n in np.unique(coupling.owner[units[units >= 0]]).tolist() if n >= 0)
