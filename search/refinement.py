"""Few measurements, well placed: a predicted loss is corrected by what was measured, and its best allocation is next.

What a surrogate that was fitted elsewhere gets wrong about one network is smooth: an offset, a trend for each group,
and a part that changes slowly with the kept fractions. So the logarithm of measured over predicted loss is taken as a
Gaussian process over the logarithms of kept fractions (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, equations 2.25 and 2.26), and allocations are sought that are best by the corrected loss or could be best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from metaprune.search.exchange import exchanged
from metaprune.search.problem import Counts, Kept, Problem

ROUNDS = 4
_STARTS = 2  # the best so far, from which the next are sought
_HOPES = (0.0, 1.0)  # standard deviations by which a loss may turn out less than expected
_OFFSET, _TREND, _LOCAL, _NOISE = 1.0, 0.25, 0.25, 0.02
"""Variances, of logarithms of losses; the local one is the least that is taken."""
_NEAR = 1e-3  # least square of the length over which the local part changes

Losses: TypeAlias = Callable[[Kept], Counts]
Counted: TypeAlias = tuple[int, ...]
"""Kept counts of the free groups."""


def refine(
    problem: Problem,
    predicted: Losses,
    measured: Losses,
    known: Mapping[Counted, float],
    rounds: int = ROUNDS,
) -> dict[Counted, float]:
    """Losses of further allocations within the budget, by their kept counts, in the order in which they were measured.

    In each round exchanges between groups are made from each of the best allocations so far until the corrected
    prediction falls no more, once as expected and once with hope; what was measured before is passed by.

    Args:
        problem: The problem; what is kept never falls below its `minimum`.
        predicted: Losses that can be asked for thousands of allocations, shape [allocations, free]; above 0.
        measured: The same, measured, infinite for an allocation that can not be.
        known: Losses that were measured before, by kept counts.
        rounds: At most so many.
    """
    every = dict(known)
    for _ in range(rounds):
        found = {kept: loss for kept, loss in every.items() if 0 < loss < np.inf}
        if not found:
            break
        error = Error.of(problem, found, predicted)
        starts = sorted(found, key=lambda kept: found[kept])[:_STARTS]
        ahead = _next(problem, predicted, error, starts, every)
        if not ahead:
            break
        every |= dict(zip(ahead, measured(np.array(ahead, dtype=np.int64)).tolist(), strict=True))
    return {kept: loss for kept, loss in every.items() if kept not in known}


def _next(
    problem: Problem, predicted: Losses, error: Error, starts: Sequence[Counted], known: Mapping[Counted, float]
) -> list[Counted]:
    """Allocations that are worth a measurement; none of them is known, or there twice."""
    passed = dict.fromkeys(known)
    for start, hope in product(starts, _HOPES):

        def corrected(kept: Kept, hope: float = hope) -> Counts:
            mean, deviation = error(kept)
            new = np.array([tuple(own) not in passed for own in kept.tolist()])
            result: Counts = np.where(new, _logarithms(predicted(kept)) + mean - hope * deviation, np.inf)
            return result

        end, loss = exchanged(problem, corrected, np.array(start, dtype=np.int64))
        if loss < np.inf:
            passed[tuple(end.tolist())] = None
    return [kept for kept in passed if kept not in known]


class Error:
    """The logarithm of measured over predicted loss as a Gaussian process.

    Args:
        sizes: Of the groups, shape [groups].
        kept: Allocations that were measured, shape [allocations, groups].
        values: The logarithms there, shape [allocations].
    """

    def __init__(self, sizes: Kept, kept: Kept, values: NDArray[np.float64]) -> None:
        self._sizes = sizes
        self._places = self._fractions(kept)
        squares = self._squares(self._places)
        apart = squares[squares > 0]
        self._length = max(float(np.median(apart)) if len(apart) else 1.0, _NEAR)
        self._local = max(_LOCAL, float(values.var()))
        self._inverse = np.linalg.inv(self._covariance(self._places) + _NOISE * np.eye(len(kept)))
        self._weights = self._inverse @ values

    @staticmethod
    def of(problem: Problem, found: Mapping[Counted, float], predicted: Losses) -> Error:
        """The error of a prediction, from losses that were measured."""
        kept = np.array(list(found), dtype=np.int64)
        return Error(problem.sizes, kept, _logarithms(np.array(list(found.values()))) - _logarithms(predicted(kept)))

    def __call__(self, kept: Kept) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation for allocations [allocations, groups], shape [allocations] each."""
        places = self._fractions(kept)
        near = self._covariance(places)
        alone = _OFFSET + _TREND * (places**2).mean(1) + self._local
        variance = alone - ((near @ self._inverse) * near).sum(1)
        return near @ self._weights, np.sqrt(np.maximum(variance, 0.0))

    def _fractions(self, kept: Kept) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.log(np.maximum(kept, 1) / self._sizes)
        return result

    def _squares(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean squared distances to the measured places, shape [places, measured]."""
        result: NDArray[np.float64] = ((places[:, None] - self._places[None]) ** 2).mean(2)
        return result

    def _covariance(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Covariance with the measured places, shape [places, measured]."""
        trend = places @ self._places.T / places.shape[1]
        local = np.exp(-self._squares(places) / (2 * self._length))
        result: NDArray[np.float64] = _OFFSET + _TREND * trend + self._local * local
        return result


def _logarithms(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(np.maximum(losses, np.finfo(np.float64).tiny))
    return result
