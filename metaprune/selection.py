"""The allocator "measured": several plans are cut and fitted on some samples, and the best on others is taken.

Which allocation and which ranking of units is best differs from network to network. Those that are tried, from uniform
to one that follows a criterion's scores, lay near the best of twenty that were measured on small networks of all forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves, batch_size, joined, leaves_of, outputs_in
from metaprune.distances import distortion
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.surgery import cut
from metaprune.reconstruction import SAMPLES, Fit
from metaprune.search.blends import blends
from metaprune.search.problem import Kept, Problem

Keep: TypeAlias = Mapping[str, tuple[int, ...]]
Scores: TypeAlias = Sequence[NDArray[np.float64]]
_WAY = {"1/3": 1 / 3, "2/3": 2 / 3, "all": 1.0}  # from uniform to the other allocation
_SHARE = 0.4  # of the samples: so many, the first, are fitted on, and so many, the last, judge
_CHUNK = 50
_ROWS, _ROWS_PER_COLUMN, _STRENGTHS = 4096, 4, (1e-2,)  # coarser than a fit that is to be kept


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
    every = [np.sum([_ranks(s) for s in group], axis=0) for group in zip(*scores.values(), strict=True)]
    return [
        *(Choice(f"{way} {allocator}, magnitude", scores["magnitude"], k) for way, k in allocations.items()),
        Choice(f"all {allocator}, {' and '.join(scores)}", every, kept),
    ]


def nearest(
    graph: Graph, groups: Sequence[Group], choices: Sequence[Choice], data: Any, seed: int = 0
) -> tuple[Choice, dict[str, float]]:
    """The choice whose pruned network's outputs are nearest to the dense ones, and the distortion of each by name.

    Args:
        graph: The network.
        groups: Those that may shrink.
        choices: At least one.
        data: Calibration data.
        seed: See `distortions`, as for the errors raised.
    """
    losses = distortions(graph, [choice.keep(groups) for choice in choices], data, seed=seed)
    best = choices[int(np.argmin(losses))]
    return best, {choice.name: loss for choice, loss in zip(choices, losses, strict=True)}


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of each unit in ascending order, equal scores sharing their mean place."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def distortions(graph: Graph, plans: Sequence[Keep], data: Any, samples: int = SAMPLES, seed: int = 0) -> list[float]:
    """How far the outputs of each pruned network, fitted by least squares, are from the dense network's.

    Args:
        graph: The network.
        plans: Kept units by group, of each plan.
        data: Calibration data; labels are not looked at. The first two fifths of the samples are fitted on, and
            on the last two fifths the outputs are compared.
        samples: At most this many.
        seed: Of the fit, and of noise.

    Returns:
        For each plan the mean of `distortion`; infinite for a network that does not run.

    Raises:
        OptionError: Fewer than two samples, data that do not fit the network, or a network on the meta device.
    """
    if any(value.is_meta for value in graph.values.values()):
        raise OptionError("allocator: a network on the meta device can not be measured")
    leaves = leaves_of(graph, data, samples, seed)
    if len(leaves) < 2:
        raise OptionError("data: two samples are needed at least, one to fit on and one to judge by")
    fitted = leaves[: max(1, round(_SHARE * len(leaves)))]
    judged = joined(graph, leaves[-max(1, round(_SHARE * len(leaves))) :], batch_size(graph) or _CHUNK)
    with torch.no_grad():
        wanted = [outputs_in(execute(graph, graph.values, batch)) for batch in judged]
        return [_measured(graph, keep, fitted, judged, wanted, seed) for keep in plans]


def _measured(
    graph: Graph,
    keep: Keep,
    fitted: Sequence[Leaves],
    judged: Sequence[Leaves],
    wanted: Sequence[Sequence[Tensor]],
    seed: int,
) -> float:
    small = cut(graph, keep).graph
    fit = Fit(
        graph,
        small,
        small.values,
        keep,
        fitted,
        seed=seed,
        rows=_ROWS,
        rows_per_column=_ROWS_PER_COLUMN,
        strengths=_STRENGTHS,
    )
    try:
        fit.run()
        found = [outputs_in(execute(small, fit.values, batch)) for batch in judged]
    except RuntimeError:  # the certificate will say what is wrong with this cut
        return float("inf")
    apart = [distortion(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    total = float(torch.cat(apart).mean())
    return total if total == total else float("inf")
