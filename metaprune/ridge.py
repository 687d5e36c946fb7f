"""Ridge regression from streamed second moments, for many outputs and several groups of columns at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Moments:
    """Sums over rows, float64, with a column of ones behind the columns of each group.

    Attributes:
        gram: Columns by columns, shape [groups, width + 1, width + 1].
        cross: Columns by wishes, shape [groups, width + 1, outputs].
        energy: Squared wishes, shape [groups, outputs].
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @staticmethod
    def zeros(groups: int, width: int, outputs: int, device: torch.device | None = None) -> Moments:
        """No rows yet."""
        wide = {"dtype": torch.float64, "device": device}
        return Moments(
            torch.zeros(groups, width + 1, width + 1, **wide),  # type: ignore[arg-type]
            torch.zeros(groups, width + 1, outputs, **wide),  # type: ignore[arg-type]
            torch.zeros(groups, outputs, **wide),  # type: ignore[arg-type]
        )

    def add(self, columns: Tensor, wishes: Tensor) -> None:
        """Takes in rows: columns of shape [groups, rows, width], wishes of shape [groups, rows, outputs]."""
        columns = torch.cat([columns, columns.new_ones(*columns.shape[:2], 1)], dim=2)
        self.gram += columns.transpose(1, 2) @ columns
        self.cross += columns.transpose(1, 2) @ wishes
        self.energy += wishes.double().square().sum(1)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    @property
    def rows(self) -> float:
        """Number of rows taken in."""
        return float(self.gram[0, -1, -1])

    def centred(self) -> tuple[Tensor, Tensor]:
        """Sums of products of deviations from the mean: columns by columns and columns by wishes."""
        mean = self.gram[:, :-1, -1:] / self.rows  # [groups, width, 1]
        gram = self.gram[:, :-1, :-1] - mean @ self.gram[:, -1:, :-1]
        return gram, self.cross[:, :-1] - mean @ self.cross[:, -1:]

    def intercept(self, matrix: Tensor) -> Tensor:
        """The best bias of a matrix [groups, width, outputs], shape [groups, outputs]."""
        return (self.cross[:, -1] - (self.gram[:, -1:, :-1] @ matrix)[:, 0]) / self.rows

    def error(self, matrix: Tensor, bias: Tensor) -> float:
        """Sum of squared errors of `columns @ matrix + bias` over all rows, groups and outputs."""
        both = torch.cat([matrix, bias[:, None]], dim=1)  # [groups, width + 1, outputs]
        explained = (both * (self.gram @ both - 2 * self.cross)).sum()
        return float(self.energy.sum() + explained)


def ridge(moments: Moments, prior: Tensor, strength: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """Minimises squared error plus `strength` times the mean column energy times the squared distance to `prior`.

    Args:
        moments: The rows.
        prior: Matrix that the solution is drawn to, shape [groups, width, outputs], float64.
        strength: At least 0; 0 is plain least squares.
        intercept: Whether a bias is fitted; it is never drawn anywhere.

    Returns:
        The matrix, and the bias of shape [groups, outputs], zero without an intercept.
    """
    gram, cross = moments.centred() if intercept else (moments.gram[:, :-1, :-1], moments.cross[:, :-1])
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    left = gram + torch.diag_embed((strength * mean)[:, None].expand(-1, gram.shape[1]))
    matrix = prior + _solved(left, cross - gram @ prior)
    bias = moments.intercept(matrix) if intercept else torch.zeros_like(moments.energy)
    return matrix, bias


def fitted(
    train: Moments, held_out: Moments, prior: Tensor, intercept: bool, strengths: Sequence[float] = RIDGES
) -> tuple[Tensor, Tensor]:
    """Ridge regression of all rows, at the strength that does best on the rows held out of a first fit.

    Staying at the prior, which is an infinite strength, is one of the choices. A single strength is taken as it is.

    Returns:
        The matrix, and the bias of shape [groups, outputs], zero without an intercept.
    """
    if len(strengths) == 1:
        return ridge(train + held_out, prior, strengths[0], intercept)
    best, strength = held_out.error(prior, _bias(train, prior, intercept)), float("inf")
    for candidate in strengths:
        error = held_out.error(*ridge(train, prior, candidate, intercept))
        if error < best:
            best, strength = error, candidate
    moments = train + held_out
    if strength == float("inf"):
        return prior, _bias(moments, prior, intercept)
    return ridge(moments, prior, strength, intercept)


def _bias(moments: Moments, matrix: Tensor, intercept: bool) -> Tensor:
    return moments.intercept(matrix) if intercept else torch.zeros_like(moments.energy)


def _solved(left: Tensor, right: Tensor) -> Tensor:
    """Solution of a symmetric positive semi-definite system; by eigenvalues where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(left)
    if not bool(failed.any()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(left, hermitian=True)
    return inverse @ right
