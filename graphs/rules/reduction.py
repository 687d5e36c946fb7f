"""Reductions, cumulative operators, softmax, sorting: operators along a dimension."""

from __future__ import annotations

from typing import Any

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule
from metaprune.graphs.structure import Ref


def _dims(value: Any, rank: int) -> set[int]:
    if value is None or value == ():
        return set(range(rank))
    if isinstance(value, int):
        value = (value,)
    return {d % max(1, rank) for d in value}


def _reduce(
    dim: str = "dim", keep: str = "keepdim", additive: bool = False, vanishes: bool = True, outputs: int = 1
) -> Rule:
    """A reduction over the dimensions in argument `dim` (absent or empty: all).

    Args:
        dim: Name of the argument with the dimensions.
        keep: Name of the argument that keeps them with size one.
        additive: Silenced positions add nothing, so nothing has to be filled up.
        vanishes: A slice of zeros gives zero.
        outputs: Number of results.
    """

    def flow(state: Flow, node: Node, bound: Bound) -> Any:
        ref: Ref = bound.get("self") or bound["input"]
        axes = state.of(ref)
        state.use(axes)
        op = node.base
        gone = _dims(bound.get(dim), len(axes))
        out: list[Axis] = []
        for i, axis in enumerate(axes):
            if i in gone:
                if additive:
                    state.contract(node, [(ref, i, axis)], op)
                else:
                    state.fill(node, ref, i, op)
                if bound.get(keep):
                    out.append(state.fixed(1, "a single position"))
            else:
                out.append(axis.with_zero(axis.zero if vanishes else False))
        return tuple(out) if outputs == 1 else [tuple(out)] * outputs

    return Rule(flow, None, "", ("self",))


def _along(dim: str = "dim", outputs: int = 1, vanishes: bool = False) -> Rule:
    """An operator whose result has the same axes, but mixes positions along one of them."""

    def flow(state: Flow, node: Node, bound: Bound) -> Any:
        ref: Ref = bound.get("self") or bound["input"]
        axes = state.of(ref)
        state.use(axes)
        mixed = _dims(bound.get(dim, -1), len(axes))
        out: list[Axis] = []
        for i, axis in enumerate(axes):
            if i in mixed and axis.ids is not None:
                state.fill(node, ref, i, node.base)
                state.restricted.setdefault(node.name, set()).add(i)
                out.append(axis.with_zero(False))
            else:
                out.append(axis.with_zero(axis.zero if vanishes else False))
        return tuple(out) if outputs == 1 else [tuple(out)] * outputs

    return Rule(flow, None, "", ("self",))


def _shuffling(outputs: int, dim: str = "dim") -> Rule:
    """Sorting and the like: the result's positions are no longer the operand's, so the axis is pinned."""

    def flow(state: Flow, node: Node, bound: Bound) -> Any:
        axes = state.of(bound["self"])
        state.use(axes)
        moved = _dims(bound.get(dim, -1), len(axes))
        metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
        shape = metas[0].shape  # type: ignore[union-attr]
        out: list[Axis] = []
        for i, axis in enumerate(axes):
            if i in moved:
                state.pin(axis, f"{node.base} reorders it at run time")
                out.append(state.fixed(shape[i], "reordered at run time"))
            else:
                out.append(axis.with_zero(False))
        return tuple(out) if outputs == 1 else [tuple(out)] * outputs

    return Rule(flow, None, "", ("self",))


def _one_hot_free(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = state.of(bound["self"])
    return (*(axis.with_zero(False) for axis in axes), state.fixed(node.shape[-1], "a one-hot code"))


ROWS: dict[str, Rule] = {
    "aten.sum": _reduce(additive=True),
    "aten.nansum": _reduce(additive=True),
    **{f"aten.{name}": _reduce() for name in "mean amax amin norm linalg_vector_norm median any var std".split()},
    **{f"aten.{name}": _reduce(vanishes=False) for name in "prod all logsumexp argmax argmin count_nonzero".split()},
    **{f"aten.{name}.dim": _reduce(outputs=2) for name in "max min median".split()},
    **{f"aten.{name}.default": _reduce(dim="no dim") for name in "max min".split()},
    "aten.var_mean": _reduce(outputs=2),
    "aten.std_mean": _reduce(outputs=2),
    **{f"aten.{name}": _along() for name in "softmax _softmax log_softmax _log_softmax cumprod logcumsumexp".split()},
    "aten.cumsum": _along(vanishes=True),
    "aten.sort": _shuffling(2),
    "aten.argsort": _shuffling(1),
    "aten.topk": _shuffling(2),
    "aten.one_hot": Rule(_one_hot_free, None),
}
