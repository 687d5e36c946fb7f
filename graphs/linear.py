"""Layers that are linear in one weight: convolutions (grouped and depthwise too) and matrix products.

Each is written as `output = columns @ matrix + bias`, group by group, so that a least-squares fit need not know which
operator it fits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.structure import Ref

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_OPERANDS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight", "bias")),
}


@dataclass(frozen=True)
class Linear:
    """A layer that is linear in its weight.

    Attributes:
        node: The node that computes it.
        input: Name of the node that it reads.
        weight: Name of the weight tensor.
        bias: Name of the bias tensor, empty when there is none.
        shape: Shape of the weight.
        transposed: Whether the weight is stored [inputs, outputs], as matrix products have it.
        groups: Groups of a convolution; 1 for all else.
        stride: Of a convolution, as padding (left and right) and dilation, one for each spatial dimension.
    """

    node: str
    input: str
    weight: str
    bias: str
    shape: tuple[int, ...]
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Columns of one group: how many numbers an output is the weighted sum of."""
        return self.shape[0] if self.transposed else prod(self.shape[1:])

    @property
    def channel(self) -> int:
        """The dimension of the output that holds its channels."""
        return 1 if self.stride else -1

    def columns(self, value: Tensor, rows: Tensor | None = None) -> Tensor:
        """What each output is the weighted sum of, shape [groups, rows, width].

        Args:
            value: The layer's input.
            rows: Which positions of the output to give, as flat indices over all its dimensions but the channels.
        """
        if not self.stride:
            flat = value.reshape(1, -1, self.width)
            return flat if rows is None else flat[:, rows]
        kernel = self.shape[2:]
        pads = [side for pair in reversed(self.padding) for side in pair]
        source = (F.pad(value, pads) if any(pads) else value).movedim(1, -1)  # [batch, *positions, channels]
        size = [len(value)]
        for length, k, stride, dilation in zip(source.shape[1:-1], kernel, self.stride, self.dilation, strict=True):
            size.append((length - (k - 1) * dilation - 1) // stride + 1)
        if rows is None:
            rows = torch.arange(prod(size), device=value.device)
        batch, *places = torch.unravel_index(rows, size)
        corner, offset = batch, rows.new_zeros(())  # flat positions, of a window's first element and within windows
        for length, k, place, stride, dilation in zip(
            source.shape[1:-1], kernel, places, self.stride, self.dilation, strict=True
        ):
            corner = corner * length + place * stride
            offset = offset[..., None] * length + torch.arange(k, device=value.device) * dilation
        read = (corner[:, None] + offset.flatten()).flatten()
        picked = source.reshape(-1, value.shape[1]).index_select(0, read)
        picked = picked.reshape(len(rows), -1, self.groups, value.shape[1] // self.groups)
        return picked.permute(2, 0, 3, 1).reshape(self.groups, len(rows), self.width)

    def outputs(self, value: Tensor, rows: Tensor | None = None) -> Tensor:
        """A value shaped like the layer's output, shape [groups, rows, outputs of one group]."""
        flat = value.movedim(self.channel, -1).reshape(-1, value.shape[self.channel])
        flat = flat if rows is None else flat[rows]
        return flat.reshape(len(flat), self.groups, -1).transpose(0, 1)

    def positions(self, value: Tensor) -> int:
        """Number of rows of a value shaped like the layer's output."""
        return value.numel() // value.shape[self.channel]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as matrices, shape [groups, width, outputs of one group]."""
        if self.transposed:
            return weight[None]
        return weight.reshape(self.groups, -1, self.width).transpose(1, 2)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix[0] if self.transposed else matrix.transpose(1, 2).reshape(self.shape)


def linear_layers(graph: Graph) -> dict[str, Linear]:
    """The layers of a graph whose weight and bias serve no one else, by node."""
    count = readers(graph)
    found = {}
    for node in graph.nodes.values():
        if node.base in _OPERANDS:
            layer = _read(graph, node)
            if layer is not None and all(count[name] == 1 for name in (layer.weight, layer.bias) if name):
                found[node.name] = layer
    return found


def readers(graph: Graph) -> Counter[str]:
    """How many nodes read each tensor, by name."""
    found: Counter[str] = Counter()
    for node in graph.nodes.values():
        if node.op == "tensor":
            found[node.args[0]] += len(graph.users[node.name])
    return found


def _read(graph: Graph, node: Node) -> Linear | None:
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    names = _OPERANDS[node.base]
    value, weight = bound[names[0]], bound[names[1]]
    bias = bound.get(names[2]) if names[2] else None
    if not isinstance(value, Ref) or bound.get("transposed") or (bound.get("alpha", 1), bound.get("beta", 1)) != (1, 1):
        return None
    weight_name, bias_name = _parameter(graph, weight), _parameter(graph, bias) if bias is not None else ""
    if not weight_name or (bias is not None and not bias_name) or graph.nodes[value.name].op == "tensor":
        return None
    shape = graph.tensors[weight_name].shape
    meta = graph.nodes[value.name].meta
    if not isinstance(meta, Meta) or (bias_name and len(graph.tensors[bias_name].shape) != 1):
        return None
    if node.base not in _CONVOLUTIONS:
        if len(shape) != 2:
            return None
        return Linear(node.name, value.name, weight_name, bias_name, shape, node.base != "linear")
    if len(meta.shape) != len(shape):
        return None
    spatial = len(shape) - 2
    stride, dilation = (_each(bound[key], spatial) for key in ("stride", "dilation"))
    padding = _padding(bound["padding"], shape[2:], dilation)
    groups = int(bound["groups"])
    return Linear(node.name, value.name, weight_name, bias_name, shape, False, groups, stride, padding, dilation)


def _parameter(graph: Graph, value: object) -> str:
    """Name of the parameter that a reference leads to directly; empty when it leads elsewhere."""
    node = graph.nodes[value.name] if isinstance(value, Ref) else None
    if node is None or node.op != "tensor" or graph.tensors[node.args[0]].kind != "parameter":
        return ""
    return str(node.args[0])


def _each(value: object, count: int) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(map(int, found)) * (count if len(found) == 1 else 1)


def _padding(value: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in _each(value, len(kernel)))
