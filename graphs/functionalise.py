"""In-place operators turned into functional ones while a traced program is read.

A value that is a view knows its base. Writing to it makes a new value and scatters it back into the base; other views
of the same base are taken anew when they are next read. So `y = x[:, 4:8]; y.mul_(2)` becomes a slice, a
multiplication and a `slice_scatter`, without any decomposition pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metaprune.graphs import operators
from metaprune.graphs.errors import TraceError
from metaprune.graphs.ir import Meta, Node
from metaprune.graphs.structure import Ref

Emit = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Ref]

_RESHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as contiguous alias detach".split()
)


@dataclass
class Handle:
    """A traced value: where it stands now, and the view it is of another one."""

    ref: Any
    meta: Any
    base: Handle | None = None
    view: Node | None = None
    version: int = 0
    seen: int = field(default=0)


class Functionaliser:
    """Follows views and writes; `emit` adds a node to the graph under construction."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._views: dict[str, Handle] = {}

    def read(self, handle: Handle) -> Any:
        """The up-to-date reference of a value."""
        if handle.base is not None and handle.view is not None:
            base = self.read(handle.base)
            if handle.base.version != handle.seen:
                view, handle.seen = handle.view, handle.base.version
                args = (base, *view.args[1:])
                handle.ref = self._emit(view.op, args, dict(view.kwargs), view.meta)
                handle.version += 1
        return handle.ref

    def record(self, handle: Handle, node: Node, base: Handle | None) -> None:
        """Notes that `handle` is the result of `node`, which may be a view of `base`."""
        if base is not None:
            handle.base, handle.view, handle.seen = base, node, base.version

    def write(self, handle: Handle, ref: Ref) -> None:
        """Gives `handle` a new value, and its bases with it."""
        handle.ref = ref
        handle.version += 1
        if handle.base is not None and handle.view is not None:
            base = handle.base
            self.write(base, self._scatter(self.read(base), base.meta, handle.view, ref))
            handle.seen = base.version

    def _scatter(self, base: Any, meta: Any, view: Node, value: Ref) -> Ref:
        """`base` with `value` written where `view` looks."""
        kind = view.op.split(".")[1]
        bound = operators.bind(view.op, view.args, dict(view.kwargs))
        if kind == "slice":
            args = (base, value, bound["dim"], bound["start"], bound["end"], bound["step"])
            return self._emit("aten.slice_scatter.default", args, {}, meta)
        if kind == "select":
            return self._emit("aten.select_scatter.default", (base, value, bound["dim"], bound["index"]), {}, meta)
        if kind in _RESHAPES:
            return self._emit("aten.view_as.default", (value, base), {}, meta)
        if kind == "transpose":
            return self._emit("aten.transpose.int", (value, bound["dim0"], bound["dim1"]), {}, meta)
        if kind == "permute":
            dims = [d % len(bound["dims"]) for d in bound["dims"]]
            inverse = tuple(dims.index(i) for i in range(len(dims)))
            return self._emit("aten.permute.default", (value, inverse), {}, meta)
        raise TraceError(f"a write through {view.op} (in {view.module or 'the network'}) can not be made functional")


def is_view(op: str) -> bool:
    """Whether the operator's result may share memory with its first argument."""
    schema = operators.schema_of(op)
    if schema is None or not schema.arguments or not schema.returns:
        return False
    first, result = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return first is not None and result is not None and not first.is_write


def is_write(op: str) -> bool:
    """Whether the operator changes its first argument in place."""
    schema = operators.schema_of(op)
    if schema is None or not schema.arguments:
        return False
    info = schema.arguments[0].alias_info
    return info is not None and info.is_write


def functional(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Meta
) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The functional call whose result is what an in-place call leaves in its first argument."""
    space, base, overload = op.split(".")
    if base == "copy_":
        return "aten.expand_as.default", (args[1], args[0]), {}
    if base in ("fill_", "zero_"):
        if base == "fill_" and overload == "Tensor":
            return "aten.fill.Tensor", args, {}
        return "aten.full_like.default", (args[0], args[1] if base == "fill_" else 0), {}
    if base == "detach_":
        return "aten.detach.default", args, kwargs
    for name in (f"{space}.{base[:-1]}.{overload}", f"{space}.{base[:-1]}.default"):
        try:
            operators.resolve(name)
        except Exception:
            continue
        return name, args, kwargs
    raise TraceError(f"in-place operator {op} has no functional form")
