"""One network for all rescalings that a batch norm undoes.

Batch norm takes out the scale of each of its channels. The output c of a layer in front of one may be multiplied by any
s > 0 if the statistics go along, W_c -> s W_c, b_c -> s b_c, mean_c -> s mean_c, var_c -> s^2 var_c, and the network
computes the same but for the norm's epsilon. Of all these networks the canonical one has W_c of unit root mean square.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.linear import Linear, linear_layers, readers
from metaprune.graphs.structure import Ref, refs
from metaprune.metanet.weight_graph import WeightGraph


def canonical(graph: WeightGraph) -> WeightGraph:
    """The weight graph with every output that a batch norm alone reads scaled to weights of unit root mean square.

    Outputs whose weights are all zero stay as they are.
    """
    tensors: dict[str, Tensor] = {}
    for layer, norm in _normed(graph.graph):
        dim = 1 if layer.transposed else 0
        weight = _tensor(graph, layer.weight)
        scale = weight.square().mean([d for d in range(weight.ndim) if d != dim]).sqrt()
        scale = scale.where(scale > 0, 1.0)  # [outputs]
        shape = [1] * weight.ndim
        shape[dim] = -1
        tensors[layer.weight] = weight / scale.reshape(shape)
        for name, factor in ((layer.bias, scale), (norm["running_mean"], scale), (norm["running_var"], scale.square())):
            if name:
                tensors[name] = _tensor(graph, name) / factor
    return graph.with_tensors(tensors)


def _tensor(graph: WeightGraph, name: str) -> Tensor:
    return graph.layout.parts[name].restore(graph.values[name])


def _normed(graph: Graph) -> list[tuple[Linear, dict[str, str]]]:
    """Linear layers that only a batch norm over their outputs reads, with the names of its statistics or empty ones."""
    count, outputs = readers(graph), frozenset(refs(graph.signature.output))
    found = []
    for name, layer in linear_layers(graph).items():
        users = [graph.nodes[user] for user in graph.users[name]]
        if len(users) != 1 or users[0].base != "batch_norm" or name in outputs:
            continue
        bound = operators.bind(users[0].op, users[0].args, dict(users[0].kwargs))
        of_channels = layer.stride or len(graph.nodes[name].shape) == 2
        names = {key: _name(graph, bound[key]) for key in ("running_mean", "running_var")}
        if of_channels and bound["input"] == Ref(name) and all(n is None or count[n] == 1 for n in names.values()):
            found.append((layer, {key: n or "" for key, n in names.items()}))
    return found


def _name(graph: Graph, value: Any) -> str | None:
    """Name of the tensor that an argument is; None when there is none."""
    node: Node | None = graph.nodes[value.name] if isinstance(value, Ref) else None
    return None if node is None else str(node.args[0])
