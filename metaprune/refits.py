"""Linear layers fitted again to their own dense response, in closed form, when units they read are gone.

With X what a layer reads, H = X^T X and S, D the columns that stay and go, least squares drawn to the dense weights W
gives `W_S + (H_SS + r I)^-1 H_SD W_D` for any S: He et al., Channel Pruning (ICCV 2017), eq. 3, solved exactly. H does
not depend on S. With the columns in the order in which they go, the Cholesky factor of a leading part of H is the
leading part of the factor of H, so one factorisation serves all numbers of kept units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.curvature import RIDGE, Columns, collect_columns
from metaprune.graphs.coupling import Coupling
from metaprune.graphs.flow import Axis
from metaprune.graphs.ir import Graph
from metaprune.removal import input_dim

Places = NDArray[np.int64]


def consumers(graph: Graph, data: Any, samples: int, seed: int) -> list[Columns]:
    """Second moments of all layers that read units of a prunable group; see `metaprune.curvature.collect_columns`."""
    weights = {part.tensor for group in graph.groups if not group.pinned for part in group.slices}
    found = collect_columns(graph, data, samples, seed, weights)
    return [columns for columns in found.values() if _reads(graph, columns)]


def refits(graph: Graph, layers: Sequence[Columns], places: Mapping[str, Places]) -> Iterator[Refit]:
    """The layers that read units of some groups, ready to be fitted.

    Args:
        graph: The network.
        layers: What `consumers` found.
        places: For each group the place of its units, 0 for the one that goes last, shape [size].
    """
    numbers = {graph.coupling.number(name): place for name, place in places.items()}
    for columns in layers:
        axis = graph.coupling.flow.axes[columns.layer.input][columns.layer.channel]
        found = _places(graph.coupling, axis, numbers)
        if (found >= 0).any():
            yield Refit(graph, columns, found)


class Refit:
    """Fits of one layer, each without the inputs from a certain place on.

    The layer's bias, or the mean of the batch normalisation behind it, takes up what changes by a constant; what that
    normalisation multiplies by stays as it is, since the fit is to the response at its old scale.

    Args:
        graph: The network.
        columns: The layer and its second moments.
        places: Place of each of the layer's inputs, -1 for those that always stay, shape [inputs].
    """

    def __init__(self, graph: Graph, columns: Columns, places: Places) -> None:
        layer = columns.layer
        self._graph = graph
        self._columns = columns
        each = layer.width // layer.shape[input_dim(layer)]
        self._places = places.reshape(layer.groups, -1).repeat(each, axis=1)  # [groups, width]
        self._order = np.argsort(self._places, axis=1, kind="stable")
        self._matrix = layer.matrix(graph.values[layer.weight].detach().double())  # [groups, width, outputs]

    @cached_property
    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """The Hessian with its ridge and its Cholesky factor, columns in order, for each group."""
        found = []
        for hessian, order in zip(self._columns.hessian(RIDGE), self._order, strict=True):
            moved = hessian[order][:, order]
            found.append((moved, torch.linalg.cholesky(moved)))
        return found

    def at(self, place: int) -> dict[str, Tensor]:
        """The fitted tensors by name when inputs of this place and all greater ones are silenced."""
        layer, values = self._columns.layer, self._graph.values
        fitted = torch.zeros_like(self._matrix)
        for group, (hessian, factor) in enumerate(self._factors):
            order = torch.from_numpy(self._order[group]).to(fitted.device)
            kept = int((self._places[group] < place).sum())
            if not kept:
                continue
            stay, go = self._matrix[group, order[:kept]], self._matrix[group, order[kept:]]
            missing = hessian[:kept, kept:] @ go
            fitted[group, order[:kept]] = stay + torch.cholesky_solve(missing, factor[:kept, :kept])
        weight = values[layer.weight]
        found = {layer.weight: layer.tensor(fitted).to(weight.dtype)}
        if self._columns.shift:
            lost = (self._columns.mean[:, None] @ (self._matrix - fitted)).flatten()
            old = values[self._columns.shift].detach()
            found[self._columns.shift] = (old + lost if layer.bias else old - lost).to(old.dtype)
        return found


def _reads(graph: Graph, columns: Columns) -> bool:
    """Whether gates act on what a layer reads, along the dimension that it sums over."""
    layer, rank = columns.layer, len(graph.nodes[columns.layer.input].shape)
    return any(
        site.arg == layer.input and site.dim % rank == layer.channel % rank and not site.statistics
        for site in graph.coupling.flow.sites.get(layer.node, [])
    )


def _places(coupling: Coupling, axis: Axis, places: Mapping[int, Places]) -> Places:
    """For each position of an axis the greatest place of the units it holds, -1 where it holds none, shape [size]."""
    found = np.full(axis.size, -1, dtype=np.int64)
    for units in coupling.units(axis):
        owner = np.where(units >= 0, coupling.owner[units], -1)
        for number, place in places.items():
            at = owner == number
            found[at] = np.maximum(found[at], place[coupling.rank[units[at]]])
    return found
