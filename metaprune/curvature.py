"""Second moments of what linear layers read: the curvature of a layer's squared error in its own weights.

With X the columns of a layer (see `metaprune.graphs.linear`), the squared error of changed weights is quadratic with
Hessian X^T X, whatever the weights are. Its diagonal holds the activation energies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metaprune.calibration import batches_of, share_of_rows, some_rows
from metaprune.graphs import operators
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.linear import Linear, linear_layers, readers
from metaprune.graphs.responses import norms_behind
from metaprune.graphs.structure import Ref

SAMPLES = 256
MEMORY = 4 << 30
RIDGE = 1e-3

_CHUNK = 32


@dataclass(frozen=True, eq=False)
class Columns:
    """Second moments of one layer's columns.

    Attributes:
        layer: The layer, of the dense network.
        moment: X^T X with a column of ones behind X, shape [groups, width + 1, width + 1], float64; the last element
            is the number of rows.
        shift: Name of the tensor that can take up a constant change of the layer's outputs: its bias, or the running
            mean of the batch normalisation behind it; empty when there is none.
        samples: Number of samples that the rows come from.
    """

    layer: Linear
    moment: Tensor
    shift: str
    samples: int

    @property
    def mean(self) -> Tensor:
        """Mean of each column, shape [groups, width]."""
        return self.moment[:, :-1, -1] / self.moment[:, -1:, -1]

    @property
    def energy(self) -> Tensor:
        """Mean square of each column, shape [groups, width]."""
        return self.moment.diagonal(dim1=1, dim2=2)[:, :-1] / self.moment[:, -1:, -1]

    def hessian(self, ridge: float = 0.0) -> Tensor:
        """Half the Hessian of the summed squared error, shape [groups, width, width].

        Where something takes up constant changes, the columns count as deviations from their mean.

        Args:
            ridge: Added to the diagonal, times the mean of the group's diagonal (times 1 where all of it is zero).
        """
        hessian = self.moment[:, :-1, :-1].clone()
        if self.shift:
            hessian -= self.moment[:, :-1, -1:] @ self.mean[:, None]
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1, keepdim=True)
        diagonal += ridge * torch.where(scale > 0, scale, torch.ones_like(scale))
        return hessian

    @cached_property
    def inverse(self) -> Tensor:
        """Inverse of the Hessian with the default ridge; shared by all groups whose units the layer reads."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.hessian(RIDGE)))


def collect_columns(
    graph: Graph,
    data: Any,
    samples: int = SAMPLES,
    seed: int = 0,
    weights: Collection[str] | None = None,
    memory: int = MEMORY,
) -> dict[str, Columns]:
    """Second moments of the columns of a network's linear layers, by weight, in one pass over the data.

    Args:
        graph: The network.
        data: Batches of inputs or of (inputs, labels); labels are not looked at. `"noise"` for Gaussian noise.
        samples: At most this many samples are used; they pass through the network in small chunks.
        seed: Of the choice of positions in layers that have more than is needed, and of noise.
        weights: Weights whose layers are wanted; None for all.
        memory: The moments may take so many bytes.

    Raises:
        OptionError: No data, data that do not fit the network, or a network on the meta device.
        MetapruneError: A layer reads values that are not finite, or the moments take more than `memory`.
    """
    if any(value.is_meta for value in graph.values.values()):
        raise OptionError("data: a network on the meta device gives no activations")
    layers = [layer for layer in linear_layers(graph).values() if weights is None or layer.weight in weights]
    _check_size(layers, memory)
    batches = batches_of(graph, data, _CHUNK, samples, seed)
    sums = _Sums(layers, len(batches), seed)
    with torch.no_grad():
        for batch in batches:
            execute(graph, graph.values, batch, watch=sums.watch)
    for layer in layers:
        if not bool(torch.isfinite(sums.moments[layer.node]).all()):
            raise MetapruneError(f"data: the values that the layer of {layer.weight} reads are not finite")
    norms = norms_behind(graph, layers)
    count = sum(_rows_of(graph, batch) for batch in batches)
    return {
        layer.weight: Columns(layer, sums.moments[layer.node], _shift(graph, layer, norms[layer.node]), count)
        for layer in layers
    }


class _Sums:
    """Sums up the moments of layers while a graph runs, one chunk of samples after the other."""

    def __init__(self, layers: Iterable[Linear], chunks: int, seed: int) -> None:
        self.moments: dict[str, Tensor] = {}
        self._layers = {layer.node: layer for layer in layers}
        self._chunks = chunks
        self._generator = torch.Generator().manual_seed(seed)
        self._readers = Counter(layer.input for layer in self._layers.values())
        self._left = self._readers.copy()
        self._held: dict[str, Tensor] = {}

    def watch(self, node: Node, value: Any) -> None:
        """Holds what layers read until the last of them has run."""
        if node.name in self._readers:
            self._held[node.name], self._left[node.name] = value, self._readers[node.name]
        layer = self._layers.get(node.name)
        if layer is not None:
            self._add(layer, self._held[layer.input], layer.positions(value))
            self._left[layer.input] -= 1
            if not self._left[layer.input]:
                del self._held[layer.input]

    def _add(self, layer: Linear, value: Tensor, positions: int) -> None:
        rows = some_rows(positions, share_of_rows(layer.width, self._chunks), self._generator, value.device)
        columns = layer.columns(value, rows).double()
        columns = torch.cat([columns, columns.new_ones(*columns.shape[:2], 1)], dim=2)  # [groups, rows, width + 1]
        moment = columns.transpose(1, 2) @ columns
        if layer.node in self.moments:
            self.moments[layer.node] += moment
        else:
            self.moments[layer.node] = moment


def _check_size(layers: Iterable[Linear], memory: int) -> None:
    sizes = {layer.weight: 8 * layer.groups * (layer.width + 1) ** 2 for layer in layers}
    total = sum(sizes.values())
    if total > memory:
        worst = max(sizes, key=sizes.__getitem__)
        raise MetapruneError(
            f"the second moments of {len(sizes)} layers take {total / 2**30:.1f} GiB, that of {worst} alone "
            f"{sizes[worst] / 2**30:.1f} GiB, of {memory / 2**30:.1f} GiB allowed"
        )


def _shift(graph: Graph, layer: Linear, norm: str) -> str:
    """The tensor, read here only, that can take up a constant change of a layer's outputs; empty for none."""
    if layer.bias or not norm:
        return layer.bias
    node = graph.nodes[norm]
    mean = operators.bind(node.op, node.args, dict(node.kwargs))["running_mean"]
    source = graph.nodes[mean.name] if isinstance(mean, Ref) else None
    if source is None or source.op != "tensor":
        return ""
    name = str(source.args[0])
    return name if readers(graph)[name] == 1 else ""


def _rows_of(graph: Graph, batch: dict[str, Tensor]) -> int:
    """Number of samples in a batch of values of the input nodes."""
    leading = [value for name, value in batch.items() if _is_batched(graph.nodes[name])]
    return len(leading[0]) if leading else 1


def _is_batched(node: Node) -> bool:
    return isinstance(node.meta, Meta) and any(node.meta.batched[:1])
