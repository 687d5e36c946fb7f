"""Normalisation layers.

Batch, instance and local norms work per channel; layer and group norm take their statistics over the
channels that are kept; root-mean-square norms are held exact by rescaling their weight and epsilon.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from metaprune.graphs.flow import Axes, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched, signature

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut

_CHANNEL = "n c *s, c, c, c, c -> n c *s"
_OPERANDS = "input weight bias running_mean running_var"
_EVAL = signature(_CHANNEL, _OPERANDS, zero="1!+2")
_BATCH = signature(_CHANNEL, _OPERANDS, zero="1!+2", mix="n *s")
_INSTANCE = signature(_CHANNEL, _OPERANDS, zero="0*1+2", mix="*s")


def _batch_norm(state: Flow, node: Node, bound: Bound) -> Axes:
    """With running statistics every position is on its own; with batch statistics the other axes mix."""
    axes: Axes = (_BATCH if bound["training"] is True else _EVAL).flow(state, node, bound)
    return axes


def _over_last(letters: int, zero: str, mix: bool) -> Rule:
    names = " ".join("cdefgh"[:letters])
    text = f"*b {names}, {names}, {names} -> *b {names}"
    return signature(text, "input weight bias", zero=zero, mix=names if mix else "", statistics="" if mix else names)


def _layer_norm(state: Flow, node: Node, bound: Bound) -> Axes:
    """Statistics over kept channels; a norm without weight shows nobody which, so it runs on the full axes."""
    if bound.get("weight") is None:
        plain: Axes = _over_last(len(bound["normalized_shape"]), "", mix=True).flow(state, node, bound)
        return plain
    axes: Axes = _over_last(len(bound["normalized_shape"]), "1!+2", mix=False).flow(state, node, bound)
    return axes


def _rms_norm(state: Flow, node: Node, bound: Bound) -> Axes:
    """Root mean square over the last dimensions: silenced positions add nothing to the sum, so it can be held exact."""
    axes: Axes = _over_last(len(bound["normalized_shape"]), "1!", mix=True).flow(state, node, bound)
    state.restricted.setdefault(node.name, set())
    if bound.get("weight") is None:
        return axes
    zero = state.of(bound["weight"])
    rank = len(zero)
    last = tuple(axis.with_zero(w.zero) for axis, w in zip(axes[-rank:], zero, strict=True))
    return (*axes[:-rank], *last)


def _normalized_shape(cut: Cut, node: Node, bound: Bound) -> Bound:
    if cut.is_filled(node):
        return bound
    rank = len(bound["normalized_shape"])
    return {**bound, "normalized_shape": tuple(cut.size(bound["input"], i - rank) for i in range(rank))}


def _rms_rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
    """Gamma * sqrt(N / N') and eps * N / N' keep the function; the operator then needs no filling up."""
    rank = len(bound["normalized_shape"])
    new = prod(cut.size(bound["input"], i - rank) for i in range(rank))
    old = prod(cut.old_size(bound["input"], i - rank) for i in range(rank))
    if new == old or cut.is_filled(node):
        return bound
    eps = bound["eps"] if bound["eps"] is not None else cut.eps(bound["input"])
    return {**_normalized_shape(cut, node, bound), "eps": eps * old / new}


_GROUPS_WHOLE = signature("n c *s -> n c *s", "input", mix="c *s")


def _group_norm(state: Flow, node: Node, bound: Bound) -> Axes:
    """Statistics over the kept channels of each group; without weight on the full axes, as for layer norm."""
    if bound.get("weight") is None:
        plain: Axes = _GROUPS_WHOLE.flow(state, node, bound)
        return plain
    rule = signature(
        "n (g c) *s, (g c), (g c) -> n (g c) *s",
        "input weight bias",
        zero="1!+2",
        mix="*s",
        roles="g=conv_group",
        statistics="c",
        sizes=lambda *_: {"g": int(bound["num_groups"])},
    )
    axes: Axes = rule.flow(state, node, bound)
    return axes


def _num_groups(cut: Cut, node: Node, bound: Bound) -> Bound:
    groups = int(bound["num_groups"])
    if bound.get("weight") is None:
        return bound
    return {
        **bound,
        "num_groups": cut.factor(bound["input"], 1, (groups, cut.old_size(bound["input"], 1) // groups), 0),
    }


def _weight_norm(state: Flow, node: Node, bound: Bound) -> Axes:
    """Weight v * g / ||v||, normed over all dimensions but one: there a silenced unit is 0/0, elsewhere 0."""
    axes = state.of(bound["v"])
    dim = bound["dim"] % len(axes) if len(axes) else 0
    if bound["dim"] == -1:
        raise Unmatched("norm over the whole tensor")
    state.use(axes)
    state.use(state.of(bound["g"]))
    state.tie([axes[dim], state.of(bound["g"])[dim]], "weight_norm")
    state.pin(axes[dim], "weight_norm divides zero by zero when it is silenced")
    for other in range(len(axes)):
        if other != dim:
            state.contract(node, [(bound["v"], other, axes[other])], "weight_norm")
    return axes


ROWS: dict[str, Rule] = {
    "aten.batch_norm": Rule(_batch_norm, None),
    "aten.cudnn_batch_norm": Rule(_batch_norm, None),
    "aten.instance_norm": _INSTANCE,
    "aten.layer_norm": Rule(_layer_norm, _normalized_shape),
    "aten.rms_norm": Rule(_rms_norm, _rms_rewrite),
    "aten.group_norm": Rule(_group_norm, _num_groups),
    "aten._weight_norm": Rule(_weight_norm, None),
    "aten._weight_norm_interface": Rule(_weight_norm, None),
}
