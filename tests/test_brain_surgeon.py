"""The optimal brain surgeon's weight update: against brute force on all rows at once, and on digits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune.brain_surgeon import compensated, obs_update
from metaprune.curvature import RIDGE, collect_columns
from metaprune.datasets import Batches, digits
from metaprune.evaluation import evaluate
from metaprune.removal import removal_error
from metaprune.training import Settings, train
from tests.support import oracle
from tests.support.layers import all_columns, convolutional, cut_to, group_of, perceptron, refitted, rows


def obs_one_by_one(hessian: Tensor, weight: Tensor, lost: Sequence[int]) -> Tensor:
    """Hassibi and Stork's update of one column after the other, the inverse downdated in between."""
    inverse, found = torch.linalg.inv(hessian), weight.clone()
    for q in lost:
        found -= torch.outer(inverse[:, q], found[q]) / inverse[q, q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_updated_weights_are_least_squares_and_the_sum_of_single_updates(bias: bool) -> None:
    net, x = perceptron(bias), rows(6)
    graph, keep = mp.trace(net, x[:2]), (0, 3, 4, 8)
    cut = cut_to(graph, {"0": keep})
    updated = obs_update(cut, [x], ridge=1e-12)
    hidden = net[1](net[0](x)).detach()  # type: ignore[index, operator]
    design = hidden[:, keep].numpy()
    design = np.concatenate([design, np.ones((83, 1))], 1) if bias else design
    expected, *_ = np.linalg.lstsq(design, net(x).detach().numpy(), rcond=None)
    layer = updated.module[2]  # type: ignore[index]
    found = torch.cat([layer.weight.T, layer.bias[None]]) if bias else layer.weight.T
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-8)
    assert torch.equal(cut.module[2].weight, net[2].weight[:, keep])  # type: ignore[index]
    for ridge in (1e-9, RIDGE, 0.3):
        columns = collect_columns(graph, [x])["2.weight"]
        joint, _ = compensated(columns, net[2].weight.detach(), np.array(keep), ridge)  # type: ignore[index, arg-type]
        lost = [7, 1, 2, 5, 6]
        single = obs_one_by_one(columns.hessian(ridge)[0], net[2].weight.detach().T, lost)  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(joint.T, single[list(keep)], rtol=0, atol=1e-8)
        assert float(single[lost].abs().max()) < 1e-8


def test_a_convolution_before_a_norm_is_least_squares_with_its_running_mean() -> None:
    net, x = convolutional(), rows(2, 5, 5)
    graph, keep = mp.trace(net, x[:2]), (0, 2, 3)
    group, behind = group_of(graph, "4.weight", 1), group_of(graph, "8.weight", 1)
    updated = obs_update(cut_to(graph, {group.name: keep, behind.name: (1, 2, 4)}), [x], ridge=1e-11).module
    dense = net[4](net[3](net[2](net[1](net[0](x))))).detach()  # type: ignore[index, operator]
    inner = all_columns(graph, x, "4.weight")[0].reshape(-1, 6, 9)[:, keep].flatten(1).numpy()
    design = np.concatenate([inner, np.ones((len(inner), 1))], 1)
    goal = dense.movedim(1, -1).flatten(0, -2)[:, [1, 2, 4]].numpy()
    expected, *_ = np.linalg.lstsq(design, goal, rcond=None)
    found = updated[4].weight.detach().flatten(1).T.numpy()  # type: ignore[index]
    np.testing.assert_allclose(found, expected[:-1], atol=1e-7)
    mean = net[5].running_mean[[1, 2, 4]].numpy() - expected[-1]  # type: ignore[index]
    np.testing.assert_allclose(updated[5].running_mean.numpy(), mean, atol=1e-7)  # type: ignore[index]


class Halves(nn.Module):
    """A convolution in two groups behind one that repeats its input, so that its columns can be cut alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(12, 8, 3, groups=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z: Tensor = self.head(torch.relu(self.both(torch.cat([y, y], 1))).mean((2, 3)))
        return z


def test_a_convolution_in_groups_is_updated_group_by_group() -> None:
    net, x = oracle.alive(Halves()).double(), rows(2, 5, 5)
    graph, keep = mp.trace(net, x[:2]), (0, 1, 4)
    group = group_of(graph, "both.weight", 1)
    cut = cut_to(graph, {group.name: keep})
    assert cut.module.both.weight.shape == (8, 3, 3, 3)  # type: ignore[union-attr]
    updated = obs_update(cut, [x], ridge=1e-11).module
    plain = all_columns(graph, x, "both.weight")
    columns = collect_columns(graph, [x])["both.weight"]
    part = next(p for p in group.slices if p.tensor == "both.weight" and p.dim == 1)
    error = removal_error(columns, net.both.weight.detach(), part)  # type: ignore[union-attr, operator, arg-type]
    assert error is not None
    energy, errors = 0.0, np.zeros(6)
    for g in range(2):
        dense = net.both.weight.detach()[4 * g : 4 * g + 4].flatten(1).T  # type: ignore[union-attr, index, operator]
        kept = [c * 9 + k for c in keep for k in range(9)]
        expected, _ = refitted(plain[g], dense, kept, 1e-11, shifted=True)
        found = updated.both.weight[4 * g : 4 * g + 4].detach().flatten(1).T  # type: ignore[union-attr, index]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
        energy += float((plain[g] @ dense).var(0, correction=0).sum()) * plain.shape[1]
        for unit in range(6):
            others = [c for c in range(54) if c // 9 != unit]
            errors[unit] += refitted(plain[g], dense, others, RIDGE, shifted=True)[1]
    np.testing.assert_allclose(error.numpy(), errors / energy, rtol=1e-6)


def test_layers_that_lost_no_input_stay_as_they_are() -> None:
    net, x = convolutional(), rows(2, 5, 5)
    graph = mp.trace(net, x[:2])
    cut = cut_to(graph, {group_of(graph, "8.weight", 1).name: (0, 1, 3)})
    before = {name: value.clone() for name, value in cut.module.state_dict().items()}
    after = obs_update(cut, [x])
    changed = {n for n, value in after.module.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"8.weight", "8.bias"}
    assert all(torch.equal(value, before[name]) for name, value in cut.module.state_dict().items())
    assert after.notes[-1].startswith("1 layers given")


# ---- whole networks


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Any], Batches]:
    batches, test = digits(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    train(model, batches, lambda logits, x, y: F.cross_entropy(logits, y), Settings(epochs=4))
    return model.eval(), list(dataclasses.replace(batches, augment=None)), test


def test_digits_by_obspa(trained: tuple[nn.Module, list[Any], Batches]) -> None:
    model, data, test = trained
    graph = mp.trace(model, data[0][0][:2])
    plan = mp.plan(graph, "macs=0.4", criterion="obspa", data=data)
    assert plan.provenance["samples"] == 256
    assert plan == mp.plan(graph, "macs=0.4", criterion="obspa", data=data)
    cut = mp.apply(graph, plan)
    assert cut.certificate is not None
    assert cut.certificate.ok
    updated = obs_update(cut, data, samples=1000)
    scores = {name: evaluate(m, test) for name, m in [("dense", model), ("cut", cut.module), ("obs", updated.module)]}
    assert scores["obs"] > scores["dense"] - 0.05
    again = obs_update(cut, data, samples=1000)
    pairs = zip(updated.module.state_dict().values(), again.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("criterion", ["wanda", "obspa"])
def test_noise_stands_in_for_data(criterion: str, trained: tuple[nn.Module, list[Any], Batches]) -> None:
    model, data, test = trained
    graph = mp.trace(model, data[0][0][:2])
    cut = mp.apply(graph, mp.plan(graph, "macs=0.5", criterion=criterion, data="noise"))
    updated = obs_update(cut, "noise")
    scores = [evaluate(m, test) for m in (model, cut.module, updated.module)]
    assert scores[2] > scores[1] + 0.03


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda cut: obs_update(cut, []), "no samples"),
        (lambda cut: obs_update(cut, torch.randn(4, 6)), "batches are needed"),
        (lambda cut: obs_update(cut, [torch.full((4, 6), float("nan")).double()]), "2.weight reads are not finite"),
        (lambda cut: obs_update(cut, "noise", ridge=0.0), "ridge"),
        (lambda cut: collect_columns(cut.original, "noise", memory=1000), "of 2.weight alone"),
        (lambda cut: mp.plan(cut.original, criterion="obspa"), "needs calibration data"),
        (lambda cut: collect_columns(mp.trace(perceptron().to("meta"), rows(6)[:2].to("meta")), []), "on the meta"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(call: Callable[[mp.Pruned], Any], said: str) -> None:
    cut = cut_to(mp.trace(perceptron(), rows(6)[:2]), {"0": (0, 1, 2)})
    with pytest.raises(mp.MetapruneError, match=said):
        call(cut)
