"""Axes of operators without a rule, found by running them; see `infer`."""

from __future__ import annotations

from typing import Any

from metaprune.graphs.flow import Flow
from metaprune.graphs.ir import Meta, Node


def infer(flow: Flow, node: Node) -> Any:
    """Pins every axis (opaque)."""
    why = f"read by {node.op}, which has no rule"
    for name in dict.fromkeys(node.refs()):
        axes = flow.axes.get(name)
        for value in [axes] if isinstance(axes, tuple) else axes or []:
            for axis in value:
                flow.pin(axis, why)
    metas = [node.meta] if isinstance(node.meta, Meta) else list(node.meta)
    found = [tuple(flow.fixed(n, why) for n in m.shape) if isinstance(m, Meta) else () for m in metas]
    return found[0] if isinstance(node.meta, Meta) else found
