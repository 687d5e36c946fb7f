"""What a cut leaves: the smaller graph, what is kept of every tensor, and which units stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs.errors import PlanError
from metaprune.graphs.ir import Graph

Mask = NDArray[np.bool_]
Kept = dict[str, dict[int, NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class Incision:
    """Result of a cut.

    Attributes:
        graph: The smaller graph, with its own tensors.
        kept: For every tensor name that shrinks (aliases included), the kept positions of each shrunk dimension.
        scales: Factor and shift by which a one-dimensional tensor changes to hold a root-mean-square norm exact.
        literals: Numbers written into the forward pass that changed: (module path, old value, new value); a default
            that had to be written out has the old value (None, argument).
        widened: Operators of the original that run on axes filled up again: for each such operand axis, whether a
            position stays.
    """

    graph: Graph
    kept: Kept
    scales: dict[str, tuple[float, float]]
    literals: tuple[tuple[str, Any, Any], ...]
    widened: dict[str, dict[tuple[str, int], torch.Tensor]]

    def carry(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the original network as it stands in the cut one: its kept part, rescaled where it must be."""
        return carried(tensor, self.kept.get(name, {}), self.scales.get(name))


def carried(
    tensor: torch.Tensor, kept: Mapping[int, NDArray[np.int64]], scale: tuple[float, float] | None
) -> torch.Tensor:
    """The kept part of a tensor, times a factor plus a shift."""
    part = tensor.detach()
    for dim, index in kept.items():
        part = part.index_select(dim, torch.from_numpy(index).to(part.device))
    return part if scale is None else part * scale[0] + scale[1]


def alive_units(graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> Mask:
    """Whether each unit of the graph stays; checks the edits (see `cut`)."""
    coupling = graph.coupling
    chosen = [np.ones(group.size, dtype=bool) for group in coupling.groups]
    for name, units in keep.items():
        number = coupling.number(name)
        group = coupling.groups[number]
        if group.pinned and len(units) < group.size:
            raise PlanError(f"group {name} is pinned: {group.reason}")
        if len(set(units)) < group.minimum:
            raise PlanError(f"group {name} must keep at least {group.minimum} of its {group.size} units")
        if len(set(units)) != len(units) or any(not 0 <= unit < group.size for unit in units):
            raise PlanError(f"group {name} has units 0 to {group.size - 1}, each at most once")
        chosen[number][:] = False
        chosen[number][list(units)] = True
    alive = np.ones(len(coupling.owner), dtype=bool)
    owned = np.flatnonzero(coupling.owner >= 0)
    if len(owned):
        starts = np.cumsum([0, *(len(c) for c in chosen)])
        alive[owned] = np.concatenate(chosen)[starts[coupling.owner[owned]] + coupling.rank[owned]]
    return alive
