"""Reshape, transpose, reshape chains that only reorder one axis (channel shuffles), recognised by what they do.

Taken literally, such a chain forces rectangular cuts of its intermediate grid. As the reordering it is, it couples
nothing: after a cut it becomes an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.structure import Ref

_RESHAPES = frozenset("view reshape _unsafe_view flatten unflatten".split())
_SWAPS = frozenset("transpose permute swapaxes movedim contiguous clone".split())
_LIMIT = 5_000_000


@dataclass(frozen=True, eq=False)
class Reordering:
    """Position p of the result along `dim` is position `index[p]` of the source; `inside` are the nodes it replaces."""

    source: Ref
    dim: int
    index: NDArray[np.int64]
    inside: tuple[str, ...]


def find_reorderings(graph: Graph) -> dict[str, Reordering]:
    """Chains by the name of their last node."""
    found: dict[str, Reordering] = {}
    for node in graph.nodes.values():
        if node.base in _RESHAPES and isinstance(node.meta, Meta):
            chain = _chain(graph, node)
            if chain:
                reordering = _reordering(graph, chain)
                if reordering is not None:
                    found[node.name] = reordering
    return found


def _chain(graph: Graph, last: Node) -> list[Node]:
    """Nodes of a reshape, swaps, reshape chain whose inner values nobody else reads; empty if there is none."""
    chain, swapped = [last], False
    while True:
        source = chain[-1].args[0]
        if not isinstance(source, Ref) or graph.users[source.name] != [chain[-1].name]:
            return []
        node = graph.nodes[source.name]
        chain.append(node)
        if node.base in _SWAPS:
            swapped = True
        elif node.base in _RESHAPES:
            return chain[::-1] if swapped else []
        else:
            return []


def _reordering(graph: Graph, chain: list[Node]) -> Reordering | None:
    source = chain[0].args[0]
    if not isinstance(source, Ref) or chain[-1].shape != graph.nodes[source.name].shape:
        return None
    shape = chain[-1].shape
    if prod(shape) > _LIMIT or prod(shape) == 0:
        return None
    start = np.arange(prod(shape)).reshape(shape)
    moved = start
    for node in chain:
        moved = _moved(moved, node)
    for dim, size in enumerate(shape):
        at = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
        index = np.unravel_index(moved[at], shape)[dim]
        if (
            size > 1
            and not np.array_equal(index, np.arange(size))
            and np.array_equal(moved, start.take(index, axis=dim))
        ):
            return Reordering(source, dim, index.astype(np.int64), tuple(node.name for node in chain[:-1]))
    return None


def _moved(values: NDArray[np.int64], node: Node) -> NDArray[np.int64]:
    if node.base in _RESHAPES:
        return values.reshape(node.shape)
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    if node.base == "permute":
        return values.transpose(bound["dims"])
    if node.base in ("transpose", "swapaxes"):
        a, b = [d for name, d in bound.items() if name in ("dim0", "dim1", "axis0", "axis1")]
        return values.swapaxes(a, b)
    if node.base == "movedim":
        return np.moveaxis(values, bound["source"], bound["destination"])
    return values
