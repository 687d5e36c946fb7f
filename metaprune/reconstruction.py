"""Least-squares reconstruction: the weights of a pruned network are fitted again, layer by layer, without training.

Each layer that is linear in its weight sees the inputs that the pruned network, fitted so far, gives it, and is fitted
by ridge regression to the response that the dense network has at the kept channels (see
`metaprune.graphs.responses`). At the end of a residual block that is the dense sum minus what the pruned shortcut
already gives, so errors are not carried along. A batch normalisation behind the layer becomes the affine map that the
fit asks for, with the statistics of the new outputs.

The idea of refitting consumers goes back to He et al., Channel Pruning (ICCV 2017), and ThiNet (ICCV 2017).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaprune.calibration import ROWS, ROWS_PER_COLUMN, Leaves, joined, leaves_of, share_of_rows, some_rows
from metaprune.graphs import operators
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import Linear, linear_layers
from metaprune.graphs.replay import Replay, peak_bytes
from metaprune.graphs.responses import Response, responses
from metaprune.graphs.structure import Ref
from metaprune.graphs.survivors import Survivors
from metaprune.ridge import RIDGES, Moments, fitted

if TYPE_CHECKING:
    from metaprune.api import Pruned

SAMPLES = 500
MEMORY = 2 << 30
_CHUNK = 32
_LARGE = 256  # where nothing is held out
_FOLDS = 5
_SAME = 1e-5
_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class Effort:
    """What goes into the fit of each layer.

    Attributes:
        rows: Positions that it is fitted on.
        rows_per_column: So many for each column of the layer's input, where that is more.
        strengths: Strengths of the ridge, of which the best is taken.
    """

    rows: int = ROWS
    rows_per_column: int = ROWS_PER_COLUMN
    strengths: tuple[float, ...] = RIDGES


FINE = Effort()
COARSE = Effort(4096, 4, (1e-2,))
"""For networks that are only compared with one another."""


def reconstruct(pruned: Pruned, data: Any, samples: int = SAMPLES, memory: int = MEMORY, seed: int = 0) -> Pruned:
    """Fits the weights of a pruned network to the responses of the dense one.

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        data: Batches of inputs or of (inputs, labels); labels are not looked at. `"noise"` for Gaussian noise.
        samples: At most this many samples are used.
        memory: About so many bytes of activations are held; fewer samples are used where they need more.
        seed: Of the choice of positions in layers that have more than the fit needs, and of noise.

    Returns:
        The same pruned network with fitted weights. Its certificate speaks of the cut, not of the fit since.

    Raises:
        OptionError: No data, data that do not fit the network, or a network on the meta device.
        MetapruneError: The network gives values that are not finite.
    """
    if any(value.is_meta for value in pruned.original.values.values()):
        raise OptionError("reconstruct: a network on the meta device has no weights to fit")
    module = copy.deepcopy(pruned.module)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    now = {name: own.get(name, value).detach() for name, value in pruned.graph.values.items()}
    with torch.no_grad():
        leaves = leaves_of(pruned.original, data, samples, seed)
        fit = Fit(pruned.original, pruned.graph, now, pruned.plan.keep, leaves, memory, seed)
        fit.run()
        for name in fit.changed:
            own[name].copy_(fit.values[name])
    note = f"{fit.fitted} layers fitted by least squares on {fit.samples} samples (seed {seed})"
    return dataclasses.replace(pruned, module=module, notes=(*pruned.notes, note))


class Fit:
    """One reconstruction in progress.

    Attributes:
        values: The cut graph's tensors; those that are fitted are changed by `run`.
        changed: Names of the tensors that were.
        fitted: Number of layers.
        samples: Number of samples they were fitted on.
        macs: Multiply-adds of the second moments of their columns; the passes through both networks are not in it.
    """

    def __init__(
        self,
        dense: Graph,
        cut: Graph,
        values: Mapping[str, Tensor],
        keep: Mapping[str, tuple[int, ...]],
        leaves: Sequence[Leaves],
        memory: int = MEMORY,
        seed: int = 0,
        effort: Effort = FINE,
    ) -> None:
        """Takes a graph, its cut, the tensors to start from, the plan's edits and the samples, one at a time."""
        self.values = {name: value.clone() for name, value in values.items()}
        self.changed: set[str] = set()
        self.fitted = 0
        self.macs = 0.0
        self._graph = cut
        self._effort = effort
        self._survivors = Survivors(dense, keep)
        self._generator = torch.Generator().manual_seed(seed)
        layers = {n: layer for n, layer in linear_layers(cut).items() if _alike(dense, cut, layer)}
        self._responses = responses(cut, layers)
        leaves = leaves[: max(_FOLDS, memory // (peak_bytes(dense) + peak_bytes(cut)))]
        size = min(_CHUNK, len(leaves) // _FOLDS) if len(effort.strengths) > 1 else _LARGE
        batches = joined(dense, leaves, max(1, size))
        self.samples = len(leaves)
        inputs = frozenset(response.layer.input for response in self._responses.values())
        goals = Counter(response.target for response in self._responses.values())
        halves = Counter(response.other for response in self._responses.values() if response.other)
        after = {name: response.other for name, response in self._responses.items() if response.other}
        self._dense = Replay(dense, dense.values, batches, goals, firsts=inputs)
        self._cut = Replay(cut, self.values, batches, halves, after, frozenset(self._responses), self._refit, inputs)

    def run(self) -> None:
        """Fits every layer that the cut has changed something for."""
        self._cut.compute(self._responses)

    def _refit(self, name: str) -> None:
        """Fits the layer of a node, right before the node is computed."""
        response = self._responses[name]
        layer = response.layer
        inputs = self._cut.get(layer.input)
        if response.other or self._differs(layer.input):
            moments = self._moments(response, inputs)
            if moments is not None:
                self._write(response, *moments)
        self._dense.release(response.target)
        if response.other:
            self._cut.release(response.other)

    def _differs(self, name: str) -> bool:
        """Whether the pruned network's value differs from the dense one's, on the first batch; or lacks a part."""
        if name not in self._dense.first:
            self._dense.get(name)
        mine, theirs = self._cut.first[name], self._dense.first[name]
        if mine.shape != theirs.shape:
            return True
        return not bool((mine - theirs).abs().max() <= _SAME * theirs.abs().max())

    def _moments(self, response: Response, inputs: Sequence[Tensor]) -> tuple[Moments, Moments] | None:
        """Second moments of the layer's columns and what is wished of it, for the fit and held out of it."""
        layer, goals = response.layer, self._dense.get(response.target)
        others = self._cut.get(response.other) if response.other else [None] * len(goals)
        own = self._cut.function(layer.node, layer.input)
        norm = self._cut.function(response.norm, layer.node) if response.norm else None
        outputs = self.values[layer.weight].numel() // (layer.groups * layer.width)
        made = [Moments.zeros(layer.groups, layer.width, outputs, inputs[0].device) for _ in range(2)]
        most = share_of_rows(layer.width, len(inputs), self._effort.rows, self._effort.rows_per_column)
        for number, (value, goal, other) in enumerate(zip(inputs, goals, others, strict=True)):
            wish = self._survivors.part(response.target, goal)
            wish = wish if other is None else wish - other
            if response.steps:
                start = own(number, value)
                start = start if norm is None else norm(number, start)
                wish = response.wish(wish, start, self._cut, number)
            rows = some_rows(layer.positions(wish), most, self._generator, wish.device)
            columns, wishes = layer.columns(value, rows).float(), layer.outputs(wish, rows).float()
            if columns.shape[1] != wishes.shape[1]:
                return None
            made[number % _FOLDS == _FOLDS - 1].add(columns, wishes)
        total = made[0] + made[1]
        self.macs += total.rows * (total.gram.numel() + total.cross.numel())
        if not bool(torch.isfinite(total.gram).all() and torch.isfinite(total.energy).all()):
            raise MetapruneError(f"reconstruct: values around {layer.node} are not finite")
        return made[0], made[1]

    def _write(self, response: Response, train: Moments, held_out: Moments) -> None:
        layer = response.layer
        weight = self.values[layer.weight]
        prior = layer.matrix(weight.double())
        if response.norm:
            self._write_norm(response, prior, train, held_out)
            return
        matrix, bias = fitted(train, held_out, prior, bool(layer.bias), self._effort.strengths)
        self._put(layer.weight, layer.tensor(matrix))
        if layer.bias:
            self._put(layer.bias, bias.flatten())
        self.fitted += 1

    def _write_norm(self, response: Response, prior: Tensor, train: Moments, held_out: Moments) -> None:
        """Weights on their old scale; the norm takes the statistics of their outputs and maps those as before."""
        layer, node = response.layer, self._graph.nodes[response.norm]
        bound = operators.bind(node.op, node.args, dict(node.kwargs))
        mean, variance, gain, shift = (
            self._graph.nodes[bound[key].name].args[0] if isinstance(bound[key], Ref) else ""
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        if bool(gain) != bool(shift):
            return
        deviation = (self.values[variance].double() + bound["eps"]).sqrt()
        scale = self.values[gain].double() / deviation if gain else 1 / deviation
        scale = torch.where(scale.abs() > _TINY, scale, torch.ones_like(scale))
        by_group = scale.reshape(layer.groups, 1, -1)
        matrix, bias = fitted(train, held_out, prior * by_group, True, self._effort.strengths)
        matrix, bias = matrix / by_group, bias.flatten()
        offset = self.values[layer.bias].double() if layer.bias else torch.zeros_like(scale)
        if gain:
            moments = train + held_out
            centre = ((moments.gram[:, -1:, :-1] @ matrix)[:, 0] / moments.rows).flatten()
            spread = (matrix * (moments.centred()[0] @ matrix)).sum(1).flatten() / moments.rows
            self._put(variance, spread.clamp_min(0))
            self._put(mean, centre + offset)
            self._put(gain, scale * (self.values[variance].double() + bound["eps"]).sqrt())
            self._put(shift, centre * scale + bias)
        else:
            self._put(mean, offset - bias / scale)
        self._put(layer.weight, layer.tensor(matrix))
        self.fitted += 1

    def _put(self, name: str, value: Tensor) -> None:
        self.values[name].copy_(value)
        self.changed.add(name)


def _alike(dense: Graph, cut: Graph, layer: Linear) -> bool:
    """Whether a layer of the cut graph is the cut of the dense graph's node of the same name."""
    node = dense.nodes.get(layer.node)
    return node is not None and node.op == cut.nodes[layer.node].op and layer.input in dense.nodes
