"""Operators that move values without computing: reshapes, permutations, concatenation, padding, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def regroup(state: Flow, axes: Axes, shape: Sequence[int], op: str) -> Axes:
    """Row-major reinterpretation under another shape: the smallest runs of equal volume are merged and split."""
    if prod(axis.size for axis in axes) == 0:
        return tuple(state.fixed(size, "empty") for size in shape)
    out: list[Axis] = []
    i = j = 0
    while i < len(axes) or j < len(shape):
        run, sizes = list(axes[i : i + 1]), list(shape[j : j + 1])
        i, j = i + 1, j + 1
        while prod(a.size for a in run) != prod(sizes):
            if prod(a.size for a in run) < prod(sizes):
                run.append(axes[i])
                i += 1
            else:
                sizes.append(shape[j])
                j += 1
        if len(sizes) == 1:
            out.append(state.merge(run, op) if run else state.fixed(1, "a single position"))
        elif sizes:
            out.extend(_refactor(state, run, sizes, op))
    return tuple(out)


def _refactor(state: Flow, run: Sequence[Axis], sizes: Sequence[int], op: str) -> Axes:
    """Axes under other sizes of the same volume: through their common factors where there are such."""
    steps = sorted({prod(sizes), *_strides([axis.size for axis in run]), *_strides(sizes)}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(steps)):
        return state.split(state.merge(run, op), sizes, op)
    factors: list[Axis] = []
    for axis, inner in zip(run, _strides([axis.size for axis in run]), strict=True):
        within = [step for step in steps if inner <= step <= inner * axis.size]
        factors += state.split(axis, [a // b for a, b in pairwise(within)], op) if axis.size > 1 else ()
    out: list[Axis] = []
    for size in sizes:
        mine: list[Axis] = []
        while prod(axis.size for axis in mine) < size:
            mine.append(factors.pop(0))
        out.append(state.merge(mine, op) if mine else state.fixed(1, "a single position"))
    return tuple(out)


def _strides(sizes: Sequence[int]) -> list[int]:
    """Distance of neighbours along each axis, in elements."""
    return [prod(sizes[i + 1 :]) for i in range(len(sizes))]


def _reshape(state: Flow, node: Node, bound: Bound) -> Axes:
    return regroup(state, state.of(bound.get("self") or bound["input"]), node.shape, node.base)


def _sizes(argument: str) -> Any:
    """Rewrites the list of sizes in `argument`, which describes the trailing dimensions of the result."""

    def rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
        sizes = bound[argument]
        first = len(node.shape) - len(sizes)
        return {**bound, argument: tuple(cut.resize(size, node, first + d) for d, size in enumerate(sizes))}

    return rewrite


def _view(cut: Cut, node: Node, bound: Bound) -> Any:
    """After a cut memory need no longer be contiguous: a view becomes a reshape."""
    key = "size" if "size" in bound else "shape"
    new = _sizes(key)(cut, node, bound)
    cut.note(node, bound, new)
    sizes = new[key]
    return cut.emit("aten.reshape.default", (bound["self"], sizes), node)


def _unflatten(cut: Cut, node: Node, bound: Bound) -> Bound:
    dim = bound["dim"] % len(cut.shape(bound["self"]))
    return {**bound, "sizes": tuple(cut.resize(size, node, dim + d) for d, size in enumerate(bound["sizes"]))}


def _permute(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    return tuple(axes[d] for d in bound["dims"])


def _transpose(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = list(state.of(bound["self"]))
    a, b = [d for name, d in bound.items() if name in ("dim0", "dim1", "axis0", "axis1")] or (0, 1)
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _movedim(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    source, target = bound["source"], bound["destination"]
    rank = len(axes)
    moved = dict(
        zip(*([d % rank for d in (v if isinstance(v, tuple) else (v,))] for v in (target, source)), strict=True)
    )
    rest = iter(d for d in range(rank) if d not in moved.values())
    return tuple(axes[moved[d]] if d in moved else axes[next(rest)] for d in range(rank))


def identity(state: Flow, node: Node, bound: Bound) -> Axes:
    """The first tensor's axes."""
    return state.of(bound.get("self") or bound.get("input") or next(v for v in bound.values() if isinstance(v, Ref)))


def _expand(state: Flow, node: Node, bound: Bound) -> Axes:
    """Copies of a single position: as many may stay as the size argument says, so they are free."""
    axes = state.of(bound["self"])
    shape, sizes = node.shape, bound.get("size")
    other = state.of(bound["other"]) if "other" in bound else None
    out: list[Axis] = []
    for d in range(len(shape)):
        at = d - len(shape) + len(axes)
        if at >= 0 and axes[at].size == shape[d]:
            out.append(axes[at])
        elif other is not None:
            out.append(other[d].with_zero(False))
        elif sizes is not None and isinstance(sizes[d], int):
            out.append(state.fresh(shape[d]))
        else:
            out.append(state.fixed(shape[d], "a dynamic size"))
    return tuple(out)


def _repeat(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, times = state.of(bound["self"]), bound.get("repeats") or bound["dims"]
    shape = node.shape
    out: list[Axis] = []
    for d in range(len(shape)):
        at, time = (
            d - len(shape) + len(axes),
            times[d - len(shape) + len(times)] if d - len(shape) + len(times) >= 0 else 1,
        )
        if not isinstance(time, int):
            out.append(axes[at] if at >= 0 and shape[d] == axes[at].size else state.fixed(shape[d], "a dynamic size"))
        elif at < 0 or axes[at].size == 1:
            out.append(state.fresh(shape[d]))
        else:
            out.append(axes[at] if time == 1 else axes[at].take(np.tile(np.arange(axes[at].size), time)))
    return tuple(out)


def _repeats(cut: Cut, node: Node, bound: Bound) -> Bound:
    key = "repeats" if "repeats" in bound else "dims"
    times, rank, own = bound[key], len(node.shape), len(cut.shape(bound["self"]))
    new = list(times)
    for d in range(rank):
        at, place = d - rank + own, d - rank + len(times)
        if place >= 0 and isinstance(times[place], int) and (at < 0 or cut.old_size(bound["self"], at) == 1):
            new[place] = cut.size(node, d)
    return {**bound, key: tuple(new)}


def _interleave(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, times, dim = list(state.of(bound["self"])), bound["repeats"], bound.get("dim")
    if dim is None or not isinstance(times, int):
        raise Unmatched("a flattened or dynamic repetition")
    axes[dim] = axes[dim].take(np.repeat(np.arange(axes[dim].size), times), "repeated")
    return tuple(axes)


def _concatenate(state: Flow, node: Node, bound: Bound) -> Axes:
    refs = [ref for ref in bound["tensors"] if not (len(state.of(ref)) == 1 and state.of(ref)[0].size == 0)]
    operands = [state.of(ref) for ref in refs]
    dim = bound["dim"] % len(node.shape)
    out: list[Axis] = []
    for d in range(len(node.shape)):
        here = [axes[d] for axes in operands]
        if d == dim:
            out.append(join(state, here, "concatenated with"))
        else:
            zero: Any = np.True_
            for axis in here:
                zero = zero & axis.zero
            out.append(state.tie(here, "cat").with_zero(zero))
    return tuple(out)


def join(state: Flow, pieces: Sequence[Axis], how: str) -> Axis:
    """One axis after the other; pieces of which nothing can go stay whole."""
    if all(axis.ids is None for axis in pieces):
        return state.fixed(sum(axis.size for axis in pieces), pieces[0].why)
    ids, zeros = [], []
    for axis in pieces:
        if axis.ids is None:
            atoms = state.atoms.fresh(axis.size)
            state.atoms.pin(atoms, f"{how} an axis that is {axis.why}")
            ids.append(atoms)
        else:
            ids.append(axis.ids)
        zeros.append(np.broadcast_to(axis.zero, axis.size))
    zero = np.concatenate(zeros)
    return Axis(len(zero), np.concatenate(ids), np.bool_(zero[0]) if (zero == zero[0]).all() else zero)


def _stack(state: Flow, node: Node, bound: Bound) -> Axes:
    operands = [state.of(ref) for ref in bound["tensors"]]
    dim = bound["dim"] % len(node.shape)
    out: list[Axis] = []
    for d in range(len(operands[0])):
        here = [axes[d] for axes in operands]
        zero: Any = np.True_
        for axis in here:
            zero = zero & axis.zero
        out.append(state.tie(here, "stack").with_zero(zero))
    return (*out[:dim], state.fixed(len(operands), "a stack of separate values"), *out[dim:])


def _flip(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = list(state.of(bound["self"]))
    for d in bound["dims"]:
        axes[d] = axes[d].take(np.arange(axes[d].size)[::-1].copy())
    return tuple(axes)


def _shifts(bound: Bound, rank: int) -> list[tuple[int, Any]]:
    shifts, dims = bound["shifts"], bound.get("dims") or ()
    if not dims:
        if rank != 1:
            raise Unmatched("a roll of the flattened tensor")
        dims = (0,)
    return list(zip([d % rank for d in dims], shifts, strict=True))


def _roll(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = list(state.of(bound["self"]))
    for d, shift in _shifts(bound, len(axes)):
        if axes[d].ids is not None:
            axes[d] = axes[d].take(np.roll(np.arange(axes[d].size), state.number(shift)))
    return tuple(axes)


def _roll_kept(cut: Cut, node: Node, bound: Bound) -> Bound:
    """A rotation of the kept positions is as long as there are kept ones among those that wrap around."""
    shifts, dims = [], []
    for d, shift in _shifts(bound, len(node.shape)):
        mask = cut.mask(bound["self"], d)
        if mask is not None:
            wrapped = shift % len(mask)
            shift = int(mask[len(mask) - wrapped :].sum()) if wrapped else 0
        shifts.append(shift)
        dims.append(d)
    return {**bound, "shifts": tuple(shifts), "dims": tuple(dims)}


def _pad(state: Flow, node: Node, bound: Bound) -> Axes:
    """Constant padding makes free positions; other modes mix, and a crop is a slice."""
    axes, amounts = list(state.of(bound["self"])), bound["pad"] if "pad" in bound else bound["padding"]
    constant = bound.get("mode", "constant") == "constant" and "pad" in bound
    value = bound.get("value") or 0
    touched = {len(axes) - 1 - i // 2 for i, amount in enumerate(amounts) if state.number(amount)}
    out: list[Axis] = []
    for d, axis in enumerate(axes):
        where = 2 * (len(axes) - 1 - d)
        before, after = (state.number(a) for a in amounts[where : where + 2]) if where < len(amounts) else (0, 0)
        if axis.ids is None or d not in touched:
            vanishes = axis.zero if not (touched - {d}) or value == 0 or not constant else False
            out.append(state.fixed(node.shape[d], axis.why) if axis.ids is None else axis.with_zero(vanishes))
        elif not constant:
            state.pin(axis, "padded by its own values")
            out.append(state.fixed(node.shape[d], "padded by its own values"))
        else:
            kept = axis.take(np.arange(max(0, -before), axis.size - max(0, -after)))
            pads = [_free(state, max(0, n), value == 0) for n in (before, after)]
            out.append(join(state, [p for p in (pads[0], kept, pads[1]) if p.size], "padded to"))
    return tuple(out)


def _free(state: Flow, size: int, zero: bool) -> Axis:
    return Axis(size, state.atoms.fresh(size), np.bool_(zero))


def _pad_kept(cut: Cut, node: Node, bound: Bound) -> Bound:
    if "pad" not in bound or bound.get("mode", "constant") != "constant":
        return bound
    amounts, rank = list(bound["pad"]), len(node.shape)
    for i in range(0, len(amounts), 2):
        d = rank - 1 - i // 2
        mask, inner = cut.mask(node, d), cut.mask(bound["self"], d)
        if mask is None and inner is None:
            continue
        before, after = amounts[i], amounts[i + 1]
        old = cut.old_size(bound["self"], d)
        inner = np.ones(old, dtype=bool) if inner is None else inner
        mask = np.ones(node.shape[d], dtype=bool) if mask is None else mask
        amounts[i] = int(mask[:before].sum()) if before >= 0 else -int(inner[:-before].sum())
        amounts[i + 1] = int(mask[len(mask) - after :].sum()) if after >= 0 else -int(inner[old + after :].sum())
        if after == 0:
            amounts[i + 1] = 0
    return {**bound, "pad": tuple(amounts)}


def _triangle(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    for axis in axes[-2:]:
        state.pin(axis, "a triangle is cut out of it")
    return (*axes[:-2], *(state.fixed(axis.size, "cut to a triangle") for axis in axes[-2:]))


def _getitem(state: Flow, node: Node, bound: Bound) -> Axes:
    axes: Axes = state.axes[bound["0"].name][bound["1"]]
    return axes


_IDENTITY = Rule(identity)
_RESHAPES = {
    name: Rule(_reshape, _view) for name in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias")
}

ROWS: dict[str, Rule] = {
    **_RESHAPES,
    **{
        f"aten.{name}": Rule(_reshape)
        for name in "flatten squeeze unsqueeze view_as reshape_as ravel atleast_1d".split()
    },
    "aten.unflatten": Rule(_reshape, _unflatten),
    "aten.permute": Rule(_permute),
    **{f"aten.{name}": Rule(_transpose) for name in "transpose t numpy_T swapaxes swapdims".split()},
    "aten.movedim": Rule(_movedim),
    "aten.expand": Rule(_expand, _sizes("size")),
    "aten.broadcast_to": Rule(_expand, _sizes("size")),
    "aten.expand_as": Rule(_expand),
    "aten.repeat": Rule(_repeat, _repeats),
    "aten.tile": Rule(_repeat, _repeats),
    "aten.repeat_interleave": Rule(_interleave),
    **{f"aten.{name}": Rule(_concatenate) for name in "cat concat concatenate".split()},
    "aten.stack": Rule(_stack),
    "aten.flip": Rule(_flip),
    "aten.roll": Rule(_roll, _roll_kept),
    "aten.constant_pad_nd": Rule(_pad, _pad_kept),
    "aten.pad": Rule(_pad, _pad_kept),
    **{f"aten.{mode}_pad{d}d": Rule(_pad) for mode in ("reflection", "replication") for d in (1, 2, 3)},
    "aten.tril": Rule(_triangle),
    "aten.triu": Rule(_triangle),
    **{
        f"aten.{name}": _IDENTITY
        for name in (
            "clone contiguous to _to_copy detach alias lift_fresh_copy lift_fresh dropout feature_dropout "
            "alpha_dropout feature_alpha_dropout type_as positive requires_grad_ cpu cuda "
            "resolve_conj resolve_neg"
        ).split()
    },
    "operator.getitem": Rule(_getitem),
}
