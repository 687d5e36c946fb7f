"""The intermediate representation: a functional ATen graph in plain data.

A `Graph` is an ordered list of `Node`s. A node is a graph input, a tensor of the network (parameter, buffer or
constant) or the call of an operator; its arguments refer to earlier nodes by `Ref`. Shapes are those of the traced
example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import nn

from metaprune.graphs.errors import GraphError, OptionError
from metaprune.graphs.operators import check_call
from metaprune.graphs.structure import Ref, refs

if TYPE_CHECKING:
    from metaprune.graphs.cost import Cost
    from metaprune.graphs.coupling import Coupling
    from metaprune.graphs.groups import Group


@dataclass(frozen=True)
class Training:
    """Stands in an argument list for "is the network in training mode"."""

    def __repr__(self) -> str:
        return "training"


@dataclass(frozen=True)
class Momentum:
    """Stands in an argument list for the momentum of a batch norm that averages over all batches it has seen.

    Attributes:
        counter: Name of the tensor that counts the batches.
    """

    counter: str

    def value(self, tensors: Mapping[str, torch.Tensor], training: bool) -> float:
        """The weight of the current batch."""
        return 1.0 / max(1, int(tensors[self.counter])) if training else 0.0


@dataclass(frozen=True)
class Meta:
    """Shape and dtype of a tensor value; `batched` marks the dimensions that grow with a dynamic axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: tuple[bool, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether values are real or complex floats."""
        return self.dtype.is_floating_point or self.dtype.is_complex


Value = Meta | tuple["Value | None", ...] | int | float | bool | None


@dataclass(frozen=True)
class Node:
    """One value of the graph.

    Attributes:
        name: Unique name.
        op: `input`, `tensor`, or an operator's full name such as `aten.conv2d.default`.
        args: Positional arguments; nested tuples of constants and `Ref`s. For `tensor`, the tensor's name.
        kwargs: Keyword arguments.
        meta: `Meta` of a tensor, tuple of metas, or the example's value of a scalar.
        module: Dotted path of the module that ran it.
    """

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    meta: Value = None
    module: str = ""

    def refs(self) -> Iterator[str]:
        """Names of the nodes it reads, in order, repeats included."""
        yield from _refs(self.args)
        yield from _refs(tuple(self.kwargs.values()))

    @property
    def base(self) -> str:
        """The operator's name without namespace and overload, such as `conv2d`."""
        parts = self.op.split(".")
        return parts[1] if len(parts) > 1 else self.op

    @property
    def shape(self) -> tuple[int, ...]:
        """Example shape of its tensor value."""
        if not isinstance(self.meta, Meta):
            raise GraphError(f"node {self.name} ({self.op}) has no tensor value")
        return self.meta.shape


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)


def substitute(value: Any, change: Callable[[Ref], Any]) -> Any:
    """`value` with every `Ref` in it, however nested, replaced by `change(ref)`."""
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, (tuple, list)):
        return tuple(substitute(item, change) for item in value)
    return value


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the network.

    Attributes:
        name: Fully qualified name under which the graph knows it.
        kind: `parameter`, `buffer` or `constant`.
        shape: Its shape.
        dtype: Its dtype.
        aliases: All names that share its storage, its own included (tied weights).
        persistent: Whether it belongs to the state dict.
        requires_grad: Whether it is trained.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...]
    persistent: bool = True
    requires_grad: bool = False


@dataclass(frozen=True)
class Signature:
    """How the network is called.

    Attributes:
        names: For each top-level argument, the name of the forward parameter that receives it.
        spec: Nested structure of one call: (args, kwargs) with `Ref`s to input nodes as leaves.
        output: Nested structure of the result (see `metaprune.graphs.structure`), with `Ref`s as leaves.
        dropped: Paths of non-tensor outputs left out, such as caches.
    """

    names: tuple[str, ...]
    spec: tuple[tuple[Any, ...], Mapping[str, Any]]
    output: Any
    dropped: tuple[str, ...] = ()


@dataclass
class Graph:
    """A network as data; see the module docstring.

    Attributes:
        nodes: Nodes by name, in order of execution.
        tensors: Tensor table by name.
        signature: Structure of the call and its result.
        values: The tensors themselves, by name (never changed by metaprune).
        source: The network it was traced from, if any.
        example: Values of the input nodes used for tracing, by node name.
        batch: Ratio of the caller's batch to the traced one.
        notes: What a trace cannot carry, in words.
    """

    nodes: dict[str, Node]
    tensors: dict[str, TensorInfo]
    signature: Signature
    values: dict[str, torch.Tensor]
    source: nn.Module | None = None
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    batch: float = 1.0
    notes: list[str] = field(default_factory=list)

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """Names of the nodes that read each node, without repeats."""
        users: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.refs()):
                users[name].append(node.name)
        return users

    @cached_property
    def coupling(self) -> Coupling:
        """Which positions of which axes live and die together."""
        from metaprune.graphs.coupling import couple

        return couple(self)

    @property
    def groups(self) -> list[Group]:
        """All groups, prunable and pinned."""
        return self.coupling.groups

    def group(self, name: str) -> Group:
        """The group called `name`; raises `PlanError` if there is none."""
        return self.coupling.by_name(name)

    def cost(self) -> Cost:
        """Cost of the whole network."""
        return self.coupling.costs.full

    def run(
        self,
        params: Mapping[str, torch.Tensor] | None,
        inputs: Any,
        gates: Mapping[str, torch.Tensor] | None = None,
        training: bool = False,
    ) -> Any:
        """Runs the network functionally; see `metaprune.graphs.execute.run`."""
        from metaprune.graphs.execute import run

        return run(self, params, inputs, gates, training)

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Graph:
        """The same network with other weights, such as those it has after training.

        What is known of the network is shared, not found again: groups, costs and fingerprint are those of this
        graph, so plans of one fit the other. A cut is made, and certified, with the new weights.

        Args:
            values: Tensors by name, of the shape and dtype they replace; the rest stays. They are not copied.

        Raises:
            OptionError: A tensor is unknown or does not fit, is a constant, or holds integers that the forward pass
                reads (the groups may follow from those) other than before.
        """
        own = {alias: info for info in self.tensors.values() for alias in info.aliases}
        read = {node.args[0] for node in self.nodes.values() if node.op == "tensor"}
        changed: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            if name not in own:
                raise OptionError(f"values: the network has no tensor {name}")
            info = own[name]
            _check_value(name, value, info, self.values[info.name], fixed=info.name in read)
            if not _same(changed.setdefault(info.name, value), value):
                raise OptionError(f"values: {name} and {info.name} are one tensor, but two are given")
        every = {alias: value for name, value in changed.items() for alias in self.tensors[name].aliases}
        result = replace(self, values=self.values | every, notes=list(self.notes))
        result.coupling, result.fingerprint = self.coupling, self.fingerprint
        return result

    def check_finite(self) -> None:
        """Raises `GraphError` naming a parameter that is not finite, or a buffer that holds NaN."""
        for info in self.tensors.values():
            value = self.values[info.name].detach()
            if value.is_meta or not value.is_floating_point() or bool(torch.isfinite(value.sum())):
                continue
            bad = ~torch.isfinite(value) if info.kind == "parameter" else torch.isnan(value)
            if bool(bad.any()):
                raise GraphError(f"{info.kind} {info.name} holds a value that is not finite")

    def networkx(self) -> nx.DiGraph:
        """The graph as a `networkx.DiGraph`; node attributes `op`, `shape`, `module`."""
        view = nx.DiGraph()
        for node in self.nodes.values():
            shape = node.meta.shape if isinstance(node.meta, Meta) else None
            view.add_node(node.name, op=node.op, shape=shape, module=node.module)
            view.add_edges_from((name, node.name) for name in node.refs())
        return view

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the axis table: tensor names and shapes, and the groups. Node names do not enter."""
        text = hashlib.sha256()
        for info in sorted(self.tensors.values(), key=lambda info: info.name):
            text.update(repr((info.name, info.shape)).encode())
        for group in self.groups:
            text.update(repr((group.name, group.size, group.pinned)).encode())
            for part in group.slices:
                text.update(repr((part.tensor, part.dim)).encode())
                text.update(part.index.tobytes())
        return text.hexdigest()

    def __str__(self) -> str:
        lines = [f"graph of {len(self.nodes)} nodes, {len(self.tensors)} tensors"]
        for node in self.nodes.values():
            args = ", ".join([*map(repr, node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())])
            shape = list(node.meta.shape) if isinstance(node.meta, Meta) else node.meta
            lines.append(f"%{node.name}: {shape} = {node.op}({args})")
        return "\n".join([*lines, f"return {self.signature.output}"])


def _check_value(name: str, value: object, info: TensorInfo, old: torch.Tensor, fixed: bool) -> None:
    """Raises `OptionError` when a tensor can not take the place of the network's own."""
    if not isinstance(value, torch.Tensor):
        raise OptionError(f"values: {name} must be a tensor, not {type(value).__name__}")
    if tuple(value.shape) != info.shape or value.dtype != info.dtype:
        given, needed = (
            f"{list(shape)} of {dtype}" for shape, dtype in ((value.shape, value.dtype), (info.shape, info.dtype))
        )
        raise OptionError(f"values: {name} must be {needed}, not {given}")
    plain = not (value.is_floating_point() or value.is_complex())
    if (info.kind == "constant" or (plain and fixed)) and not _same(value, old):
        raise OptionError(f"values: {name} must stay as it is: it is a constant or an index of the network")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


def live_nodes(nodes: Mapping[str, Node], roots: Iterable[str]) -> dict[str, Node]:
    """The nodes that `roots` depend on and all graph inputs, in order."""
    wanted = set(roots)
    for node in reversed(list(nodes.values())):
        if node.name in wanted:
            wanted.update(node.refs())
    return {name: node for name, node in nodes.items() if name in wanted or node.op == "input"}


def verify(graph: Graph) -> None:
    """Checks that references point backwards, operators exist and tensors are known; raises `GraphError`."""
    seen: set[str] = set()
    for name, node in graph.nodes.items():
        if name != node.name:
            raise GraphError(f"node {node.name} is filed under {name}")
        for ref in node.refs():
            if ref not in seen:
                raise GraphError(f"node {name} ({node.op}) reads {ref}, which is not defined before it")
        if node.op == "tensor":
            if node.args[0] not in graph.tensors:
                raise GraphError(f"node {name} reads the unknown tensor {node.args[0]}")
            shape = graph.tensors[node.args[0]].shape
            if node.shape != shape:
                raise GraphError(f"node {name} has shape {node.shape}, its tensor {node.args[0]} {shape}")
        elif node.op != "input":
            check_call(node.op, node.args, node.kwargs)
            for value in node.args:
                if isinstance(value, Momentum) and value.counter not in graph.tensors:
                    raise GraphError(f"node {name} counts batches in the unknown tensor {value.counter}")
        seen.add(name)
    for ref in refs(graph.signature.output):
        if ref not in seen:
            raise GraphError(f"the output refers to {ref}, which is not defined")
