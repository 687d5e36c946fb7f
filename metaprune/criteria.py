"""Criteria: how much the network would miss each unit of a group, from its tensors and from calibration data.

A criterion is one function and one row of `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from metaprune.curvature import Columns
from metaprune.graphs.errors import OptionError
from metaprune.graphs.groups import Group, Slice
from metaprune.mfac import marginal_losses
from metaprune.removal import activation_energy, removal_error
from metaprune.statistics import Moments, Statistics


class Weights:
    """A network's parameters, with sums per position computed once and shared by all groups that ask.

    A dense block's last layer is read by every group before it: without sharing, the cost would be quadratic.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self._blocks: dict[tuple[str, int], Tensor] = {}
        self._sums: dict[tuple[str, int, int], Tensor] = {}

    def energy(self, tensor: str, dim: int, power: int = 2) -> Tensor:
        """Sum of |values|^power at each position along a dimension, shape [size]."""
        key = (tensor, dim, power)
        if key not in self._sums:
            value = self.values[tensor].detach()
            if value.is_meta:
                found = torch.zeros(value.shape[dim])
            else:
                powers = self._powers(tensor, value, dim, power)
                found = powers.sum([d for d in range(powers.ndim) if d != dim]) if powers.ndim > 1 else powers
            self._sums[key] = found.float().cpu()
        return self._sums[key]

    def rows(self, part: Slice) -> Tensor:
        """What a slice takes from its tensor, one row per unit, shape [size, values]."""
        value = self.values[part.tensor].detach()
        value = torch.zeros(value.shape) if value.is_meta else value
        picked = value.movedim(part.dim, 0)[torch.from_numpy(part.index).to(value.device)]
        return picked.flatten(1).float().cpu()

    def of(self, group: Group) -> list[Slice]:
        """The group's slices of parameters; buffers, such as running statistics, are left out."""
        return [part for part in group.slices if part.tensor in self.values]

    def _powers(self, tensor: str, value: Tensor, dim: int, power: int) -> Tensor:
        """Powers with kernel dimensions summed away, shape [outputs, inputs]; of other tensors the plain powers."""
        wide = value if value.dtype == torch.float64 else value.float()
        if value.ndim < 4 or dim > 1:
            return wide.square() if power == 2 else wide.abs()
        if (tensor, power) not in self._blocks:
            norm = torch.linalg.vector_norm(wide.flatten(2), ord=power, dim=2)
            self._blocks[(tensor, power)] = norm.square() if power == 2 else norm
        return self._blocks[(tensor, power)]


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at.

    Attributes:
        weights: The parameters.
        statistics: What calibration data showed; None when there are none.
        seed: Of criteria that draw.
    """

    weights: Weights
    statistics: Statistics | None = None
    seed: int = 0

    def moments(self, group: Group) -> Moments:
        """Moments of the group's gate gradients."""
        assert self.statistics is not None
        return self.statistics.gates[group.name]

    def rows(self, group: Group) -> Tensor:
        """The group's gate gradients sample by sample, shape [samples, size]."""
        assert self.statistics is not None
        return self.statistics.rows[group.name]


Criterion = Callable[[Group, Evidence], Tensor]


def energy(group: Group, weights: Weights, power: int = 2) -> Tensor:
    """Sum of |values|^power over all slices of each unit, shape [size]; without values (meta device) zero."""
    total = torch.zeros(group.size)
    for part in weights.of(group):
        total += weights.energy(part.tensor, part.dim, power)[torch.from_numpy(part.index)].sum(1)
    return total


def _norm(group: Group, evidence: Evidence, power: int) -> Tensor:
    """Norm over all slices of each unit, shape [size]."""
    total = energy(group, evidence.weights, power)
    return total.sqrt() if power == 2 else total


def _over_mean(score: Tensor) -> Tensor:
    mean = score.mean()
    return score / mean if float(mean) > 0 else torch.ones_like(score)


def magnitude(group: Group, evidence: Evidence) -> Tensor:
    """L2 norm of all slices of a unit, over the group's mean: Fang et al., DepGraph (CVPR 2023), mean normaliser."""
    return _over_mean(_norm(group, evidence, 2))


def magnitude_l1(group: Group, evidence: Evidence) -> Tensor:
    """L1 norm of all slices of a unit, over the group's mean: Li et al., Pruning Filters (ICLR 2017), group-wise."""
    return _over_mean(_norm(group, evidence, 1))


def magnitude_max(group: Group, evidence: Evidence) -> Tensor:
    """L2 norm over the group's greatest. It starves narrow groups: it is here to be compared with."""
    score = _norm(group, evidence, 2)
    return score / score.max() if float(score.max()) > 0 else torch.ones_like(score)


def magnitude_plain(group: Group, evidence: Evidence) -> Tensor:
    """L2 norm as it is, so that groups of small weights lose most."""
    return _norm(group, evidence, 2)


def lamp(group: Group, evidence: Evidence) -> Tensor:
    """LAMP scores of whole units, by their squared norms (see `lamp_scores`)."""
    return lamp_scores(energy(group, evidence.weights))


def lamp_scores(squares: Tensor) -> Tensor:
    """Squared norm over the sum of all squared norms that are not smaller: LAMP, Lee et al. (ICLR 2021), eq. 2.

    Args:
        squares: Squared norms of the units, or squared weights of a layer, shape [size].
    """
    order = torch.argsort(squares, stable=True)
    rest = squares[order].flip(0).cumsum(0).flip(0)
    score = torch.empty_like(squares)
    score[order] = squares[order] / rest.clamp_min(1e-30)
    return score


def norm_scale(group: Group, evidence: Evidence) -> Tensor:
    """Size of the weights of the norms on a unit: Network Slimming, Liu et al. (ICCV 2017); L2 where there is none."""
    values = evidence.weights.values
    vectors = [p for p in evidence.weights.of(group) if values[p.tensor].ndim == 1 and p.tensor.endswith("weight")]
    if not vectors:
        return magnitude(group, evidence)
    return _over_mean(sum((evidence.weights.rows(part).abs().sum(1) for part in vectors), torch.zeros(group.size)))


def fpgm(group: Group, evidence: Evidence) -> Tensor:
    """Distance to all other units of the group: filter pruning by geometric median, He et al. (CVPR 2019), eq. 6."""
    parts = [part for part in evidence.weights.of(group) if part.dim == 0] or evidence.weights.of(group)
    if not parts:
        return torch.ones(group.size)
    rows = torch.cat([evidence.weights.rows(part) for part in parts], dim=1).double()
    return _over_mean(torch.cdist(rows, rows).sum(1))


def random(group: Group, evidence: Evidence) -> Tensor:
    """Uniform between 0 and 1, the same for the same group and seed: the control."""
    generator = torch.Generator().manual_seed((evidence.seed * 2654435761 + crc32(group.name.encode())) % 2**63)
    return torch.rand(group.size, generator=generator)


def taylor(group: Group, evidence: Evidence) -> Tensor:
    """Mean over samples of the absolute change of the loss to first order, over the group's mean.

    Molchanov et al., Importance Estimation (CVPR 2019), with a gate per unit.
    """
    return _over_mean(evidence.moments(group).absolute)


def fisher(group: Group, evidence: Evidence) -> Tensor:
    """Half the mean squared gate gradient: the change of the loss to second order, comparable between groups.

    Theis et al., Faster gaze prediction (2018), eq. 6; Liu et al., Group Fisher (ICML 2021).
    """
    return 0.5 * evidence.moments(group).square


def fisher_block(group: Group, evidence: Evidence) -> Tensor:
    """What each unit adds to the loss to second order when it leaves after those that harm less; others adjust.

    The whole Fisher matrix of the group's gates counts and not only its diagonal, so units that stand in for one
    another do not all go: M-FAC, Frantar et al. (NeurIPS 2021), eqs. 1-5; see `metaprune.mfac`.
    """
    return marginal_losses(evidence.rows(group))


def wanda(group: Group, evidence: Evidence) -> Tensor:
    """Squared weights times the mean squares of the activations they meet, in the layers that read the unit.

    Sun et al., Wanda (ICLR 2024), eq. 1, squared and summed over each unit, over the group's mean. Where no linear
    layer reads the units, as those of queries and keys, `magnitude`.
    """
    return _of_readers(group, evidence, activation_energy)


def obspa(group: Group, evidence: Evidence) -> Tensor:
    """Error of the layers that read the unit when it goes and the others make up for it, over their output's energy.

    OBSPA of Structurally Prune Anything (arXiv 2403.18955), by the optimal brain surgeon's closed form (see
    `metaprune.removal.removal_error`), summed over the layers, over the group's mean. Where no linear layer reads the
    units, `magnitude`, which has the same mean. `metaprune.obs_update` carries out what it assumes.
    """
    return _of_readers(group, evidence, removal_error)


def _of_readers(group: Group, evidence: Evidence, loss: Callable[[Columns, Tensor, Slice], Tensor | None]) -> Tensor:
    """Sum of what the layers that read the units lose with each, over the mean; `magnitude` without such layers."""
    assert evidence.statistics is not None
    total: Tensor | None = None
    for part in evidence.weights.of(group):
        columns = evidence.statistics.columns.get(part.tensor)
        found = None if columns is None else loss(columns, evidence.weights.values[part.tensor].detach(), part)
        if found is not None:
            total = found.cpu() if total is None else total + found.cpu()
    return magnitude(group, evidence) if total is None else _over_mean(total)


@dataclass(frozen=True)
class Row:
    """A criterion and what it asks for and gives.

    Attributes:
        function: The criterion.
        data: Whether it needs calibration data.
        columns: Whether second moments of what linear layers read are all it needs.
        per_sample: Whether it needs the gate gradients of every sample.
        additive: Whether its scores estimate losses that add up, over units and over groups.
    """

    function: Criterion
    data: bool = False
    columns: bool = False
    per_sample: bool = False
    additive: bool = False


CRITERIA: dict[str, Row] = {
    "magnitude": Row(magnitude),
    "magnitude_l1": Row(magnitude_l1),
    "magnitude_max": Row(magnitude_max),
    "magnitude_plain": Row(magnitude_plain),
    "lamp": Row(lamp),
    "norm_scale": Row(norm_scale),
    "fpgm": Row(fpgm),
    "random": Row(random),
    "taylor": Row(taylor, data=True),
    "fisher": Row(fisher, data=True, additive=True),
    "fisher_block": Row(fisher_block, data=True, per_sample=True, additive=True),
    "wanda": Row(wanda, data=True, columns=True),
    "obspa": Row(obspa, data=True, columns=True),
}


def find(name: str) -> Row:
    """The criterion called `name`; raises `OptionError`."""
    if not isinstance(name, str) or name not in CRITERIA:
        raise OptionError(f"criterion: {name!r} is none of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]
