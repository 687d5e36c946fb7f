"""Recovery: statistics against torch's own, recipes on a really pruned network, nothing of the input changed."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.demo import ResNet
from metaprune.evaluation import evaluate
from metaprune.features import matched_nodes
from metaprune.graphs.portable import PortableModule, sharing
from metaprune.graphs.survivors import Survivors
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


_GAINS = {"absorb": 0.0, "recalibrate": 0.1, "norm_scale": 0.1}  # the rest trains or fits


@pytest.mark.parametrize("recipe", [*RUNGS, "absorb+recalibrate", "least_squares+kd_features"])
def test_every_rung_recovers_accuracy(task: mp.Task, pruned: mp.Pruned, recipe: str) -> None:
    cut, dense = task.score(pruned.module), task.score()
    assert dense > 0.95
    assert cut < dense - 0.2
    recovered = mp.recover(pruned, task, recipe=recipe, epochs=3)
    assert task.score(recovered.module) > cut + _GAINS.get(recipe.split("+")[-1], 0.3)
    assert recovered.plan == pruned.plan
    assert recovered.notes[: len(pruned.notes)] == pruned.notes
    assert f"recovered by {recipe}" in recovered.notes[-1]
    assert not any(module.training for module in recovered.module.modules())


@pytest.mark.parametrize("recipe", ["recalibrate + kd", "least_squares+norm_scale+kd_features"])
def test_recovery_changes_neither_the_pruned_network_nor_the_teacher(
    task: mp.Task, pruned: mp.Pruned, recipe: str
) -> None:
    before, teacher = bits(pruned.module), bits(task.model)
    modes = [module.training for module in (*pruned.module.modules(), *task.model.modules())]
    grads = [p.requires_grad for p in task.model.parameters()]
    recovered = mp.recover(pruned, task, recipe=recipe, epochs=1)
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


@pytest.mark.parametrize("recipe", ["finetune", "kd_features"])
def test_watching_sees_the_network_on_its_way_and_disturbs_nothing(
    task: mp.Task, pruned: mp.Pruned, recipe: str
) -> None:
    seen: list[tuple[int, int, float, dict[str, Tensor]]] = []

    def watch(network: nn.Module, done: int, total: int) -> None:
        seen.append((done, total, task.score(network), bits(network)))

    recovered = mp.recover(pruned, task, recipe=recipe, epochs=1, watch=watch)
    assert [entry[:2] for entry in seen] == [(step, len(task.train)) for step in range(1, len(task.train) + 1)]
    assert seen[-1][2] == task.score(recovered.module)
    assert same(seen[-1][3], bits(recovered.module))
    assert not same(seen[0][3], seen[-1][3])
    assert same(bits(mp.recover(pruned, task, recipe=recipe, epochs=1).module), bits(recovered.module))


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
    with pytest.raises(
        mp.MetapruneError, match=r"recipe: '(magic)?' is unknown, choose from absorb, finetune, imitate, kd"
    ):
        mp.recover(pruned, task, recipe=recipe)


def test_a_bad_number_of_epochs_is_named(task: mp.Task, pruned: mp.Pruned) -> None:
    with pytest.raises(mp.MetapruneError, match="epochs"):
        mp.recover(pruned, task, epochs=-1)


# ---- features of the network that was cut


class Encoder(nn.Module):
    """One block of a transformer over the eight rows of a digit."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.heads = nn.Linear(8, width), heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images[:, 0])  # (batch, 8, width)
        y = self.first(x)
        parts = [part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


def plain(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise((64, *widths))]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def cut_from(model: nn.Module, task: mp.Task) -> mp.Pruned:
    settings = Settings(epochs=20, lr=0.1)
    train(model, task.train, lambda logits, inputs, labels: cross_entropy(logits, labels), settings)
    return mp.prune(model, task.inputs, budget="width=0.5")


def test_features_are_compared_where_residual_blocks_end(task: mp.Task, pruned: mp.Pruned) -> None:
    survivors = Survivors(pruned.original, pruned.plan.keep)
    names = matched_nodes(pruned.graph, survivors)
    assert [pruned.graph.nodes[name].base for name in names] == ["add"] * 3
    assert [pruned.original.nodes[name].shape[1] for name in names] == [12, 24, 48]
    encoder = mp.prune(Encoder(), task.inputs, budget="width=0.5")
    names = matched_nodes(encoder.graph, Survivors(encoder.original, encoder.plan.keep))
    assert [encoder.graph.nodes[name].shape[1:] for name in names] == [(8, 8)] * 2
    chain = mp.prune(plain(40, 36, 32, 28, 24), task.inputs, budget="width=0.5")
    names = matched_nodes(chain.graph, Survivors(chain.original, chain.plan.keep))
    assert [chain.original.nodes[name].shape[1] for name in names] == [40, 36, 32, 24]


def test_the_shared_form_is_the_module(pruned: mp.Pruned, task: mp.Task) -> None:
    module = copy.deepcopy(pruned.module)
    form, images = sharing(pruned.graph, module), next(iter(task.val))[0]
    form.train()(images).sum().backward()
    twin = copy.deepcopy(pruned.module).train()
    twin(images).sum().backward()
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.sub_(parameter.grad)
        for parameter in twin.parameters():
            parameter.sub_(parameter.grad)
    trained, expected = module.state_dict(), twin.state_dict()
    assert trained.keys() == expected.keys()
    assert any("num_batches_tracked" in name for name in trained)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [Encoder, lambda: plain(48, 40, 32)], ids=["encoder", "plain"])
def test_features_are_distilled_in_any_network(task: mp.Task, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    pruned = cut_from(model, task)
    own = dataclasses.replace(task, model=model)
    dense, cut = own.score(), own.score(pruned.module)
    assert dense > cut + 0.1
    recovered = mp.recover(pruned, own, recipe="kd_features", epochs=2)
    assert own.score(recovered.module) > cut + (dense - cut) / 3
    assert any(note.startswith("features of ") and "of 0" not in note for note in recovered.notes)


def test_native_and_portable_forms_recover_alike(task: mp.Task, pruned: mp.Pruned) -> None:
    assert pruned.kind == "native"
    portable = dataclasses.replace(pruned, module=PortableModule(pruned.graph).eval(), kind="portable")
    one, two = (mp.recover(p, task, recipe="kd_features", epochs=1).module for p in (pruned, portable))
    assert isinstance(two, PortableModule)
    mine, theirs = dict(one.named_parameters()), dict(two.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in mine.items())


def test_features_come_closer_to_the_kept_channels(task: mp.Task, pruned: mp.Pruned) -> None:
    images = next(iter(task.val))[0]
    keep = torch.from_numpy(pruned.kept["head.weight"][1])

    def distance(model: nn.Module) -> float:
        found: list[Tensor] = []
        for network in (task.model, model):
            handle = network.get_submodule("head").register_forward_pre_hook(lambda m, args: found.append(args[0]))
            with torch.no_grad():
                network(images)
            handle.remove()
        return float((found[1] - found[0][:, keep]).square().mean() / found[0][:, keep].square().mean())

    with_features, without = (
        distance(mp.recover(pruned, task, recipe=recipe, epochs=2).module) for recipe in ("kd_features", "kd")
    )
    assert with_features < 0.8 * without
    assert with_features < 0.8 * distance(pruned.module)


@pytest.mark.parametrize("recipe", ["kd", "kd_decoupled", "kd_features"])
def test_a_teacher_with_other_outputs_is_named(task: mp.Task, pruned: mp.Pruned, recipe: str) -> None:
    with pytest.raises(mp.MetapruneError, match=r"^teacher: shape \(\d+, 7\) does not fit"):
        mp.recover(pruned, task, teacher=ResNet(width=4, classes=7), recipe=recipe, epochs=1)


def test_absorbing_after_a_fit_is_refused(task: mp.Task, pruned: mp.Pruned) -> None:
    with pytest.raises(mp.MetapruneError, match="absorb comes first"):
        mp.recover(pruned, task, recipe="least_squares+absorb")
