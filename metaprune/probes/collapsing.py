"""Layer collapse: groups that a plan all but removes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune.api import Pruned
from metaprune.graphs.errors import PlanError
from metaprune.graphs.incision import alive_units
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.structure import refs


@dataclasses.dataclass(frozen=True)
class Remainder:
    """What a plan leaves of a group.

    Attributes:
        group: Its name.
        kind: Its kind.
        size: Its number of units.
        kept: Units that stay.
        fraction: Their share.
        thin: Whether the share is below the report's threshold.
        single: Whether one unit alone is left of several.
    """

    group: str
    kind: str
    size: int
    kept: int
    fraction: float
    thin: bool
    single: bool


@dataclasses.dataclass(frozen=True)
class Collapse:
    """Where a plan leaves hardly anything.

    Attributes:
        threshold: Groups that keep a smaller share are thin.
        remainders: One for each prunable group.
        throttled: Whether every path from the inputs to the outputs passes through an axis with one position left: no
            shortcut leads around all of them.
    """

    threshold: float
    remainders: tuple[Remainder, ...]
    throttled: bool

    @property
    def narrowest(self) -> Remainder | None:
        """The group that keeps the smallest share; None without prunable groups."""
        return min(self.remainders, key=lambda r: r.fraction, default=None)

    @property
    def collapsed(self) -> tuple[Remainder, ...]:
        """The groups that are thin or down to a single unit."""
        return tuple(r for r in self.remainders if r.thin or r.single)

    def rows(self) -> list[dict[str, Any]]:
        """One row per prunable group."""
        return [dataclasses.asdict(remainder) for remainder in self.remainders]


def collapse(graph: Graph, plan: Plan | Pruned, threshold: float = 0.1) -> Collapse:
    """Looks for groups that a plan all but removes: layer collapse, Tanaka et al., SynFlow (NeurIPS 2020).

    Args:
        graph: The network before the cut.
        plan: What stays, or a network pruned by it.
        threshold: Groups that keep a smaller share of their units are thin.

    Raises:
        PlanError: The plan is of another network, or illegal.
    """
    plan = plan.plan if isinstance(plan, Pruned) else plan
    if plan.graph and plan.graph != graph.fingerprint:
        raise PlanError("the plan was made for another network: its axis table differs")
    remainders = []
    for group in graph.groups:
        if not group.pinned:
            kept = len(plan.keep.get(group.name, range(group.size)))
            share = kept / group.size
            remainders.append(
                Remainder(group.name, group.kind, group.size, kept, share, share < threshold, kept == 1 < group.size)
            )
    return Collapse(threshold, tuple(remainders), _throttled(graph, plan))


def _throttled(graph: Graph, plan: Plan) -> bool:
    """Whether removing all values with an axis cut down to one position separates the inputs from the outputs."""
    import networkx as nx

    alive = alive_units(graph, plan.keep)
    view = graph.networkx()
    narrow = [name for name in view if _narrow(graph, name, alive)]
    inputs = [node.name for node in graph.nodes.values() if node.op == "input"]
    outputs = list(refs(graph.signature.output))

    def connected() -> bool:
        return any(i in view and o in view and nx.has_path(view, i, o) for i in inputs for o in outputs)

    if not narrow or not connected():
        return False
    view.remove_nodes_from(narrow)
    return not connected()


def _narrow(graph: Graph, name: str, alive: NDArray[np.bool_]) -> bool:
    """Whether an axis of one of a node's values has a single position left of several."""
    for axes in graph.coupling.values(graph.nodes[name]):
        for axis in axes:
            stays = np.ones(axis.size, dtype=bool)
            for units in graph.coupling.units(axis):
                stays &= (units < 0) | alive[units.clip(min=0)]
            if stays.sum() == 1 < axis.size:
                return True
    return False
