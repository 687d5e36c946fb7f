"""Fronts: dominance against its definition, hypervolume against a closed form, files, plots, and what is refused."""

import builtins
import csv
import dataclasses
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible, LoadError, MetapruneError, OptionError
from metaprune.graphs.plan import Plan
from metaprune.search.front import Front, Point


def _points(values: NDArray[np.float64], graph: str = "g") -> list[Point]:
    return [
        Point(tuple(row), Plan({"a": (0, i)}, graph, reached={"params": row[-1]}), (i,), {"evaluation": i})
        for i, row in enumerate(values.tolist())
    ]


def _front(seed: int = 0, count: int = 60, objectives: int = 2) -> Front:
    values = np.random.default_rng(seed).random((count, objectives))
    return Front.of(("error", "macs", "bytes")[:objectives], _points(values), count, 10.5, {"seed": seed})


@pytest.mark.parametrize("objectives", [2, 3])
def test_a_front_holds_what_nothing_dominates(objectives: int) -> None:
    values = np.round(np.random.default_rng(1).random((80, objectives)), 1)  # many ties
    front = Front.of(("error", "macs", "bytes")[:objectives], _points(values))

    def dominates(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
        return bool((a <= b).all() and (a < b).any())

    expected = {tuple(row) for row in values if not any(dominates(other, row) for other in values)}
    assert [point.objectives for point in front.points] == sorted(expected)
    for point in front.points:
        assert point.config[0] == next(i for i, row in enumerate(values) if tuple(row) == point.objectives)


def test_values_that_are_not_finite_never_enter() -> None:
    values = np.array([[0.5, 0.5], [math.nan, 0.1], [-math.inf, 0.1], [math.inf, 0.0], [0.1, math.nan]])
    assert Front.of(("error", "macs"), _points(values)).values.tolist() == [[0.5, 0.5]]
    assert len(Front.of(("error", "macs"), _points(values[1:]))) == 0
    assert Front.of(("error", "macs"), _points(values[1:])).hypervolume() == 0


def test_hypervolume_of_two_objectives_is_the_area_of_the_steps() -> None:
    front = _front()
    strips = sorted({m for _, m in front.values.tolist() if m < 0.9} | {0.9})
    exact = 0.0
    for low, high in itertools.pairwise(strips):
        least = min(error for error, macs in front.values.tolist() if macs <= low)
        exact += (high - low) * max(0.0, 0.8 - least)
    assert front.hypervolume((0.8, 0.9)) == pytest.approx(exact)


def test_hypervolume_of_three_objectives_is_that_of_inclusion_and_exclusion() -> None:
    front = _front(count=8, objectives=3)
    values = front.values
    exact = 0.0
    for size in range(1, len(values) + 1):
        for chosen in itertools.combinations(values, size):
            exact -= (-1) ** size * np.prod(1 - np.max(chosen, axis=0))
    assert front.hypervolume() == pytest.approx(exact)
    with pytest.raises(OptionError, match="reference: a finite number for each of error, macs, bytes"):
        front.hypervolume((1, 1))


def test_best_is_the_least_first_objective_within_limits() -> None:
    front = _front()
    point = front.best(macs=0.3)
    assert point.objectives[0] == min(p.objectives[0] for p in front.points if p.objectives[1] <= 0.3)
    assert front.best() == front.points[0]
    assert front.best(macs=0.3, params=0.2).objectives[1] <= 0.2
    least = front.values[:, 1].min()
    with pytest.raises(BudgetInfeasible, match=r"no point has macs <= 0\.0; the least is") as caught:
        front.best(macs=0.0)
    assert caught.value.attainable == least
    with pytest.raises(OptionError, match="'speed' is neither an objective"):
        front.best(speed=1)
    with pytest.raises(OptionError, match="no points"):
        Front.of(("error",), []).best()


def test_merged_fronts_hold_the_best_of_all() -> None:
    first, second = _front(0), _front(1)
    both = first.merge(second)
    assert both == Front.of(
        first.objectives, [*first.points, *second.points], 120, 21.0, {"merged": [{"seed": 0}, {"seed": 1}]}
    )
    assert both.hypervolume() >= max(first.hypervolume(), second.hypervolume())
    assert first.merge(first).points == first.points
    with pytest.raises(OptionError, match="merge: a front of error, macs, bytes and one of error, macs"):
        first.merge(_front(objectives=3))
    with pytest.raises(OptionError, match="different networks"):
        first.merge(Front.of(("error", "macs"), _points(np.array([[0.0, 0.0]]), "h")))


def test_a_saved_front_is_the_same(tmp_path: Path) -> None:
    front = _front(objectives=3)
    front.save(tmp_path / "deep" / "front.json")
    assert mp.Front.load(tmp_path / "deep" / "front.json") == front
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["front.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "schema 1 is needed"),
        ({"points": 3}, "damaged"),
        ({"points": [{"objectives": [1], "config": [], "info": {}, "plan": {}}]}, "damaged: PlanError"),
        ({"objectives": ["error"]}, "damaged: OptionError"),
        ({"evaluations": "many"}, "damaged: ValueError"),
    ],
)
def test_a_damaged_front_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "front.json"
    path.write_text(json.dumps(json.loads(_front().to_json()) | change))
    with pytest.raises(LoadError, match=f"{path}: front: .*{message}"):
        Front.load(path)


def test_a_front_with_a_dominated_point_is_damaged(tmp_path: Path) -> None:
    body = json.loads(_front().to_json())
    body["points"].append({**body["points"][0], "objectives": [2.0, 2.0]})
    with pytest.raises(LoadError, match="a point is dominated"):
        Front.from_json(json.dumps(body))
    with pytest.raises(LoadError, match="can not be read"):
        Front.load(tmp_path / "none.json")
    with pytest.raises(LoadError, match="not JSON"):
        Front.from_json("{")


def test_the_history_is_the_volume_of_what_was_found_by_then() -> None:
    values = np.random.default_rng(2).random((40, 2))
    steps = tuple((float(i + 1), tuple(row)) for i, row in enumerate(values.tolist()))
    front = dataclasses.replace(Front.of(("error", "macs"), _points(values), 40), history=steps)
    history = front.hypervolume_history((0.9, 0.8))
    assert history.shape == (40, 2)
    for spent, volume in history.tolist():
        assert volume == Front.of(("error", "macs"), _points(values[: int(spent)])).hypervolume((0.9, 0.8))
    assert history[-1, 1] == front.hypervolume((0.9, 0.8))
    assert Front.from_json(front.to_json()) == front
    assert _front().hypervolume_history().shape == (0, 2)
    body = json.loads(front.to_json())
    body["history"][0][1] = [1.0]
    with pytest.raises(LoadError, match="a step of the history is not"):
        Front.from_json(json.dumps(body))


def test_the_knee_is_furthest_from_the_line_between_the_ends() -> None:
    front = _front(3)
    low, high = front.values.min(0), front.values.max(0)
    scaled = (front.values - low) / (high - low)
    line = scaled[-1] - scaled[0]
    apart = np.abs(line[0] * (scaled[:, 1] - scaled[0, 1]) - line[1] * (scaled[:, 0] - scaled[0, 0]))
    below = scaled.sum(axis=1) <= 1
    assert front.knee() == front.points[int(np.where(below, apart, -1).argmax())]
    assert Front.of(("error", "macs"), _points(np.array([[0.3, 0.3]]))).knee().objectives == (0.3, 0.3)
    with pytest.raises(OptionError, match="knee: the front has no points"):
        Front.of(("error",), []).knee()


def test_a_table_has_a_line_for_each_point() -> None:
    front = _front()
    rows = list(csv.DictReader(io.StringIO(front.to_csv())))
    assert [(float(row["error"]), float(row["macs"])) for row in rows] == [p.objectives for p in front.points]
    assert [float(row["reached params"]) for row in rows] == [p.plan.reached["params"] for p in front.points]
    assert {row["kept a"] for row in rows} == {"2"}


def test_plots_are_files_and_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    _front().plot(tmp_path / "two.png")
    told = dataclasses.replace(
        _front(objectives=3),
        provenance={"dense": {"error": 0.1, "macs": 1.0, "bytes": 1.0}},
        history=((1.0, (0.5, 0.5, 0.5)), (2.0, (0.2, 0.4, 0.6))),
    )
    told.plot(str(tmp_path / "three.svg"), baselines={"other": _front(1, objectives=3)})
    with pytest.raises(OptionError, match="plot: baseline other has the objectives error, macs"):
        told.plot(tmp_path / "four.png", baselines={"other": _front()})
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (tmp_path / "three.svg").read_bytes()
    with pytest.raises(MetapruneError, match=r"front\.abc: can not be written"):
        _front().plot(tmp_path / "front.abc")
    with pytest.raises(OptionError, match="plot: a front of one objective"):
        Front.of(("error",), _points(np.array([[1.0]]))).plot(tmp_path / "one.png")
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MetapruneError, match=r"plot: matplotlib is missing; pip install 'metaprune\[plot\]'"):
        _front().plot(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [((), [], "one or more"), (("a", "a"), [], "different names"), (("a",), [[1.0, 2.0]], "2 values for 1")],
)
def test_what_is_no_front_is_refused(names: tuple[str, ...], values: list[list[float]], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Front.of(names, _points(np.array(values)) if values else [])
