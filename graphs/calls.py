"""The operator calls of one forward pass, each with its operands: what has to be run to run it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from metaprune.graphs import operators, structure
from metaprune.graphs.execute import arguments, execute
from metaprune.graphs.ir import Graph, Meta, Node, substitute
from metaprune.graphs.structure import Ref


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of an operator.

    Attributes:
        node: Name of the node that makes it.
        op: The operator's full name.
        args: Positional arguments, nested tuples; `Ref("0")`, `Ref("1")`, ... stand for the operands.
        kwargs: Keyword arguments.
        operands: The tensors it is called with.
        fixed: For each operand, whether it follows from the network's own tensors and not from its inputs.
        results: The tensors it gives.
    """

    node: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[torch.Tensor, ...]
    fixed: tuple[bool, ...]
    results: tuple[torch.Tensor, ...]

    def bound(self, operands: tuple[torch.Tensor, ...] | None = None) -> Callable[[], Any]:
        """The call as a function without arguments, on these operands or its own."""
        given = self.operands if operands is None else operands

        def put(value: Any) -> Any:
            return given[int(value.name)] if isinstance(value, Ref) else _each(value, put)

        function, args = operators.resolve(self.op), put(list(self.args))
        kwargs = {name: put(value) for name, value in self.kwargs.items()}
        return lambda: function(*args, **kwargs)

    @cached_property
    def key(self) -> str:
        """Equal for calls that do the same work: the operator, its attributes, shapes, dtypes and layouts."""

        def text(value: Any) -> Any:
            return _Text(_described(self.operands[int(value.name)], self.fixed[int(value.name)]))

        args = [repr(item) for item in substitute(self.args, text)]
        args += [f"{name}={substitute(value, text)!r}" for name, value in self.kwargs.items()]
        return f"{self.op}({', '.join(args)})"

    @property
    def is_constant(self) -> bool:
        """Whether the result is the same for all inputs of the network."""
        return all(self.fixed)

    @property
    def is_reshape(self) -> bool:
        """Whether the result is an operand's memory, whole and in the same order."""
        places = {operand.untyped_storage().data_ptr(): operand.numel() for operand in self.operands}
        return all(
            result.is_contiguous() and places.get(result.untyped_storage().data_ptr()) == result.numel()
            for result in self.results
        )


class _Text(str):
    """Shown without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def calls(graph: Graph) -> list[OperatorCall]:
    """Every call of a torch operator that gives a tensor, in order, for the traced example at the caller's batch size.

    All values of the forward pass are held at once.
    """
    values: dict[str, Any] = {}
    fixed: set[int] = set()
    found: list[OperatorCall] = []

    def watch(node: Node, value: Any) -> None:
        values[node.name] = value
        if node.op == "tensor":
            fixed.add(id(value))
        results = tuple(_tensors(value))
        if node.op in ("input", "tensor") or not results or operators.schema_of(node.op) is None:
            return
        call = _recorded(node, arguments(node, values, graph.values), fixed, results)
        if call.is_constant:
            fixed.update(map(id, results))
        found.append(call)

    with torch.no_grad():
        execute(graph, graph.values, callers_example(graph), watch=watch)
    return found


def callers_example(graph: Graph) -> dict[str, torch.Tensor]:
    """The traced example by input node, in the caller's batch size: tracing may have doubled it."""
    found = dict(graph.example)
    for name, value in graph.example.items():
        meta = graph.nodes[name].meta
        for dim, grows in enumerate(meta.batched if isinstance(meta, Meta) else ()):
            size = round(value.shape[dim] * graph.batch)
            if grows and size < value.shape[dim]:
                found[name] = found[name].narrow(dim, 0, size).contiguous()
    return found


def callers_arguments(graph: Graph) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call of the network, in the caller's batch size."""
    example = callers_example(graph)
    positional, named = graph.signature.spec
    args = tuple(structure.put_together(value, lambda ref: example[ref.name]) for value in positional)
    return args, {k: structure.put_together(value, lambda ref: example[ref.name]) for k, value in named.items()}


def _recorded(
    node: Node, given: tuple[list[Any], dict[str, Any]], fixed: set[int], results: tuple[torch.Tensor, ...]
) -> OperatorCall:
    operands: list[torch.Tensor] = []

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            operands.append(value)
            return Ref(str(len(operands) - 1))
        return _each(value, take, tuple)

    args, kwargs = take(given[0]), {name: take(value) for name, value in given[1].items()}
    return OperatorCall(
        node.name, node.op, args, kwargs, tuple(operands), tuple(id(t) in fixed for t in operands), results
    )


def _each(value: Any, change: Callable[[Any], Any], kind: type = list) -> Any:
    """`value` with `change` made of each item, if it is a sequence."""
    return kind(change(item) for item in value) if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _described(tensor: torch.Tensor, fixed: bool) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
    return f"{'fixed ' if fixed else ''}{dtype}{list(tensor.shape)}{layout}"
