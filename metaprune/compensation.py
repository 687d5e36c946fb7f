"""Closed-form compensation: the first moments, or the first two, of what layers put out, as before the cut.

Neither function needs labels or training. `absorb` gives back the mean of what was cut, from statistics of the dense
network alone; `match_moments` also follows what the earlier layers of the pruned network have become.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaprune.calibration import batches_of
from metaprune.graphs import operators
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.incision import carried
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.linear import Linear, linear_layers, readers
from metaprune.graphs.portable import values_of
from metaprune.graphs.replay import Replay, peak_bytes
from metaprune.graphs.responses import responses
from metaprune.graphs.structure import Ref
from metaprune.graphs.survivors import Survivors

if TYPE_CHECKING:
    from metaprune.api import Pruned

SAMPLES = 256
MEMORY = 2 << 30
_CHUNK = 32
_TINY = 1e-6

Batches = Sequence[Mapping[str, Tensor]]


def absorb(pruned: Pruned, data: Any, samples: int = SAMPLES, memory: int = MEMORY, seed: int = 0) -> Pruned:
    """Puts the mean of what was cut into the biases of the layers that read it.

    A layer that reads inputs x loses `W[:, cut] x[cut]`. The mean of that over the data, in the dense network, goes
    into the layer's bias, or out of the running mean of the batch normalisation behind it: `b' = b + W[:, cut]
    E[x[cut]]`, the constant that leaves the least squared error when the kept inputs are as they were (the bias
    correction of Nagel et al., Data-Free Quantization, 2019, arXiv 1906.04721, section 4.2, for a cut instead of a
    rounding). It is exact where the cut units were constant. With zero padding x is what the kernel sees, zeros
    included, so the mean over all positions is exact and single positions at the border are not. A layer with neither
    bias nor batch normalisation has no place for a constant and stays as it is.

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        data: Batches of inputs or of (inputs, labels); labels are not looked at. `"noise"` for Gaussian noise.
        samples: At most this many samples are used.
        memory: About so many bytes of activations are held; fewer samples pass through the network at once, and
            `match_moments` uses fewer of them, where they need more.
        seed: Of noise.

    Returns:
        The same pruned network with other biases and running means.

    Raises:
        OptionError: No data, data that do not fit the network, a network on the meta device, or one whose layers have
            been fitted or trained since the cut: their weights no longer miss what was cut.
        MetapruneError: The network gives values that are not finite.
    """
    _check_values(pruned, "absorb")
    dense, cut = pruned.original, pruned.graph
    survivors = Survivors(dense, pruned.plan.keep)
    layers = {
        name: layer
        for name, layer in linear_layers(dense).items()
        if survivors.mask(layer.input, layer.channel) is not None
    }
    places = _constants(cut)
    module = copy.deepcopy(pruned.module)
    values = values_of(cut, module)
    absorbed = 0
    with torch.no_grad():
        means = _lost_means(dense, layers, survivors, _batches(dense, data, samples, memory, seed))
        for name, layer in layers.items():
            if name not in places:
                continue
            place, sign = places[name]
            _check_unchanged(pruned, values, (layer.weight, place))
            constant = (means[name] @ layer.matrix(dense.values[layer.weight].double())).flatten()
            mask = survivors.mask(name, layer.channel)
            kept = constant if mask is None else constant[torch.from_numpy(mask).to(constant.device)]
            values[place].add_((sign * kept).to(values[place]))
            absorbed += 1
    note = f"what was cut is absorbed as a constant by {absorbed} of the {len(layers)} layers that read it"
    return dataclasses.replace(pruned, module=module, notes=(*pruned.notes, note))


def match_moments(pruned: Pruned, data: Any, samples: int = SAMPLES, memory: int = MEMORY, seed: int = 0) -> Pruned:
    """Gives each channel that a layer puts out the mean and standard deviation that it has in the dense network.

    Layer by layer, in the order of the network, on the inputs that the layers before, already matched, give. Behind a
    layer with a batch normalisation that normalisation takes the statistics of its new inputs, its gain becomes the
    dense output's standard deviation (with the sign it had) and its shift the dense output's mean; one without gain
    and shift has its statistics chosen to that end. Without a normalisation the
    rows of the weight and the bias are scaled and shifted; without a bias only the standard deviation
    is matched. Unlike recalibration it reaches networks without batch normalisation, and also restores what the gain
    and the shift no longer give; unlike least squares it mixes no channels, so a few samples do. Jordan et al., REPAIR
    (2022), arXiv 2211.08403, correct merged networks so.

    A channel that the pruned network leaves constant keeps its scale.

    Arguments and errors are those of `absorb`, but that the network may have been fitted or trained since the cut.

    Returns:
        The same pruned network, its channels on their old scale.
    """
    _check_values(pruned, "match_moments")
    module = copy.deepcopy(pruned.module)
    own = values_of(pruned.graph, module)
    with torch.no_grad():
        samples = max(1, min(samples, memory // peak_bytes(pruned.graph)))  # all of them are held side by side
        matching = _Matching(pruned, own, _batches(pruned.original, data, samples, memory, seed))
        matching.run()
        for name, value in matching.values.items():
            own[name].copy_(value)
    note = f"moments of the outputs of {matching.matched} layers are those of the dense network"
    return dataclasses.replace(pruned, module=module, notes=(*pruned.notes, note))


class _Matching:
    """One matching of moments in progress."""

    def __init__(self, pruned: Pruned, values: Mapping[str, Tensor], batches: Batches) -> None:
        dense, cut = pruned.original, pruned.graph
        devices = {name: value.device for name, value in dense.values.items()}
        self.values = {name: value.to(devices.get(name, value.device), copy=True) for name, value in values.items()}
        self.matched = 0
        self._layers: dict[str, tuple[Linear, _Norm | None]] = {}
        survivors = Survivors(dense, pruned.plan.keep)
        starts: dict[str, Linear] = {}
        for name, response in responses(cut, linear_layers(cut)).items():
            norm = _norm_of(cut, response.norm)
            if (norm is not None or not response.norm) and survivors.comparable(response.start, cut):
                self._layers[name] = response.layer, norm
                starts[response.start] = response.layer
        self._wanted = _dense_moments(dense, starts, survivors, batches)
        self._cut = Replay(cut, self.values, batches, stops=frozenset(self._layers), prepare=self._match)

    def run(self) -> None:
        """Matches every layer."""
        self._cut.compute(self._layers)

    def _match(self, name: str) -> None:
        """Matches the layer of a node, right before the node is computed."""
        layer, norm = self._layers[name]
        wanted = self._wanted[norm.node if norm else name]
        outputs = self._cut.function(name, layer.input)
        found = _Moments()
        for number, value in enumerate(self._cut.get(layer.input)):
            found.add(outputs(number, value), layer.channel)
        found.check(name)
        alive = found.deviation > _TINY * wanted.deviation
        if norm is None:
            scale = torch.where(alive, wanted.deviation / found.deviation, 1.0)
            self._scale(layer, scale, wanted.mean - scale * found.mean)
        else:
            self._renormalise(norm, found, wanted, alive)
        self.matched += 1

    def _scale(self, layer: Linear, scale: Tensor, shift: Tensor) -> None:
        """Makes a layer's output `scale * output + shift`, channel by channel; the shift only where there is a bias."""
        matrix = layer.matrix(self.values[layer.weight].double())
        self.values[layer.weight].copy_(layer.tensor(matrix * scale.reshape(layer.groups, 1, -1)))
        if layer.bias:
            self.values[layer.bias].copy_(scale * self.values[layer.bias].double() + shift)

    def _renormalise(self, norm: _Norm, found: _Moments, wanted: _Moments, alive: Tensor) -> None:
        """Statistics of the new inputs and an affine map of their own; or, without one, statistics that do both."""
        if norm.gain:
            self.values[norm.variance].copy_(found.deviation.square())
            self.values[norm.mean].copy_(found.mean)
            gain = self.values[norm.gain].double()
            sign = torch.where(gain < 0, -1.0, 1.0)
            width = (self.values[norm.variance].double() + norm.eps).sqrt()  # what the norm divides by
            self.values[norm.gain].copy_(torch.where(alive, sign * wanted.deviation * width / found.deviation, gain))
            self.values[norm.shift].copy_(wanted.mean)
            return
        variance = self.values[norm.variance].double()
        asked = (found.deviation / wanted.deviation).square() - norm.eps
        fits = alive & asked.isfinite() & (asked >= 0)
        self.values[norm.variance].copy_(torch.where(fits, asked, variance))
        width = (self.values[norm.variance].double() + norm.eps).sqrt()
        self.values[norm.mean].copy_(found.mean - wanted.mean * width)


class _Moments:
    """Mean and standard deviation of each channel over streamed values, in float64."""

    def __init__(self) -> None:
        self._rows = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, value: Tensor, channel: int) -> None:
        """Takes in a value whose dimension `channel` holds the channels."""
        rows = value.movedim(channel, -1).flatten(0, -2).double()  # [rows, channels]
        self._rows += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Of each channel."""
        return torch.as_tensor(self._sum) / self._rows

    @property
    def deviation(self) -> Tensor:
        """Of each channel; variance 0 where rounding leaves less."""
        return (torch.as_tensor(self._squares) / self._rows - self.mean.square()).clamp_min(0).sqrt()

    def check(self, name: str) -> None:
        """Raises `MetapruneError` when a moment is not finite."""
        if not bool(torch.as_tensor(self._squares).isfinite().all()):
            raise MetapruneError(f"match_moments: values of {name} are not finite")


@dataclass(frozen=True)
class _Norm:
    """A batch normalisation by the names of its tensors; those of gain and shift are empty where it has none."""

    node: str
    mean: str
    variance: str
    gain: str
    shift: str
    eps: float


def _norm_of(graph: Graph, name: str) -> _Norm | None:
    """The batch normalisation of a node; None without one, with half an affine map, or with a tensor used elsewhere."""
    if not name:
        return None
    node = graph.nodes[name]
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    names: dict[str, str] = {}
    for key in ("running_mean", "running_var", "weight", "bias"):
        source = graph.nodes[bound[key].name] if isinstance(bound[key], Ref) else None
        if source is not None and (source.op != "tensor" or readers(graph)[source.args[0]] != 1):
            return None
        names[key] = "" if source is None else str(source.args[0])
    mean, variance, gain, shift = names.values()
    if bool(gain) != bool(shift):
        return None
    return _Norm(name, mean, variance, gain, shift, float(bound["eps"]))


def _constants(graph: Graph) -> dict[str, tuple[str, int]]:
    """For each layer that can take up a constant: the tensor that takes it, and the sign it takes it with."""
    found = {}
    for name, response in responses(graph, linear_layers(graph)).items():
        norm = _norm_of(graph, response.norm)
        if response.layer.bias:
            found[name] = response.layer.bias, 1
        elif norm is not None:
            found[name] = norm.mean, -1
    return found


def _lost_means(
    dense: Graph, layers: Mapping[str, Linear], survivors: Survivors, batches: Batches
) -> dict[str, Tensor]:
    """The mean column of each layer where its inputs are cut and 0 where they stay, shape [groups, 1, width]."""
    readers: dict[str, list[str]] = {}
    for name, layer in layers.items():
        readers.setdefault(layer.input, []).append(name)
    totals: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)

    def watch(node: Node, value: Any) -> None:
        for name in readers.get(node.name, ()):
            lost = survivors.lost(node.name, value, layers[name].channel).double()
            lost = lost if layers[name].stride else lost.flatten(0, -2)  # [batch, channels, ...] or [rows, width]
            totals[name] = totals.get(name, 0.0) + lost.sum(0, keepdim=True)
            rows[name] += len(lost)

    for batch in batches:
        execute(dense, dense.values, batch, watch=watch)
    means = {}
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise MetapruneError(f"absorb: values that {name} reads are not finite")
        means[name] = layers[name].columns(total / rows[name]).mean(1, keepdim=True)
    return means


def _dense_moments(
    dense: Graph, starts: Mapping[str, Linear], survivors: Survivors, batches: Batches
) -> dict[str, _Moments]:
    """Moments of the kept channels of nodes, by node; the channels lie where those of the layer's output do."""
    found = {name: _Moments() for name in starts}

    def watch(node: Node, value: Any) -> None:
        if node.name in starts:
            found[node.name].add(survivors.part(node.name, value), starts[node.name].channel)

    for batch in batches:
        execute(dense, dense.values, batch, watch=watch)
    for name, moments in found.items():
        moments.check(name)
    return found


def _batches(graph: Graph, data: Any, samples: int, memory: int, seed: int) -> Batches:
    size = max(1, min(_CHUNK, memory // peak_bytes(graph)))
    return batches_of(graph, data, size, samples, seed)


def _check_values(pruned: Pruned, function: str) -> None:
    if any(value.is_meta for value in pruned.original.values.values()):
        raise OptionError(f"{function}: a network on the meta device has no weights")


def _check_unchanged(pruned: Pruned, values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuses tensors that are no longer what the cut left."""
    for name in names:
        left = carried(pruned.original.values[name], pruned.kept.get(name, {}), None)
        if not torch.equal(left.to(values[name].device), values[name]):
            raise OptionError(
                f"absorb: {name} has been fitted or trained since the cut; absorb comes first, on a network pruned "
                "with reconstruct=False"
            )
