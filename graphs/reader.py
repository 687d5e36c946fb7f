"""Reads an exported program node by node into a graph, and makes it functional on the way."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from metaprune.graphs import operators, structure
from metaprune.graphs.errors import TraceError
from metaprune.graphs.execute import execute
from metaprune.graphs.functionalise import Functionaliser, Handle, functional, is_view, is_write
from metaprune.graphs.ir import Graph, Meta, Momentum, Node, Signature, TensorInfo, Training, live_nodes, verify
from metaprune.graphs.structure import Ref

_FOLLOW_MODE = frozenset(
    "batch_norm dropout feature_dropout alpha_dropout feature_alpha_dropout lstm gru rnn_tanh rnn_relu".split()
)
_GUARDS = ("_assert", "sym_constrain_range", "sym_constrain_range_for_size")
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


class Reader:
    """Reads an exported program into nodes and a tensor table.

    Args:
        program: What was exported.
        model: The network, whose module paths the program names.
        tensors: Its tensors by name.
        strip: What the program puts before every name.
    """

    def __init__(
        self, program: ExportedProgram, model: nn.Module, tensors: dict[str, torch.Tensor], strip: str
    ) -> None:
        self._program = program
        self._model = model
        self._strip = strip
        self.nodes: dict[str, Node] = {}
        self.values: dict[str, torch.Tensor] = dict(tensors)
        self.infos: dict[str, TensorInfo] = {}
        self.inputs: list[str] = []
        self.outputs: list[Any] = []
        self._handles: dict[fx.Node, Any] = {}
        self._placeholders: dict[str, str] = {}
        self._functional = Functionaliser(self._emit)
        self._module = ""
        self._counts: dict[str, int] = {}
        self._owner = self._table()

    def _table(self) -> dict[str, str]:
        """Fills the tensor table; returns the table's name of every name, aliases merged by storage."""
        buffers = {
            s.target: s.persistent for s in self._program.graph_signature.input_specs if s.kind is InputKind.BUFFER
        }
        owner: dict[str, str] = {}
        by_storage: dict[Any, str] = {}
        for name, tensor in self.values.items():
            key: Any = id(tensor)
            if tensor.device.type != "meta" and tensor.numel():
                key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner[name] = by_storage.setdefault(key, name)
        for name, first in owner.items():
            if name == first:
                tensor = self.values[name]
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                persistent = all(buffers.get(prefix + name) is not False for prefix in ("", self._strip))
                aliases = tuple(n for n, o in owner.items() if o == name)
                self.infos[name] = TensorInfo(
                    name, kind, tuple(tensor.shape), tensor.dtype, aliases, persistent, tensor.requires_grad
                )
        return owner

    def read(self) -> None:
        """Reads every node of the program."""
        signature = self._program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
            elif node.op == "output":
                kinds = [spec.kind for spec in signature.output_specs]
                self.outputs = [
                    self._use(arg)
                    for arg, kind in zip(node.args[0], kinds, strict=True)
                    if kind is OutputKind.USER_OUTPUT
                ]
            else:
                self._node(node, self._program.graph_module)

    def graph(self, signature: Signature, leaves: Sequence[torch.Tensor], batch: float, notes: list[str]) -> Graph:
        """The finished graph, dead nodes left out, verified."""
        nodes = live_nodes(self.nodes, structure.refs(signature.output))
        example = dict(zip(self.inputs, leaves, strict=True))
        graph = Graph(nodes, self.infos, signature, self.values, self._model, example, batch, notes)
        if any(_unknown(node.meta) for node in nodes.values()):
            measure(graph)
        verify(graph)
        self._release()
        return graph

    def _release(self) -> None:
        """Breaks the cycle that keeps every shape environment of the exporter alive, and empties its caches."""
        for node in self._program.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.tracked_fakes = None
                mode.shape_env.fake_tensor_cache.clear()
                mode.cache_clear()
                return

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        if spec.kind is InputKind.USER_INPUT:
            name = f"in{len(self.inputs)}"
            self.inputs.append(name)
            self.nodes[name] = Node(name, "input", meta=_meta(node.meta["val"]))
            self._handles[node] = Handle(Ref(name), self.nodes[name].meta)
            return
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise TraceError(f"the network reads {spec.arg.name}, a {spec.kind.name.lower().replace('_', ' ')}")
        name = spec.target
        if name not in self.values:
            name = name.removeprefix(self._strip)
        if name not in self.values:
            constant = self._program.constants[spec.target]
            self.values[name] = constant
            self._owner[name] = name
            self.infos[name] = TensorInfo(
                name, "constant", tuple(constant.shape), constant.dtype, (name,), persistent=True
            )
        owner = self._owner[name]
        if owner not in self._placeholders:
            unique = self._unique("t_" + owner.replace(".", "_"))
            self._placeholders[owner] = unique
            tensor = self.values[owner]
            meta = Meta(tuple(tensor.shape), tensor.dtype, (False,) * tensor.ndim)
            self.nodes[unique] = Node(unique, "tensor", (owner,), meta=meta)
        key = self._placeholders[owner]
        self._handles[node] = Handle(Ref(key), self.nodes[key].meta)

    def _use(self, value: Any) -> Any:
        """A call's argument in terms of the graph under construction."""
        if isinstance(value, fx.Node):
            handle = self._handles[value]
            return self._functional.read(handle) if isinstance(handle, Handle) else handle
        if isinstance(value, (list, tuple)):
            return tuple(self._use(item) for item in value)
        if isinstance(value, slice):
            raise TraceError("a slice object is an operator's argument")
        return value

    def _node(self, node: fx.Node, owner: nn.Module) -> None:
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(owner)
            if isinstance(found, torch.Tensor):
                found = self._constant(str(node.target), found)
            self._handles[node] = found
            return
        target: Any = node.target
        base = getattr(target, "__name__", str(target))
        if base.startswith(_GUARDS):
            return
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self._module = stack[-1][0].removeprefix("L['self'].").removeprefix(self._strip) if stack else ""
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._region(node, base, owner)
            return
        op = operators.name_of(target)
        first: Any = node.args[0] if node.args else None
        if op == "operator.getitem" and isinstance(self._handles[first], list):
            self._handles[node] = self._handles[first][node.args[1]]
            return
        self._call(node, op, first)

    def _call(self, node: fx.Node, op: str, first: Any) -> None:
        args, kwargs = self._use(node.args), {k: self._use(v) for k, v in node.kwargs.items()}
        meta = _meta(node.meta.get("val"))
        if is_write(op) and isinstance(meta, Meta):
            target = self._handles[first]
            name, args, kwargs = functional(op, args, kwargs, meta)
            ref = self._emit(name, args, kwargs, meta)
            source = self.nodes[args[0].name].meta if isinstance(args[0], Ref) else meta
            if isinstance(source, Meta) and source.dtype != meta.dtype:
                ref = self._emit("aten.to.dtype", (ref, meta.dtype), {}, meta)
            self._functional.write(target, ref)
            self._handles[node] = target
            return
        op, args, kwargs = self._following_mode(op, args, kwargs)
        ref = self._emit(op, args, kwargs, meta)
        handle = Handle(ref, meta)
        base = self._handles.get(first) if isinstance(first, fx.Node) else None
        if isinstance(base, Handle) and op == "operator.getitem":
            self._piece(handle, first, args[1])
        elif isinstance(base, Handle) and is_view(op):
            self._functional.record(handle, self.nodes[ref.name], base)
        self._handles[node] = handle

    def _following_mode(
        self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """Arguments that say "eval mode" made to follow the network's mode again."""
        base = op.split(".")[1]
        if operators.schema_of(op) is None or base not in _FOLLOW_MODE:
            return op, args, kwargs
        bound = operators.bind(op, args, kwargs)
        key = "training" if base == "batch_norm" else "train"
        if bound[key] is not False:
            return op, args, kwargs
        bound[key] = Training()
        if base == "batch_norm" and bound["momentum"] == 0.0:
            counter = f"{self._module}.num_batches_tracked".lstrip(".")
            if counter in self.infos and getattr(self._model.get_submodule(self._module), "momentum", 0.0) is None:
                bound["momentum"] = Momentum(counter)
        return op, tuple(bound.values()), {}

    def _piece(self, handle: Handle, source: fx.Node, number: int) -> None:
        """One of the views that a split or unbind gives: the same view as a slice or selection of the base."""
        base = self._handles.get(source.args[0]) if source.args and isinstance(source.args[0], fx.Node) else None
        if not isinstance(base, Handle) or not isinstance(source.target, torch._ops.OpOverload):
            return
        op = operators.name_of(source.target)
        bound = operators.bind(op, self._use(source.args), {k: self._use(v) for k, v in source.kwargs.items()})
        dim, pieces = bound.get("dim", 0), source.meta["val"]
        if op.split(".")[1] == "unbind":
            view = Node("", "aten.select.int", (base.ref, dim, number), {}, handle.meta)
        elif "split" in op or "chunk" in op:
            if any(_size(piece.shape[dim]) is None for piece in pieces):
                return  # their sizes depend on the data
            start = sum(_size(piece.shape[dim]) for piece in pieces[:number])
            view = Node(
                "", "aten.slice.Tensor", (base.ref, dim, start, start + handle.meta.shape[dim]), {}, handle.meta
            )
        else:
            return
        self._functional.record(handle, view, base)

    def _region(self, node: fx.Node, base: str, owner: nn.Module) -> None:
        """A region run under another mode, read in place."""
        if base not in _REGIONS:
            raise TraceError(f"higher-order operator {base} (in {self._module or 'the network'}) is not supported")
        at = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        module = self._handles[node.args[at]]  # type: ignore[index]
        inner = [self._handles[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[at + 1 :]]
        feed = iter(inner)
        for child in module.graph.nodes:
            if child.op == "placeholder":
                self._handles[child] = next(feed)
            elif child.op == "output":
                results = child.args[0]
                many = isinstance(results, (list, tuple))
                found = [self._handles[r] for r in (results if many else [results])]
                self._handles[node] = found if many else found[0]
            else:
                self._node(child, module)

    def _constant(self, name: str, tensor: torch.Tensor) -> Handle:
        name = name if name not in self.values else f"{name}_constant"
        self.values[name] = tensor
        self.infos[name] = TensorInfo(name, "constant", tuple(tensor.shape), tensor.dtype, (name,))
        unique = self._unique("t_" + name.replace(".", "_"))
        meta = Meta(tuple(tensor.shape), tensor.dtype, (False,) * tensor.ndim)
        self.nodes[unique] = Node(unique, "tensor", (name,), meta=meta)
        return Handle(Ref(unique), meta)

    def _emit(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any) -> Ref:
        name = self._unique(op.split(".")[1])
        self.nodes[name] = Node(name, op, args, kwargs, meta, self._module)
        return Ref(name)

    def _unique(self, base: str) -> str:
        if base not in self.nodes:
            return base
        number = self._counts.get(base, 0) + 1
        while f"{base}_{number}" in self.nodes:
            number += 1
        self._counts[base] = number
        return f"{base}_{number}"


def _meta(value: Any) -> Any:
    """Example shapes of a traced value."""
    if isinstance(value, torch.Tensor):
        shape = tuple(_size(s) for s in value.shape)
        return Meta(shape, value.dtype, tuple(_grows(s) for s in value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(_meta(item) for item in value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _size(value)
    return value


def _unknown(meta: Any) -> bool:
    """Whether a size depends on the data, so that the trace can not tell it."""
    if isinstance(meta, tuple):
        return any(_unknown(m) for m in meta)
    return isinstance(meta, Meta) and None in meta.shape


def measure(graph: Graph) -> None:
    """Fills in shapes and numbers that depend on the data by running the example."""
    if any(tensor.is_meta for tensor in graph.example.values()):
        raise TraceError("a size depends on the data, which the meta device does not have")

    def watch(node: Node, value: Any) -> None:
        old = node.meta
        new = _meta(value)
        if isinstance(new, Meta):
            batched = old.batched if isinstance(old, Meta) else ()
            new = Meta(new.shape, new.dtype, batched)
        graph.nodes[node.name] = replace(node, meta=new)

    with torch.no_grad():
        execute(graph, graph.values, graph.example, watch=watch)


def _grows(size: Any) -> bool:
    """Whether a traced size is free; one that the network settles is not, though it came from a free one."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def _size(size: Any) -> Any:
    if isinstance(size, (int, float, bool)):
        return size
    return size.node.hint
