"""Several aggregators of the messages at a unit, as principal neighbourhood aggregation has them.

Corso, Cavalleri, Beaini, Liò and Velickovic, Principal Neighbourhood Aggregation for Graph Nets (NeurIPS 2020), arXiv
2004.05718, join mean, deviation, maximum and minimum of all messages that a unit receives. The first of these is what
`metaprune.metanet.exchange` does by products of matrices; the others need every message by itself, so that a chunk of
a block's edges at a time is made, reduced and thrown away.

With the message m_e on an edge what the edge adds to that mean, a unit here hears

    (sum_e m_e,  sqrt(sum_e m_e^2 + t) - sqrt(t),  max_e m_e,  min_e m_e),      t = 1e-12.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metaprune.metanet.encoding import moments
from metaprune.metanet.exchange import DenseExchange
from metaprune.metanet.layout import Incidence

AGGREGATORS = ("sum", "root of squares", "max", "min")
_TINY = 1e-12
_MESSAGES = 1 << 22  # numbers in the messages that are there at a time


def root(squares: Tensor) -> Tensor:
    """Roots of sums of squares, with a gradient at 0."""
    found: Tensor = (squares + _TINY).sqrt() - _TINY**0.5
    return found


class ManyExchange(DenseExchange):
    """An exchange from which units hear all of `AGGREGATORS`, side by side: [units, 4 h] for each direction.

    Edges are those of `metaprune.metanet.edge_list`: a position with several owners has one for each of them.
    """

    def __call__(self, down: Tensor, up: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """See `metaprune.metanet.exchange.Exchange`."""
        inputs, outputs = self._layout.inputs, self._layout.outputs
        to_outputs, to_inputs = _Heard(down, inputs.units), _Heard(down, inputs.units)
        at_input, at_output = 0, 0
        for number, value in enumerate(self._encoding.blocks):
            kept = self._encoding.moments[number]
            e = (moments(value) if kept is None else kept).to(down)  # [3, C_out, C_in]
            rows = (_Entries(outputs, at_output, e.shape[1], down), _Entries(inputs, at_input, e.shape[2], down))
            norms = [
                table[start : start + size].to(down).T
                for table, start, size in (
                    (self._encoding.at_outputs, at_output, e.shape[1]),
                    (self._encoding.at_inputs, at_input, e.shape[2]),
                )
            ]
            to_outputs.take(e / norms[0][:, :, None], down * factors[number, 0], *rows)
            to_inputs.take((e / norms[1][:, None]).transpose(1, 2), up * factors[number, 1], *reversed(rows))
            at_output, at_input = at_output + e.shape[1], at_input + e.shape[2]
        return to_outputs.joined(), to_inputs.joined()


class _Entries:
    """The owners of one block's positions on one side, as entries (position in the block, unit) with their weights."""

    def __init__(self, side: Incidence, start: int, size: int, like: Tensor) -> None:
        own = (side.position >= start) & (side.position < start + size)
        self.position = (side.position[own] - start).to(like.device)
        self.unit = side.unit[own].to(like.device)
        self.gather, self.scatter = (weight[own].to(like)[:, None] for weight in side.weights)


class _Heard:
    """What units have heard so far in one direction, by aggregator, each of shape [units, h]."""

    def __init__(self, like: Tensor, units: int) -> None:
        self._sums, self._squares = (like.new_zeros(units, like.shape[2]) for _ in range(2))
        self._most = like.new_full((units, like.shape[2]), -torch.inf)
        self._least = like.new_full((units, like.shape[2]), torch.inf)

    def take(self, e: Tensor, sent: Tensor, hearers: _Entries, senders: _Entries) -> None:
        """Takes in a block: its moments [3, hearing positions, sending positions] and states sent [units, 3, h]."""
        states = sent[senders.unit] * senders.gather[:, None]  # [senders, 3, h]
        step = max(1, _MESSAGES // max(1, states.shape[0] * states.shape[2]))
        for start, stop in pairwise([*range(0, len(hearers.unit), step), len(hearers.unit)]):
            chosen = e[:, hearers.position[start:stop]][:, :, senders.position]  # [3, hearers, senders]
            units = hearers.unit[start:stop]
            found = checkpoint(_reduced, chosen, states, hearers.scatter[start:stop], use_reentrant=False)
            sums, squares, most, least = found
            self._sums = self._sums.index_add(0, units, sums)
            self._squares = self._squares.index_add(0, units, squares)
            where = units[:, None].expand_as(most)
            self._most = self._most.scatter_reduce(0, where, most, "amax")
            self._least = self._least.scatter_reduce(0, where, least, "amin")

    def joined(self) -> Tensor:
        """All aggregators side by side; zero for units that hear nothing."""
        extremes = [own.where(own.isfinite(), 0.0) for own in (self._most, self._least)]
        return torch.cat([self._sums, root(self._squares), *extremes], 1)


def _reduced(e: Tensor, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Aggregates of messages, whose own shape is [hearers, senders, h], over the senders."""
    messages = torch.einsum("mba,amh->bah", e, states) * weights[:, None]
    return messages.sum(1), messages.square().sum(1), messages.amax(1), messages.amin(1)
