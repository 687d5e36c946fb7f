"""Whether what a search looks at ranks networks as they turn out in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError


@dataclasses.dataclass(frozen=True)
class RankFidelity:
    """How well a proxy ranks configurations.

    Attributes:
        tau: Kendall's tau-b of the proxy with the final results; with two results per configuration, the mean of both.
        low: Lower end of the bootstrap interval of `tau`.
        high: Its upper end.
        ceiling: Tau-b of the two results with one another: what a perfect proxy could reach. None for one result.
        ceiling_low: Lower end of the bootstrap interval of `ceiling`.
        ceiling_high: Its upper end.
        count: Number of configurations.
    """

    tau: float
    low: float
    high: float
    ceiling: float | None
    ceiling_low: float | None
    ceiling_high: float | None
    count: int

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        return [dataclasses.asdict(self)]


def rank_fidelity(
    proxy: Sequence[float],
    final_a: Sequence[float],
    final_b: Sequence[float] | None = None,
    confidence: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> RankFidelity:
    """Kendall's tau-b between what a search looks at and what comes out after recovery, with its noise ceiling.

    Two recoveries of one configuration with different seeds do not agree either; their own tau bounds what any proxy
    can show, so two proxies whose intervals both reach the ceiling can not be told apart. Intervals are percentiles
    over configurations drawn with replacement (Efron 1979); draws in which a variable is constant have no tau and
    are left out.

    Args:
        proxy: One number per configuration, more is better.
        final_a: The recovered score of each, more is better.
        final_b: The same after recovery with another seed.
        confidence: Of the intervals, between 0 and 1.
        resamples: Draws of the bootstrap.
        seed: Of the draws.

    Raises:
        OptionError: Fewer than three configurations, different lengths, numbers that are not finite or all equal.
    """
    if not 0 < confidence < 1:
        raise OptionError(f"confidence: a number between 0 and 1 is needed, not {confidence}")
    if resamples < 1:
        raise OptionError(f"resamples: at least one is needed, not {resamples}")
    finals = [_ranked("final_a", final_a), *([] if final_b is None else [_ranked("final_b", final_b)])]
    table = [_ranked("proxy", proxy), *finals]
    if len({len(column) for column in table}) > 1:
        raise OptionError(f"proxy, final_a, final_b: equal lengths are needed, not {[len(c) for c in table]}")
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(table[0]), size=(resamples, len(table[0])))
    taus = np.array([_taus([column[draw] for column in table]) for draw in draws])  # (resamples, 1 or 2)
    ends = np.nanquantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T.tolist()
    tau, *ceiling = _taus(table)
    low, high = ends[0]
    ceiling_low, ceiling_high = ends[1] if ceiling else (None, None)
    return RankFidelity(tau, low, high, ceiling[0] if ceiling else None, ceiling_low, ceiling_high, len(proxy))


def _ranked(option: str, values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or len(found) < 3:
        raise OptionError(f"{option}: one number for each of at least three configurations is needed")
    if not np.isfinite(found).all():
        raise OptionError(f"{option}: a value is not finite")
    if (found == found[0]).all():
        raise OptionError(f"{option}: all values are equal, they rank nothing")
    return found


def _taus(table: Sequence[NDArray[np.float64]]) -> list[float]:
    """Tau-b of the proxy (first) with the results, and of two results with one another; NaN for a constant."""
    from scipy.stats import kendalltau

    proxy, *finals = table
    tau = float(np.mean([kendalltau(proxy, final).statistic for final in finals]))
    return [tau, float(kendalltau(*finals).statistic)] if len(finals) == 2 else [tau]
