"""Densities: which share of its weights each layer keeps when so many of all weights stay."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Densities = NDArray[np.float64]


def erdos_renyi(shapes: Sequence[tuple[int, ...]], density: float) -> Densities:
    """Erdos-Renyi kernel densities: in proportion to the sum of a weight's dimensions over their product.

    Evci et al., Rigging the Lottery (ICML 2020), section 3: layers whose share would exceed 1 are dense, and the factor
    of all others follows from the weights that are left. So they are `min(scale * sum(shape) / prod(shape), 1)`.

    Args:
        shapes: Shape of each layer's weight; kernel dimensions count like the others.
        density: The share of all weights that stays, from 0 to 1.

    Returns:
        The density of each layer, shape [layers]; over all weights they average to `density`.
    """
    sizes = np.array([prod(shape) for shape in shapes], dtype=np.float64)
    sums = np.array([sum(shape) for shape in shapes], dtype=np.float64)
    order = np.argsort(-sums / sizes, kind="stable")  # in which layers become dense as the scale grows
    dense = np.concatenate([[0.0], np.cumsum(sizes[order])[:-1]])
    rest = np.cumsum(sums[order][::-1])[::-1]
    scale = (density * sizes.sum() - dense) / rest  # when the first 0, 1, ... of them are dense
    fits = np.flatnonzero(scale * (sums / sizes)[order] <= 1)
    if not len(fits):
        return np.ones(len(sizes))
    found: Densities = np.minimum(max(scale[fits[0]], 0.0) * sums / sizes, 1.0)
    return found


def leaving(scores: Sequence[NDArray[np.floating[Any]]]) -> NDArray[np.int32]:
    """The layer of each weight in the order of all scores, smallest first; of equal ones the earlier layer's.

    Args:
        scores: Scores of the weights of each layer, in any order, shape [weights of the layer] each.
    """
    owner = np.repeat(np.arange(len(scores), dtype=np.int32), [len(values) for values in scores])
    return owner[np.argsort(np.concatenate([*scores, np.empty(0)]), kind="stable")]


def left(order: NDArray[np.int32], sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many weights each layer keeps when `count` of all stay.

    Args:
        order: See `leaving`.
        sizes: Weights of each layer, shape [layers].
        count: From 0 to all.
    """
    gone = np.bincount(order[: len(order) - count], minlength=len(sizes))
    kept: NDArray[np.int64] = sizes - gone
    return kept


def spread(densities: Densities, sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Whole numbers of kept weights that sum to `count`, next to what the densities ask for: largest remainders first.

    Args:
        densities: Shape [layers]; over all weights they average to `count` of them, up to rounding.
        sizes: Weights of each layer, shape [layers].
        count: From 0 to all.
    """
    exact = densities * sizes
    kept = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes)
    while (short := count - int(kept.sum())) > 0:
        open_ = np.flatnonzero(kept < sizes)
        kept[open_[np.argsort(-(exact - kept)[open_], kind="stable")[:short]]] += 1
    while (over := int(kept.sum()) - count) > 0:
        full = np.flatnonzero(kept > 0)
        kept[full[np.argsort((exact - kept)[full], kind="stable")[:over]]] -= 1
    return kept
