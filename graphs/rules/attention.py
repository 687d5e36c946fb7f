"""Fused attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def _sdpa(state: Flow, node: Node, bound: Bound) -> Axes:
    """softmax(q k^T * scale + mask) v; key and value heads may be fewer than query heads (grouped queries)."""
    query, key, value, mask = bound["query"], bound["key"], bound["value"], bound.get("attn_mask")
    q, k, v = state.of(query), state.of(key), state.of(value)
    if not len(q) == len(k) == len(v) >= 3:
        raise Unmatched("operands of different rank")
    op = "attention"
    for axes in (q, k, v):
        state.use(axes)
    heads: Axis
    if bound.get("enable_gqa") and q[-3].size != k[-3].size:
        kv = state.tie([k[-3], v[-3]], op)
        groups, inside = state.split(q[-3], (kv.size, q[-3].size // kv.size), op)
        state.tie([groups, kv], op)
        _role(state, kv, "kv_group")
        _role(state, inside, "query_group")
        heads = q[-3].with_zero(False)
    else:
        _broadcast(state, [q[-3], k[-3], v[-3]], op)
        heads = q[-3].with_zero(v[-3].zero if v[-3].size == q[-3].size else False)
        _role(state, q[-3], "heads")
    for i in range(len(q) - 3):
        _broadcast(state, [q[i], k[i], v[i]], op)
    for axis in (q[-1], v[-1]):
        _role(state, axis, "head_dim")
    state.contract(node, [(query, len(q) - 1, q[-1]), (key, len(k) - 1, k[-1])], op)
    for axis in (k[-2], v[-2]):
        state.pin(axis, "attention normalises over it")
    state.tie([k[-2], v[-2]], op)
    if isinstance(mask, Ref):
        scores = (*q[:-1], k[-2])
        for place, axis in enumerate(reversed(state.of(mask))):
            against = scores[-1 - place]
            if axis.size == against.size and axis.size > 1:
                state.tie([axis, against], op)
    return (*q[:-3], heads, q[-2].with_zero(False), v[-1])


def _broadcast(state: Flow, axes: list[Axis], op: str) -> None:
    """Ties axes of a batch; one of a single position serves all positions of the others."""
    size = max(axis.size for axis in axes)
    state.tie([axis for axis in axes if axis.size == size], op)


def _role(state: Flow, axis: Axis, role: str) -> None:
    if axis.ids is not None:
        state.atoms.role(axis.ids, role)


def _keep_scale(cut: Cut, node: Node, bound: Bound) -> Bound:
    """The implied scale 1/sqrt(d) is that of the original width, written out."""
    width = cut.old_size(bound["query"], -1)
    if bound.get("scale") is None and cut.size(bound["query"], -1) != width:
        return {**bound, "scale": float(width) ** -0.5}
    return bound


ROWS: dict[str, Rule] = {
    "aten.scaled_dot_product_attention": Rule(_sdpa, _keep_scale, "0 1[-2] + out 1[-2]", ("query", "key", "value")),
}
