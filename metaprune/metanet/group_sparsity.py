"""Group sparsity: decay that is strongest on the weakest units of a group, so that these can go at little loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaprune.metanet.weight_graph import WeightGraph

ALPHA = 16.0
_SPARED = ("bias", "running_mean", "running_var")


def group_sparsity(graph: WeightGraph, tensors: Mapping[str, Tensor], alpha: float = ALPHA) -> Tensor:
    """The penalty 1/2 sum_c g_c ||w_c||^2 over the units c of all groups that are not pinned, a scalar.

    With w_c all weights that go with a unit, biases left out, and I_c = ||w_c||, the factors of a group are

        g_c = alpha^((I_max - I_c) / (I_max - I_min)),

    through which no gradient flows: the gradient at a weight is g_c w for each unit that it belongs to. It is what
    DepGraph's sparse training adds to gradients (Fang et al. 2023, arXiv 2301.12900), and the penalty of
    metanetworks that rewrite networks before they are pruned (Liu et al. 2025, arXiv 2506.12041).

    Args:
        graph: The network, for its groups and for what its tensors are.
        tensors: Tensors by name that take the place of its own.
        alpha: The factor on the weakest unit of a group; that on the strongest is 1.
    """
    parts, values = graph.layout.parts, graph.graph.values
    total = torch.zeros((), dtype=torch.float64)
    for group in graph.graph.groups:
        if group.pinned:
            continue
        energy = torch.zeros(group.size, dtype=torch.float64)
        for piece in group.slices:
            info = graph.graph.tensors[piece.tensor]
            if info.kind == "parameter" and parts[piece.tensor].reading.argument not in _SPARED:
                value = tensors.get(piece.tensor, values[piece.tensor]).double()
                by_position = value.square().movedim(piece.dim, 0).reshape(value.shape[piece.dim], -1).sum(1)
                energy = energy + by_position[torch.from_numpy(piece.index)].sum(1)
        norm = energy.detach().sqrt()
        spread = (norm.max() - norm.min()).clamp_min(torch.finfo(norm.dtype).tiny)
        total = total + 0.5 * (alpha ** ((norm.max() - norm) / spread) * energy).sum()
    return total
