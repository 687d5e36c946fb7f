"""The allocator "measured": several plans are cut and fitted on some samples, and the best on others is taken.

Which allocation and which ranking of units is best differs from network to network. Those that are tried, from uniform
to one that follows a criterion's scores, lay near the best of twenty that were measured on small networks of all forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.groups import Group
from metaprune.judge import Judge
from metaprune.search.blends import blends
from metaprune.search.problem import Kept, Problem

Scores: TypeAlias = Sequence[NDArray[np.float64]]
CLEARLY = 0.95  # of a loss: one that is less by no more than the rest may be so by chance of the samples
_WAY = {"1/3": 1 / 3, "2/3": 2 / 3, "all": 1.0}  # from uniform to the other allocation


@dataclass(frozen=True)
class Choice:
    """What an allocation keeps of the groups that may shrink.

    Attributes:
        name: What it is called.
        scores: Of each group's units, shape [size] each; the best stay.
        kept: How many stay, shape [groups].
    """

    name: str
    scores: Scores
    kept: Kept

    def keep(self, groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
        """The units that stay by name of the group, for those groups that lose any."""
        found: dict[str, tuple[int, ...]] = {}
        for group, count, values in zip(groups, self.kept.tolist(), self.scores, strict=True):
            if count < group.size:
                best = np.lexsort((np.arange(len(values)), -values))[:count]
                found[group.name] = tuple(sorted(best.tolist()))
        return found


def around(problem: Problem, kept: Kept, allocator: str, scores: Mapping[str, Scores]) -> list[Choice]:
    """Choices on the way from uniform to an allocation, with units ranked by L2 norm, and by all scores together.

    Args:
        problem: The problem.
        kept: The allocation, shape [free].
        allocator: What it is called.
        scores: By criterion, "magnitude" among them.
    """
    allocations = dict(zip(_WAY, blends(problem, kept, list(_WAY.values())), strict=True))
    every = together(list(scores.values()))
    return [
        *(Choice(f"{way} {allocator}, magnitude", scores["magnitude"], k) for way, k in allocations.items()),
        Choice(f"all {allocator}, {' and '.join(scores)}", every, kept),
    ]


def together(scores: Sequence[Scores]) -> list[NDArray[np.float64]]:
    """Scores of units by several criteria at once: the sum of their places, shape [size] for each group."""
    return [np.sum([_ranks(own) for own in group], axis=0) for group in zip(*scores, strict=True)]


def nearest(groups: Sequence[Group], choices: Sequence[Choice], judge: Judge) -> tuple[Choice, dict[str, float]]:
    """The choice whose pruned network's outputs are nearest to the dense ones, and the distortion of each by name.

    Args:
        groups: Those that may shrink.
        choices: At least one.
        judge: Of the network; for the errors raised see `Judge.distortions`.
    """
    losses = judge.distortions([choice.keep(groups) for choice in choices])
    best = choices[int(np.argmin(losses))]
    return best, {choice.name: loss for choice, loss in zip(choices, losses, strict=True)}


def reranked(
    groups: Sequence[Group], choice: Choice, loss: float, criterion: str, by_norm: Scores, judge: Judge
) -> tuple[Choice, dict[str, float]]:
    """The choice, or its counts with units ranked by L2 norm or by both, where that is measured to be clearly better.

    Args:
        groups: Those that may shrink.
        choice: What was found.
        loss: Its distortion.
        criterion: Of its scores.
        by_norm: Scores by L2 norm.
        judge: Of the network.
    """
    both = together([choice.scores, by_norm])
    others = [
        Choice(f"{choice.name}, {name}", scores, choice.kept)
        for name, scores in (("magnitude", by_norm), (f"{criterion} and magnitude", both))
    ]
    other, losses = nearest(groups, others, judge)
    return (other if losses[other.name] < CLEARLY * loss else choice), losses


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of each unit in ascending order, equal scores sharing their mean place."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks
