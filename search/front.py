"""Fronts: the networks of which none is better than another in everything, each with the plan that makes it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import BudgetInfeasible, LoadError, OptionError, PlanError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.plan import Plan

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """One network of a front.

    Attributes:
        objectives: Values in the order of the front's objectives; less is better.
        plan: What makes the network.
        config: Levels in the space that was searched; empty where there was none.
        info: How it was evaluated: its number, fidelity and cost in forwards.
    """

    objectives: tuple[float, ...]
    plan: Plan
    config: tuple[int, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Front:
    """Points of which none dominates another; make one with `Front.of`.

    Attributes:
        objectives: Names; less is better in all of them.
        points: In ascending order of the objectives; of points with equal objectives the first is held.
        evaluations: Networks that were evaluated to find it.
        forwards: What that cost, as forward passes of one sample through the dense network.
        provenance: Back end, seed and options.
        failed: Of the networks that were evaluated those that do not run or gave a value that is not finite.
        history: When a point entered the front, those that left it again included: the evaluations that were spent by
            then, and its objectives.
    """

    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    evaluations: int = 0
    forwards: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    failed: int = 0
    history: tuple[tuple[float, tuple[float, ...]], ...] = ()

    @staticmethod
    def of(
        objectives: Sequence[str],
        points: Iterable[Point],
        evaluations: int = 0,
        forwards: float = 0.0,
        provenance: Mapping[str, Any] | None = None,
    ) -> Front:
        """The front of any points; those with a value that is not finite are left out.

        Raises:
            OptionError: A point has not as many values as there are objectives.
        """
        names = tuple(objectives)
        if not names or len(set(names)) < len(names):
            raise OptionError(f"objectives: one or more different names are needed, not {list(names)}")
        known = list(points)
        for point in known:
            if len(point.objectives) != len(names):
                raise OptionError(f"objectives: a point has {len(point.objectives)} values for {len(names)} of them")
        finite = [point for point in known if all(map(math.isfinite, point.objectives))]
        stays = nondominated(np.array([point.objectives for point in finite], dtype=float).reshape(-1, len(names)))
        chosen = [finite[i] for i in np.flatnonzero(stays).tolist()]
        ordered = tuple(sorted(chosen, key=lambda point: point.objectives))
        return Front(names, ordered, evaluations, forwards, dict(provenance or {}))

    def __len__(self) -> int:
        return len(self.points)

    @property
    def values(self) -> NDArray[np.float64]:
        """The objectives of all points, shape [points, objectives]."""
        return np.array([point.objectives for point in self.points], dtype=float).reshape(-1, len(self.objectives))

    def hypervolume(self, reference: Sequence[float] | None = None) -> float:
        """Volume of what the front dominates within a reference point, by moocore.

        Args:
            reference: One value for each objective; by default 1 in each, the dense network for kept fractions.

        Raises:
            OptionError: Another number of values, or one that is not finite.
        """
        return _volume(self.values, self._corner(reference))

    def hypervolume_history(self, reference: Sequence[float] | None = None) -> NDArray[np.float64]:
        """The hypervolume after each step of `history`, shape [steps, 2]: evaluations spent, and volume.

        Args:
            reference: See `hypervolume`, also for errors.
        """
        corner = self._corner(reference)
        values = np.array([step for _, step in self.history], dtype=float).reshape(-1, len(corner))
        rows = [(spent, _volume(values[: i + 1], corner)) for i, (spent, _) in enumerate(self.history)]
        return np.array(rows, dtype=float).reshape(-1, 2)

    def _corner(self, reference: Sequence[float] | None) -> NDArray[np.float64]:
        corner = np.ones(len(self.objectives)) if reference is None else np.asarray(reference)
        if corner.shape != (len(self.objectives),) or corner.dtype.kind not in "if" or not np.isfinite(corner).all():
            raise OptionError(f"reference: a finite number for each of {', '.join(self.objectives)} is needed")
        return corner.astype(float)

    def knee(self) -> Point:
        """The point furthest below the plane through the ends of the front, each objective over its range.

        Das, On Characterizing the "Knee" of the Pareto Curve (Structural Optimization 18, 1999). Of two objectives it
        is where one stops being cheap and the other begins to be dear.

        Raises:
            OptionError: The front has no points.
        """
        if not self.points:
            raise OptionError("knee: the front has no points")
        low, high = self.values.min(0), self.values.max(0)
        scaled = (self.values - low) / np.where(high > low, high - low, 1.0)
        return self.points[int(scaled.sum(axis=1).argmin())]

    def best(self, **limits: float) -> Point:
        """The point of least first objective within limits, such as `front.best(macs=0.5)`.

        Args:
            limits: Largest values of objectives, or of costs that the plans reach.

        Raises:
            OptionError: A limit is no number, or on something that the points do not state.
            BudgetInfeasible: No point is within the limits; `attainable` is the least of the limit that fails.
        """
        within = list(self.points)
        for name, limit in limits.items():
            if not isinstance(limit, int | float):
                raise OptionError(f"best: {name} must be a number, not {limit!r}")
            values = {id(point): self._value(point, name) for point in self.points}
            kept = [point for point in within if values[id(point)] <= limit]
            if not kept:
                least = min((values[id(point)] for point in within), default=math.inf)
                raise BudgetInfeasible(f"best: no point has {name} <= {limit}; the least is {least:.4g}", least)
            within = kept
        if not within:
            raise OptionError("best: the front has no points")
        return min(within, key=lambda point: point.objectives)

    def _value(self, point: Point, name: str) -> float:
        if name in self.objectives:
            return point.objectives[self.objectives.index(name)]
        if name in point.plan.reached:
            return point.plan.reached[name]
        raise OptionError(f"best: {name!r} is neither an objective ({', '.join(self.objectives)}) nor a cost of a plan")

    def merge(self, *others: Front) -> Front:
        """The front of all points of this and other fronts, what they cost added up.

        Raises:
            OptionError: They have other objectives, or plans of another network.
        """
        fronts = (self, *others)
        for front in others:
            if front.objectives != self.objectives:
                raise OptionError(
                    f"merge: a front of {', '.join(front.objectives)} and one of {', '.join(self.objectives)}"
                )
        if len({point.plan.graph for front in fronts for point in front.points}) > 1:
            raise OptionError("merge: the fronts are of different networks")
        return Front.of(
            self.objectives,
            [point for front in fronts for point in front.points],
            sum(front.evaluations for front in fronts),
            sum(front.forwards for front in fronts),
            {"merged": [dict(front.provenance) for front in fronts]},
        )

    def plot(self, path: str | Path, baselines: Mapping[str, Front] | None = None) -> None:
        """Draws the front, how its hypervolume grew and the widths of its networks; see `metaprune.search.plots.draw`.

        Args:
            path: Its ending is the format, such as `.png`.
            baselines: Other fronts of the same objectives to be drawn beside it, by name.

        Raises:
            OptionError: There is but one objective, or a baseline has others.
            MetapruneError: matplotlib is not installed, or the file can not be written.
        """
        from metaprune.search.plots import draw

        draw(self, path, baselines or {})

    def to_csv(self) -> str:
        """One line for each point: its objectives, the costs that its plan reaches, and the units that groups keep.

        A group is named where any point takes units away from it; an empty cell is a whole group.
        """
        costs = sorted({cost for point in self.points for cost in point.plan.reached})
        groups = sorted({group for point in self.points for group in point.plan.keep})
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*self.objectives, *(f"reached {cost}" for cost in costs), *(f"kept {name}" for name in groups)])
        for point in self.points:
            reached = [repr(float(point.plan.reached[c])) if c in point.plan.reached else "" for c in costs]
            kept = [len(point.plan.keep[name]) if name in point.plan.keep else "" for name in groups]
            table.writerow([*map(repr, point.objectives), *reached, *kept])
        return text.getvalue()

    def to_json(self) -> str:
        """The front as JSON text; floats are exact."""
        points = [
            {
                "objectives": list(point.objectives),
                "config": list(point.config),
                "info": dict(point.info),
                "plan": json.loads(point.plan.to_json()),
            }
            for point in self.points
        ]
        body = {
            "schema": SCHEMA,
            "objectives": list(self.objectives),
            "evaluations": self.evaluations,
            "forwards": self.forwards,
            "provenance": dict(self.provenance),
            "failed": self.failed,
            "history": [[spent, list(values)] for spent, values in self.history],
            "points": points,
        }
        return json.dumps(body, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Front:
        """The front in a JSON text; raises `LoadError` naming what is wrong with it."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"front: not JSON: {error}") from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise LoadError(f"front: schema {SCHEMA} is needed")
        try:
            points = [_point(item) for item in body["points"]]
            names, spent = [str(name) for name in body["objectives"]], (body["evaluations"], body["forwards"])
            front = Front.of(names, points, int(spent[0]), float(spent[1]), body["provenance"])
            history = tuple(_step(item, len(names)) for item in body.get("history", []))
            front = replace(front, failed=int(body.get("failed", 0)), history=history)
        except (KeyError, TypeError, ValueError, OptionError, PlanError) as error:
            raise LoadError(f"front: damaged: {type(error).__name__}: {error}") from None
        if len(front) < len(points):
            raise LoadError("front: damaged: a point is dominated by another, or not finite")
        return front

    def save(self, path: str | Path) -> None:
        """Writes the front as JSON, atomically."""
        write_atomically(Path(path), self.to_json().encode())

    @staticmethod
    def load(path: str | Path) -> Front:
        """Reads a front; raises `LoadError`."""
        try:
            return Front.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"front {path} can not be read: {error}") from None
        except LoadError as error:
            raise LoadError(f"{path}: {error}") from None


def nondominated(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each of some finite points, shape [points, objectives], is dominated by none; of equal ones the first."""
    if not len(values):
        return np.zeros(0, dtype=bool)
    mask: NDArray[np.bool_] = np.asarray(moocore.is_nondominated(values), dtype=bool)
    return mask


def _volume(values: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    inside = values[(values < corner).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=corner)) if len(inside) else 0.0


def _step(item: Any, objectives: int) -> tuple[float, tuple[float, ...]]:
    spent, values = item
    step = float(spent), tuple(map(float, values))
    if len(step[1]) != objectives or not all(map(math.isfinite, (step[0], *step[1]))):
        raise ValueError("a step of the history is not a number of evaluations and finite objectives")
    return step


def _point(item: Any) -> Point:
    values, config = item["objectives"], item["config"]
    if not all(type(level) is int for level in config) or not all(type(value) in (int, float) for value in values):
        raise TypeError("a point's objectives are numbers and its levels whole numbers")
    return Point(tuple(map(float, values)), Plan.from_json(json.dumps(item["plan"])), tuple(config), dict(item["info"]))
