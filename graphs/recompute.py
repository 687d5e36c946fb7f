"""Values computed once more at full width, for an operator that mixes an axis whose cut positions are not zero.

A norm written by hand takes the mean of (x - mean(x))^2. Where a unit is silenced x is zero, but x - mean(x) is not, so
filling up with zeros would be wrong. What is elementwise between the two can be run again on x filled up with zeros:
the result is that of the masked original at every position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.structure import Ref

_LIMIT = 64
_PASSES_ON = frozenset("to _to_copy type_as clone contiguous detach alias dropout".split())


@dataclass(frozen=True)
class Region:
    """Elementwise nodes between zero-filled values and an operand.

    Attributes:
        nodes: Names of the nodes to run again, in order; the operand is the last.
        frontier: Values to be filled up with zeros first, and their axis.
    """

    nodes: tuple[str, ...]
    frontier: tuple[tuple[str, int], ...]


def find_region(graph: Graph, ref: Ref, dim: int, vanishes: Callable[[str, int], bool | None]) -> Region | None:
    """The elementwise nodes to run again so that `ref` has its axis `dim` whole.

    Args:
        graph: The graph.
        ref: The operand.
        dim: Its axis.
        vanishes: Whether a value is zero wherever the units along an axis are silenced; None where the axis is fixed.

    Returns:
        The region, or None when something other than an elementwise operator stands between.
    """
    back = dim - len(graph.nodes[ref.name].shape)  # elementwise operators align axes from the right
    size = graph.nodes[ref.name].shape[dim]
    inside: set[str] = set()
    frontier: dict[str, int] = {}
    pending = [ref.name]
    while pending:
        name = pending.pop()
        node = graph.nodes[name]
        if name in inside or not isinstance(node.meta, Meta) or len(node.shape) < -back or node.shape[back] != size:
            continue
        at = back + len(node.shape)
        verdict = vanishes(name, at)
        if name != ref.name and verdict:
            frontier[name] = at
        elif verdict is None:
            continue  # whole already
        elif not _elementwise(node) or not node.meta.is_float or len(inside) == _LIMIT:
            return None
        else:
            inside.add(name)
            pending += node.refs()
    if not frontier:
        return None
    return Region(tuple(name for name in graph.nodes if name in inside), tuple(sorted(frontier.items())))


def _elementwise(node: Node) -> bool:
    return node.op not in ("input", "tensor") and (node.base in _PASSES_ON or operators.is_pointwise(node.op))
