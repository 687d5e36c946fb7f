"""What is left of a network is fitted without any data: to responses to drawn inputs that its batch norms vouch for.

A trained network knows one thing of its data: the mean and variance that every batch norm saw (where those are made up
or stale, the fit is to false inputs and may be worse than none). Inputs are drawn, half of them white noise and half,
where they are images, noise with the amplitude spectrum 1/f of natural images (Field 1987); for these inputs each norm
takes the statistics that they give it, so that behind it every channel has the mean and variance it has with data. On
that network `metaprune.reconstruction` fits the cut one. What it finds for a layer, new weights and a shift of its
output, is then carried over to the norms' own statistics.

With z = W x in front of a norm (gain g, shift b), drawn statistics (m', v') and those of the data (m, v), the fit makes
g1 (z1 - m1) / s1 + b1 reproduce g (z - m') / s' + b, where s^2 = v + eps. So z is reproduced by an affine function of
z1, and in the network with the data's statistics the norm has to be

    gain = g1 s' / s,    shift = (b1 - b + g m' / s') s' / s + b - g m / s    at statistics (m1, v1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import NOISE, Leaves, joined, leaves_of
from metaprune.graphs import operators
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.plan import Plan
from metaprune.graphs.structure import Ref
from metaprune.graphs.surgery import cut
from metaprune.reconstruction import FINE, Effort, Fit

SAMPLES = 384
_IMAGE = 4  # dimensions from which on an input has places in a plane


def refit_without_data(
    graph: Graph, plan: Plan, samples: int = SAMPLES, seed: int = 0, effort: Effort = FINE
) -> dict[str, Tensor]:
    """Weights that make up for the units that a plan removes, from the weights alone.

    Args:
        graph: The network; it is not changed.
        plan: What stays.
        samples: Number of inputs that are drawn.
        seed: Of them, and of the choice of positions that are fitted.
        effort: What goes into the fit of each layer.

    Returns:
        The tensors that change, by name, in their full shapes for `Graph.with_values`; what belongs to units that go
        is as it was.

    Raises:
        OptionError: An input of the network is of integers, which can not be drawn.
        MetapruneError: The network gives values that are not finite.
        PlanError: The plan does not fit the network.
    """
    if all(len(units) == graph.group(name).size for name, units in plan.keep.items()):
        return {}
    leaves = drawn(graph, samples, seed)
    norms = _norms(graph)
    statistics = _statistics(graph, norms, leaves)
    stand_in = graph.with_values(statistics)
    incision = cut(stand_in, plan.keep)
    values = {name: value.detach() for name, value in incision.graph.values.items()}
    with torch.no_grad():
        fit = Fit(stand_in, incision.graph, values, plan.keep, leaves, seed=seed, effort=effort)
        fit.run()
        found = {name: fit.values[name] for name in sorted(fit.changed)}
        for norm in norms:
            if norm.mean in found:
                old = {n: incision.carry(n, graph.values[n]) for n in norm.tensors}
                new = {n: incision.carry(n, stand_in.values[n]) for n in norm.tensors}
                found |= norm.carried_over(old, new, found)
        return {
            name: _put_back(graph.values[name].detach(), value, incision.kept.get(name, {}))
            for name, value in found.items()
        }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name."""
    text = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        text.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return text.hexdigest()


def drawable(graph: Graph) -> bool:
    """Whether the inputs of a network can be drawn: none is of integers."""
    return all(value.is_floating_point() for value in graph.example.values())


def drawn(graph: Graph, samples: int, seed: int) -> list[Leaves]:
    """Inputs of a network from a seed, one sample at a time; see the module.

    Raises:
        OptionError: An input is of integers.
    """
    leaves = leaves_of(graph, NOISE, samples, seed)
    return [leaf if number % 2 else {n: _natural(v) for n, v in leaf.items()} for number, leaf in enumerate(leaves)]


def _natural(noise: Tensor) -> Tensor:
    """White noise brought to the amplitude spectrum 1/f over all dimensions from the third on; of unit variance."""
    if noise.ndim < _IMAGE:
        return noise
    dims = list(range(2, noise.ndim))
    squares = torch.zeros((), dtype=torch.float64)
    for dim in dims:
        shape = [1] * len(dims)
        shape[dim - 2] = -1
        squares = squares + torch.fft.fftfreq(noise.shape[dim], dtype=torch.float64).square().reshape(shape)
    least = 1 / max(noise.shape[2:])  # below it lies the mean alone
    amplitude = squares.sqrt().clamp_min(least).reciprocal().to(noise.device)
    amplitude = amplitude / amplitude.square().mean().sqrt()
    found: Tensor = torch.fft.ifftn(torch.fft.fftn(noise.double(), dim=dims) * amplitude, dim=dims).real
    return found.to(noise.dtype)


@dataclass(frozen=True)
class _Norm:
    """A batch norm by the names of its tensors; empty names where it has no gain and shift."""

    node: str
    input: str
    mean: str
    variance: str
    gain: str
    shift: str
    eps: float

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.mean, self.variance, self.gain, self.shift) if name)

    def carried_over(
        self, data: Mapping[str, Tensor], drawn: Mapping[str, Tensor], fitted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The fitted tensors for the statistics of the data: those that differ from the fitted ones."""
        mean, stand_in = data[self.mean].double(), drawn[self.mean].double()
        if self.gain not in fitted:
            return {self.mean: mean + fitted[self.mean].double() - stand_in}
        s, s_drawn = ((own[self.variance].double() + self.eps).sqrt() for own in (data, drawn))
        gain, shift = data[self.gain].double(), data[self.shift].double()
        ratio = s_drawn / s
        moved = fitted[self.shift].double() - shift + gain * stand_in / s_drawn
        return {
            self.gain: fitted[self.gain].double() * ratio,
            self.shift: moved * ratio + shift - gain * mean / s,
        }


def _norms(graph: Graph) -> list[_Norm]:
    """The batch norms that have running statistics of their own."""
    found = []
    for node in graph.nodes.values():
        if node.base != "batch_norm":
            continue
        bound = operators.bind(node.op, node.args, dict(node.kwargs))
        mean, variance, gain, shift = (
            _tensor(graph, bound[key]) for key in ("running_mean", "running_var", "weight", "bias")
        )
        if mean and variance and isinstance(bound["input"], Ref):
            found.append(_Norm(node.name, bound["input"].name, mean, variance, gain, shift, float(bound["eps"])))
    return found


def _tensor(graph: Graph, value: object) -> str:
    """Name of the tensor that an argument is; empty when it is none."""
    source = graph.nodes[value.name] if isinstance(value, Ref) else None
    return "" if source is None or source.op != "tensor" else str(source.args[0])


def _statistics(graph: Graph, norms: list[_Norm], leaves: list[Leaves]) -> dict[str, Tensor]:
    """Mean and variance in front of each norm while all norms use those of the batch; nothing else is in training."""
    if not norms:
        return {}
    by_input: dict[str, list[_Norm]] = {}
    for norm in norms:
        by_input.setdefault(norm.input, []).append(norm)
    names = {name for norm in norms for name in (norm.mean, norm.variance)}
    found = {name: graph.values[name].detach().clone() for name in names}

    def watch(node: Node, value: Tensor) -> None:
        for norm in by_input.get(node.name, ()):
            variance, mean = torch.var_mean(value, [dim for dim in range(value.ndim) if dim != 1], correction=0)
            found[norm.mean].copy_(mean)  # in place, before the norm runs: the executor may hold the tensor already
            found[norm.variance].copy_(variance)

    batch = joined(graph, leaves, len(leaves))[0]
    with torch.no_grad():
        execute(graph, {**graph.values, **found}, batch, watch=watch)
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise MetapruneError("graph: drawn inputs give values that are not finite")
    return found


def _put_back(whole: Tensor, part: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """A tensor with another part in the place of the positions that are kept."""
    part = part.to(whole.dtype)
    if not kept:
        return part.clone()
    index = [torch.arange(size) for size in whole.shape]
    for dim, positions in kept.items():
        index[dim] = torch.from_numpy(positions)
    found = whole.clone()
    found[torch.meshgrid(*index, indexing="ij")] = part
    return found
