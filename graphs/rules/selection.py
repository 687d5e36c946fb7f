"""Operators that pick positions: slices, splits, constant and runtime indices, scatters."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.movement import regroup
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def _span(bound: Bound, size: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice with Python's rules; raises `Unmatched` for dynamic bounds."""
    start, stop, step = bound.get("start"), bound.get("end"), bound.get("step", 1)
    if not all(value is None or isinstance(value, int) for value in (start, stop, step)):
        raise Unmatched("a slice with dynamic bounds")
    return slice(start, stop, step).indices(size)


def _slice(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = list(state.of(bound["self"]))
    d = bound["dim"] % len(axes)
    if axes[d].ids is None:
        axes[d] = state.fixed(node.shape[d], axes[d].why)
    elif any(isinstance(bound.get(key), Ref) for key in ("start", "end")):
        state.pin(axes[d], "sliced at a dynamic position")
        axes[d] = state.fixed(node.shape[d], "sliced at a dynamic position")
    else:
        start, stop, step = _span(bound, axes[d].size)
        if (start, stop, step) != (0, axes[d].size, 1):
            axes[d] = axes[d].take(np.arange(start, stop, step))
    return tuple(axes)


def _slice_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    """Bounds count kept positions; a stride over kept positions is an index."""
    d = bound["dim"] % len(node.shape)
    mask = cut.mask(bound["self"], d)
    if mask is None:
        return bound
    start, stop, step = _span(bound, len(mask))
    if step != 1:
        return cut.pick(bound["self"], d, np.arange(start, stop, step), node)
    first = int(mask[:start].sum())
    return {**bound, "dim": d, "start": first, "end": first + int(mask[start:stop].sum())}


def _narrow(state: Flow, node: Node, bound: Bound) -> Axes:
    return _slice(state, node, _as_slice(bound))


def _as_slice(bound: Bound) -> Bound:
    start, length = bound["start"], bound["length"]
    end = start + length if isinstance(start, int) and isinstance(length, int) else length
    end = 2**63 - 1 if isinstance(start, int) and start < 0 and end == 0 else end
    return {"self": bound["self"], "dim": bound["dim"], "start": bound["start"], "end": end, "step": 1}


def _narrow_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    if cut.mask(bound["self"], bound["dim"] % len(node.shape)) is None:
        return bound
    new = _slice_kept(cut, node, _as_slice(bound))
    return {**bound, "start": new["start"], "length": new["end"] - new["start"]}


def _pieces(state: Flow, node: Node, bound: Bound) -> list[Axes]:
    """Splits of every kind: consecutive ranges, as long as the traced pieces."""
    axes = state.of(bound["self"])
    d = bound.get("dim", 0) % len(axes)
    out: list[Axes] = []
    position = 0
    for piece in node.meta:  # type: ignore[union-attr]
        size = piece.shape[d]  # type: ignore[union-attr]
        here = (
            axes[d].take(np.arange(position, position + size))
            if axes[d].ids is not None
            else state.fixed(size, axes[d].why)
        )
        out.append((*axes[:d], here, *axes[d + 1 :]))
        position += size
    return out


def _pieces_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    d = bound.get("dim", 0) % len(cut.shape(bound["self"]))
    mask = cut.mask(bound["self"], d)
    if mask is None:
        return bound
    old = [piece.shape[d] for piece in node.meta]  # type: ignore[union-attr]
    bounds = np.cumsum([0, *old])
    sizes = tuple(int(mask[a:b].sum()) for a, b in pairwise(bounds.tolist()))
    key = next(k for k in bound if k not in ("self", "dim"))
    cut.note(node, {key: tuple(old)}, {key: sizes})
    return cut.emit("aten.split_with_sizes.default", (bound["self"], sizes, d), node)


def _unbind(state: Flow, node: Node, bound: Bound) -> list[Axes]:
    axes = state.of(bound["self"])
    d = bound["dim"] % len(axes)
    state.pin(axes[d], "taken apart into separate values")
    return [(*axes[:d], *axes[d + 1 :])] * axes[d].size


def _select(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    d = bound["dim"] % len(axes)
    if not isinstance(bound["index"], int):
        state.pin(axes[d], "addressed by a number at run time")
    elif axes[d].ids is not None:
        state.atoms.pin(axes[d].ids[[bound["index"]]], "addressed by its number")
    return (*axes[:d], *axes[d + 1 :])


def _select_kept(cut: Cut, node: Node, bound: Bound) -> Bound:
    mask = cut.mask(bound["self"], bound["dim"])
    if mask is None or not isinstance(bound["index"], int):
        return bound
    return {**bound, "index": int(mask[: bound["index"] % len(mask)].sum())}


def _index_select(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    d = bound["dim"] % len(axes)
    index = state.constant(bound["index"])
    state.use(state.of(bound["index"]))
    if index is None:
        state.pin(axes[d], "addressed by numbers at run time")
        picked = state.of(bound["index"])[0] if state.of(bound["index"]) else state.fixed(1, "a single position")
    else:
        for axis in state.of(bound["index"]):
            state.pin(axis, "a constant index")
        picked = axes[d].take(index.ravel())
    return (*axes[:d], picked.with_zero(picked.zero if index is not None else False), *axes[d + 1 :])


def _index_select_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    d = bound["dim"] % len(node.shape)
    if cut.mask(bound["self"], d) is None and cut.mask(node, d) is None:
        return bound
    index = cut.flow.constant(bound["index"])
    return bound if index is None else cut.pick(bound["self"], d, index.ravel(), node)


def _index(state: Flow, node: Node, bound: Bound) -> Axes:
    """Advanced indexing: one constant index moves positions, anything else pins the axes it addresses."""
    axes, indices = state.of(bound["self"]), bound["indices"]
    addressed = [d for d, index in enumerate(indices) if index is not None]
    for d in addressed:
        for axis in state.of(indices[d]):
            state.pin(axis, "part of an index")
    d = addressed[0]
    constant = state.constant(indices[d]) if len(addressed) == 1 else None
    if constant is not None and constant.dtype != np.bool_ and state.meta(indices[d]).dtype is not torch.bool:
        index = constant % max(1, axes[d].size)
        picked = axes[d].take(index.ravel(), "addressed by an index")
        return (*axes[:d], *regroup(state, (picked,), constant.shape, "index"), *axes[d + 1 :])
    for a in addressed:
        state.pin(axes[a], "addressed by numbers at run time")
    masks = [state.meta(indices[a]).dtype in (torch.bool, torch.uint8) for a in addressed]
    if any(masks):
        return _masked(state, node, axes, addressed, len(state.of(indices[d])))
    shape = np.broadcast_shapes(*(state.meta(indices[a]).shape for a in addressed))
    together = addressed == list(range(addressed[0], addressed[-1] + 1))
    at = addressed[0] if together else 0
    rest = [axis for i, axis in enumerate(axes) if i not in addressed]
    made = [state.fixed(size, "addressed at run time") for size in shape]
    return (*rest[:at], *made, *rest[at:])


def _masked(state: Flow, node: Node, axes: Axes, addressed: list[int], covered: int) -> Axes:
    """One boolean mask over `covered` dimensions: they become one of as many positions as are true."""
    if len(addressed) > 1:
        raise Unmatched("a boolean mask among other indices")
    at = addressed[0]
    for axis in axes[at : at + covered]:
        state.pin(axis, "masked at run time")
    return (*axes[:at], state.fixed(node.shape[at], "masked at run time"), *axes[at + covered :])


def _index_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    addressed = [d for d, index in enumerate(bound["indices"]) if index is not None]
    if len(addressed) != 1 or cut.mask(bound["self"], addressed[0]) is None:
        return bound
    d = addressed[0]
    index = cut.flow.constant(bound["indices"][d])
    assert index is not None
    picked = cut.pick(bound["self"], d, index.ravel() % cut.old_size(bound["self"], d), node)
    if index.ndim == 1:
        return picked
    sizes = tuple(cut.size(node, d + i) for i in range(index.ndim))
    return cut.emit("aten.unflatten.int", (picked, d, sizes), node)


def _gather(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, index = state.of(bound["self"]), state.of(bound["index"] if "index" in bound else bound["indices"])
    if bound["dim"] is None:
        raise Unmatched("positions in the flattened tensor")
    d = bound["dim"] % len(axes)
    state.pin(axes[d], "addressed by numbers at run time")
    out: list[Axis] = []
    for i, (axis, other) in enumerate(zip(axes, index, strict=True)):
        if i == d or axis.size != other.size:
            state.pin(axis, "addressed by numbers at run time")
            out.append(other.with_zero(False))
        else:
            out.append(state.tie([axis, other], "gather").with_zero(axis.zero))
    return tuple(out)


def _slice_scatter(state: Flow, node: Node, bound: Bound) -> Axes:
    base, source = state.of(bound["self"]), state.of(bound["src"])
    d = bound["dim"] % len(base)
    out: list[Axis] = []
    for i, (axis, other) in enumerate(zip(base, source, strict=True)):
        if i != d:
            out.append(state.tie([axis, other], "slice_scatter").with_zero(axis.zero & other.zero))
            continue
        if any(isinstance(bound.get(key), Ref) for key in ("start", "end")):
            for pinned in (axis, other):
                state.pin(pinned, "written at a dynamic position")
            out.append(state.fixed(axis.size, "written at a dynamic position"))
            continue
        where = np.arange(*_span(bound, axis.size))
        state.tie([axis.take(where, axis.why), other], "slice_scatter")
        zero = np.broadcast_to(axis.zero, axis.size).copy()
        zero[where] = other.zero
        out.append(axis.with_zero(zero))
    return tuple(out)


def _slice_scatter_kept(cut: Cut, node: Node, bound: Bound) -> Any:
    d = bound["dim"] % len(node.shape)
    mask = cut.mask(bound["self"], d)
    if mask is None:
        return bound
    start, stop, step = _span(bound, len(mask))
    if step == 1:
        first = int(mask[:start].sum())
        return {**bound, "start": first, "end": first + int(mask[start:stop].sum())}
    index = np.arange(start, stop, step)
    index = (np.cumsum(mask) - 1)[index[mask[index]]]
    constant = cut.constant(torch.from_numpy(index.copy()))
    return cut.emit("aten.index_copy.default", (bound["self"], d, constant, bound["src"]), node)


def _select_scatter(state: Flow, node: Node, bound: Bound) -> Axes:
    base, source = list(state.of(bound["self"])), iter(state.of(bound["src"]))
    d = bound["dim"] % len(base)
    for i, axis in enumerate(base):
        if i == d:
            state.pin(axis, "written at one position")
        else:
            other = next(source)
            base[i] = state.tie([axis, other], "select_scatter").with_zero(axis.zero & other.zero)
    return tuple(base)


def _scattered(state: Flow, node: Node, bound: Bound) -> Axes:
    """Writes at runtime positions: the written axis is pinned, the others go along."""
    base, index = state.of(bound["self"]), state.of(bound["index"])
    source = state.of(bound["src"]) if isinstance(bound.get("src"), Ref) else None
    d = bound["dim"] % len(base)
    out: list[Axis] = []
    for i, axis in enumerate(base):
        others = [axes[i] for axes in (index, source) if axes is not None and i < len(axes)]
        if i == d or any(other.size != axis.size for other in others):
            for pinned in (axis, *others):
                state.pin(pinned, "written at positions known at run time")
            out.append(state.fixed(axis.size, "written at positions known at run time"))
        else:
            zero = axis.zero & source[i].zero if source is not None else False
            out.append(state.tie([axis, *others], "scatter").with_zero(zero))
    return tuple(out)


def _meshgrid(state: Flow, node: Node, bound: Bound) -> list[Axes]:
    for ref in bound["tensors"]:
        for axis in state.of(ref):
            state.pin(axis, "spanned into a grid")
    shapes = [piece.shape for piece in node.meta]  # type: ignore[union-attr]
    return [tuple(state.fixed(size, "a grid") for size in shape) for shape in shapes]


_SPLIT = Rule(_pieces, _pieces_kept)

ROWS: dict[str, Rule] = {
    "aten.slice": Rule(_slice, _slice_kept),
    "aten.narrow": Rule(_narrow, _narrow_kept),
    **{
        f"aten.{name}": _SPLIT for name in "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk".split()
    },
    "aten.unbind": Rule(_unbind),
    "aten.select": Rule(_select, _select_kept),
    "aten.index_select": Rule(_index_select, _index_select_kept),
    "aten.index": Rule(_index, _index_kept),
    "aten.gather": Rule(_gather),
    "aten.take_along_dim": Rule(_gather),
    "aten.slice_scatter": Rule(_slice_scatter, _slice_scatter_kept),
    "aten.select_scatter": Rule(_select_scatter),
    "aten.scatter": Rule(_scattered),
    "aten.scatter_add": Rule(_scattered),
    "aten.meshgrid": Rule(_meshgrid),
}
