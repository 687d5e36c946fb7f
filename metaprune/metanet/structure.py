"""What groups are by the structure of their network: who writes and reads them, how deep, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.graphs.flow import Axis
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import Linear, linear_layers
from metaprune.graphs.polynomial import Counts
from metaprune.graphs.responses import norms_behind

_COSTS = ("macs", "params", "bytes")


@dataclass(frozen=True, eq=False)
class Layout:
    """The structure around all groups that are not pinned.

    Attributes:
        graph: The network.
        features: By group the features that `metaprune.metanet.schema.STRUCTURE` names.
        readers: By the node of a linear layer the groups that it reads and does not carry on channel by channel.
    """

    graph: Graph
    features: Mapping[str, NDArray[np.float64]]
    readers: Mapping[str, frozenset[str]]

    def kept_costs(self, name: str) -> Tensor:
        """What a group's cuts leave, when all others are whole, shape [size + 1, 4].

        The logarithms of the fractions of its own units that stay and go, of the network's multiply-adds and of its
        parameters.
        """
        costs, number = self.graph.coupling.costs, self.graph.coupling.number(name)
        size = self.graph.group(name).size
        kept = np.arange(size + 1)
        counts = np.tile(costs.sizes, (size + 1, 1))
        counts[:, number] = kept
        least = 0.5 / size
        fractions = [np.maximum(kept, 0.5) / size, np.maximum(size - kept, 0.5) / size]
        for what in ("macs", "params"):
            values = costs.evaluate(what, counts)
            fractions.append(np.maximum(values / max(values[-1], 1.0), min(least, 1e-6)))
        return torch.from_numpy(np.log(np.stack(fractions, axis=1)))


def structure(graph: Graph) -> Layout:
    """Looks at the linear layers around each group, in the order in which they run, and at the cost polynomials."""
    layers = list(linear_layers(graph).values())
    read = [_held(graph, graph.coupling.flow.axes[layer.input][layer.channel]) for layer in layers]
    written = [_held(graph, graph.coupling.flow.axes[layer.node][layer.channel]) for layer in layers]
    norms = norms_behind(graph, layers)
    depth = np.arange(len(layers)) / max(1, len(layers) - 1)
    groups = [group for group in graph.groups if not group.pinned]
    shares = _shares(graph, [graph.coupling.number(group.name) for group in groups])
    features = {}
    for group, share in zip(groups, shares, strict=True):
        writers = [i for i, names in enumerate(written) if group.name in names]
        readers = [i for i, names in enumerate(read) if group.name in names]
        normed = [float(bool(norms[layers[i].node])) for i in writers]
        taps = [layers[i].width * layers[i].groups / _inputs(layers[i]) for i in readers]
        features[group.name] = np.array(
            [
                np.log(group.size),
                np.log(len(groups)),
                np.mean(depth[writers]) if writers else 0.0,
                np.mean(depth[readers]) if readers else 1.0,
                np.log1p(len(writers)),
                np.log1p(len(readers)),
                np.mean(normed) if normed else 0.0,
                np.log(np.mean(taps)) if taps else 0.0,
                float(any(layers[i].groups > 1 for i in {*writers, *readers})),
                *share,
            ]
        )
    carried = [layer.groups > 1 for layer in layers]
    inside = [r - w if grouped else r for r, w, grouped in zip(read, written, carried, strict=True)]
    return Layout(graph, features, {layer.node: names for layer, names in zip(layers, inside, strict=True)})


def _inputs(layer: Linear) -> int:
    """Channels of what a layer reads."""
    return layer.shape[0] if layer.transposed else layer.shape[1] * layer.groups


def _held(graph: Graph, axis: Axis) -> frozenset[str]:
    """Names of the groups that are not pinned and have units on an axis."""
    coupling = graph.coupling
    found: set[str] = set()
    for units in coupling.units(axis):
        owners = np.unique(coupling.owner[units[units >= 0]])
        found.update(coupling.groups[i].name for i in owners[owners >= 0].tolist())
    return frozenset(name for name in found if not graph.group(name).pinned)


def _shares(graph: Graph, numbers: Sequence[int]) -> Counts:
    """The share of each cost that goes with all units of a group, shape [groups, costs]."""
    costs = graph.coupling.costs
    without = np.tile(costs.sizes, (len(numbers), 1))
    without[np.arange(len(numbers)), numbers] = 0
    found = []
    for what in _COSTS:
        full = max(float(costs.evaluate(what, costs.sizes[None])[0]), 1.0)
        found.append(1 - costs.evaluate(what, without) / full)
    return np.stack(found, axis=1)
