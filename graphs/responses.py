"""What a linear layer is for: the value it should reproduce once its inputs have been pruned.

A layer's response is its output after its batch normalisation, carried on through reorderings and per-element affine
operators, up to the sum it is one half of (the end of a residual block). At such a sum the layer answers for what the
other half leaves over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor

from metaprune.graphs import operators, structure
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.linear import Linear, readers
from metaprune.graphs.replay import Replay
from metaprune.graphs.structure import Ref

_MOVES = frozenset(
    "view reshape _unsafe_view permute transpose t flatten unflatten squeeze unsqueeze roll flip movedim contiguous "
    "clone alias dropout detach".split()
)
_AFFINE = frozenset({"add", "sub", "mul", "div"})
_TINY = 1e-6


@dataclass(frozen=True)
class Response:
    """Where a layer's work can be judged.

    Attributes:
        layer: The layer.
        norm: The batch normalisation right behind it, of the layer's own channels and with tensors that no other reads;
            empty when there is none.
        steps: Reorderings and affine operators from there to the sum, in order; none when there is no sum.
        target: The node whose value is to be reproduced.
        other: The other half of the sum that the target is; empty when it is no sum.
    """

    layer: Linear
    norm: str
    steps: tuple[str, ...] = ()
    target: str = ""
    other: str = ""

    @property
    def start(self) -> str:
        """The layer's own value: its norm's or, without one, its own."""
        return self.norm or self.layer.node

    def alone(self) -> Response:
        """The same layer judged by its own value."""
        return replace(self, steps=(), target=self.start, other="")

    def wish(self, goal: Tensor, own: Tensor, replay: Replay, batch: int) -> Tensor:
        """The value at the start of the steps that gives the goal at their end, shaped like `own`, the value now.

        Elements that the steps multiply by next to nothing stay as they are.
        """
        if not self.steps:
            return goal
        zeros, ones = torch.zeros_like(own), torch.ones_like(own)
        places = torch.arange(own.numel(), dtype=torch.float64, device=own.device).reshape(own.shape)
        for step, source in zip(self.steps, (self.start, *self.steps), strict=False):
            function = replay.function(step, source)
            zeros, ones = function(batch, zeros), function(batch, ones)
            places = function(batch, places) if replay.graph.nodes[step].base in _MOVES else places
        factor = ones - zeros
        alive = factor.abs() > _TINY * factor.abs().max()
        where = places.long().flatten()
        found = own.flatten().clone()
        found[where[alive.flatten()]] = ((goal - zeros) / factor)[alive]
        return found.reshape(own.shape)


def responses(graph: Graph, layers: Mapping[str, Linear]) -> dict[str, Response]:
    """The response of each layer, by node.

    Where both halves of a sum are layers' responses, the wider layer answers for the sum. A sum whose other half can
    not be computed before the layer is not used.
    """
    outputs, count = frozenset(structure.refs(graph.signature.output)), readers(graph)
    found = {name: _follow(graph, layer, outputs, count) for name, layer in layers.items()}
    order = graph.networkx()
    owners: dict[str, str] = {}
    for name, response in found.items():
        rival = owners.get(response.target)
        if response.other and (rival is None or layers[name].width >= layers[rival].width):
            owners[response.target] = name
    for name, response in found.items():
        if not response.other:
            continue
        if owners[response.target] != name or nx.has_path(order, name, response.other):
            found[name] = response.alone()
        else:
            order.add_edge(response.other, name)
    return found


def norms_behind(graph: Graph, layers: Iterable[Linear]) -> dict[str, str]:
    """The batch normalisation right behind each layer, as in `Response`, empty when there is none, by node."""
    outputs, count = frozenset(structure.refs(graph.signature.output)), readers(graph)
    return {layer.node: _follow(graph, layer, outputs, count).norm for layer in layers}


def _follow(graph: Graph, layer: Linear, outputs: frozenset[str], count: Mapping[str, int]) -> Response:
    """The response of one layer, regardless of others."""
    here, norm, steps = layer.node, "", list[str]()
    while here not in outputs and len(graph.users[here]) == 1:
        node = graph.nodes[graph.users[here][0]]
        if not steps and not norm and _is_norm(graph, node, layer, count):
            norm = node.name
        elif _is_step(graph, node, here):
            steps.append(node.name)
        else:
            other = _other_half(graph, node, here)
            return Response(layer, norm, tuple(steps), node.name, other) if other else Response(layer, norm).alone()
        here = node.name
    return Response(layer, norm).alone()


def _is_norm(graph: Graph, node: Node, layer: Linear, count: Mapping[str, int]) -> bool:
    """Whether an operator is a batch normalisation of a layer's channels, by tensors that it alone reads."""
    if node.base != "batch_norm":
        return False
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    if bound["input"] != Ref(layer.node) or not isinstance(bound["running_mean"], Ref):
        return False
    shape = _shape(graph, layer.node)
    tensors = [graph.nodes[ref].args[0] for ref in node.refs() if graph.nodes[ref].op == "tensor"]
    own = all(count[name] == 1 for name in tensors)
    return own and shape is not None and layer.channel % len(shape) == 1  # a norm's channels are dimension 1


def _is_step(graph: Graph, node: Node, value: str) -> bool:
    """Whether an operator reorders the elements of a value, or is affine in each of them by itself."""
    if node.args[:1] != (Ref(value),) or list(node.refs()).count(value) > 1:
        return False
    if node.base in _MOVES:
        return _elements(graph, node.name) == _elements(graph, value)
    others = [graph.nodes[ref].op for ref in node.refs() if ref != value]
    same = _shape(graph, node.name) == _shape(graph, value)
    return node.base in _AFFINE and same and all(op == "tensor" for op in others)


def _other_half(graph: Graph, node: Node, value: str) -> str:
    """What a value is added to, when it has the same shape and comes from the network's input; else empty."""
    refs = list(node.refs())
    if node.base != "add" or node.kwargs or len(node.args) != 2 or len(refs) != 2 or refs[0] == refs[1]:
        return ""
    other = refs[1] if refs[0] == value else refs[0]
    return other if _shape(graph, other) == _shape(graph, value) and graph.nodes[other].op != "tensor" else ""


def _shape(graph: Graph, name: str) -> tuple[int, ...] | None:
    meta = graph.nodes[name].meta
    return meta.shape if isinstance(meta, Meta) else None


def _elements(graph: Graph, name: str) -> int:
    shape = _shape(graph, name)
    return -1 if shape is None else torch.Size(shape).numel()
