"""Which parameters are weights: what the network multiplies and sums with."""

from __future__ import annotations

from metaprune.graphs import operators, structure
from metaprune.graphs.functionalise import is_view
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.rules import contraction, lookup, recurrent

_SUMS = contraction.ROWS | recurrent.ROWS


def linear_weights(graph: Graph) -> list[str]:
    """Parameters of two dimensions or more that only serve operators which multiply and sum.

    Such as the weights of convolutions, transposed ones too, matrix products, recurrent layers and einsum, whether they
    are read as they are or through a view. What is looked up (embeddings), added or returned as well is left out.

    Args:
        graph: The network.

    Returns:
        Names in the graph's tensor table, in order of first use.
    """
    outputs = frozenset(structure.refs(graph.signature.output))
    found: dict[str, bool] = {}
    for node in graph.nodes.values():
        if node.op == "tensor":
            info = graph.tensors[node.args[0]]
            if info.kind == "parameter" and len(info.shape) > 1 and info.dtype.is_floating_point:
                found[info.name] = found.get(info.name, True) and _multiplies(graph, node, outputs)
    return [name for name, whole in found.items() if whole]


def _multiplies(graph: Graph, node: Node, outputs: frozenset[str]) -> bool:
    """Whether all that reads a value multiplies and sums with it, views of it looked through."""
    users = [graph.nodes[name] for name in graph.users[node.name]]
    if not users or node.name in outputs:
        return False
    return all(_multiplies(graph, u, outputs) if _is_view(u) else _is_factor(u, node.name) for u in users)


def _is_view(node: Node) -> bool:
    return node.op.startswith("aten.") and is_view(node.op) and len(set(node.refs())) == 1


def _is_factor(node: Node, value: str) -> bool:
    """Whether an operator contracts over a value. A bias is added; so is `self` of operators that scale it by beta."""
    rule = lookup(node.op)
    if rule is None or not rule.macs or node.op.rpartition(".")[0] not in _SUMS:
        return False
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    added = ("bias", "self") if "beta" in bound else ("bias",)
    return all(value not in structure.refs(bound[name]) for name in added if bound.get(name) is not None)
