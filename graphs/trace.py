"""From PyTorch to a `Graph` through `torch.export(strict=False)`."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from metaprune.graphs import structure
from metaprune.graphs.errors import MetapruneError, TraceError
from metaprune.graphs.ir import Graph, Signature
from metaprune.graphs.reader import Reader
from metaprune.graphs.structure import Ref


def trace(model: Any, inputs: Any = None, dynamic: Mapping[int | str, Sequence[int]] | None = None) -> Graph:
    """Turns a network into a `Graph`.

    Args:
        model: An `nn.Module`, `fx.GraphModule` or `ExportedProgram`. It is traced in eval mode and never changed.
        inputs: An example: a tensor, a tuple of arguments, or a dict of keyword arguments. An `ExportedProgram`
            brings its own. A batch of one is doubled, since a dynamic dimension can not be of size one.
        dynamic: More dynamic dimensions, by position or name of the argument: `{"input_ids": (1,)}`.

    Raises:
        TraceError: The network can not be exported, or does not accept the inputs.
    """
    if isinstance(model, ExportedProgram):
        return _from_program(model)
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"a network must be an nn.Module, fx.GraphModule or ExportedProgram, not {type(model).__name__}"
        )
    if inputs is None:
        raise TraceError("inputs: an example input is needed to trace a network")
    args, kwargs = _call(inputs)
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> Ref:
        leaves.append(tensor)
        return Ref(f"in{len(leaves) - 1}")

    spec = (
        tuple(structure.take_apart(a, leaf, lambda _, v: v) for a in args),
        {k: structure.take_apart(v, leaf, lambda _, v: v) for k, v in kwargs.items()},
    )
    if not leaves:
        raise TraceError("inputs: the example holds no tensor")
    if any(x.is_floating_point() and not x.is_meta and bool(x.isnan().any()) for x in leaves):
        raise TraceError("inputs: the example holds values that are not a number")
    wrapper = _Flat(model, spec)
    size = leaves[0].shape[0] if leaves[0].ndim else 0
    notes: list[str] = []
    with _evaluating(model):
        doubled = [torch.cat([x, x]) if size == 1 and x.ndim and x.shape[0] == 1 else x for x in leaves]
        try:
            program = _export(wrapper, doubled, _dims(spec, doubled, dynamic))
            used = doubled
        except TraceError:
            if size != 1 or dynamic:
                raise
            wrapper = _Flat(model, spec)
            program = _export(wrapper, leaves, None)
            used = leaves
            notes.append("the network accepts a batch of one only")
    names = tuple(inspect.signature(model.forward).parameters)
    reader = Reader(program, model, _tensors_of(model), strip="model.")
    reader.read()
    if not reader.outputs:
        raise TraceError("the network's output holds no tensor")
    outputs = iter(reader.outputs)
    output = structure.exchange(wrapper.noted.template, lambda _: next(outputs))
    signature = Signature(names, spec, output, wrapper.noted.dropped)
    notes += [f"output {path} is not a tensor and is left out" for path in wrapper.noted.dropped]
    batch = leaves[0].shape[0] / used[0].shape[0] if leaves[0].ndim and used[0].shape[0] else 1.0
    return reader.graph(signature, used, batch, notes)


def _from_program(program: ExportedProgram) -> Graph:
    if program.example_inputs is None:
        raise TraceError("the ExportedProgram carries no example inputs")
    args, kwargs = program.example_inputs
    model = program.module(check_guards=False)
    reader = Reader(program, model, dict(program.state_dict) | dict(program.constants), strip="")
    reader.read()
    flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    names = iter(reader.inputs)
    spec = torch.utils._pytree.tree_map(
        lambda v: Ref(next(names)) if isinstance(v, torch.Tensor) else v, (args, kwargs)
    )
    stand_ins = [torch.empty(0) for _ in reader.outputs]
    by_identity = {id(tensor): ref for tensor, ref in zip(stand_ins, reader.outputs, strict=True)}
    output = torch.utils._pytree.tree_unflatten(stand_ins, program.call_spec.out_spec)
    output = structure.take_apart(output, lambda tensor: by_identity[id(tensor)], lambda _, v: v)
    signature = Signature(tuple(kwargs), (tuple(spec[0]), spec[1]), output)
    return reader.graph(signature, [v for v in flat if isinstance(v, torch.Tensor)], 1.0, [])


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


class _Output:
    """Structure of a network's output, noted while it is traced (the exporter undoes changes of module attributes)."""

    template: Any = None
    dropped: tuple[str, ...] = ()


class _Flat(nn.Module):
    """The network with a flat list of tensors in and out."""

    def __init__(self, model: nn.Module, spec: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self._spec = spec
        self.noted = _Output()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        find: Callable[[Ref], Any] = lambda ref: tensors[int(ref.name[2:])]  # noqa: E731
        args = [structure.put_together(a, find) for a in self._spec[0]]
        kwargs = {k: structure.put_together(v, find) for k, v in self._spec[1].items()}
        result = self.model(*args, **kwargs)
        leaves: list[torch.Tensor] = []
        dropped: list[str] = []

        def leaf(tensor: torch.Tensor) -> Ref:
            leaves.append(tensor)
            return Ref(f"out{len(leaves) - 1}")

        def other(path: str, value: Any) -> Any:
            if isinstance(value, (bool, int, float, str)):
                return value
            dropped.append(path.lstrip(".") or type(value).__name__)
            return None

        self.noted.template = structure.take_apart(result, leaf, other)
        self.noted.dropped = tuple(dropped)
        return tuple(leaves)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and without the fused attention path that hides its operators."""
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    for module, _ in flags:
        module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags:
            module.training = flag


def _dims(
    spec: tuple[tuple[Any, ...], Mapping[str, Any]],
    leaves: Sequence[torch.Tensor],
    dynamic: Mapping[int | str, Sequence[int]] | None,
) -> tuple[Any, ...]:
    """Dynamic dimensions of every leaf: the batch, and those asked for."""
    size = leaves[0].shape[0] if leaves[0].ndim else 0
    wanted: list[set[int]] = [{0} if x.ndim and x.shape[0] == size and size > 1 else set() for x in leaves]
    if dynamic is not None and not (
        isinstance(dynamic, Mapping) and all(isinstance(dims, (tuple, list, set)) for dims in dynamic.values())
    ):
        raise TraceError(f"dynamic: a dict from arguments to their dimensions is needed, not {dynamic!r}")
    for key, dims in (dynamic or {}).items():
        try:
            argument = spec[0][key] if isinstance(key, int) else spec[1][key]
        except (IndexError, KeyError):
            raise TraceError(f"dynamic: there is no argument {key!r}") from None
        for name in structure.refs(argument):
            number = int(name[2:])
            if any(not 0 <= d < leaves[number].ndim for d in dims):
                raise TraceError(f"dynamic: argument {key!r} has {leaves[number].ndim} dimensions, not {tuple(dims)}")
            wanted[number].update(dims)
    return (tuple(dict.fromkeys(sorted(dims), Dim.AUTO) or None for dims in wanted),)


def _export(wrapper: nn.Module, leaves: Sequence[torch.Tensor], dims: Any) -> ExportedProgram:
    try:
        with _forgetting_sources():
            return torch.export.export(wrapper, tuple(leaves), dynamic_shapes=dims, strict=False)
    except MetapruneError:
        raise
    except Exception as error:
        where = _user_line(error)
        text = str(error).strip().splitlines() or [""]
        raise TraceError(f"the network can not be exported: {type(error).__name__}: {text[0][:300]}{where}") from error


@contextlib.contextmanager
def _forgetting_sources() -> Iterator[None]:
    """The exporter keeps the source text of every module it generates, for tracebacks; those made here are let go."""
    kept: dict[str, str] = torch.fx.graph_module._loader.eval_cache
    before = set(kept)
    try:
        yield
    finally:
        for name in set(kept) - before:
            del kept[name]
            linecache.cache.pop(name, None)


def _user_line(error: BaseException) -> str:
    """The innermost line outside torch, which is where the network stopped the export."""
    line = ""
    tb = error.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.endswith(("graphs/trace.py", "graphs/structure.py")):
            line = f" (at {file}:{tb.tb_lineno} in {tb.tb_frame.f_code.co_name})"
        tb = tb.tb_next
    return line


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))
