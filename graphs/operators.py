"""Operators by name: the allow-list through which a graph, also one read from disk, reaches callables."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from metaprune.graphs.errors import GraphError

_PYTHON: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        "getitem add sub mul floordiv truediv mod pow neg eq ne lt le gt ge and_ or_ not_ lshift rshift"
    ).split()
} | {
    f"torch.{name}": getattr(torch, name)
    for name in "sym_not sym_max sym_min sym_int sym_float sym_ite sym_sum".split()
    if hasattr(torch, name)
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*){2}")
_FORBIDDEN = frozenset({"from_file", "set_", "set", "_debug_has_internal_overlap", "resize_", "resize"})


@lru_cache(maxsize=4096)
def resolve(name: str) -> Callable[..., Any]:
    """The callable of an operator name such as `aten.relu.default` or `operator.mul`.

    Raises:
        GraphError: The name is not an operator registered with torch, or not allowed in a graph.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    if not _NAME.fullmatch(name):
        raise GraphError(f"{name!r} is not an operator name")
    space, base, overload = name.split(".")
    try:
        found = getattr(getattr(getattr(torch.ops, space), base), overload)
    except (AttributeError, RuntimeError) as error:
        raise GraphError(f"operator {name} is not registered in this process") from error
    if not isinstance(found, torch._ops.OpOverload) or base in _FORBIDDEN:
        raise GraphError(f"operator {name} is not allowed in a graph")
    return found


def name_of(target: Any) -> str:
    """The name under which `resolve` finds a call target; raises `GraphError` if it cannot."""
    if isinstance(target, torch._ops.OpOverload):
        space, base = target._schema.name.split("::")
        return f"{space}.{base}.{target._overloadname}"
    for name, function in _PYTHON.items():
        if function is target:
            return name
    module = getattr(target, "__module__", "")
    raise GraphError(f"call of {module}.{getattr(target, '__name__', target)} has no operator name")


def schema_of(name: str) -> torch._C.FunctionSchema | None:
    """The schema of a torch operator, None for a Python one."""
    found = resolve(name)
    return found._schema if isinstance(found, torch._ops.OpOverload) else None


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults filled in."""
    schema = schema_of(name)
    if schema is None:
        return {str(i): value for i, value in enumerate(args)} | kwargs
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def check_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises `GraphError` when a call has more, fewer or other arguments than the operator's schema."""
    schema = schema_of(name)
    if schema is None:
        return
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    given = {*positional[: len(args)], *kwargs}
    if len(args) > len(positional) or not given <= {a.name for a in schema.arguments}:
        raise GraphError(f"a call of {name} has arguments that the operator does not take")
    missing = [a.name for a in schema.arguments if a.name not in given and not a.has_default_value()]
    if missing:
        raise GraphError(f"a call of {name} lacks the argument {missing[0]}")


@lru_cache(maxsize=4096)
def is_pointwise(op: str) -> bool:
    """Whether torch declares the operator to be elementwise."""
    found = resolve(op)
    return isinstance(found, torch._ops.OpOverload) and torch.Tag.pointwise in found.tags
