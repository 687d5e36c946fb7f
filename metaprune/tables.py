"""Tables of sensitivity curves: the cheap second-order curves, measurements where they pay, and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from metaprune.calibration import Leaves
from metaprune.curvature import Columns
from metaprune.distances import WORST
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.masking import Change, measure, silenced
from metaprune.monotone import along, non_increasing, through
from metaprune.quadratic import quadratic_curves
from metaprune.refits import refits
from metaprune.statistics import open_gates

MEASURED, ONE_PASS, ANCHORED = "measured", "one_pass", "anchored"
LEVELS = {MEASURED: 16, ANCHORED: 2}
"""At how many numbers of units a group is measured."""

Orders: TypeAlias = Mapping[str, NDArray[np.int64]]
Curves: TypeAlias = dict[str, NDArray[np.float64]]
Levels: TypeAlias = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Table:
    """Curves of all groups and where they come from; see `metaprune.curves.Sensitivity`.

    Attributes:
        curves: By kind and group, shape [size + 1].
        levels: Numbers of units at which each group was measured.
        points: What was measured there, by kind and group.
        forwards: What it cost, in forward passes of all samples.
    """

    curves: dict[str, Curves]
    levels: Levels = field(default_factory=dict)
    points: dict[str, Curves] = field(default_factory=dict)
    forwards: float = 0.0


def tabulate(
    graph: Graph,
    order: Orders,
    leaves: Sequence[Leaves],
    method: str,
    levels: int | None,
    kinds: Sequence[str],
    layers: Sequence[Columns] | None = None,
    seed: int = 0,
) -> Table:
    """Curves from what a network gives on samples.

    Args:
        graph: The network.
        order: Units of each group that is not pinned, the last to go first, shape [size].
        leaves: The samples, one at a time.
        method: `"measured"`, `"one_pass"` or `"anchored"`; see `metaprune.sensitivity`.
        levels: At how many numbers of units each group is measured; None for the default, and where nothing is.
        kinds: Kinds of distance that the network has.
        layers: Where layers are fitted before they are measured: what `metaprune.refits.consumers` found.
        seed: Of directions.

    Raises:
        MetapruneError: The network gives values that are not finite.
    """
    groups = [graph.group(name) for name in order]
    kept = _levels(groups, method, levels)
    points: dict[str, Curves] = {}
    shapes: dict[str, Curves] = {}
    forwards = 0.0
    if method != MEASURED:
        shapes, spent = quadratic_curves(graph, order, leaves, kinds, seed=seed)
        forwards += spent
    if kept:
        points, spent = _measured(graph, kept, _changes(graph, order, kept, layers or ()), leaves, kinds)
        forwards += spent
    exact = {kind: layers is None and kind != WORST for kind in kinds}  # the worst case is of rough estimates
    curves = {kind: _curves(groups, kept, points.get(kind), shapes.get(kind), exact[kind]) for kind in kinds}
    return Table(curves, kept, points, forwards)


def _levels(groups: Sequence[Group], method: str, count: int | None) -> Levels:
    """The numbers of units at which each group is measured, ascending; none where no unit can go.

    Anchors divide the units that can go evenly, and the last is where all of them are gone.
    """
    if method not in LEVELS:
        return {}
    count = count or LEVELS[method]
    found: Levels = {}
    for group in groups:
        ends = (group.minimum, group.size - 1) if method == MEASURED else (group.minimum, group.size)
        at = np.linspace(*ends, count, endpoint=method == MEASURED).round().astype(np.int64)
        found[group.name] = np.unique(np.minimum(at, group.size - 1)) if ends[0] < group.size else at[:0]
    return found


def _changes(graph: Graph, order: Orders, kept: Levels, layers: Sequence[Columns]) -> list[Change]:
    """One change for each group and level, with the given layers fitted to it."""
    ones = open_gates(graph)
    changes = []
    for name, levels in kept.items():
        fits = list(refits(graph, layers, {name: np.argsort(order[name])}))
        for count in levels.tolist():
            gate = silenced(ones[name], order[name][count:])
            changes.append(Change({name: gate}, {key: value for fit in fits for key, value in fit.at(count).items()}))
    return changes


def _measured(
    graph: Graph, kept: Levels, changes: Sequence[Change], leaves: Sequence[Leaves], kinds: Sequence[str]
) -> tuple[dict[str, Curves], float]:
    found = measure(graph, changes, leaves)
    ends = np.cumsum([len(levels) for levels in kept.values()])[:-1]
    points = {kind: dict(zip(kept, np.split(found.total(kind), ends), strict=True)) for kind in kinds}
    return points, found.forwards


def _curves(groups: Sequence[Group], kept: Levels, points: Curves | None, shapes: Curves | None, exact: bool) -> Curves:
    """The curve of each group: through its points, along its shape, or the shape alone.

    A shape may be exact where few units go.
    """
    found: Curves = {}
    for group in groups:
        name, least = group.name, group.minimum
        if points is None:
            assert shapes is not None
            found[name] = non_increasing(shapes[name])
            found[name][:least] = np.inf
        elif not len(kept[name]):
            found[name] = np.append(np.full(group.size, np.inf), 0.0)
        else:
            values = non_increasing(points[name])
            found[name] = (
                through(kept[name], values, group.size, least)
                if shapes is None
                else along(kept[name], values, shapes[name], least, exact)
            )
    return found
