"""Local search by exchange: one group gives units up, another takes what the budget then allows.

For losses that can be asked for thousands of allocations at once, such as those of a fitted surrogate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metaprune.search.problem import Counts, Kept, Problem

_MOVES = 256
_ROUNDS = 60
_FAILURES = 2  # rounds in a row without a better allocation, where not all moves were looked at


def exchanged(problem: Problem, losses: Callable[[Kept], Counts], start: Kept) -> tuple[Kept, float]:
    """The allocation that no exchange that was looked at makes better, and its loss.

    Args:
        problem: The problem; what is kept never falls below its `minimum`.
        losses: Of allocations, shape [allocations, free].
        start: An allocation within the budget, shape [free].

    Returns:
        An allocation within the budget that is no worse than the start, shape [free], and its loss.
    """
    draw = np.random.default_rng(problem.seed)
    best, loss, failures = start.copy(), float(losses(start[None])[0]), 0
    for _ in range(_ROUNDS):
        moves, every = _moves(problem, best, draw)
        if not len(moves):
            break
        found = losses(moves)
        chosen = int(np.argmin(found))
        if found[chosen] < loss:
            best, loss, failures = moves[chosen], float(found[chosen]), 0
            continue
        failures += 1
        if every or failures == _FAILURES:
            break
    return best, loss


def _moves(problem: Problem, kept: Kept, draw: np.random.Generator) -> tuple[Kept, bool]:
    """Allocations one exchange away, shape [moves, free], and whether these are all there are."""
    groups = np.arange(len(kept))
    steps = 2 ** np.arange(int(np.log2(max(2, int((problem.sizes // problem.step).max())))))
    giver, taker, given = (x.ravel() for x in np.meshgrid(groups, groups, [0, *steps.tolist()], indexing="ij"))
    apart = (giver != taker) & ((given > 0) | (giver == (taker + 1) % len(kept)))  # to take alone needs no giver
    lower = (kept[giver] - given * problem.step[giver]) // problem.step[giver] * problem.step[giver]
    lower = np.where(given > 0, lower, kept[giver])
    possible = np.flatnonzero(apart & (lower >= problem.minimum[giver]) & (kept[taker] < problem.sizes[taker]))
    every = len(possible) <= _MOVES
    if not every:
        possible = draw.choice(possible, _MOVES, replace=False)
    giver, taker, lower = giver[possible], taker[possible], lower[possible]
    moves = np.tile(kept, (len(possible), 1))
    moves[np.arange(len(possible)), giver] = lower
    filled = _filled(problem, moves, taker)
    return np.unique(filled[(filled != kept).any(axis=1)], axis=0), every


def _filled(problem: Problem, moves: Kept, taker: Kept) -> Kept:
    """Each allocation with as much of one of its groups as the budget allows."""
    rows = np.arange(len(moves))
    low, high = moves[rows, taker], problem.sizes[taker]
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = problem.budget.excess(problem.costs, problem.full(_with(problem, moves, taker, middle))) <= 1
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return _with(problem, moves, taker, low)


def _with(problem: Problem, moves: Kept, taker: Kept, counts: Kept) -> Kept:
    """Allocations with one group's count set, to the step below."""
    rows = np.arange(len(moves))
    step, size = problem.step[taker], problem.sizes[taker]
    found = moves.copy()
    found[rows, taker] = np.where(counts >= size, size, np.maximum(counts // step * step, moves[rows, taker]))
    return found
