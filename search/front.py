"""Fronts: the networks of which none is better than another in everything, each with the plan that makes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.errors import BudgetInfeasible, LoadError, MetapruneError, OptionError, PlanError
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
    """

    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    evaluations: int = 0
    forwards: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
        corner = np.ones(len(self.objectives)) if reference is None else np.asarray(reference)
        if corner.shape != (len(self.objectives),) or corner.dtype.kind not in "if" or not np.isfinite(corner).all():
            raise OptionError(f"reference: a finite number for each of {', '.join(self.objectives)} is needed")
        inside = self.values[(self.values < corner).all(axis=1)]
        return float(moocore.hypervolume(inside, ref=corner)) if len(inside) else 0.0

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

    def plot(self, path: str | Path) -> None:
        """Draws the first objective over each of the others, by matplotlib; the ending of `path` is the format.

        Raises:
            OptionError: There is but one objective.
            MetapruneError: matplotlib is not installed, or the file can not be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MetapruneError("plot: matplotlib is missing; pip install 'metaprune[plot]'") from error
        others = self.objectives[1:]
        if not others:
            raise OptionError("plot: a front of one objective has nothing to be drawn over")
        figure = Figure(figsize=(5 * len(others), 4), layout="constrained")
        panels = figure.subplots(1, len(others), squeeze=False)[0]
        for number, (panel, name) in enumerate(zip(panels, others, strict=True), 1):
            order = np.argsort(self.values[:, number], kind="stable")
            panel.plot(self.values[order, number], self.values[order, 0], "o-" if len(others) == 1 else "o")
            panel.set_xlabel(name)
            panel.set_ylabel(self.objectives[0])
        try:
            figure.savefig(Path(path))
        except (OSError, ValueError) as error:
            raise MetapruneError(f"{path}: can not be written: {error}") from error

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


def _point(item: Any) -> Point:
    values, config = item["objectives"], item["config"]
    if not all(type(level) is int for level in config) or not all(type(value) in (int, float) for value in values):
        raise TypeError("a point's objectives are numbers and its levels whole numbers")
    return Point(tuple(map(float, values)), Plan.from_json(json.dumps(item["plan"])), tuple(config), dict(item["info"]))
