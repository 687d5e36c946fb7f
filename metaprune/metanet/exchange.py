"""Messages between the units on the two sides of every block, as matrix products over the weights.

With e_1 = w, e_2 = |w|, e_3 = w^2 (of the block over its rms r, [C_out, C_in, K]), an output position o hears

    down_o = sum_m c_m sum_i mean_k e_m(o, i, k) * s_m(i),      c = (sqrt(K / C_in), 1 / C_in, 1 / C_in),

where s_m are states that the inputs send, and an input hears the same of the outputs with C_out in place of C_in: what
has a sign is averaged and scaled by the root of the fan, what has none is averaged. So messages have the same size at
any width. They are linear in the states, hence products of matrices: there is no state per edge, and no more memory is
taken than a chunk of rows needs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metaprune.metanet.encoding import ROWS, moments
from metaprune.metanet.weight_graph import WeightGraph

MOMENTS = 3

Exchange = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From what units send as inputs and as outputs, both [units, 3, h], and the blocks' factors on it [blocks, 2, 3, h],
to what units hear as outputs and as inputs, both [units, h]."""


class DenseExchange:
    """The exchange of one network by matrix products.

    Args:
        graph: The network.
        dtype: Of the states; weights are cast a chunk at a time.
        rows: Elements of a block worked on at a time.
    """

    def __init__(self, graph: WeightGraph, dtype: torch.dtype, rows: int = ROWS) -> None:
        self._layout, self._encoding, self._dtype, self._rows = graph.layout, graph.encoding, dtype, rows

    def __call__(self, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        inputs, outputs, width = self._layout.inputs, self._layout.outputs, down.shape[2]
        into = torch.split(inputs.spread(down.flatten(1)).view(-1, MOMENTS, width), inputs.sizes)
        out = torch.split(outputs.spread(up.flatten(1)).view(-1, MOMENTS, width), outputs.sizes)
        heard = [self._block(n, *pair, factors[n]) for n, pair in enumerate(zip(into, out, strict=True))]
        nothing = down.new_zeros(0, width)
        return (
            outputs.collect(torch.cat([nothing, *(y for y, _ in heard)])),
            inputs.collect(torch.cat([nothing, *(z for _, z in heard)])),
        )

    def _block(self, number: int, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs and the inputs of one block hear, shapes [C_out, h] and [C_in, h]."""
        value, kept = self._encoding.blocks[number], self._encoding.moments[number]
        down = down * factors[0] * scales(value, self._encoding.rms[number], 1).to(down)[:, None]
        up = up * factors[1] * scales(value, self._encoding.rms[number], 0).to(up)[:, None]
        down = down.transpose(0, 1).flatten(0, 1)  # [3 C_in, h]
        if kept is not None:
            return _products(kept.to(down), down, up)
        step = max(1, self._rows // (value.shape[1] * value.shape[2]))
        heard, back = [], torch.zeros_like(down[: value.shape[1]])
        for start, stop in pairwise([*range(0, len(value), step), len(value)]):
            y, z = checkpoint(self._chunk, value[start:stop], down, up[start:stop], use_reentrant=False)
            heard.append(y)
            back = back + z
        return torch.cat(heard), back

    def _chunk(self, value: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return _products(moments(value.to(self._dtype)), down, up)


def _products(e: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Products with moments e [R, 3, C] of states down [3 C, h] and up [R, 3, h]: shapes [R, h] and [C, h]."""
    return e.flatten(1) @ down, e.flatten(0, 1).T @ up.flatten(0, 1)


def scales(value: Tensor, rms: float, summed: int) -> Tensor:
    """The factors c_m over r or r^2, for sums over a dimension of a block [C_out, C_in, K]; shape [3]."""
    fan, kernel = value.shape[summed], value.shape[2]
    return torch.tensor(
        [(kernel / fan) ** 0.5 / rms, 1 / (fan * rms), 1 / (fan * rms**2)], dtype=torch.float64, device=value.device
    )
