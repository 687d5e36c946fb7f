"""A network run again with some of it changed: what does not depend on the change is not computed twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from metaprune.graphs.execute import execute
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph, Node


class Rerun:
    """The values of all nodes of a graph on one batch, and what becomes of them under gates or other tensors.

    All values are held, so memory is that of the activations of the batch without any freed.

    Args:
        graph: The graph.
        leaves: Values of its input nodes.

    Attributes:
        output: The network's output, in its original structure.
    """

    def __init__(self, graph: Graph, leaves: Mapping[str, torch.Tensor]) -> None:
        self._graph = graph
        self._leaves = leaves
        self._dense: dict[str, Any] = {}

        def watch(node: Node, value: Any) -> None:
            self._dense[node.name] = value

        self.output = execute(graph, graph.values, leaves, watch=watch)

    def __call__(
        self, affected: Collection[str], gates: Gates | None = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Any:
        """The output of the changed network.

        Args:
            affected: The nodes to compute, as `affected` finds them for these gates and tensors.
            gates: Gates on units.
            tensors: Tensors that are not the graph's own, by name.
        """
        known = {name: value for name, value in self._dense.items() if name not in affected}
        values = {**self._graph.values, **tensors} if tensors else self._graph.values
        return execute(self._graph, values, self._leaves, gates, known=known)


def affected(graph: Graph, gates: Gates | None = None, tensors: Collection[str] = ()) -> frozenset[str]:
    """Nodes whose values may change under gates and other tensors: those they act on, and all that read them."""
    own = {alias: name for name, info in graph.tensors.items() for alias in info.aliases}
    changed = {own[name] for name in tensors}
    found = set(gates.nodes) if gates is not None else set()
    for node in graph.nodes.values():
        if any(name in found for name in node.refs()) or (node.op == "tensor" and own[node.args[0]] in changed):
            found.add(node.name)
    return frozenset(found)
