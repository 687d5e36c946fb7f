"""What a criterion makes of every unit, and what it costs a group to lose the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune import criteria
from metaprune.curves import Sensitivity
from metaprune.graphs.errors import OptionError
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.statistics import collect, collect_second_moments


@dataclass(frozen=True, eq=False)
class Scores:
    """What a criterion makes of the units of all groups that are not pinned.

    Attributes:
        criterion: Its name.
        units: Scores by group, shape [size] each.
        samples: Number of samples that were looked at.
        curves: By group, what keeping the k best units costs, shape [size + 1]; None where single scores add up.
        about: How the curves were found.
    """

    criterion: str
    units: Mapping[str, NDArray[np.float64]]
    samples: int
    curves: Mapping[str, NDArray[np.float64]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(curves: Sensitivity) -> Scores:
        """The order of the units, and the curves of the first kind of distance, as scores."""
        units = {name: _places(order) for name, order in curves.order.items()}
        about = {key: curves.provenance.get(key) for key in ("method", "compensate")}
        about |= {"kind": curves.kinds[0], "forwards": curves.forwards}
        return Scores(str(curves.provenance.get("criterion")), units, curves.samples, curves.of(), about)


def score(graph: Graph, criterion: str | None = None, data: Any = None, seed: int = 0) -> Scores:
    """Scores for plans at several budgets; arguments and errors are those of `unit_scores` and `metaprune.plan`."""
    name = default_criterion(criterion, data)
    free = [group for group in graph.groups if not group.pinned]
    values, samples = unit_scores(graph, free, name, data, seed)
    return Scores(name, {group.name: value for group, value in zip(free, values, strict=True)}, samples)


def unit_scores(
    graph: Graph, groups: Sequence[Group], criterion: str, data: Any = None, seed: int = 0
) -> tuple[list[NDArray[np.float64]], int]:
    """What a criterion makes of every unit.

    Args:
        graph: The network.
        groups: Those of its groups that are scored.
        criterion: Name in `metaprune.criteria.CRITERIA`.
        data: Calibration data, for a criterion that needs them.
        seed: Of criteria that draw.

    Returns:
        The scores of each group's units, shape [size] each, and the number of samples that were looked at.

    Raises:
        OptionError: An unknown criterion, or data where there should be none, or none where there should be.
        GraphError: A tensor of the network is not finite.
    """
    row = criteria.find(criterion)
    if row.data and data is None:
        raise OptionError(f"data: criterion {criterion!r} needs calibration data")
    if data is not None and not row.data:
        raise OptionError(f"data: criterion {criterion!r} does not use data")
    graph.check_finite()
    weights = criteria.Weights({n: graph.values[n] for n, info in graph.tensors.items() if info.kind == "parameter"})
    statistics = None
    if row.data and row.columns:
        statistics = collect_second_moments(graph, data, seed=seed)
    elif row.data:
        statistics = collect(graph, data, seed=seed, per_sample=row.per_sample)
    evidence = criteria.Evidence(weights, statistics, seed)
    scores = [row.function(group, evidence).double().numpy() for group in groups]
    return scores, statistics.samples if statistics else 0


def default_criterion(criterion: str | None, data: Any) -> str:
    """The criterion that is named, or the default: one that looks at data where there are any."""
    if criterion is not None:
        return criterion
    return "magnitude" if data is None else "fisher_block"


def _places(order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores that put units in a given order, the best first."""
    places = np.empty(len(order))
    places[order] = np.arange(len(order), 0, -1)
    return places
