"""`explore`: objectives as an independent computation finds them, searches that go on, and what is refused by name."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import metaprune as mp
from metaprune.cli import app
from metaprune.cli_explore import report_front
from metaprune.distances import distortion
from metaprune.graphs.errors import BudgetInfeasible, LoadError, OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.objectives import OBJECTIVES, Objectives
from metaprune.search.evaluate import Fidelity
from metaprune.search.front import Point
from tests.support import digits_search

QUICK: dict[str, Any] = {"evaluations": 4, "samples": 32, "criterion": "magnitude"}


@pytest.fixture(scope="module")
def task() -> mp.Task:
    return digits_search.task()


@pytest.fixture(scope="module")
def graph(task: mp.Task) -> Graph:
    return mp.trace(task.model, task.inputs)


def _keep(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(range(0, group.size, 2)) for group in graph.groups if not group.pinned}


def _batches(task: mp.Task, first: int, last: int) -> list[Any]:
    return [(task.train.images[first:last], task.train.labels[first:last])]


def test_objectives_are_those_of_the_pruned_network(task: mp.Task, graph: Graph) -> None:
    names = ("error", "distortion", "macs", "params", "bytes")
    judged = Objectives(graph, names, task.train, task, samples=100)
    result = judged(_keep(graph), Fidelity(100))
    assert result.values is not None
    error, apart, *costs = result.values
    pruned = mp.apply(graph, Plan(_keep(graph), graph.fingerprint))
    fitted = mp.reconstruct(pruned, _batches(task, 0, 100)).module
    assert error == pytest.approx(1 - task.score(fitted), abs=0.0023)
    images = task.val.images[:100]
    with torch.no_grad():
        expected = distortion([fitted(images)], [task.model(images)]).mean()
    assert apart == pytest.approx(float(expected), rel=1e-4)
    before, after = (dataclasses.astuple(pruned.cost[when]) for when in ("before", "after"))
    assert costs == [new / old for new, old in zip(after, before, strict=True)]
    whole = judged({}, Fidelity(100)).values
    assert whole == (pytest.approx(1 - task.score(), abs=1e-12), pytest.approx(0, abs=1e-9), 1.0, 1.0, 1.0)


def test_recalibration_and_no_repair(task: mp.Task, graph: Graph) -> None:
    judged = Objectives(graph, ("error",), task.train, task, samples=64)
    pruned = mp.apply(graph, Plan(_keep(graph), graph.fingerprint))
    (plain,) = judged(_keep(graph), Fidelity(64, "none")).values or ()
    assert plain == pytest.approx(1 - task.score(pruned.module), abs=1e-12)
    module = copy.deepcopy(pruned.module)
    assert mp.recalibrate(module, _batches(task, 0, 64)) == 2
    (error,) = judged(_keep(graph), Fidelity(64, "recalibrate")).values or ()
    assert error == pytest.approx(1 - task.score(module), abs=1e-12)
    assert error != plain


def test_forwards_are_the_multiply_adds_that_are_made(task: mp.Task, graph: Graph) -> None:
    """Counted by torch while it runs, against what is charged; torch counts two operations for one multiply-add."""
    judged = Objectives(graph, ("error", "distortion"), task.train, task, samples=100)
    assert judged.forwards == 100 + len(task.val.images)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        task.model(task.val.images[:1])
    assert one.get_total_flops() / 2 == judged.bench.macs
    for repair, within in (("none", 1e-9), ("recalibrate", 1e-9), ("least_squares", 0.1)):
        with FlopCounterMode(display=False) as counter:
            result = judged(_keep(graph), Fidelity(100, repair))
        assert result.forwards == pytest.approx(counter.get_total_flops() / 2 / judged.bench.macs, rel=within)


def test_a_search_from_a_graph_needs_no_labels(task: mp.Task, graph: Graph) -> None:
    images = [task.train.images[:64]]
    front = mp.explore(graph, data=images, **QUICK)
    assert front.objectives == ("distortion", "macs")
    for point in front.points:
        pruned = mp.apply(graph, point.plan, certify=False)
        small = mp.reconstruct(pruned, [images[0][:32]]).module
        with torch.no_grad():
            wanted, found = (net(images[0][32:]).log_softmax(1) for net in (task.model, small))
        expected = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
        assert point.objectives[0] == pytest.approx(float(expected), rel=1e-3)
    noise = mp.explore(graph, data="noise", **QUICK)
    assert noise.hypervolume((10, 1)) > 0
    assert noise == mp.explore(graph, data="noise", **QUICK)


def test_shuffled_training_data_give_equal_searches(task: mp.Task) -> None:
    shuffled = mp.Batches(task.train.images, task.train.labels, 64, shuffle=True)
    again = dataclasses.replace(task, train=shuffled)
    assert mp.explore(again, **{**QUICK, "criterion": None}) == mp.explore(again, **{**QUICK, "criterion": None})


def test_a_longer_search_goes_on_from_a_shorter_one(task: mp.Task, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    fronts: list[mp.Front] = []
    short = mp.explore(
        task, out=tmp_path, **QUICK, progress=lambda *at: steps.append(at), watch=lambda f, *_: fronts.append(f)
    )
    assert steps == [(i, 4) for i in range(1, 5)]
    assert fronts[-1] == short
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.json", "ledger.jsonl", "space.json"]
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    longer = mp.explore(task, out=tmp_path, **{**QUICK, "evaluations": 6})
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(lines)
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"\n") == 7
    assert longer == mp.explore(task, **{**QUICK, "evaluations": 6})
    assert mp.Front.load(tmp_path / "front.json") == longer
    assert longer.hypervolume() >= short.hypervolume()


def test_fronts_and_plans_are_starting_points(task: mp.Task, graph: Graph) -> None:
    plan = mp.plan(graph, "macs=0.7")
    first = mp.explore(task, init=[plan], **QUICK)
    config = [len(plan.keep.get(g.name, range(g.size))) for g in graph.groups if not g.pinned]
    second = mp.explore(task, init=first, **{**QUICK, "evaluations": 8})
    assert second.hypervolume() >= first.hypervolume()
    started = mp.explore(task, init=[plan], budget="macs=0.5", **{**QUICK, "evaluations": 1})
    (point,) = started.points
    assert 0.3 < point.objectives[1] <= 0.5 < plan.reached["macs"]
    assert sum(len(units) for units in point.plan.keep.values()) < sum(config)
    with pytest.raises(PlanError, match="another network"):
        mp.explore(task, init=[dataclasses.replace(plan, graph="other")], **QUICK)
    for wrong in (plan, 3, [3]):
        with pytest.raises(OptionError, match="init: a Front or plans are needed, not"):
            mp.explore(task, init=wrong, **QUICK)  # type: ignore[arg-type]


def test_a_folder_of_another_search_is_refused(task: mp.Task, graph: Graph, tmp_path: Path) -> None:
    images = [task.train.images[:64]]
    own = {"target": graph, "data": images, "out": tmp_path, **QUICK}
    mp.explore(**own)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    for name, change in (
        ("network", {"target": mp.trace(narrow, images[0][:2])}),
        ("weights", {"target": graph.with_values({"0.weight": graph.values["0.weight"] * 1.001})}),
        ("data", {"data": [images[0] + 1e-6]}),
        ("objectives", {"objectives": ("distortion", "params")}),
        ("seed", {"seed": 1}),
        ("budget", {"budget": "macs=0.5"}),
        ("criterion", {"criterion": "magnitude_l1"}),
        ("fidelity", {"samples": 20}),
        ("space", {"levels": 3}),
        ("init", {"init": [mp.plan(graph)]}),
    ):
        with pytest.raises(OptionError, match=f"out: {tmp_path} holds another search, with other {name}"):
            mp.explore(**{**own, **change})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "ledger.jsonl").write_bytes(before["ledger.jsonl"] + b"x\n")
    with pytest.raises(LoadError, match=r"ledger\.jsonl: line 6 is damaged"):
        mp.explore(**own)


def test_what_can_not_be_searched_is_named(task: mp.Task, graph: Graph) -> None:
    images = [task.train.images[:8]]
    for change, message in (
        ({"target": task.model}, "target: a Task or a Graph is needed, not a Sequential"),
        ({"backend": "magic"}, "backend: 'magic' is none of"),
        ({"objectives": ("error", "beauty")}, "objectives: 'beauty' is unknown, choose from bytes, distortion"),
        ({"objectives": ("macs", "macs")}, "objectives: one or more different names"),
        ({"objectives": ()}, "objectives: one or more different names"),
        ({"objectives": ("error",)}, "objectives: 'error' needs labels, so a Task"),
        ({"evaluations": 0}, "evaluations: at least 1"),
        ({"seed": -1}, "seed: must be a whole number from 0"),
        ({"budget": "width=0.5"}, "budget: a search needs a cost"),
        ({"budget": "speed=0.5"}, "budget: 'speed' is none of"),
        ({"levels": 1}, "levels: at least 2"),
        ({"protect": "*"}, "no group may shrink"),
        ({"only": "nothing*"}, "only: 'nothing\\*' matches no group"),
        ({"out": 3}, "out: a path is needed"),
        ({"data": None}, "data: objective 'distortion' needs calibration data"),
        ({"data": []}, "data: there are no samples"),
        ({"data": [images[0][:1]]}, "data: two samples are needed"),
        ({"target": task, "data": []}, "data: there are no samples"),
    ):
        with pytest.raises(OptionError, match=message):
            mp.explore(**{"target": graph, "data": images, **QUICK, **change})
    with pytest.raises(BudgetInfeasible, match=r"the least is macs=0\.0") as caught:
        mp.explore(graph, data=images, budget="macs=0.0001", **QUICK)
    assert 0 < caught.value.attainable < 0.1
    assert mp.explore(graph, objectives=("params", "macs"), **QUICK).forwards == 0


def test_a_network_that_does_not_run_is_left_out(task: mp.Task, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Objectives(graph, ("distortion", "macs"), task.train, task, samples=16)

    def broken(*_: object) -> float:
        raise RuntimeError("singular")

    monkeypatch.setitem(OBJECTIVES, "distortion", dataclasses.replace(OBJECTIVES["distortion"], value=broken))
    result = judged(_keep(graph), Fidelity(16))
    assert (result.values, result.note) == (None, "singular")


def test_small_values_are_told_apart_in_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    points = [Point((value, 1 - value), mp.Plan({}, "")) for value in (1.2e-7, 3.4e-6)]
    report_front(mp.Front.of(("distortion", "macs"), points), None, as_json=False)
    shown = capsys.readouterr().out
    assert "1.2e-07" in shown
    assert "3.4e-06" in shown


def test_explore_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shell_searches.py").write_text(
        "import torch, metaprune as mp\n"
        "from tests.support.digits_search import task\n"
        "def pair():\n"
        "    return task().model, task().inputs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = ["--evaluations", "3", "--budget", "macs=0.5", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["explore", "shell_searches:task", *common, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    front = mp.Front.load(tmp_path / "out" / "front.json")
    assert report["evaluations"] == front.evaluations == 3
    assert report["hypervolume"] == front.hypervolume()
    assert [tuple(point["objectives"].values()) for point in report["points"]] == [p.objectives for p in front.points]
    assert all(point["reached"]["macs"] <= 0.5 for point in report["points"])
    done = CliRunner().invoke(app, ["explore", "shell_searches:pair", "--noise", "--evaluations", "2"])
    assert done.exit_code == 0, done.output
    assert "distortion" in done.stdout
    for arguments, message in (
        (["shell_searches:pair"], "must return a metaprune.Task, not tuple"),
        (["shell_searches:task", *common, "--seed", "1"], "holds another search, with other seed"),
        (["shell_searches:task", "--budget", "macs=0.00001"], "can not be met"),
    ):
        done = CliRunner().invoke(app, ["explore", *arguments])
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
