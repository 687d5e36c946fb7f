"""Training before the cut: after it, a small network is far better than before, and the order is the fixed one."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import metaprune as mp
from metaprune.datasets import digits
from metaprune.demo import ResNet
from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.graphs.plan import Plan
from metaprune.losses import cross_entropy
from metaprune.prune_aware import LEVELS, Tolerant, _levels, train_tolerant
from metaprune.training import Settings, train

pytestmark = pytest.mark.xdist_group("prune_aware")  # one process: the fixtures are expensive
SMALL = "macs=0.2"


def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


@pytest.fixture(scope="module", params=[0, 1], ids=["seed0", "seed1"])
def trained(request: pytest.FixtureRequest) -> tuple[mp.Task, Tolerant]:
    """A task, and its network after prune-aware training; by seed."""
    train_half, held_out = digits(request.param)
    torch.manual_seed(request.param)
    model = ResNet(width=8).eval()
    train(model, train_half, objective, Settings(epochs=6), request.param)
    task = mp.Task(model, held_out.images[:1], train_half, held_out)
    return task, train_tolerant(task, SMALL, epochs=4, seed=request.param)


@pytest.fixture(scope="module")
def small() -> mp.Task:
    """An untrained network and few examples: enough where accuracy is not asked for."""
    torch.manual_seed(0)
    held_out = digits()[1]
    batches = [(held_out.images[i : i + 16], held_out.labels[i : i + 16]) for i in range(0, 64, 16)]
    return mp.Task(ResNet(width=6).eval(), held_out.images[:1], batches, batches)


def cut_and_recalibrated(task: mp.Task, graph: Any, plan: Plan) -> float:
    return task.score(mp.recover(mp.apply(graph, plan), task, recipe="recalibrate").module)


def test_a_small_network_is_clearly_better_than_without(trained: tuple[mp.Task, Tolerant]) -> None:
    task, tolerant = trained
    before = cut_and_recalibrated(task, tolerant.original, mp.plan(tolerant.original, SMALL))
    in_order = cut_and_recalibrated(task, tolerant.graph, tolerant.plan(SMALL))
    anew = cut_and_recalibrated(task, tolerant.graph, mp.plan(tolerant.graph, SMALL))
    assert in_order > before + 0.2
    assert anew > before + 0.1


def test_the_whole_network_stays_what_it_was(trained: tuple[mp.Task, Tolerant]) -> None:
    task, tolerant = trained
    whole = mp.apply(tolerant.graph, mp.plan(tolerant.graph, "width=1.0"))
    assert task.score(whole.module) > task.score() - 0.04


def test_the_order_is_that_of_the_original_weights(trained: tuple[mp.Task, Tolerant]) -> None:
    task, tolerant = trained
    plan = tolerant.plan(SMALL)
    assert plan.keep == mp.plan(mp.trace(task.model, task.inputs), SMALL).keep
    assert plan.keep != mp.plan(tolerant.graph, SMALL).keep
    assert plan.graph == tolerant.graph.fingerprint
    assert tolerant.plan("macs=0.3").reached["macs"] <= 0.3
    with pytest.raises(BudgetInfeasible):
        tolerant.plan("macs=0.0001")


def test_equal_seeds_give_equal_bits_and_nothing_else_is_touched(small: mp.Task) -> None:
    before = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    state = torch.get_rng_state()
    options: dict[str, Any] = {"epochs": 1, "distil": 0.5, "straight_through": True}
    one, two, three = (train_tolerant(small, SMALL, seed=seed, **options).graph for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.model.state_dict().items())
    assert all(torch.equal(tensor, two.values[name]) for name, tensor in one.values.items())
    assert any(not torch.equal(tensor, three.values[name]) for name, tensor in one.values.items())
    assert all(not tensor.requires_grad for tensor in one.values.values())


def test_the_options_count_and_progress_is_told(small: mp.Task) -> None:
    seen: list[tuple[int, int]] = []
    plain = train_tolerant(small, SMALL, epochs=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 8) for step in range(1, 9)]
    for options in ({"distil": 1.0}, {"straight_through": True}, {"criterion": "random"}, {"allocator": "uniform"}):
        other = train_tolerant(small, SMALL, epochs=2, **options)  # type: ignore[arg-type]
        assert any(not torch.equal(tensor, plain.graph.values[name]) for name, tensor in other.graph.values.items())


def test_masked_units_keep_their_weights_unless_open(small: mp.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one level, the smallest, training moves the kept units, and with straight-through gates the others too."""
    monkeypatch.setattr("metaprune.prune_aware._levels", lambda budget: [budget] * LEVELS)
    settings = Settings(weight_decay=0.0)
    for through in (False, True):
        result = train_tolerant(small, SMALL, epochs=1, straight_through=through, settings=settings)
        group = result.graph.group("stages.0.conv1")
        kept = torch.zeros(group.size, dtype=torch.bool)
        kept[list(result.plan(SMALL).keep[group.name])] = True
        moved = result.graph.values["stages.0.conv1.weight"] - result.original.values["stages.0.conv1.weight"]
        assert moved[kept].any()
        assert bool(moved[~kept].any()) is through


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distil": 1.5}, "distil: a weight from 0 to 1"),
        ({"epochs": -1}, "epochs"),
        ({"data": iter([])}, "no samples"),
        ({"budget": "macs=2"}, "budget"),
        ({"criterion": "magic"}, "criterion"),
        ({"criterion": "fisher"}, "needs calibration data"),
        ({"allocator": "measured"}, "one order is needed"),
    ],
)
def test_bad_options_are_named(small: mp.Task, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        train_tolerant(small, **options)


def test_the_order_by_data_is_that_of_one_pass_over_them(small: mp.Task) -> None:
    batches = [images for images, _ in small.train]
    passes = 0

    class Once:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            return iter(batches)

    tolerant = train_tolerant(small, SMALL, epochs=0, criterion="fisher", data=Once(), seed=3)
    graph = mp.trace(small.model, small.inputs)
    for budget in (SMALL, "macs=0.5"):
        assert tolerant.plan(budget) == mp.plan(graph, budget, criterion="fisher", data=batches, seed=3)
    assert passes == 1
    again = train_tolerant(small, SMALL, epochs=0, criterion="fisher", data=iter(batches), seed=3)
    assert again.plan(SMALL) == tolerant.plan(SMALL)


def test_levels_run_from_the_smallest_budget_to_the_whole() -> None:
    levels = [dict(part.split("=") for part in text.split(",")) for text in _levels("macs=0.25,params=0.4")]
    assert len(levels) == LEVELS
    assert (levels[0], levels[-1]) == ({"macs": "0.25", "params": "0.4"}, {"macs": "1.0", "params": "1.0"})
    steps = [float(b["macs"]) - float(a["macs"]) for a, b in pairwise(levels)]
    assert steps == pytest.approx([0.75 / (LEVELS - 1)] * (LEVELS - 1))
