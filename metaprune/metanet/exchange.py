"""Messages between the units on the two sides of every block, as matrix products over the weights.

With e_1, e_2, e_3 the sums of w, |w| and w^2 over the kernel of a block [C_out, C_in, K], an output position o hears

    down_o = sum_m 1 / N_m(o) sum_i e_m(o, i) * s_m(i),      N(o) = (||w_o||_2, ||w_o||_1, ||w_o||_2^2),

where s_m are states that the inputs send and w_o all weights that o reads with; an input position hears the same of the
outputs, by the norms of the weights that read it. So the second and third moment give weighted means of states, the
first a sum of the size of a single state if signs are random: messages have the same size at any width and any scale
of the weights (both are features of their own). They are linear in the states, hence products of matrices: there is
no state per edge, and no more memory is taken than a chunk of rows needs.
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
    """The exchange of one network by matrix products, in the dtype and on the device of the states.

    Args:
        graph: The network.
        rows: Elements of a block worked on at a time.
    """

    def __init__(self, graph: WeightGraph, rows: int = ROWS) -> None:
        self._layout, self._encoding, self._rows = graph.layout, graph.encoding, rows

    def __call__(self, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange`."""
        inputs, outputs, width = self._layout.inputs, self._layout.outputs, down.shape[2]
        into = torch.split(inputs.spread(down.flatten(1)).view(-1, MOMENTS, width), inputs.sizes)
        out = torch.split(outputs.spread(up.flatten(1)).view(-1, MOMENTS, width), outputs.sizes)
        heard = [self._block(n, *pair, factors[n]) for n, pair in enumerate(zip(into, out, strict=True))]
        at_outputs, at_inputs = self._encoding.at_outputs.to(down), self._encoding.at_inputs.to(down)
        return (
            outputs.collect(_weighed([y for y, _ in heard], at_outputs, width)),
            inputs.collect(_weighed([z for _, z in heard], at_inputs, width)),
        )

    def _block(self, number: int, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs and the inputs of one block hear by moment, shapes [3, C_out, h] and [3, C_in, h]."""
        value, kept = self._encoding.blocks[number], self._encoding.moments[number]
        down, up = (down * factors[0]).transpose(0, 1), (up * factors[1]).transpose(0, 1)
        if kept is not None:
            return _products(kept.to(down), down, up)
        step = max(1, self._rows // (value.shape[1] * value.shape[2]))
        heard, back = [], torch.zeros_like(down)
        for start, stop in pairwise([*range(0, len(value), step), len(value)]):
            y, z = checkpoint(_chunk, value[start:stop], down, up[:, start:stop], use_reentrant=False)
            heard.append(y)
            back = back + z
        return torch.cat(heard, 1), back


def _chunk(value: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The products for some rows [R, C, K] of a block, whose moments are thrown away afterwards."""
    return _products(moments(value.to(down)), down, up)


def _products(e: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Products of moments [3, R, C] with states down [3, C, h] and up [3, R, h]: shapes [3, R, h] and [3, C, h]."""
    return e @ down, e.transpose(1, 2) @ up


def _weighed(heard: list[Tensor], norms: Tensor, width: int) -> Tensor:
    """What all blocks' positions hear over its norms [positions, 3], summed over moments; shape [positions, h]."""
    every = torch.cat([norms.new_zeros(MOMENTS, 0, width), *heard], 1)  # [3, positions, h]
    return (every / norms.T[..., None]).sum(0)
