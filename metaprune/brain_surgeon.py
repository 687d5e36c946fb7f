"""The optimal brain surgeon's weight update of a pruned network, without training and layer by layer.

Every layer that lost inputs is given the weights that come nearest to its dense outputs, on the dense network's own
activations: `W'_S = W_S + (H_SS)^-1 H_SQ W_Q` for kept columns S and lost columns Q, which is what the updates of
Hassibi and Stork (NIPS 1992), eq. 5, add up to when the lost columns go one after the other. H does not depend on what
is cut, so that one pass over the data serves any plan: OBSPA of Structurally Prune Anything (arXiv 2403.18955).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metaprune.curvature import RIDGE, SAMPLES, Columns, collect_columns
from metaprune.graphs.errors import OptionError
from metaprune.graphs.linear import linear_layers
from metaprune.removal import Index, columns_at, input_dim

if TYPE_CHECKING:
    from metaprune.api import Pruned


def obs_update(pruned: Pruned, data: Any, samples: int = SAMPLES, seed: int = 0, ridge: float = RIDGE) -> Pruned:
    """Lets the kept inputs of every layer make up for those that were cut.

    The weights start from the dense network's: whatever has been done to the updated ones since the cut is lost.
    A constant that the lost inputs gave is put into the layer's bias, or into the running mean of the batch
    normalisation behind it.

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        data: Batches of inputs or of (inputs, labels); labels are not looked at. `"noise"` for Gaussian noise.
        samples: At most this many samples are used.
        seed: Of the choice of positions in layers that have more than is needed, and of noise.
        ridge: Strength of the pull towards the dense weights, relative to the mean energy of the columns; above 0.

    Returns:
        The same pruned network with updated weights. Its certificate speaks of the cut, not of the update since.

    Raises:
        OptionError: A ridge that is not above 0; no data, data that do not fit the network, or a network on the meta
            device.
        MetapruneError: A layer reads values that are not finite.
    """
    if not ridge > 0:
        raise OptionError(f"ridge: must be above 0, not {ridge!r}")
    dense, kept = pruned.original, pruned.kept
    layers = [layer for layer in linear_layers(dense).values() if input_dim(layer) in kept.get(layer.weight, {})]
    moments = collect_columns(dense, data, samples, seed, [layer.weight for layer in layers])
    module = copy.deepcopy(pruned.module)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))

    def put(name: str, value: Tensor, skip: int | None = None) -> None:
        for dim, index in kept.get(name, {}).items():
            if dim != skip:
                value = value.index_select(dim, torch.from_numpy(index).to(value.device))
        own[name].copy_(value)

    with torch.no_grad():
        for name, columns in moments.items():
            dim = input_dim(columns.layer)
            weight, offset = compensated(columns, dense.values[name].detach(), kept[name][dim], ridge)
            put(name, weight, skip=dim)
            if columns.shift:
                sign = 1 if columns.shift == columns.layer.bias else -1
                put(columns.shift, dense.values[columns.shift].detach().double() + sign * offset)
    used = next((columns.samples for columns in moments.values()), 0)
    note = f"{len(moments)} layers given the optimal brain surgeon's weights on {used} samples (seed {seed})"
    return dataclasses.replace(pruned, module=module, notes=(*pruned.notes, note))


def compensated(columns: Columns, weight: Tensor, kept: Index, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weights of a layer that keeps some of its inputs, nearest to its outputs on all of them.

    Minimises `||X W - X_S W'||^2` plus `ridge` times the mean diagonal of H times `||W_S - W'||^2`, where X is taken
    about its mean if the layer's outputs can be shifted.

    Args:
        columns: Moments of the layer with all its inputs.
        weight: Its weight.
        kept: Positions that stay along the input dimension, ascending.
        ridge: Above 0.

    Returns:
        The weight with the kept inputs only, float64, and what is to be added to each output, shape [outputs].
    """
    layer = columns.layer
    hessian, matrix = columns.hessian(ridge), layer.matrix(weight.double())
    stays = columns_at(layer, kept).ravel()
    s = torch.from_numpy(stays).to(matrix.device)
    q = torch.from_numpy(np.setdiff1d(np.arange(layer.width), stays)).to(matrix.device)
    factor = torch.linalg.cholesky(hessian[:, s[:, None], s])
    found = matrix[:, s] + torch.cholesky_solve(hessian[:, s[:, None], q] @ matrix[:, q], factor)
    mean = columns.mean[:, None]  # [groups, 1, width]
    offset = (mean @ matrix - mean[:, :, s] @ found).flatten()
    shape = list(layer.shape)
    shape[input_dim(layer)] = len(kept)
    return dataclasses.replace(layer, shape=tuple(shape)).tensor(found), offset
