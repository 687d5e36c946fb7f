"""The metanetwork's exchange over a list of edges: the reference that the dense one is held to.

Every pair of an output unit and an input unit that a block's positions join is an edge with the kernel on it, as in
`WeightGraph.to_hetero`, and every message on it is a tensor of its own. So it is plain to read and heavy to run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import Aggregation

from metaprune.metanet.aggregation import root
from metaprune.metanet.layout import Side
from metaprune.metanet.views import edges
from metaprune.metanet.weight_graph import WeightGraph


class RootOfSquares(Aggregation):  # type: ignore[misc]
    """The root of the sum of squared messages; see `metaprune.metanet.aggregation`."""

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """Messages [edges, h] by the units [edges] that hear them; shape [units, h]."""
        return root(self.reduce(x.square(), index, ptr, dim_size, dim, reduce="sum"))


class EdgeListExchange(MessagePassing):  # type: ignore[misc]
    """See `metaprune.metanet.exchange.Exchange`; call `Metanetwork.forward(..., exchange=EdgeListExchange(graph))`.

    The message on an edge is the sum over the three moments of the sender's state times the block's factor, the
    moment of the edge's own kernel, and the edge's weight; a unit hears the sum over its edges.

    Args:
        graph: The network.
        many: Whether a unit hears all of `metaprune.metanet.aggregation.AGGREGATORS`, and not the sum alone.
    """

    def __init__(self, graph: WeightGraph, many: bool = False) -> None:
        super().__init__(aggr=["sum", RootOfSquares(), "max", "min"] if many else "sum", node_dim=0)
        self._count = graph.layout.count
        seen = [_seen(graph, side) for side in (0, 1)]
        found: list[tuple[Tensor, ...]] = [(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long))]
        kernels: list[Tensor] = [torch.zeros(0, 2, 3, dtype=torch.float64)]
        for number, block in enumerate(graph.blocks):
            value = graph.encoding.blocks[number].double()
            norms = [_norms(value.flatten(1)), _norms(value.transpose(0, 1).flatten(1))]
            for some in edges(block, graph.units):
                into, out = some.positions
                kernel = value[out, into]  # [edges, K]
                moment = torch.stack([kernel.sum(1), kernel.abs().sum(1), kernel.square().sum(1)], 1)
                units = some.units + torch.tensor([[some.source.start], [some.target.start]])
                weights = torch.stack(
                    [
                        _sent(block.sides[1])[into] * _heard(block.sides[0], seen[0])[units[1]],
                        _sent(block.sides[0])[out] * _heard(block.sides[1], seen[1])[units[0]],
                    ],
                    1,
                )  # [edges, 2]: down and up
                found.append((units, torch.full((units.shape[1],), number)))
                at = torch.stack([norms[0][out], norms[1][into]], 1)  # [edges, 2, 3]
                kernels.append(moment[:, None] / at * weights[..., None])
        self._units = torch.cat([units for units, _ in found], 1)
        self._blocks = torch.cat([blocks for _, blocks in found])
        self._kernels = torch.cat(kernels)  # [edges, 2, 3]

    def forward(self, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        own = factors[self._blocks]  # [edges, 2, 3, h]
        kernels = self._kernels.to(down.dtype)
        heard = self.propagate(self._units, x=down, factor=own[:, 0], kernel=kernels[:, 0])
        back = self.propagate(self._units.flip(0), x=up, factor=own[:, 1], kernel=kernels[:, 1])
        return heard, back

    def message(self, x_j: Tensor, factor: Tensor, kernel: Tensor) -> Tensor:
        """Messages [edges, h] from states x_j [edges, 3, h], factors of the same shape and moments [edges, 3]."""
        return (x_j * factor * kernel[..., None]).sum(1)


def _norms(weights: Tensor) -> Tensor:
    """Norms ||w||_2, ||w||_1 and ||w||_2^2 of each row, 1 for a row of zeros; shape [rows, 3]."""
    norms = torch.stack([weights.norm(dim=1), weights.abs().sum(1), weights.square().sum(1)], 1)
    return norms.where(norms > 0, 1.0)


def _sent(side: Side) -> Tensor:
    """By position: one over the root of the number of units whose states add up there."""
    return (side.units >= 0).sum(0).double().rsqrt()


def _heard(side: Side, sides: Tensor) -> Tensor:
    """By unit: one over its positions on this side, over the root of the number of sides that it stands on."""
    standing = torch.bincount(side.units[side.units >= 0], minlength=len(sides)).double()
    return 1 / (standing * sides.sqrt())


def _seen(graph: WeightGraph, which: int) -> Tensor:
    """On how many blocks' sides of one kind each unit stands, shape [units]."""
    count = torch.zeros(graph.layout.count, dtype=torch.float64)
    for block in graph.blocks:
        units = block.sides[which].units
        count[torch.bincount(units[units >= 0], minlength=len(count)) > 0] += 1
    return count
