"""Axes of operators without a rule, as dye tracing finds them; what it can not explain is pinned."""

from __future__ import annotations

import math
from typing import Any

from metaprune.graphs.dye import Call, Description, Slot, check, describe
from metaprune.graphs.flow import Axis, Flow
from metaprune.graphs.ir import Meta, Node, substitute
from metaprune.graphs.structure import Ref

_LIMIT = 20_000_000


def infer(flow: Flow, node: Node) -> Any:
    """Axes of a node without a rule; what can not be explained is pinned, or filled up where that is exact."""
    results = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    metas = [meta for meta in results if isinstance(meta, Meta)]
    names = [n for n in dict.fromkeys(node.refs()) if flow.is_tensor(Ref(n))]
    tracked = {(n, d): axis for n in names for d, axis in enumerate(flow.of(Ref(n))) if axis.ids is not None}
    for axis in tracked.values():
        flow.use([axis])
    out = [[flow.fixed(size, f"made by {node.base}") for size in meta.shape] for meta in metas]
    if tracked:
        _explain(flow, node, names, tracked, metas, out)
    axes = [tuple(value) for value in out]
    return axes[0] if isinstance(node.meta, Meta) else axes


def _explain(
    flow: Flow, node: Node, names: list[str], tracked: dict[Slot, Axis], metas: list[Meta], out: list[list[Axis]]
) -> None:
    why = f"read by {node.op}, which has no rule"
    floating = [n for n in names if flow.meta(Ref(n)).is_float]
    shapes = {n: flow.meta(Ref(n)).shape for n in floating}
    slots = {s: axis.all_zero for s, axis in tracked.items() if s[0] in floating}
    for slot, axis in tracked.items():
        if slot not in slots:
            flow.pin(axis, why)
    values = flow.example_values()
    if (
        values is None
        or not node.op.startswith("aten.")  # code of others may not survive the numbers it is given here
        or sum(math.prod(s) for s in shapes.values()) > _LIMIT
        or not all(meta.is_float for meta in metas)
    ):
        for axis in tracked.values():
            flow.pin(axis, why)
        return
    key = (
        node.op,
        tuple(shapes.values()),
        tuple(slots.items()),
        repr((node.args, dict(node.kwargs))) if not floating else _static(node, flow),
    )
    if key not in flow.described:
        call = Call(node, values, floating)
        try:
            found = describe(call, shapes, list(slots))
            flow.described[key] = (found, check(call, shapes, slots, found))
        except (RuntimeError, ValueError, IndexError, TypeError):
            flow.described[key] = (Description(mixed=set(slots)), set())
    found, failed = flow.described[key]
    rename = dict(zip(flow.described_names.setdefault(key, tuple(floating)), floating, strict=True))
    _adopt(flow, node, found, failed, rename, tracked, out)


def _static(node: Node, flow: Flow) -> str:
    def leaf(ref: Ref) -> Any:
        return repr(flow.graph.nodes[ref.name].meta)

    return repr((substitute(node.args, leaf), [(k, substitute(v, leaf)) for k, v in node.kwargs.items()]))


def _adopt(
    flow: Flow,
    node: Node,
    found: Description,
    failed: set[Slot],
    rename: dict[str, str],
    tracked: dict[Slot, Axis],
    out: list[list[Axis]],
) -> None:
    done: set[frozenset[Slot]] = set()
    names = {new: old for old, new in rename.items()}
    for slot, axis in tracked.items():
        if slot[0] not in names:
            continue
        known = (names[slot[0]], slot[1])
        if known in failed:
            flow.pin(axis, f"{node.base} does not commute with a selection of its positions")
            continue
        if known in found.mixed:
            flow.fill(node, Ref(slot[0]), slot[1], node.base)
            continue
        if not (known in found.links or known in found.products or known in found.partners):
            flow.pin(axis, f"{node.base} hides where it goes")
            continue
        for k, dim, at in found.links.get(known, []):
            if (at < 0).any():
                flow.pin(axis, f"{node.base} joins it with positions of its own")
                continue
            moved = axis.take(at)
            zero = (k, dim) in found.vanishing and axis.all_zero
            before = out[k][dim]
            out[k][dim] = (moved if before.ids is None else flow.tie([before, moved], node.base)).with_zero(zero)
        for k, dims, at in found.products.get(known, []):
            factors = [flow.fresh(out[k][d].size) for d in dims]
            flow.product(axis.take(at), factors, node.base)
            for d, factor in zip(dims, factors, strict=True):
                out[k][d] = factor
        for other, at in found.partners.get(known, []):
            place = (rename[other[0]], other[1])
            pair = frozenset((slot, place))
            if pair in done or (at < 0).any():
                continue
            done.add(pair)
            flow.contract(
                node,
                [(Ref(place[0]), place[1], flow.of(Ref(place[0]))[place[1]]), (Ref(slot[0]), slot[1], axis.take(at))],
                node.base,
            )
