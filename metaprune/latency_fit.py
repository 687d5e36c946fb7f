"""What is fitted to measured times: polynomials of operators, and the correction of their sum.

Both fits are least squares of relative errors with coefficients that are not negative, so that a cost never falls
when units are added and an allocator may trust it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.cost import Costs
from metaprune.graphs.ir import Node
from metaprune.graphs.polynomial import Counts, Polynomial, Size, Term
from metaprune.graphs.rules import lookup

CONTRACTIONS, OTHERS = KINDS = ("contractions", "others")


def kind_of(op: str) -> str:
    """Whether an operator multiplies and sums, or does something else, which an engine may fuse with its neighbours."""
    rule = lookup(op)
    return CONTRACTIONS if rule is not None and rule.macs else OTHERS


def operator_terms(costs: Costs, node: Node, kept: Counts, seconds: Counts) -> list[Term]:
    """The time of one operator as a polynomial in the kept counts.

    It is a sum, with fitted coefficients, of a constant, the operator's multiply-adds, the bytes that it reads and
    those that it writes.

    Args:
        costs: Of the graph.
        node: The operator.
        kept: Kept counts at which it was measured, shape [plans, groups].
        seconds: Its times, shape [plans], positive.
    """
    parts: list[list[Term]] = [[(Size(1.0),)], *costs.operator(node).values()]
    columns = np.stack([Polynomial(part).at(kept) for part in parts], axis=1)  # (plans, parts)
    coefficients = nonnegative(columns, seconds)
    return [
        (Size(coefficient), *term)
        for coefficient, part in zip(coefficients.tolist(), parts, strict=True)
        if coefficient > 0
        for term in part
    ]


@dataclass(frozen=True)
class Correction:
    """From the sum of operators measured alone to the time of the network.

    Attributes:
        intercept: Seconds that do not depend on the operators.
        slopes: Factor of the summed seconds of each kind of operator.
    """

    intercept: float = 0.0
    slopes: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))

    @staticmethod
    def fitted(sums: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> Correction:
        """The correction that fits networks measured end to end.

        Args:
            sums: For each network, the summed seconds of its operators by kind.
            seconds: What each takes end to end.
        """
        target = np.asarray(seconds)
        columns = np.array([[1.0, *(row.get(kind, 0.0) for kind in KINDS)] for row in sums])
        intercept, *slopes = nonnegative(columns, target).tolist()
        return Correction(intercept, dict(zip(KINDS, slopes, strict=True)))

    def total(self, sums: Mapping[str, float]) -> float:
        """Seconds of a network, from the summed seconds of its operators by kind."""
        return self.intercept + sum(self.slopes[kind] * seconds for kind, seconds in sums.items())


def nonnegative(columns: Counts, targets: Counts) -> NDArray[np.float64]:
    """Coefficients, none negative, that make `columns @ coefficients` relatively close to positive targets.

    Shapes:
        columns: (observations, coefficients), not negative.
        targets: (observations,).
    """
    from scipy.optimize import nnls

    relative = columns / targets[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    solution: NDArray[np.float64] = nnls(relative / scale, np.ones(len(targets)))[0] / scale
    return solution
