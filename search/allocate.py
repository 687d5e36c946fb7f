"""Allocators: how many units each group keeps under a budget. One function each, of the same signature."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import OptionError
from metaprune.search.baselines import erk, lamp, precrop, random
from metaprune.search.cost_aware import cost_aware
from metaprune.search.pqi import sap
from metaprune.search.problem import FLOOR, Problem, allocator, filled, proportional


def uniform(problem: Problem) -> NDArray[np.int64]:
    """The same kept fraction for every group, the largest that the budget allows."""
    return proportional(problem, np.ones(len(problem.free)))


@allocator
def global_(problem: Problem) -> NDArray[np.int64]:
    """Units leave in the order of their scores over all groups, down to a floor in each, until the budget is met.

    The floor is budget-neutral: a tenth of each group's units (`FLOOR`) where the budget allows it, else a half of
    that, a quarter and so on. It moves units between groups and never the cost; without it, groups of small scores
    would be emptied, and a layer that keeps next to nothing takes the network with it.
    """
    floor = FLOOR
    while True:
        least = np.maximum(problem.minimum, np.ceil(floor * problem.sizes).astype(np.int64))
        if problem.excess(problem.rounded(least.astype(float))) <= 1 or floor < 1e-3:
            break
        floor /= 2
    if floor < 1e-3:
        least = problem.minimum
    group = np.concatenate([np.full(len(s) - k, i) for i, (s, k) in enumerate(zip(problem.scores, least, strict=True))])
    value = np.concatenate(
        [np.sort(s, kind="stable")[: len(s) - k] for s, k in zip(problem.scores, least, strict=True)]
    )
    order = group[np.lexsort((group, value))]

    def after(count: int) -> NDArray[np.int64]:
        gone = np.bincount(order[:count], minlength=len(problem.free))
        return problem.rounded((problem.sizes - gone).astype(float))

    low, high = 0, len(order)  # after(high) is within budget, after(low - 1) is not
    while low < high:
        middle = (low + high) // 2
        if problem.excess(after(middle)) <= 1:
            high = middle
        else:
            low = middle + 1
    last = order[max(0, low - 1) :: -1] if low else order[:0]
    return filled(problem, after(low), order=np.array(list(dict.fromkeys(last.tolist())), dtype=np.int64))


def _later(module: str, name: str) -> Callable[[Problem], NDArray[np.int64]]:
    """An allocator whose module, and the solvers behind it, are imported when it is first asked."""

    def allocate(problem: Problem) -> NDArray[np.int64]:
        found: Callable[[Problem], NDArray[np.int64]] = getattr(import_module(f"metaprune.search.{module}"), name)
        return found(problem)

    return allocate


ALLOCATORS: dict[str, Callable[[Problem], NDArray[np.int64]]] = {
    "uniform": uniform,
    "global": global_,
    "cost": cost_aware,
    "sap": sap,
    "erk": erk,
    "lamp": lamp,
    "precrop": precrop,
    "random": random,
    "dp": _later("layer_adaptive", "dp"),
    "milp": _later("layer_adaptive", "milp"),
    "lagrange": _later("layer_adaptive", "relaxed"),
    "spdy": _later("spdy", "spdy"),
    "refined": _later("refined", "refined"),
}


MEASURED = "measured"
"""The allocator that is no function of the scores alone; see `metaprune.selection`."""


def find(name: str) -> Callable[[Problem], NDArray[np.int64]]:
    """The allocator called `name`; raises `OptionError`."""
    if not isinstance(name, str) or name not in ALLOCATORS:
        raise OptionError(f"allocator: {name!r} is none of {', '.join(sorted([*ALLOCATORS, MEASURED]))}")
    return ALLOCATORS[name]
