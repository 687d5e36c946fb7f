"""Sparsity-informed adaptive pruning (SAP): groups lose units in the measure in which their scores are uneven.

Diao, Wang, Zhang, Yang, Ding and Tarokh, Pruning Deep Neural Networks from a Sparsity Perspective (ICLR 2023), arXiv
2302.05601.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError
from metaprune.search.problem import Kept, Problem, allocator, least_kept, within_budget

P, Q = 0.5, 1.0  # the exponents of the paper's experiments
ETA = 1e-3  # share of the p-th powers that may lie outside the units that are needed; positive, so every group gives


def pq_index(scores: NDArray[np.floating[Any]], p: float = P, q: float = Q) -> float:
    """How unevenly scores are spread: `1 - d^(1/q - 1/p) * |s|_p / |s|_q`, definition 1 of the paper.

    It is 0 when all scores are equal and `1 - d^(1/q - 1/p)` when all but one are 0; a factor on all scores does not
    change it. Scores of which none is anything but 0 are equal.

    Args:
        scores: Shape [d], d at least 1; only absolute values count.
        p: The lower exponent, above 0.
        q: The higher exponent.

    Raises:
        OptionError: Not 0 < p < q, or no scores.
    """
    if not 0 < p < q:
        raise OptionError(f"p: exponents 0 < p < q are needed, not p={p} and q={q}")
    sizes = np.abs(np.asarray(scores, dtype=np.float64))
    if not sizes.size:
        raise OptionError("scores: there are none")
    largest = sizes.max()
    if largest == 0:
        return 0.0
    lower, higher = (float(np.mean((sizes / largest) ** power)) ** (1 / power) for power in (p, q))
    return float(max(0.0, 1.0 - lower / higher))  # of the power means d^(-1/p) * |s|_p and d^(-1/q) * |s|_q


def needed(scores: NDArray[np.floating[Any]], p: float = P, q: float = Q, eta: float = ETA) -> float:
    """Least number of units that can hold all but a share of the scores, from the PQ index I alone, as a real number.

    When the p-th powers of the other scores sum to at most `eta` times those of the r largest, Hoelder's inequality
    over those r gives `|s|_p^p <= (1 + eta) * r^(1 - p/q) * |s|_q^p`, that is

        r >= d * (1 + eta)^(-q / (q - p)) * (1 - I)^(p * q / (q - p)),

    theorem 1 of the paper. It is d where all scores are 0.

    Args:
        scores: Shape [d].
        p: The lower exponent.
        q: The higher exponent.
        eta: That share, 0 or more.
    """
    if eta < 0:
        raise OptionError(f"eta: a share of 0 or more is needed, not {eta}")
    index = pq_index(scores, p, q)
    return float(len(scores) * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p)))


@allocator
def sap(problem: Problem) -> Kept:
    """Each group loses the share `min(gamma * (1 - m / d), beta)` of its d units, with one gamma that meets the budget.

    m is the number of units the group needs (see `needed`); beta holds every group above the common floor. The paper
    fixes gamma and prunes as far as that leads; here the budget is given, and gamma follows from it by bisection.
    """
    sizes = problem.sizes
    most = sizes - least_kept(problem)
    demand = np.array([len(s) - needed(s) for s in problem.scores])

    def kept(gamma: float) -> NDArray[np.float64]:
        counts: NDArray[np.float64] = sizes - np.minimum(gamma * demand, most)
        return counts

    return within_budget(problem, kept, within=float((most / demand).max()), beyond=0.0)
