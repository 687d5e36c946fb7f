"""Block Fisher information of gates and its inverse: what units cost together, and in which order they should leave.

Frantar, Kurtic and Alistarh, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information (NeurIPS 2021,
arXiv 2107.03356, eqs. 1-5), with the gates of a group's units, all 1, in place of weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaprune.graphs.errors import OptionError

DAMPING = 0.1
BLOCK = 512


class InverseFisher:
    """The inverse of F = damping * I + (1/m) * sum_i g_i g_i^T over those units that are still there.

    It is held as I / damping minus a sum of outer products of vectors: adding a gradient subtracts one more, which is
    the recursion of M-FAC, h_i = g_i / damping - sum_{j<i} (h_j^T g_i) / (m + h_j^T g_j) h_j, and so does
    removing a unit (optimal brain surgeon). Every product, every gradient and every removal costs
    O(size * rank), where rank, the number of vectors so far, is at most samples + size; so does the memory.

    Args:
        gradients: Gradients by the gates, one row per sample, shape [samples, size].
        damping: Added to the diagonal, positive.
    """

    def __init__(self, gradients: Tensor, damping: float) -> None:
        if not damping > 0:
            raise OptionError(f"damping: a positive number is needed, not {damping}")
        rows = gradients.double()
        samples, size = rows.shape
        self._damping = damping
        self._vectors = rows.new_empty(samples + size, size)
        self._rank = 0
        self._diagonal = rows.new_full((size,), 1 / damping)
        for row in rows:
            product = self.times(row)
            self._subtract(product, float(samples + row @ product))

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of the inverse, shape [size]; it has no meaning for units that were removed."""
        return self._diagonal

    def times(self, vector: Tensor) -> Tensor:
        """The inverse times a vector, shape [size]."""
        vectors = self._vectors[: self._rank]
        return vector / self._damping - vectors.T @ (vectors @ vector)

    def column(self, unit: int) -> Tensor:
        """One column of the inverse, shape [size]."""
        vectors = self._vectors[: self._rank]
        column = -(vectors.T @ vectors[:, unit])
        column[unit] += 1 / self._damping
        return column

    def remove(self, unit: int) -> Tensor:
        """Takes a unit away: from then on this is the inverse of F without its row and column, zero in their place.

        Returns:
            The unit's column of the inverse before, shape [size].
        """
        column = self.column(unit)
        self._subtract(column, float(column[unit]))
        return column

    def _subtract(self, vector: Tensor, denominator: float) -> None:
        """The inverse minus vector vector^T / denominator."""
        scaled = vector / denominator**0.5
        self._vectors[self._rank] = scaled
        self._rank += 1
        self._diagonal = self._diagonal - scaled.square()


def departures(gradients: Tensor, damping: float) -> tuple[list[int], Tensor]:
    """The order in which units leave, and by how much each departure raises the loss, to second order.

    With gates at 1 and F for the Hessian, the cheapest unit is the one of least w_q^2 / (2 [F^-1]_qq).
    When it has left, the gates w of the others make up for it, w <- w - w_q / [F^-1]_qq F^-1 e_q, its row and column
    leave the inverse, and the next unit is chosen. So of two units that do the same, the second is dear once the first
    has gone. The increases add up to the least loss at which all units that left can be missed:
    1^T ([F^-1]_SS)^-1 1 / 2 for a set S, as optimal brain surgeon has it.

    Args:
        gradients: Gradients by the gates, shape [samples, size].
        damping: Added to the diagonal of F, positive.

    Returns:
        Units in the order of departure, and the increase of each in that order, shape [size], float64. It takes
        O(size * (samples + size)^2) operations.
    """
    inverse = InverseFisher(gradients, damping)
    size = gradients.shape[1]
    gates = torch.ones(size, dtype=torch.float64, device=gradients.device)
    gone = torch.zeros(size, dtype=torch.bool, device=gradients.device)
    order: list[int] = []
    increases = gates.new_empty(size)
    for step in range(size):
        harm = (gates.square() / (2 * inverse.diagonal)).masked_fill(gone, float("inf"))
        unit = int(harm.argmin())
        column = inverse.remove(unit)
        increases[step] = gates[unit].square() / (2 * column[unit])
        gates = gates - gates[unit] / column[unit] * column
        gone[unit] = True
        order.append(unit)
    return order, increases


def marginal_losses(gradients: Tensor, damping: float = DAMPING, block: int = BLOCK) -> Tensor:
    """For every unit what it adds to the loss at its turn to leave: `departures` as scores that allocators can sum.

    An allocator takes units in ascending order and adds their scores up. An increase may be smaller than the one
    before (of two units that cancel out, the second leaves for nothing), so that the increases are not yet such
    scores. Taken are the slopes of the greatest convex function below their sums, which ascend in the order of
    departure and equal the sums wherever it pays to stop. Equal slopes are told apart by the last bit, so that
    sorting gives that order back.

    Args:
        gradients: Gradients by the gates of a group, shape [samples, size].
        damping: Added to the diagonal of the Fisher matrix, relative to its mean.
        block: Units of wider groups are taken in consecutive blocks of at most this size as independent.

    Returns:
        Scores, shape [size], float64; zero for a group without any gradient. It takes
        O(size * (samples + block)^2) operations.

    Raises:
        OptionError: The damping or the block is not positive.
    """
    if block < 1:
        raise OptionError(f"block: at least one unit, not {block}")
    rows = gradients.double()
    scores = rows.new_zeros(rows.shape[1])
    mean = float(rows.square().mean())
    if mean == 0:
        return scores
    for units in torch.split(torch.arange(rows.shape[1]), block):
        order, increases = departures(rows[:, units], damping * mean)
        scores[units[order]] = _ascending(increases)
    return scores


def _ascending(increases: Tensor) -> Tensor:
    """Slopes of the greatest convex minorant of the running sum, made strictly ascending; shape as given.

    Pools of neighbours are merged into their mean until the means ascend.
    """
    pools: list[tuple[float, int]] = []  # mean, members
    for value in increases.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] >= mean:
            before, members = pools.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        pools.append((mean, count))
    slopes: list[float] = []
    for mean, count in pools:
        for _ in range(count):
            slopes.append(max(mean, math.nextafter(slopes[-1], math.inf)) if slopes else mean)
    return increases.new_tensor(slopes)
