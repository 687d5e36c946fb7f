"""Pruning in one pass with heads fitted on a tiny zoo: files, budgets, fronts, the guard, the range."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.judge import Judge
from metaprune.metanet.encoded import CLOSED
from metaprune.metanet.examples import DATA, WEIGHTS
from metaprune.metanet.pruner import MetaPruner
from tests.support.little_zoo import encoded_unseen, graph_of, plain_layers, pruner_of_zoo, same, task_of

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo and its fit are expensive


def test_save_and_load_give_the_same_predictions(tmp_path: Path) -> None:
    path, card = tmp_path / "x.safetensors", tmp_path / "x.json"
    pruner_of_zoo().save(path, card)
    again = MetaPruner.load(path)
    assert json.loads(card.read_text()).items() >= again.card.items()
    assert same(again, pruner_of_zoo())
    assert again.card["validation"] == pruner_of_zoo().card["validation"]
    described = encoded_unseen().description
    minima = dict.fromkeys(described.sizes, 1)
    for one, two in zip(
        pruner_of_zoo().predictors[DATA].losses(described, minima), again.predictors[DATA].losses(described, minima),
        strict=True,
    ):  # fmt: skip
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    pruner_of_zoo().save(path)
    monkeypatch.setattr("metaprune.metanet.schema.DATA_CUT", ("something else",))
    with pytest.raises(LoadError, match="other features"):
        MetaPruner.load(path)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="without one"):
        MetaPruner.load(path, encoder=lambda graph: {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoadError, match="no checkpoint"):
        MetaPruner.load(path)
    save_file({"a": torch.ones(1)}, tmp_path / "y")
    for wrong in (tmp_path / "y", tmp_path / "z"):
        with pytest.raises(LoadError, match="no checkpoint"):
            MetaPruner.load(wrong)
    for package in ("metaprune.nothing", "metaprune.search"):  # none there, and one without the file
        monkeypatch.setattr("metaprune.metanet.pruner.CHECKPOINTS", package)
        with pytest.raises(LoadError, match="without a checkpoint"):
            MetaPruner.load("default")


def test_one_pass_serves_several_budgets_and_the_guard_never_loses() -> None:
    encoded, pruner = encoded_unseen(), pruner_of_zoo()
    pruner.guard.clear()
    graph, data = encoded.graph, task_of("unseen").train
    judge = Judge(graph, data)
    for budget in (0.6, 0.3):
        pruned = pruner.prune(encoded, budget=f"macs={budget}")
        assert pruned.certificate is not None
        assert pruned.certificate.ok
        assert budget - 0.12 < pruned.cost["after"].macs / pruned.cost["before"].macs <= budget
        assert "least squares" in pruned.notes[-1]
        about = pruned.plan.provenance["guard"]
        closed = mp.plan(graph, f"macs={budget}", "fisher_block", "cost", data)
        mine, floor = judge.distortions([pruned.plan.keep, closed.keep])
        assert mine <= floor * (1 + 1e-9)
        assert about["measured"][about["kept"]] == pytest.approx(mine)
        assert about["measured"][CLOSED] == pytest.approx(floor)
        assert mp.Plan.from_json(pruned.plan.to_json()) == pruned.plan
    assert pruner.guard.total() == 2


def test_the_weights_alone_are_enough_to_plan() -> None:
    encoded = encoded_unseen(data=False)
    pruned = pruner_of_zoo().prune(encoded, budget="macs=0.5")
    assert pruned.plan.provenance["features"] == WEIGHTS
    assert pruned.plan.reached["macs"] <= 0.5
    assert not any("least squares" in note for note in pruned.notes)
    kept = {group.name: group.size for group in encoded.graph.groups}
    assert pruner_of_zoo().prune(encoded, budget="width=1.0").plan.keep == {}
    protected = next(name for name in encoded.plain)
    plan = pruner_of_zoo().plan(encoded, "macs=0.7", protect=(protected,))
    assert protected not in plan.keep
    assert all(len(units) < kept[name] for name, units in plan.keep.items())


def test_the_front_is_a_start_for_a_search() -> None:
    encoded = encoded_unseen()
    front = pruner_of_zoo().front(encoded, points=5)
    assert front.objectives == ("distortion", "macs")
    assert len(front) >= 3
    assert (np.diff(front.values[:, 1]) < 0).all()  # ascending in the first, so falling in the second
    assert mp.Front.from_json(front.to_json()) == front
    found = mp.explore(
        encoded.graph, evaluations=len(front) + 1, init=front, data=task_of("unseen").train, samples=40, levels=8
    )
    assert len(found) >= 1
    with pytest.raises(OptionError, match="points"):
        pruner_of_zoo().front(encoded, points=0)


def test_a_network_outside_the_range_is_warned_of() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(
        *plain_layers((6, 200), True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 10)
    ).eval()
    with pytest.warns(UserWarning, match="outside the range of the zoo.*log size") as seen:
        encoded = pruner_of_zoo().encode(wide, task_of("unseen").inputs)
    assert len(seen) == 1
    assert all(np.isfinite(curve[1:]).all() for curve in encoded.plain.values())


def test_the_default_checkpoint_is_small_and_says_what_it_was_fitted_on() -> None:
    folder = Path(__file__).resolve().parents[1] / "checkpoints"
    pruner, card = MetaPruner.load("default"), json.loads((folder / "default.json").read_text())
    assert (folder / "default.safetensors").stat().st_size < 5 << 20
    assert {key: card[key] for key in pruner.card} == pruner.card
    assert len({family for _, family in card["zoo"]["networks"]}) >= 10
    assert card["validation"]["data"]["curves"]["compensated"]["r2"] > 0.8
    encoded = pruner.encode(graph_of("unseen"))
    assert pruner.plan(encoded, "macs=0.5").reached["macs"] <= 0.5
