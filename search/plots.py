"""Pictures of fronts, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metaprune.graphs.errors import MetapruneError, OptionError

if TYPE_CHECKING:
    from metaprune.search.front import Front

_WIDTH, _HEIGHT = 5.0, 4.0  # of a panel, in inches


def draw(front: Front, path: str | Path, baselines: Mapping[str, Front]) -> None:
    """One panel for the first objective over each of the others, then the history and the widths, where there are any.

    The dense network is marked where the front's provenance says what it is worth. The history is the hypervolume
    over the evaluations that were spent, those of baselines too; a network's widths are a line through the shares that
    its groups keep, its colour the first objective.

    Args:
        front: The front.
        path: Its ending is the format.
        baselines: Other fronts of the same objectives, by name.

    Raises:
        OptionError: There is but one objective, or a baseline has others.
        MetapruneError: matplotlib is not installed, or the file can not be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetapruneError("plot: matplotlib is missing; pip install 'metaprune[plot]'") from error
    if len(front.objectives) < 2:
        raise OptionError("plot: a front of one objective has nothing to be drawn over")
    for name, other in baselines.items():
        if other.objectives != front.objectives:
            raise OptionError(f"plot: baseline {name} has the objectives {', '.join(other.objectives)}")
    fronts = {"found": front, **baselines}
    shares = _shares(front)
    count = len(front.objectives) - 1 + bool(front.history) + bool(shares)
    figure = Figure(figsize=(_WIDTH * count, _HEIGHT), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for number in range(1, len(front.objectives)):
        _scatter(panels.pop(0), fronts, number)
    if front.history:
        _history(panels.pop(0), fronts)
    if shares:
        _parallel(panels.pop(0), front, shares)
    try:
        figure.savefig(Path(path))
    except (OSError, ValueError) as error:
        raise MetapruneError(f"{path}: can not be written: {error}") from error


def _scatter(panel: Any, fronts: Mapping[str, Front], number: int) -> None:
    """The first objective over another one."""
    front = fronts["found"]
    line = "-" if len(front.objectives) == 2 else ""
    for name, other in fronts.items():
        order = np.argsort(other.values[:, number], kind="stable")
        panel.plot(other.values[order, number], other.values[order, 0], f"o{line}", markersize=4, label=name)
    dense = front.provenance.get("dense", {})
    names = front.objectives[number], front.objectives[0]
    if all(name in dense for name in names):
        panel.plot(*([dense[name]] for name in names), "k*", markersize=10, label="dense")
    panel.set_xlabel(names[0])
    panel.set_ylabel(names[1])
    if len(panel.get_lines()) > 1:
        panel.legend()


def _history(panel: Any, fronts: Mapping[str, Front]) -> None:
    for name, front in fronts.items():
        spent, volume = front.hypervolume_history().T
        panel.plot(spent, volume, drawstyle="steps-post", label=name)
    panel.set_xlabel("evaluations")
    panel.set_ylabel("hypervolume")
    if len(fronts) > 1:
        panel.legend()


def _parallel(panel: Any, front: Front, shares: Mapping[str, list[float]]) -> None:
    """Lines through the shares that groups keep, one for each network."""
    first = front.values[:, 0]
    span = max(float(np.ptp(first)), 1e-30)
    from matplotlib import colormaps

    for number, value in enumerate(first.tolist()):
        colour = colormaps["viridis"]((value - float(first.min())) / span)
        panel.plot(range(len(shares)), [column[number] for column in shares.values()], color=colour, linewidth=1)
    panel.set_xticks(range(len(shares)), list(shares), rotation=90, fontsize=6)
    panel.set_ylabel("kept share")


def _shares(front: Front) -> dict[str, list[float]]:
    """For every group that shrinks somewhere, the share that each point keeps of the most that any keeps.

    A plan names the units that stay; how many there were is the greatest number that it names, plus one, at least.
    """
    groups: dict[str, int] = {}
    for point in front.points:
        for name, units in point.plan.keep.items():
            groups[name] = max(groups.get(name, 1), max(units) + 1)
    return {
        name: [len(point.plan.keep[name]) / size if name in point.plan.keep else 1.0 for point in front.points]
        for name, size in groups.items()
    }
