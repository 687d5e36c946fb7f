"""What the layers that read a unit lose with it, from the second moments of their columns.

A unit takes columns from the layers that read it along their input dimension. A convolution in groups that reads a
unit within the unit's own groups only, as a depthwise one does, loses those groups' matrices whole.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.curvature import Columns
from metaprune.graphs.groups import Slice
from metaprune.graphs.linear import Linear

Index = NDArray[np.int64]


def activation_energy(columns: Columns, weight: Tensor, part: Slice) -> Tensor | None:
    """Sum of |weight|^2 E[column^2] over what each unit takes from a layer: the squared metric of Wanda.

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models (ICLR 2024), eq. 1.

    Args:
        columns: Moments of the layer.
        weight: Its weight.
        part: The units' slice of the weight.

    Returns:
        Shape [units], float64; None when the layer does not read the units there.
    """
    products = columns.layer.matrix(weight.double()).square().sum(2) * columns.energy  # [groups, width]
    taken = taken_columns(columns.layer, part)
    if taken is not None:
        return products.sum(0)[_at(taken, products)].sum(1)
    blocks = taken_blocks(columns.layer, part)
    return None if blocks is None else products.sum(1)[_at(blocks, products)].sum(1)


def removal_error(columns: Columns, weight: Tensor, part: Slice) -> Tensor | None:
    """Least squared error of a layer without each unit's columns, all others adapted, over its output's energy.

    The error is `trace(W_q^T ([H^-1]_qq)^-1 W_q)` for the columns q of a unit: the optimal brain surgeon for a block
    of weights, Hassibi and Stork (NIPS 1992), eq. 5, as Structurally Prune Anything (arXiv 2403.18955) has it for
    coupled channels, OBSPA. H has a ridge (see `Columns.inverse`), and the error counts the ridge's penalty. A matrix
    that goes whole leaves nothing to adapt: its error is `trace(W^T H W)`.

    Args, returns: As `activation_energy`. A layer whose output does not vary loses nothing.
    """
    matrix = columns.layer.matrix(weight.double())
    outputs = (matrix * (columns.hessian() @ matrix)).sum((1, 2))  # [groups]
    taken, blocks = taken_columns(columns.layer, part), taken_blocks(columns.layer, part)
    if taken is not None:
        index = _at(taken, matrix)
        block = columns.inverse[:, index[:, :, None], index[:, None, :]]  # [groups, units, columns, columns]
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(block), matrix[:, index], upper=False)
        error = half.square().sum((0, 2, 3))
    elif blocks is not None:
        error = outputs[_at(blocks, matrix)].sum(1)
    else:
        return None
    total = outputs.sum()
    return error / total if float(total) > 0 else torch.zeros_like(error)


def taken_columns(layer: Linear, part: Slice) -> Index | None:
    """Columns that each unit takes from every matrix of a layer, shape [units, columns]; None when it takes none."""
    dim = input_dim(layer)
    return columns_at(layer, part.index).reshape(len(part.index), -1) if part.dim == dim else None


def taken_blocks(layer: Linear, part: Slice) -> Index | None:
    """Groups of a convolution that go whole with each unit, shape [units, groups of one]; None when none does."""
    if layer.groups == 1 or part.dim != 0:
        return None
    outputs = layer.shape[0] // layer.groups
    owners = np.sort(part.index // outputs, axis=1)
    if owners.shape[1] % outputs:
        return None
    owners = owners.reshape(len(owners), -1, outputs)
    return owners[:, :, 0] if bool((owners == owners[:, :, :1]).all()) else None


def input_dim(layer: Linear) -> int:
    """The dimension of a layer's weight along which its inputs lie."""
    return 0 if layer.transposed else 1


def columns_at(layer: Linear, positions: Index) -> Index:
    """Columns at positions along the input dimension of a weight, shape [*positions, columns of one]."""
    each = layer.width // layer.shape[input_dim(layer)]
    return positions[..., None] * each + np.arange(each)


def _at(index: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)
