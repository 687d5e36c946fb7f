"""Curves from a few points: made monotone, then followed in between."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]
_TRACE = 1e-12


def non_increasing(values: Curve) -> Curve:
    """The non-increasing sequence nearest to `values` in squares: pooling of adjacent violators, Barlow et al. 1972."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(means, counts)


def through(kept: NDArray[np.int64], values: Curve, size: int, least: int) -> Curve:
    """A curve through measured points: a power of the number of units that go from one point to the next.

    Args:
        kept: Numbers of units that are kept, ascending, the first `least` and the last below `size`.
        values: Non-increasing, shape [points].
        size: Units of the group.
        least: The least number that can be kept.

    Returns:
        Shape [size + 1]: infinite below `least`, 0 at `size`.
    """
    gone = size - np.arange(least, size, dtype=np.float64)
    curve = np.full(size + 1, np.inf)
    curve[least:size] = _between(np.log(gone), np.log(size - kept), values)
    curve[kept] = values
    curve[size] = 0.0
    return curve


def along(kept: NDArray[np.int64], values: Curve, shape: Curve, least: int, tangent: bool) -> Curve:
    """A curve through measured points that follows a shape in between, scaled by the ratio interpolated in its log.

    The ratio is interpolated in the share of the units that go; beyond the last points it is that of the point.

    Args:
        kept: Numbers of units that are kept, ascending, at least `least` and below the size.
        values: Non-increasing, shape [points].
        shape: Any curve, shape [size + 1].
        least: The least number that can be kept.
        tangent: Whether the ratio tends to 1 where few units go, as it does for a shape that is exact to second order.

    Returns:
        Shape [size + 1], non-increasing: infinite below `least`, 0 at the size.
    """
    size = len(shape) - 1
    share = 1 - np.arange(size + 1) / size
    guide = non_increasing(shape)
    # A trace of a quadratic: where the shape says nothing, the curve still rises from one point to the next.
    guide = guide + _TRACE * max(float(guide[least]), np.finfo(float).tiny / _TRACE**2) * share**2
    places, ratios = share[kept], values / guide[kept]
    if tangent:
        places, ratios = np.append(places, 0.0), np.append(ratios, 1.0)
    ratio = _between(share, places, ratios)
    curve = np.where(np.isinf(ratio), np.inf, guide * ratio)
    bounds = np.searchsorted(kept, np.arange(size + 1))
    curve = np.minimum(curve, np.append(np.inf, values)[bounds])  # at most the point below
    curve[kept] = values
    curve[size] = 0.0
    curve = np.maximum.accumulate(curve[::-1])[::-1]
    curve[:least] = np.inf
    return curve


def _between(at: Curve, points: Curve, values: Curve) -> Curve:
    """Values at places, geometric between points of descending place; linear from 0, and infinite next to infinity."""
    places, known = points[::-1], values[::-1]
    finite = np.where(np.isinf(known), np.finfo(float).max, known)
    right = np.clip(np.searchsorted(places, at), 1, max(1, len(places) - 1))
    if len(places) == 1:
        return np.full(len(at), known[0])
    left = right - 1
    weight = np.clip((at - places[left]) / (places[right] - places[left]), 0, 1)
    low, high = finite[left], finite[right]
    positive = (low > 0) & (high > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = np.exp((1 - weight) * np.log(low) + weight * np.log(high))
    result: Curve = np.where(positive, geometric, (1 - weight) * low + weight * high)
    touched = (np.isinf(known[left]) & (weight < 1)) | (np.isinf(known[right]) & (weight > 0))
    return np.where(touched, np.inf, result)
