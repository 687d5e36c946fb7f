"""Wrong cuts on purpose: mutants of a correct incision, for the question whether the certificate notices every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.certificate import Prover
from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph, Node, TensorInfo, substitute
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.structure import Ref
from metaprune.graphs.surgery import cut
from tests.support import random_oracle
from tests.support.random_cases import random_plan

EQUIVALENT = 1e-9


@dataclass(frozen=True)
class Mutant:
    """A wrong cut: what was done to it, its graph, and what it says it kept (None: what the correct cut kept)."""

    kind: str
    where: str
    graph: Graph
    kept: dict[str, dict[int, Any]] | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: `caught`, `error` (it does not run), `equivalent` or `missed`."""

    mutant: Mutant
    outcome: str
    error: float


class Patient:
    """A network with a correct cut of it, and the certificate's reference."""

    def __init__(self, net: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
        self.net, self.inputs = net, inputs
        self.graph = mp.trace(net, inputs)
        plan = random_plan(self.graph, seed)
        self.incision: Incision = cut(self.graph, plan.keep)
        self.prover = Prover(self.graph, self.incision)

    def is_certified(self) -> bool:
        """Whether the correct cut passes, by the certificate and by the oracle."""
        module = PortableModule(self.incision.graph).eval()
        error, change = random_oracle.error(self.net, module, self.incision.kept, self.inputs)
        return self.prover.certify(module).ok and error < EQUIVALENT and change > 1e-6

    def judge(self, mutant: Mutant) -> Verdict:
        """Asks the certificate and, should it be content, the oracle."""
        kept = self.incision.kept if mutant.kept is None else mutant.kept
        try:
            module = PortableModule(mutant.graph).eval()
            error, _ = random_oracle.error(self.net, module, kept, self.inputs)
        except Exception:  # it does not run, on one batch size or another: nobody takes it for a network
            return Verdict(mutant, "error", float("inf"))
        if error <= EQUIVALENT:
            return Verdict(mutant, "equivalent", error)
        try:
            prover = self.prover
            if mutant.kept is not None:
                prover = Prover(self.graph, replace(self.incision, graph=mutant.graph, kept=mutant.kept))
            certified = prover.certify(module).ok
        except mp.MetapruneError:
            certified = False
        return Verdict(mutant, "missed" if certified else "caught", error)

    def mutants(self) -> Iterator[Mutant]:
        """All mutants of the cut."""
        yield from tensor_mutants(self.graph, self.incision)
        yield from alias_mutants(self.incision.graph)
        for node in self.incision.graph.nodes.values():
            for kind, change in NODE_MUTATIONS:
                for number, changed in enumerate(change(node, self.incision.graph)):
                    yield Mutant(kind, f"{node.name}#{number}", with_node(self.incision.graph, changed))


# ---- tensors


def with_tensor(graph: Graph, name: str, value: Tensor) -> Graph:
    """The graph with another value for a tensor, under all its names."""
    values = dict(graph.values)
    for alias in graph.tensors[name].aliases:
        values[alias] = value
    return copied(graph, values=values)


def tensor_mutants(graph: Graph, incision: Incision) -> Iterator[Mutant]:
    """One tensor takes other units than the rest."""
    for name, dims in incision.kept.items():
        if graph.tensors.get(name) is None or name not in incision.graph.tensors:
            continue
        if all(node.args[:1] != (name,) for node in incision.graph.nodes.values() if node.op == "tensor"):
            continue
        for dim, index in dims.items():
            for kind, other, states in _other_indices(graph.tensors[name].shape[dim], np.asarray(index)):
                changed = {**dims, dim: other}
                mutated = with_tensor(incision.graph, name, _carried(graph, incision, name, changed))
                kept = None
                if states:
                    aliases = graph.tensors[name].aliases
                    kept = {n: (changed if n in aliases else d) for n, d in incision.kept.items()}
                yield Mutant(kind, f"{name}[{dim}]", mutated, kept)
    for name in incision.scales:
        if name in incision.graph.tensors:
            factor, shift = incision.scales[name]
            whole = (incision.graph.values[name] - shift) / factor
            yield Mutant("scale left out", name, with_tensor(incision.graph, name, whole))


def _carried(graph: Graph, incision: Incision, name: str, dims: dict[int, Any]) -> Tensor:
    part = random_oracle.part_of(graph.values[name].detach(), dims)
    factor, shift = incision.scales.get(name, (1.0, 0.0))
    return part * factor + shift


def _other_indices(size: int, index: Any) -> Iterator[tuple[str, Any, bool]]:
    """Wrong choices of as many positions: what was done, the positions, whether they are also stated as kept."""
    dropped = np.setdiff1d(np.arange(size), index)
    if len(dropped):
        for place in sorted({0, len(index) - 1}):
            swapped = index.copy()
            swapped[place] = dropped[place % len(dropped)]
            yield "unit swapped for a dropped one", swapped, False
            yield "unit swapped and stated", np.sort(swapped), True
        yield "tensor missed: first units", np.arange(len(index)), False
        yield "tensor missed: last units", np.arange(size - len(index), size), False
    if len(index) > 1:
        yield "tensor missed: other order", np.roll(index, 1), False
        turned = index.copy()
        turned[[0, -1]] = turned[[-1, 0]]
        yield "tensor missed: two units exchanged", turned, False


def alias_mutants(graph: Graph) -> Iterator[Mutant]:
    """A tensor read in several places is untied: one place reads a copy in another order."""
    for node in graph.nodes.values():
        if node.op != "tensor" or len(graph.users[node.name]) < 2 or not node.shape:
            continue
        name = node.args[0]
        for dim in range(len(node.shape)):
            for user in graph.users[node.name]:
                value = graph.values[name].roll(1, dim)
                yield Mutant("alias untied", f"{name}[{dim}] in {user}", untied(graph, node, user, value))


def untied(graph: Graph, node: Node, user: str, value: Tensor) -> Graph:
    """The graph in which one user of a tensor reads a tensor of its own."""
    fresh = f"{node.name}_untied"
    info = graph.tensors[node.args[0]]
    nodes: dict[str, Node] = {}
    for found in graph.nodes.values():
        if found.name == user:
            nodes[fresh] = Node(fresh, "tensor", (fresh,), meta=node.meta)
            swap: Callable[[Ref], Any] = lambda ref: Ref(fresh) if ref.name == node.name else ref  # noqa: E731
            found = replace(
                found,
                args=tuple(substitute(a, swap) for a in found.args),
                kwargs={k: substitute(v, swap) for k, v in found.kwargs.items()},
            )
        nodes[found.name] = found
    own = TensorInfo(fresh, info.kind, info.shape, info.dtype, (fresh,), info.persistent, info.requires_grad)
    return copied(graph, nodes=nodes, tensors=graph.tensors | {fresh: own}, values=graph.values | {fresh: value})


# ---- operators


def copied(graph: Graph, **changes: Any) -> Graph:
    """A copy of a graph with other parts."""
    parts = {"nodes": graph.nodes, "tensors": graph.tensors, "values": graph.values} | changes
    return Graph(
        parts["nodes"], parts["tensors"], graph.signature, parts["values"], None, dict(graph.example), graph.batch, []
    )


def with_node(graph: Graph, node: Node) -> Graph:
    """The graph with another node under a name."""
    return copied(graph, nodes=graph.nodes | {node.name: node})


def _with_arg(node: Node, place: int, value: Any) -> Node:
    return replace(node, args=(*node.args[:place], value, *node.args[place + 1 :]))


def _slices(node: Node, graph: Graph) -> Iterator[Node]:
    if node.base == "slice" and len(node.args) >= 4:
        value, dim, start, end, *step = node.args
        if isinstance(start, int) and isinstance(end, int):
            for a, b in ((1, 1), (-1, -1), (0, -1), (1, 0)):
                if start + a >= 0:
                    yield replace(node, args=(value, dim, start + a, end + b, *step))
    if node.base in ("select", "narrow") and isinstance(node.args[2], int):
        yield _with_arg(node, 2, node.args[2] + 1)
        if node.args[2] > 0:
            yield _with_arg(node, 2, node.args[2] - 1)


def _splits(node: Node, graph: Graph) -> Iterator[Node]:
    if node.base in ("split", "split_with_sizes", "unsafe_split") and isinstance(node.args[1], Sequence):
        sizes = list(node.args[1])
        for i in range(len(sizes) - 1):
            for step in (1, -1):
                other = [*sizes]
                other[i], other[i + 1] = sizes[i] + step, sizes[i + 1] - step
                yield _with_arg(node, 1, tuple(other))
    elif node.base in ("split", "chunk") and isinstance(node.args[1], int):
        for step in (1, -1):
            if node.args[1] + step > 0:
                yield _with_arg(node, 1, node.args[1] + step)


def _groups(node: Node, graph: Graph) -> Iterator[Node]:
    place = {"conv1d": 6, "conv2d": 6, "conv_transpose2d": 6, "group_norm": 1, "channel_shuffle": 1}.get(node.base)
    if place is None:
        return
    now = node.args[place] if len(node.args) > place else 1
    full = (
        (*node.args, *(None, (1, 1), (0, 0), (1, 1), 1)[len(node.args) - 2 :]) if node.base == "conv2d" else node.args
    )
    for groups in range(1, 17):
        if groups != now and len(full) > place:
            yield replace(node, args=(*full[:place], groups, *full[place + 1 :]))


def _views(node: Node, graph: Graph) -> Iterator[Node]:
    if node.base in ("view", "reshape", "unflatten") and len(node.args) > 1 and isinstance(node.args[-1], Sequence):
        sizes = list(node.args[-1])
        whole = [i for i, size in enumerate(sizes) if isinstance(size, int) and size > 0]
        for a, b in pairwise(whole):
            other = [*sizes]
            other[a], other[b] = sizes[b], sizes[a]
            yield _with_arg(node, len(node.args) - 1, tuple(other))
            for factor in (2, 3):
                if sizes[b] % factor == 0:
                    other = [*sizes]
                    other[a], other[b] = sizes[a] * factor, sizes[b] // factor
                    yield _with_arg(node, len(node.args) - 1, tuple(other))


def _numbers(node: Node, graph: Graph) -> Iterator[Node]:
    """Epsilons, scales and other real numbers: a little off, and left out."""
    for place, value in enumerate(node.args):
        if isinstance(value, float) and value not in (0.0, 1.0) and node.base != "constant_pad_nd":
            yield _with_arg(node, place, value * 1.5)
            yield _with_arg(node, place, value * 1.001 if value > 0.01 else value + 1e-3)
    for key, value in node.kwargs.items():
        if isinstance(value, float) and value not in (0.0, 1.0):
            yield replace(node, kwargs={**node.kwargs, key: None if key == "scale" else 1.5 * value})
            yield replace(node, kwargs={**node.kwargs, key: 1.001 * value})


def _order(node: Node, graph: Graph) -> Iterator[Node]:
    if node.base in ("cat", "stack") and len(node.args[0]) > 1:
        yield _with_arg(node, 0, tuple(reversed(node.args[0])))
    if node.base == "permute":
        dims = list(node.args[1])
        for a, b in zip(range(1, len(dims) - 1), range(2, len(dims)), strict=True):
            dims[a], dims[b] = dims[b], dims[a]
            yield _with_arg(node, 1, tuple(dims))
            dims[a], dims[b] = dims[b], dims[a]
    if node.base == "getitem" and isinstance(node.args[1], int):
        yield _with_arg(node, 1, node.args[1] + 1)
        if node.args[1]:
            yield _with_arg(node, 1, node.args[1] - 1)


def _moves(node: Node, graph: Graph) -> Iterator[Node]:
    if node.base == "roll":
        for step in (1, -1):
            yield _with_arg(node, 1, tuple(s + step for s in node.args[1]))
    if node.base in ("constant_pad_nd", "pad") and isinstance(node.args[1], Sequence):
        for i in range(0, len(node.args[1]), 2):
            for step in (1, -1):
                amounts = list(node.args[1])
                amounts[i], amounts[i + 1] = amounts[i] + step, amounts[i + 1] - step
                yield _with_arg(node, 1, tuple(amounts))
    if node.base == "repeat_interleave" and isinstance(node.args[1], int):
        yield replace(node, op="aten.repeat.default", args=(node.args[0], _tiled(node, graph)), kwargs={})
    if node.base == "scaled_dot_product_attention" and node.kwargs.get("enable_gqa"):
        yield replace(node, kwargs={**node.kwargs, "enable_gqa": False})


def _tiled(node: Node, graph: Graph) -> tuple[int, ...]:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return tuple(node.args[1] if d == dim else 1 for d in range(len(node.shape)))


Mutation = Callable[[Node, Graph], Iterator[Node]]
NODE_MUTATIONS: tuple[tuple[str, Mutation], ...] = (
    ("slice off by one", _slices),
    ("split sizes off by one", _splits),
    ("group count", _groups),
    ("view sizes", _views),
    ("epsilon or scale", _numbers),
    ("order of operands, axes or pieces", _order),
    ("roll, pad or repeat off", _moves),
)
