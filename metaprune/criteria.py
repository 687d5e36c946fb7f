"""Criteria: how much the network would miss each unit of a group, as functions of the group and the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from metaprune.graphs.errors import OptionError
from metaprune.graphs.groups import Group


class Weights:
    """A network's parameters, with their squared sums per position computed once and shared by all groups that ask.

    A dense block's last layer is read by every group before it: without sharing, the cost would be quadratic.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values
        self._blocks: dict[str, torch.Tensor] = {}
        self._energy: dict[tuple[str, int], torch.Tensor] = {}

    def energy(self, tensor: str, dim: int) -> torch.Tensor:
        """Sum of squares of each position along a dimension, shape [size]."""
        key = (tensor, dim)
        if key not in self._energy:
            value = self.values[tensor].detach()
            if value.is_meta:
                found = torch.zeros(value.shape[dim])
            else:
                squares = self._squares(tensor, value, dim)
                found = squares.sum([d for d in range(squares.ndim) if d != dim]) if squares.ndim > 1 else squares
            self._energy[key] = found.float().cpu()
        return self._energy[key]

    def _squares(self, tensor: str, value: torch.Tensor, dim: int) -> torch.Tensor:
        """Squares with kernel dimensions summed away, shape [outputs, inputs]; of other tensors the plain squares."""
        wide = value if value.dtype == torch.float64 else value.float()
        if value.ndim < 4 or dim > 1:
            return wide.square()
        if tensor not in self._blocks:
            self._blocks[tensor] = torch.linalg.vector_norm(wide.flatten(2), dim=2).square()
        return self._blocks[tensor]


Criterion = Callable[[Group, Weights], torch.Tensor]


def magnitude(group: Group, weights: Weights) -> torch.Tensor:
    """Group L2 norm of all slices of a unit, over the group's mean.

    Fang et al., DepGraph (CVPR 2023), with the mean normaliser. Tensors without values (meta device) score equally.

    Returns:
        Score of each unit, shape [size]; higher is more important.
    """
    total = torch.zeros(group.size)
    for part in group.slices:
        if part.tensor not in weights.values:
            continue  # a buffer, such as running statistics
        total += weights.energy(part.tensor, part.dim)[torch.from_numpy(part.index)].sum(1)
    score = total.sqrt()
    mean = score.mean()
    return score / mean if float(mean) > 0 else torch.ones_like(score)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def find(name: str) -> Criterion:
    """The criterion called `name`; raises `OptionError`."""
    if name not in CRITERIA:
        raise OptionError(f"criterion: {name!r} is none of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]
