"""Which positions of every value stay under a plan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from metaprune.graphs.flow import Axis
from metaprune.graphs.incision import Mask, alive_units
from metaprune.graphs.ir import Graph, Meta


class Survivors:
    """Answers, for a graph and a plan's edits, which positions of an axis stay.

    Raises:
        PlanError: The edits do not fit the graph.
    """

    def __init__(self, graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> None:
        self._graph = graph
        self._coupling = graph.coupling
        self._alive = alive_units(graph, keep)
        self._masks: dict[int, tuple[Axis, Mask | None]] = {}

    def along(self, axis: Axis) -> Mask | None:
        """Which positions of an axis stay; None when all do."""
        if axis.ids is None:
            return None
        key = id(axis.ids)
        if key not in self._masks:
            mask = np.ones(axis.size, dtype=bool)
            for units in self._coupling.units(axis):
                mask &= (units < 0) | self._alive[units]
            self._masks[key] = (axis, None if mask.all() else mask)
        return self._masks[key][1]

    def mask(self, name: str, dim: int) -> Mask | None:
        """Which positions along a dimension of a node's value stay; None when all do."""
        return self.along(self._coupling.flow.axes[name][dim])

    def part(self, name: str, value: Tensor) -> Tensor:
        """What stays of the value of a node."""
        for dim in range(value.ndim):
            value = _picked(value, dim, self.mask(name, dim))
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what stays of the value of a node, for the traced batch."""
        return tuple(
            axis.size if mask is None else int(mask.sum())
            for axis in self._coupling.flow.axes[name]
            for mask in [self.along(axis)]
        )

    def comparable(self, name: str, cut: Graph) -> bool:
        """Whether a node of the cut graph gives what stays of the value of the node of the same name here."""
        node = self._graph.nodes.get(name)
        if node is None or node.op != cut.nodes[name].op or not isinstance(node.meta, Meta) or not node.meta.is_float:
            return False
        return self.shape(name) == cut.nodes[name].shape

    def lost(self, name: str, value: Tensor, dim: int) -> Tensor:
        """What goes along one dimension of a node's value, zero where it stays; of the other dimensions what stays."""
        for other in range(value.ndim):
            if other != dim % value.ndim:
                value = _picked(value, other, self.mask(name, other))
        mask = self.mask(name, dim)
        if mask is None:
            return torch.zeros_like(value)
        stays = torch.from_numpy(np.flatnonzero(mask)).to(value.device)
        return value.index_fill(dim, stays, 0)


def _picked(value: Tensor, dim: int, mask: Mask | None) -> Tensor:
    if mask is None:
        return value
    return value.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
