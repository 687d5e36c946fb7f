"""Allocations between uniform and another one, for those who can measure which is best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metaprune.search.problem import Kept, Problem, proportional


def blends(problem: Problem, other: Kept, shares: Sequence[float]) -> list[Kept]:
    """Allocations whose kept fractions are geometric means of equal ones and of another allocation's.

    Args:
        problem: The problem.
        other: An allocation within the budget, shape [free]; it stands for share 1.
        shares: How much of the other allocation; 0 is uniform.

    Returns:
        The allocations in the order of `shares`, each scaled up to the budget.
    """
    weights = np.maximum(other, 1e-3) / problem.sizes
    return [other if share == 1 else proportional(problem, weights**share) for share in shares]
