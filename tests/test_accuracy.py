"""The accuracy benchmark's own machinery: what is spent, what is compared, and that a kill loses nothing."""

import dataclasses
import importlib
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

import metaprune as mp
from metaprune.evaluation import single_thread

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = (
    "accuracy",
    "accuracy_arms",
    "accuracy_case",
    "accuracy_cost",
    "accuracy_peer",
    "accuracy_report",
    "fashion",
    "ledger",
)
pytestmark = pytest.mark.xdist_group("accuracy")  # one process: the fixture is expensive

PROGRAM = '''"""A tiny setting of the benchmark on digits."""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from accuracy import Plan, measure
from accuracy_arms import WITHOUT_TRAINING, Trained
from accuracy_case import case_of
from torch import nn

import metaprune as mp


def load(name, seed, folder):
    train, test = mp.digits(seed)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    mp.train(model, train, lambda logits, x, labels: nn.functional.cross_entropy(logits, labels), mp.Settings(epochs=1))
    return case_of(name, seed, model.eval(), train, test)


first, closed = (WITHOUT_TRAINING[name] for name in ("L2, uniform", "block Fisher, cost + least squares"))
trained = {"scratch": Trained(first, fresh=True, epochs=1), "kd": Trained(closed, "kd")}
tables = {"none": {"L2, uniform": first}, "equal FLOPs": trained}
plan = Plan({"digits": 2}, (0.25,), {"digits": (0.25,)}, tables, load)

if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(plan, list(plan.rows()), Path(sys.argv[2]))
'''


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_killed_benchmark_goes_on_to_the_same_rows(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    program, killed, undisturbed = tmp_path / "tiny.py", tmp_path / "killed", tmp_path / "undisturbed"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(BENCHMARKS), str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    path = killed / "rows-0.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    path.write_bytes(before + b'{"key": ["digits", 1, 0.')  # as if the kill had come in the middle of a row

    plan = runpy.run_path(str(program))["plan"]
    with single_thread():
        for folder in (killed, undisturbed):
            bench["accuracy"].measure(plan, list(plan.rows()), folder)
    assert path.read_bytes().startswith(before)
    ended, expected = ({tuple(row["key"]): row for row in bench["ledger"].read_rows(f)} for f in (killed, undisturbed))
    assert len(expected) == 2 * (1 + 2)
    assert 2 <= before.count(b"\n") < len(expected)
    assert path.read_bytes().count(b"\n") == len(expected) + 1  # nothing is measured twice; one line is cut off
    for key, row in expected.items():
        assert {**ended[key], "cpu_seconds": 0} == {**row, "cpu_seconds": 0}
    trained = [row for row in expected.values() if row["key"][3] == "equal FLOPs"]
    assert all({"score_cut", "score_short", "score", "steps", "dense_epochs"} <= row.keys() for row in trained)


def test_a_row_is_not_joined_to_one_that_was_cut_off(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "rows-0.jsonl"
    for _ in range(2):
        with bench["ledger"].appending(path) as add:
            add({"key": ["a"], "score": 1})
            add({"key": ["b"], "score": 2})
        path.write_bytes(path.read_bytes()[:-3])
    assert bench["ledger"].read_rows(tmp_path) == [{"key": ["a"], "score": 1}]
    with bench["ledger"].appending(path) as add:
        add({"key": ["b"], "score": 3})
    assert [row["score"] for row in bench["ledger"].read_rows(tmp_path)] == [1, 3]


class Known:
    """A case of which only the costs matter: 1,000 multiply-adds, 40 batches."""

    macs, train = 1000, range(40)  # 0.75 epochs of the dense network are 30 of its steps


@pytest.mark.parametrize("recipe", ["finetune", "kd"])
@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("macs", [500, 125, 61])
def test_every_arm_spends_the_same(bench: dict[str, ModuleType], recipe: str, before: float, macs: int) -> None:
    arm = bench["accuracy_arms"].Trained(lambda case, budget: None, recipe, before=before)
    allowance = bench["accuracy_case"].DENSE_EPOCHS
    per_image = 3 * macs + (1000 if recipe == "kd" else 0)
    in_all = before * allowance * 3 * 1000 * 40 + arm.steps(Known, macs) * per_image
    assert in_all == pytest.approx(allowance * 3 * 1000 * 40, abs=per_image / 2)
    assert arm.spent(Known, macs) == pytest.approx(in_all / (3 * 1000 * 40))


def test_equal_epochs_are_the_dense_networks(bench: dict[str, ModuleType]) -> None:
    arm = bench["accuracy_arms"].WITH_TRAINING["from scratch, equal epochs"]
    assert arm.steps(Known, 125) == 5 * 40
    assert arm.spent(Known, 125) == pytest.approx(5 * 0.125)


def test_the_cost_of_a_row_is_that_of_its_steps_and_scorings(bench: dict[str, ModuleType]) -> None:
    cost, arms = bench["accuracy_cost"], bench["accuracy_arms"]
    pace = cost.Pace(Known, step=cost._line([1.125, 2.0]), scoring=(0.25, 1.0), teacher=0.5)
    assert pace.step == pytest.approx((1.0, 1.0))
    finetuned, distilled = (arms.Trained(lambda case, budget: None, recipe) for recipe in ("finetune", "kd"))
    assert finetuned.steps(Known, 250) == 120
    assert pace.seconds(finetuned, 0.25) == pytest.approx(cost.PLANNING + 3 * 0.5 + 120 * 1.25)
    steps = distilled.steps(Known, 250)
    assert pace.seconds(distilled, 0.25) == pytest.approx(cost.PLANNING + 3 * 0.5 + steps * 1.75)
    assert pace.seconds(lambda case, budget: None, 0.25) == pytest.approx(cost.PLANNING + 0.5)


def test_there_is_one_recipe(bench: dict[str, ModuleType]) -> None:
    settings = bench["fashion"].settings(1)
    assert dataclasses.replace(settings, channels_last=False) == mp.Settings(epochs=1)  # what `recover` trains with


def row(name: str, seed: int, arm: str, score: float, table: str = "equal FLOPs") -> dict[str, Any]:
    costs = {"dense": 0.9, "macs": 0.25, "params": 0.3, "cpu_seconds": 1.0, "dense_epochs": 1.0}
    return {"key": [name, seed, 0.25, table, arm], "score": score, **costs}


def test_differences_are_paired(bench: dict[str, ModuleType]) -> None:
    ours, theirs = [0.80, 0.83, 0.81, 0.86], [0.79, 0.83, 0.79, 0.84]
    rows = [row("net", seed, "a", score) for seed, score in enumerate(ours)]
    rows += [row("net", seed, "b", score) for seed, score in reversed(list(enumerate(theirs)))]
    found = bench["accuracy_report"].Scores(rows, {"equal FLOPs": ["a", "b"]}).difference("equal FLOPs", "a", "b", 0.25)
    apart = [1.0, 0.0, 2.0, 2.0]
    assert found.mean == pytest.approx(statistics.mean(apart))
    assert found.error == pytest.approx(statistics.stdev(apart) / 2)
    assert found.spread == pytest.approx(100 * statistics.stdev(ours))


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.5, 0.3, "yes"), (0.5, 0.5, "open"), (-0.2, 0.04, "yes"), (-0.2, 0.1, "open"), (-0.4, 0.0, "no"),
     (2.0, math.nan, "open")],
)  # fmt: skip
def test_at_least_as_good_is_within_the_margin(
    bench: dict[str, ModuleType], mean: float, error: float, verdict: str
) -> None:
    assert bench["accuracy_report"].Difference(mean, error, 0.1).verdict == verdict


def test_only_complete_cells_are_shown(bench: dict[str, ModuleType]) -> None:
    tables = {"equal FLOPs": ["a", "b"], "none": ["c"]}
    rows = [row("net", 0, "a", 0.5), row("net", 0, "b", 0.6), row("net", 1, "a", 0.9), row("net", 0, "old", 0.1)]
    scores = bench["accuracy_report"].Scores([*rows, row("net", 3, "c", 0.7, "none")], tables)
    assert [(r["key"][1], r["key"][4]) for r in scores.rows] == [(0, "a"), (0, "b"), (3, "c")]
    assert bench["accuracy_report"].Scores(rows[2:3], tables).rows == []


def test_the_readme_says_where_the_default_is_at_least_as_good(bench: dict[str, ModuleType]) -> None:
    arms, rows = bench["accuracy_arms"], []
    for table, labels in arms.TABLES.items():
        for label in labels:
            score = {arms.DEFAULTS[table]: 0.85, "Torch-Pruning, local, fine-tuned": 0.855}.get(label, 0.80)
            rows += [row(name, seed, label, score + seed / 100, table) for name in ("one", "two") for seed in (0, 1)]
    text = bench["accuracy_report"].readme(bench["accuracy_report"].Scores(rows, arms.TABLES))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["Torch-Pruning, local, fine-tuned", "86.0 ± 0.7", "1.0"] in lines
    assert ["Torch-Pruning, local, fine-tuned", "-0.5 ± 0.0"] in lines
    assert ["one, equal training FLOPs", "no, -0.5 ± 0.0"] in lines
    assert ["two, no training steps", "yes, +5.0 ± 0.0"] in lines


def test_sparse_learning_takes_from_the_weak_and_ends_with_its_training(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    train, test = mp.digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 10),
    ).eval()  # fmt: skip
    case = bench["accuracy_case"].case_of("digits", 0, model, train, test)
    hooks = len(_global_optimizer_pre_hooks)
    norms = []
    for strength in (0.0, 0.05):
        monkeypatch.setattr(bench["accuracy_peer"], "REGULARISATION", strength)
        learned, seconds = bench["accuracy_peer"].sparse(case)
        weights = (learned[0].weight, learned[1].weight[:, None], learned[3].weight.transpose(0, 1))
        norms.append(sum(w.detach().flatten(1).square().sum(1) for w in weights))
        assert seconds > 0
        assert not learned.training
    kept = norms[1] / norms[0]  # of each channel's squared norm
    arm = bench["accuracy_peer"].group_norm_sparse(global_=False)
    first, second = arm(case, 0.5), arm(case, 0.4)
    assert first.seconds == 0 < second.seconds == case.shared["sparse"][1]  # what the second row found there
    assert second.macs <= 0.4 * case.macs
    assert (kept < 1).all()
    assert kept[norms[0].argmin()] < kept[norms[0].argmax()]
    assert len(_global_optimizer_pre_hooks) == hooks
