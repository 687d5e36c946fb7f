"""Rewriting: other weights for the units that stay, from the states of all units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.graphs.errors import OptionError
from metaprune.metanet.encoding import TENSOR
from metaprune.metanet.engine import Layer
from metaprune.metanet.exchange import DenseExchange
from metaprune.metanet.layout import Part
from metaprune.metanet.weight_graph import WeightGraph


class Rewriter(nn.Module):
    """Makes up for removed units by changing the weights that stay, within bounds, and starts as the identity.

    Unit states and whether a unit stays go through further rounds of messages, so that every unit learns what is taken
    from its neighbours. With x_o and x_i the states at both positions of a block of root mean square r, W_oi (all
    kernel positions alike) becomes

        W_oi (1 + c tanh(a.x_o + b.x_i)) + c r <P x_o, Q x_i> / sqrt(rank),

    and an entry v of a vector of root mean square r, at a position with state x, becomes

        v (1 + d tanh(a.x)) + d r tanh(b.x),

    where a, b and P depend on nothing else and are zero at first. Buffers, such as running statistics, are not changed.

    Args:
        hidden: Width of the unit states.
        rank: Of what is added to a block.
        ratio: The bound c, in parts of a weight or of its tensor's root mean square.
        layers: Rounds of messages.
        seed: Of the initial weights; the caller's random state is left alone.
        vector_ratio: The bound d; the same as `ratio` unless told otherwise.
    """

    def __init__(
        self,
        hidden: int,
        rank: int = 4,
        ratio: float = 0.1,
        layers: int = 1,
        seed: int = 0,
        vector_ratio: float | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.ratio = rank, ratio
        self.vector_ratio = ratio if vector_ratio is None else vector_ratio
        if hidden < 1 or rank < 1 or layers < 0 or not (ratio > 0 and self.vector_ratio > 0):
            raise OptionError("rewriter: hidden, rank and ratios must be positive, layers at least 0")
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            self.of_kept, self.of_tensor = nn.Linear(1, hidden), nn.Linear(len(TENSOR), hidden)
            self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
            self.at_input, self.at_output, self.at_line = (nn.Linear(hidden, n) for n in (1 + rank, 1 + rank, 2))
        for zero in (self.at_output.weight, self.at_output.bias, self.at_line.weight, self.at_line.bias):
            nn.init.zeros_(zero)
        nn.init.zeros_(self.at_input.weight[0])  # the factor's part; the other rows are Q, which P = 0 silences
        nn.init.zeros_(self.at_input.bias[:1])

    def forward(
        self,
        weight_graph: WeightGraph,
        states: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """New parameters, for `graph.run` or `Graph.with_values`; gradients flow to the states and to this module.

        Args:
            weight_graph: The network.
            states: States of the units of every group, shape [size, hidden].
            kept: For some groups whether each unit stays, shape [size]; the others stay whole.
            start: Tensors that are rewritten instead of the network's own, by name; messages go by the network's own.

        Returns:
            The parameters that have units and the tensors of `start`, by name, in their own shapes and dtypes.

        Raises:
            OptionError: The states are not those of this network, or `kept` or `start` does not fit it.
        """
        layout, encoding = weight_graph.layout, weight_graph.encoding
        if [(name, len(state)) for name, state in states.items()] != [(u.name, u.size) for u in weight_graph.units]:
            raise OptionError("states: they are not those of this network's groups")
        x = torch.cat(list(states.values()))
        x = x + self.of_kept(_flags(weight_graph, kept or {}).to(x))
        features = F.layer_norm(encoding.tensors[: len(layout.blocks)].to(x), (len(TENSOR),))
        exchange = DenseExchange(weight_graph)
        for layer in self.layers:
            x = layer(x, F.silu(self.of_tensor(features)), exchange)
        x = F.layer_norm(x, x.shape[1:])
        outputs = torch.split(self.at_output(layout.outputs.spread(x)), layout.outputs.sizes)
        inputs = torch.split(self.at_input(layout.inputs.spread(x)), layout.inputs.sizes)
        lines = torch.split(self.at_line(layout.lines.spread(x)), layout.lines.sizes)
        values = weight_graph.with_tensors(start or {}).values
        blocks = {
            part.name: self._block(values[part.name], *sides)
            for part, sides in zip(layout.blocks, zip(outputs, inputs, strict=True), strict=True)
            if _learned(weight_graph, part)
        }
        vectors = {
            part.name: self._vector(values[part.name], line)
            for part, line in zip(layout.vectors, lines, strict=True)
            if _learned(weight_graph, part)
        }
        found = {name: layout.parts[name].restore(value) for name, value in {**blocks, **vectors}.items()}
        return {**(start or {}), **found}

    def _block(self, value: Tensor, output: Tensor, into: Tensor) -> Tensor:
        """A block [C_out, C_in, K] rewritten by what its outputs and inputs say, [C_out, 1 + rank] and alike."""
        factor = torch.tanh(output[:, None, 0] + into[None, :, 0])
        added = output[:, 1:] @ into[:, 1:].T / self.rank**0.5
        return _changed(value, self.ratio * factor[..., None], self.ratio * added[..., None])

    def _vector(self, value: Tensor, line: Tensor) -> Tensor:
        """A vector [C, K] rewritten by what its positions say, [C, 2]."""
        factor, added = torch.tanh(line).chunk(2, 1)
        return _changed(value, self.vector_ratio * factor, self.vector_ratio * added)


def _changed(value: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """The values times 1 + factor, plus what is added in units of their root mean square, in their dtype."""
    rms = value.square().mean().sqrt()
    return value * (1 + factor.to(value)) + rms * added.to(value)


def _learned(graph: WeightGraph, part: Part) -> bool:
    info = graph.graph.tensors[part.name]
    return info.kind == "parameter" and info.dtype.is_floating_point


def _flags(graph: WeightGraph, kept: Mapping[str, Tensor]) -> Tensor:
    """1 for units that stay and 0 for the others, shape [units, 1]."""
    flags = torch.ones(graph.layout.count, 1)
    rows = graph.split(flags)
    for name, stays in kept.items():
        if name not in rows:
            raise OptionError(f"kept: the network has no group {name}")
        if tuple(stays.shape) != (len(rows[name]),):
            raise OptionError(f"kept: {name} has {len(rows[name])} units, not {_shown(stays.shape)}")
        rows[name].copy_(stays.reshape(-1, 1))
    return flags


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
