"""Which positions of every value stay under a plan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from metaprune.graphs.flow import Axis
from metaprune.graphs.incision import Mask, alive_units
from metaprune.graphs.ir import Graph


class Survivors:
    """Answers, for a graph and a plan's edits, which positions of an axis stay.

    Raises:
        PlanError: The edits do not fit the graph.
    """

    def __init__(self, graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> None:
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

    def part(self, name: str, value: Tensor) -> Tensor:
        """What stays of the value of a node."""
        for dim, axis in enumerate(self._coupling.flow.axes[name]):
            mask = self.along(axis)
            if mask is not None:
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
        return value
