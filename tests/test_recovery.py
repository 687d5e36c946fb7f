"""Recovery: statistics against torch's own, recipes on a really pruned network, nothing of the input changed."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.demo import ResNet
from metaprune.evaluation import evaluate
from metaprune.losses import cross_entropy
from metaprune.recovery import RUNGS, recalibrate
from metaprune.training import Settings, train

pytestmark = pytest.mark.xdist_group("recovery")  # one process: the fixture is expensive


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.Flatten(), nn.Linear(80, 7), nn.BatchNorm1d(7),
    )  # fmt: skip


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(2 * torch.randn(size, 1, 8, 8) + 1, torch.zeros(size)) for size in sizes]


def test_recalibration_is_a_cumulative_average_in_torchs_own_layers() -> None:
    model = normalised()
    reference = copy.deepcopy(model).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    data = batches(16, 8, 12)
    with torch.no_grad():
        for images, _ in data:
            reference(images)
    assert recalibrate(model, data) == 3
    for name, buffer in reference.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    assert all(module.training for module in model.modules())


def test_recalibration_leaves_out_a_batch_without_variance_and_stops_in_time() -> None:
    one, two, three = normalised(), normalised(), normalised()
    data = batches(16, 16, 1)
    recalibrate(one, data[:2])
    recalibrate(two, [(images[:1], labels[:1]) for images, labels in data])
    recalibrate(three, data, samples=17)  # two batches
    assert same(bits(one), bits(three))
    assert torch.equal(two[8].running_var, torch.ones(7))  # one value per channel: nothing to learn
    assert not torch.equal(two[1].running_var, torch.ones(4))  # 36 values per channel


def test_recalibration_of_a_network_without_batch_norm_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = bits(model)
    assert recalibrate(model, batches(4)) == 0
    assert same(before, bits(model))


@pytest.fixture(scope="module")
def task() -> mp.Task:
    train_half, held_out = digits()
    torch.manual_seed(0)
    model = ResNet(width=12).eval()

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    train(model, train_half, objective, Settings(epochs=5))
    return mp.Task(model, held_out.images[:1], train_half, held_out)


@pytest.fixture(scope="module")
def pruned(task: mp.Task) -> mp.Pruned:
    return mp.prune(task.model, task.inputs, budget="macs=0.25")


@pytest.mark.parametrize(("recipe", "gain"), [(name, 0.1 if name == "recalibrate" else 0.3) for name in RUNGS])
def test_every_rung_recovers_accuracy(task: mp.Task, pruned: mp.Pruned, recipe: str, gain: float) -> None:
    cut, dense = task.score(pruned.module), task.score()
    assert dense > 0.95
    assert cut < dense - 0.2
    recovered = mp.recover(pruned, task, recipe=recipe, epochs=3)
    assert task.score(recovered.module) > cut + gain
    assert recovered.plan == pruned.plan
    assert recovered.notes[:-1] == pruned.notes
    assert f"recovered by {recipe}" in recovered.notes[-1]
    assert not any(module.training for module in recovered.module.modules())


def test_recovery_changes_neither_the_pruned_network_nor_the_teacher(task: mp.Task, pruned: mp.Pruned) -> None:
    before, teacher = bits(pruned.module), bits(task.model)
    modes = [module.training for module in (*pruned.module.modules(), *task.model.modules())]
    grads = [p.requires_grad for p in task.model.parameters()]
    recovered = mp.recover(pruned, task, recipe="recalibrate + kd", epochs=1)
    assert same(before, bits(pruned.module))
    assert same(teacher, bits(task.model))
    assert [module.training for module in (*pruned.module.modules(), *task.model.modules())] == modes
    assert [p.requires_grad for p in task.model.parameters()] == grads
    assert not same(before, bits(recovered.module))


def test_equal_seeds_give_equal_bits(task: mp.Task, pruned: mp.Pruned) -> None:
    one, two, other = (mp.recover(pruned, task, epochs=1, seed=seed) for seed in (3, 3, 4))
    assert same(bits(one.module), bits(two.module))
    assert not same(bits(one.module), bits(other.module))


def test_the_teacher_counts(task: mp.Task, pruned: mp.Pruned) -> None:
    class Contrary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -5 * task.model(x)  # type: ignore[no-any-return]

    misled = mp.recover(pruned, task, teacher=Contrary(), recipe="kd", epochs=2)
    assert task.score(misled.module) < 0.5 < task.score(mp.recover(pruned, task, recipe="kd", epochs=2).module)


def test_progress_counts_every_step(task: mp.Task, pruned: mp.Pruned) -> None:
    seen: list[tuple[int, int]] = []
    mp.recover(pruned, task, epochs=2, progress=lambda done, total: seen.append((done, total)))
    steps = 2 * len(task.train)
    assert seen == [(step, steps) for step in range(1, steps + 1)]


def test_a_recovered_network_is_what_is_saved(task: mp.Task, pruned: mp.Pruned, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    recovered = mp.recover(pruned, task, epochs=1)
    recovered.save(folder)
    images = next(iter(task.val))[0]
    with torch.no_grad():
        assert torch.equal(mp.load(folder).eval()(images), recovered.module(images))
        assert not torch.equal(recovered.module(images), pruned.module(images))
    assert evaluate(mp.load(folder), task.val) == task.score(recovered.module)


@pytest.mark.parametrize("recipe", ["", "magic", "kd+", "kd+magic"])
def test_an_unknown_rung_is_named(task: mp.Task, pruned: mp.Pruned, recipe: str) -> None:
    with pytest.raises(mp.MetapruneError, match=r"recipe: '(magic)?' is unknown, choose from finetune, kd"):
        mp.recover(pruned, task, recipe=recipe)


def test_a_bad_number_of_epochs_is_named(task: mp.Task, pruned: mp.Pruned) -> None:
    with pytest.raises(mp.MetapruneError, match="epochs"):
        mp.recover(pruned, task, epochs=-1)
