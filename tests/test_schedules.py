"""Schedules: the path of the budget, masks that can be taken back, and a cut that is the masked network as trained."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import schedules
from metaprune.data import Batches
from metaprune.datasets import digits
from metaprune.demo import ResNet
from metaprune.graphs.errors import BudgetInfeasible, OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import GatedModule
from metaprune.losses import cross_entropy
from metaprune.recovery import recalibrate
from metaprune.schedules import SCHEDULES, finalise, kept_fraction, train_pruned
from metaprune.training import Settings, train
from tests.support import oracle

pytestmark = pytest.mark.xdist_group("schedules")  # one process: the fixture is expensive


def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


@pytest.fixture(scope="module")
def task() -> mp.Task:
    whole, held_out = digits()
    train_half = Batches(whole.images[:768], whole.labels[:768], 64, shuffle=True)
    torch.manual_seed(0)
    model = ResNet(width=8).eval()
    train(model, train_half, objective, Settings(epochs=6))
    return mp.Task(model, held_out.images[:1], train_half, held_out)


@pytest.fixture(scope="module")
def graph(task: mp.Task) -> Graph:
    return mp.trace(task.model, task.inputs)


@pytest.mark.parametrize(
    ("schedule", "final", "path"),
    [
        ("one_shot", 0.2, (1.0, 0.2, 0.2, 0.2, 0.2)),
        ("iterative", 1 / 16, (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)),
        ("cubic", 0.2, (1.0, 0.5375, 0.3, 0.2125, 0.2)),
    ],
)
def test_the_path_by_hand(schedule: str, final: float, path: tuple[float, ...]) -> None:
    assert [kept_fraction(schedule, step, 4, final) for step in range(5)] == pytest.approx(path, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("final", [1e-3, 0.37, 1.0])
def test_every_path_falls_to_exactly_the_end(schedule: str, final: float) -> None:
    for steps in (1, 3, 10):
        path = [kept_fraction(schedule, step, steps, final) for step in range(steps + 1)]
        assert path[0] == 1
        assert path[-1] == final
        assert path == sorted(path, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("magic", 1, 4, 0.5), "schedule: 'magic' is unknown, choose from cubic, iterative, one_shot"),
        (("cubic", 5, 4, 0.5), "step: a whole number from 0 to 4 is needed, not 5"),
        (("cubic", -1, 4, 0.5), "step: .* not -1"),
        (("cubic", 0, 0, 0.5), "steps: a positive whole number is needed, not 0"),
        (("cubic", 0, 2.0, 0.5), "steps: .* not 2.0"),
        (("cubic", 1, 4, 0.0), "final: .* not 0.0"),
        (("cubic", 1, 4, 1.5), "final: .* not 1.5"),
    ],
)
def test_bad_steps_are_named(arguments: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        kept_fraction(*arguments)


@pytest.mark.parametrize(
    ("schedule", "steps", "training", "events"),
    [
        ("cubic", 4, 80, {0: "macs=0.5375", 10: "macs=0.3", 20: "macs=0.2125", 30: "macs=0.2"}),
        ("one_shot", 4, 80, {0: "macs=0.2"}),
        ("cubic", 4, 0, {0: "macs=0.2"}),  # nothing is trained: the end is reached at once
        ("cubic", 4, 4, {0: "macs=0.3", 1: "macs=0.2"}),  # two steps fall on one moment
    ],
)
def test_when_it_is_pruned(schedule: str, steps: int, training: int, events: dict[int, str]) -> None:
    found = schedules._events("macs=0.2", schedule, steps, training)
    assert found.keys() == events.keys()
    for moment, text in found.items():
        assert float(text.removeprefix("macs=")) == pytest.approx(float(events[moment].removeprefix("macs=")))


Moment = tuple[Plan, dict[str, Tensor]]


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[Moment]:
    """Each plan that is followed with the weights at that moment, and at last the plan and weights that are cut."""
    seen: list[Moment] = []

    def copied(values: Any) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in values.items()}

    class Watched(schedules._Masked):
        def follow(self, plan: Plan) -> None:
            seen.append((plan, copied(self._module.values)))
            super().follow(plan)

    def watched(graph: Graph, values: Any, plan: Plan, certify: bool = True) -> mp.Pruned:
        seen.append((plan, copied(values)))
        return finalise(graph, values, plan, certify)

    monkeypatch.setattr(schedules, "_Masked", Watched)
    monkeypatch.setattr(schedules, "finalise", watched)
    return seen


def masked_positions(graph: Graph, plan: Plan, name: str) -> Tensor:
    """Whether each value of a tensor belongs to a unit that a plan leaves out."""
    found = torch.zeros(graph.tensors[name].shape, dtype=torch.bool)
    for group, units in plan.keep.items():
        for part in graph.group(group).slices:
            if part.tensor == name:
                for unit in set(range(graph.group(group).size)) - set(units):
                    found.index_fill_(part.dim, torch.from_numpy(part.index[unit]), True)
    return found


@pytest.mark.parametrize("schedule", ["iterative", "cubic"])
def test_budgets_follow_the_path_and_masked_weights_rest(
    task: mp.Task, graph: Graph, moments: list[Moment], schedule: str
) -> None:
    pruned = train_pruned(task, "macs=0.12", schedule, steps=4, epochs=2)
    *events, (last, _) = moments
    assert len(events) == 4
    assert last is events[-1][0] is pruned.plan
    for step, (plan, weights) in enumerate(events, start=1):
        kept = kept_fraction(schedule, step, 4, 0.12)
        assert 0.93 * kept <= plan.reached["macs"] <= kept
        assert plan.keep == mp.plan(graph.with_values(weights), plan.budget).keep  # of the weights at that moment
    changed = 0
    for (plan, before), (_, after) in pairwise(moments):
        for name, info in graph.tensors.items():
            if info.kind == "parameter":
                rests = masked_positions(graph, plan, name)
                assert torch.equal(before[name][rests], after[name][rests]), name
                changed += int((before[name] != after[name])[~rests].sum())
    assert changed > 10_000


def test_a_masked_unit_comes_back(task: mp.Task, graph: Graph, moments: list[Moment]) -> None:
    data = [(task.train.images[:32], task.train.labels[:32])]  # type: ignore[attr-defined]
    pruned = train_pruned(task, "macs=0.3", "cubic", steps=3, epochs=2, criterion="taylor", data=data)
    plans = [plan for plan, _ in moments[:-1]]
    returned = 0
    for earlier, later in pairwise(plans):
        for name in earlier.keep:
            now = set(later.keep.get(name, range(graph.group(name).size)))
            returned += len(now - set(earlier.keep[name]))
    assert returned > 0
    plan, weights = moments[-2]
    assert plan.keep == mp.plan(graph.with_values(weights), plan.budget, "taylor", data=data).keep
    assert plan.keep != mp.plan(graph, plan.budget, "taylor", data=data).keep  # statistics are of the current weights
    assert pruned.plan.provenance["samples"] == 32


def test_the_cut_is_the_masked_network(task: mp.Task, graph: Graph, moments: list[Moment]) -> None:
    pruned = train_pruned(task, "macs=0.2", "cubic", steps=2, epochs=1)
    plan, values = moments[-1]
    masked = GatedModule(graph.with_values(values)).eval().double()
    masked.mask(plan.keep)
    images = next(iter(task.val))[0].double()
    with torch.no_grad():
        expected = masked(images)
        assert oracle.distance(copy.deepcopy(pruned.module).double()(images), expected) <= 1e-9
        masked.mask({})
        assert oracle.distance(masked(images), expected) > 0.01
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    assert not any(module.training for module in pruned.module.modules())
    assert pruned.plan.reached["macs"] <= 0.2
    assert "schedule cubic, 2 steps, 1 epochs, seed 0" in pruned.notes[-1]


def test_pruning_at_once_is_pruning_and_fine_tuning() -> None:
    torch.manual_seed(0)
    raw = digits()[0]
    loader = Batches(raw.images[:256].double(), raw.labels[:256], 64, shuffle=True)
    model = oracle.alive(ResNet(width=6)).double().eval()
    task = mp.Task(model, loader.images[:1], loader, loader)
    found = train_pruned(task, "macs=0.3", "one_shot", epochs=2, seed=3)
    expected = mp.recover(
        mp.prune(model, task.inputs, "macs=0.3"), task, recipe="finetune+recalibrate", epochs=2, seed=3
    )
    assert found.plan.keep == expected.plan.keep
    with torch.no_grad():
        assert oracle.distance(found.module(loader.images), expected.module(loader.images)) <= 1e-7
    wanted = dict(expected.module.named_parameters())
    for name, parameter in found.module.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-7, atol=1e-9)


def test_statistics_of_batch_norm_are_those_of_the_masked_network(task: mp.Task) -> None:
    for epochs in (0, 1):
        pruned = train_pruned(task, "macs=0.2", epochs=epochs)
        again = copy.deepcopy(pruned.module)
        recalibrate(again, task.train)  # the same data in other batches
        for name, buffer in pruned.module.named_buffers():
            if name.endswith("running_var"):
                assert oracle.distance(buffer, again.get_buffer(name)) <= 0.05, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_small_network_is_trained_to_its_task(task: mp.Task, schedule: str) -> None:
    cut = mp.prune(task.model, task.inputs, budget="macs=0.15")
    pruned = train_pruned(task, "macs=0.15", schedule)
    assert task.score() > 0.9
    assert task.score(cut.module) < 0.5
    assert task.score(pruned.module) > 0.75


def test_equal_seeds_give_equal_bits_and_nothing_else_is_touched(task: mp.Task) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    pairs = [(image, label) for images, labels in task.train for image, label in zip(images, labels, strict=True)]
    loader = torch.utils.data.DataLoader(pairs[:64], 32, shuffle=True)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    other = mp.Task(task.model, task.inputs, loader, task.val)
    options = {"criterion": "taylor", "data": loader, "epochs": 2, "steps": 2, "settings": Settings(lr=0.01)}
    one, two, three = (train_pruned(other, "macs=0.4", seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert one.plan.keep == two.plan.keep
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(one.module.parameters(), three.module.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"schedule": "magic"}, OptionError, "schedule: 'magic' is unknown"),
        ({"steps": 0}, OptionError, "steps: a positive whole number"),
        ({"epochs": -1}, OptionError, "epochs"),
        ({"seed": "x"}, OptionError, "seed: a whole number is needed, not 'x'"),
        ({"budget": "macs=0.001"}, BudgetInfeasible, "can not be met"),
        ({"budget": "speed=0.5"}, OptionError, "speed"),
        ({"criterion": "magic"}, OptionError, "criterion: 'magic'"),
        ({"allocator": "magic"}, OptionError, "allocator: 'magic'"),
        ({"data": iter([])}, OptionError, "data: an iterator"),
    ],
)
def test_what_can_not_be_done_is_said_before_training(
    task: mp.Task, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    def fail(done: int, total: int) -> None:
        raise AssertionError("trained")

    with pytest.raises(error, match=said):
        train_pruned(task, **{"budget": "macs=0.5", "progress": fail, **options})


def test_progress_counts_every_step_and_other_budgets_are_met(task: mp.Task, graph: Graph) -> None:
    seen: list[tuple[int, int]] = []
    report: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    pruned = train_pruned(task, "macs=0.5,params=0.3", steps=3, epochs=1, progress=report)
    steps = len(task.train)
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    assert pruned.plan.reached["macs"] <= 0.5
    assert pruned.plan.reached["params"] <= 0.3
    sizes = {group.name: group.size for group in graph.groups if not group.pinned}
    halved = train_pruned(task, "width=0.5", epochs=0)
    assert {name: len(units) for name, units in halved.plan.keep.items()} == {n: s // 2 for n, s in sizes.items()}


def test_finalise_takes_plans_of_its_network_only(graph: Graph) -> None:
    other = mp.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    with pytest.raises(PlanError, match="another network"):
        finalise(graph, {}, mp.plan(other))
    with pytest.raises(OptionError, match="no tensor"):
        finalise(graph, {"nowhere": torch.zeros(1)}, mp.plan(graph))
