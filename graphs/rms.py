"""Root-mean-square norms, fused or spelled out, that a rescaled weight and epsilon hold exact after a cut.

y = gamma * x / sqrt(S / N + eps) with S the sum of squares over N channels. When only N' channels stay and the others
are zero, S is the same, so gamma * sqrt(N / N') and eps * N / N' give the same y (DESIGN: implied scales are written
out).
"""

from __future__ import annotations

from dataclasses import dataclass

from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.structure import Ref

_CASTS = frozenset("to _to_copy type_as float double half contiguous clone".split())


@dataclass(frozen=True)
class RmsNorm:
    """A root-mean-square norm.

    Attributes:
        statistic: Node that takes the mean of squares (the operator itself when fused).
        source: The value whose axes are normalised.
        dims: Those axes.
        weight: Name of the weight tensor.
        offset: What is added to the weight before it multiplies.
        epsilon: Node that adds epsilon; empty when fused.
        value: Epsilon.
        ratio: N / N', set when a cut is made.
    """

    statistic: str
    source: Ref
    dims: tuple[int, ...]
    weight: str
    offset: float = 0.0
    epsilon: str = ""
    value: float = 0.0
    ratio: float = 1.0

    def held(self, gain: float) -> tuple[float, float]:
        """Factor and shift of the weight that multiply the norm's output by `gain`."""
        return gain, (gain - 1.0) * self.offset


def find_rms_norms(graph: Graph) -> list[RmsNorm]:
    """All norms whose weight is used nowhere else and whose normalised axes are the ones to be filled up."""
    found: list[RmsNorm] = []
    again = {name for name, _, _ in graph.coupling.flow.recomputed}
    for name in graph.coupling.flow.filled.keys() - again:
        node = graph.nodes[name]
        base = node.base
        norm = _fused(graph, node) if base == "rms_norm" else _spelled(graph, node) if base == "mean" else None
        if norm is not None:
            found.append(norm)
    return found


def _fused(graph: Graph, node: Node) -> RmsNorm | None:
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    weight = _own_weight(graph, bound.get("weight"), node)
    if weight is None:
        return None
    rank = len(graph.nodes[bound["input"].name].shape)
    count = len(bound["normalized_shape"])
    return RmsNorm(node.name, bound["input"], tuple(range(rank - count, rank)), *weight)


def _spelled(graph: Graph, mean: Node) -> RmsNorm | None:
    """mean(x * x) + eps, its inverse root times x, times a weight; casts may stand anywhere."""
    square: Ref = mean.args[0]
    dims = {d for name, d in graph.coupling.flow.filled[mean.name] if name == square.name}
    rank = len(graph.nodes[square.name].shape)
    given = operators.bind(mean.op, mean.args, dict(mean.kwargs)).get("dim")
    if given is None or {d % rank for d in (given if isinstance(given, tuple) else (given,))} != dims:
        return None
    add = _next(graph, mean, "add")
    epsilon = next((a for a in add.args if isinstance(a, float)), None) if add else None
    root = _next(graph, add, "rsqrt") if add and epsilon is not None else None
    scaled = _next(graph, root, "mul") if root else None
    weighted = _next(graph, scaled, "mul") if scaled else None
    if add is None or epsilon is None or weighted is None:
        return None
    for arg in weighted.args:
        weight = _own_weight(graph, arg, weighted)
        if weight is not None:
            return RmsNorm(mean.name, square, tuple(sorted(dims)), *weight, add.name, epsilon)
    return None


def _next(graph: Graph, node: Node, base: str) -> Node | None:
    """The only user of a value behind casts, if it is the named operator."""
    while True:
        users = graph.users[node.name]
        if len(users) != 1:
            return None
        node = graph.nodes[users[0]]
        found = node.base
        if found == base:
            return node
        if found not in _CASTS:
            return None


def _own_weight(graph: Graph, value: object, user: Node) -> tuple[str, float] | None:
    """The tensor behind an operand, and what is added to it on the way, if this is its only use."""
    name, offset = parameter_behind(graph, value)
    if name is None:
        return None
    node = next(n for n in graph.nodes.values() if n.op == "tensor" and n.args[0] == name)
    alone = len(graph.users[node.name]) == 1 and len(graph.tensors[name].aliases) == 1
    return (name, offset) if alone and len(node.shape) == 1 else None


def parameter_behind(graph: Graph, value: object) -> tuple[str | None, float]:
    """The tensor that an operand is, behind casts and added numbers, and the sum of those; None for anything else."""
    offset = 0.0
    while isinstance(value, Ref):
        node = graph.nodes[value.name]
        if node.op == "tensor":
            return node.args[0], offset
        refs = [a for a in node.args if isinstance(a, Ref)]
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        added = node.base == "add" and len(refs) == len(numbers) == 1 and not node.kwargs
        if len(refs) != 1 or not (node.base in _CASTS or added) or len(graph.users[node.name]) != 1:
            break
        offset += numbers[0] if added else 0.0
        value = refs[0]
    return None, 0.0
