"""Operators that make values from nothing. A uniform value may have any size; anything else is fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metaprune.graphs.flow import Axes, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def _uniform(value: float | None) -> Rule:
    """A constant fill; `None`: the value is the argument `fill_value`."""

    def flow(state: Flow, node: Node, bound: Bound) -> Axes:
        fill = bound["fill_value"] if value is None else value
        sizes = bound["size"]
        return tuple(
            state.fresh(n, fill == 0) if isinstance(size, int) else state.fixed(n, "a dynamic size")
            for n, size in zip(node.shape, sizes, strict=True)
        )

    def rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
        return {**bound, "size": tuple(cut.resize(size, node, d) for d, size in enumerate(bound["size"]))}

    return Rule(flow, rewrite)


def _like(value: float | None) -> Rule:
    def flow(state: Flow, node: Node, bound: Bound) -> Axes:
        fill = bound["fill_value"] if value is None else value
        return tuple(axis.with_zero(fill == 0) for axis in state.of(bound["self"]))

    return Rule(flow)


def _fixed(state: Flow, node: Node, bound: Bound) -> Axes:
    return tuple(state.fixed(n, f"made by {node.base}") for n in node.shape)


ROWS: dict[str, Rule] = {
    "aten.zeros": _uniform(0),
    "aten.new_zeros": _uniform(0),
    "aten.ones": _uniform(1),
    "aten.new_ones": _uniform(1),
    "aten.full": _uniform(None),
    "aten.new_full": _uniform(None),
    "aten.empty": _uniform(1),
    "aten.new_empty": _uniform(1),
    "aten.zeros_like": _like(0),
    "aten.ones_like": _like(1),
    "aten.empty_like": _like(1),
    "aten.full_like": _like(None),
    **{
        f"aten.{name}": Rule(_fixed)
        for name in (
            "arange linspace logspace eye scalar_tensor rand randn randint randperm tril_indices triu_indices"
        ).split()
    },
}
