"""Second moments, the criteria that read them and the weight update: against brute force on all rows at once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import metaprune as mp
from metaprune.brain_surgeon import compensated, obs_update
from metaprune.criteria import CRITERIA, Evidence, Weights, magnitude
from metaprune.curvature import RIDGE, collect_columns
from metaprune.datasets import Batches, digits
from metaprune.evaluation import evaluate
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import linear_layers
from metaprune.graphs.replay import Replay
from metaprune.removal import removal_error
from metaprune.statistics import collect_second_moments
from metaprune.training import Settings, train
from tests.support import oracle
from tests.support.cases import Net, conv

Array = NDArray[np.float64]


def perceptron(bias: bool = True) -> nn.Module:
    return oracle.alive(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=bias))).double()


def convolutional() -> nn.Module:
    """Each kind of reader: a convolution, a depthwise one, one before a norm, a linear layer behind a flattening."""
    layers = [conv(2, 6), nn.ReLU(), conv(6, 6, groups=6), nn.Tanh(), conv(6, 5, bias=False), nn.BatchNorm2d(5)]
    return oracle.alive(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 25, 3))).double().eval()


def rows(*shape: int, seed: int = 1) -> Tensor:
    """Inputs of mean 0.3, more of them than a chunk and no multiple of it."""
    return torch.randn(83, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


def evidence(graph: Graph, data: Any) -> Evidence:
    values = {name: graph.values[name] for name, info in graph.tensors.items() if info.kind == "parameter"}
    return Evidence(Weights(values), collect_second_moments(graph, data))


def all_columns(graph: Graph, x: Tensor, weight: str) -> Tensor:
    """The columns of a layer on all inputs at once, shape [groups, rows, width]."""
    layer = next(layer for layer in linear_layers(graph).values() if layer.weight == weight)
    replay = Replay(graph, {n: v.detach() for n, v in graph.values.items()}, [{next(iter(graph.example)): x}])
    replay._left.update([layer.input])
    return layer.columns(replay.get(layer.input)[0])


def refitted(x: Tensor, weight: Tensor, kept: Sequence[int], ridge: float, shifted: bool) -> tuple[Array, float]:
    """Least squares by numpy on rows: the weights that stay nearest without some columns, and the least objective.

    The ridge is written as rows that ask for the dense weights.
    """
    data, dense = x.numpy(), weight.numpy()
    data = data - data.mean(0) if shifted else data
    strength = (ridge * np.square(data).sum(0).mean()) ** 0.5
    wide = np.concatenate([data, strength * np.eye(data.shape[1])])
    goal = wide @ dense
    found, *_ = np.linalg.lstsq(wide[:, kept], goal, rcond=None)
    return found, float(np.square(wide[:, kept] @ found - goal).sum())


def group_of(graph: Graph, weight: str, dim: int) -> Group:
    return next(g for g in graph.groups if any((p.tensor, p.dim) == (weight, dim) for p in g.slices))


def cut_to(graph: Graph, keep: dict[str, tuple[int, ...]]) -> mp.Pruned:
    return mp.apply(graph, dataclasses.replace(mp.plan(graph, "macs=1.0"), keep=keep))


# ---- second moments


def test_moments_are_those_of_all_rows() -> None:
    net, x = convolutional(), rows(2, 5, 5)
    graph = mp.trace(net, x[:2])
    found = collect_columns(graph, [(x[:50], torch.zeros(50)), x[50:]])
    assert set(found) == {"0.weight", "2.weight", "4.weight", "8.weight"}
    for weight, columns in found.items():
        plain = all_columns(graph, x, weight)
        wide = torch.cat([plain, torch.ones_like(plain[..., :1])], 2)
        torch.testing.assert_close(columns.moment, wide.transpose(1, 2) @ wide, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(columns.energy, plain.square().mean(1))
        about = plain - plain.mean(1, keepdim=True)
        torch.testing.assert_close(columns.hessian(), about.transpose(1, 2) @ about, rtol=1e-9, atol=1e-9)
        assert columns.samples == 83
    assert {weight: columns.shift for weight, columns in found.items()} == {
        "0.weight": "0.bias",
        "2.weight": "2.bias",
        "4.weight": "5.running_mean",
        "8.weight": "8.bias",
    }
    assert set(collect_columns(graph, [x], weights=["4.weight"])) == {"4.weight"}


def test_a_value_read_by_several_layers_is_seen_by_all_and_what_fits_no_shift_has_none() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.first(x))
        out: Tensor = net.left(y) + net.right(y) + net.late(net.norm(net.right_in(y)) + net.norm(y))
        return out

    def plain(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    parts = {"left": plain(8, 3), "right": plain(8, 3), "right_in": plain(8, 8), "late": plain(8, 3)}
    net = oracle.alive(Net(body, first=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), **parts)).double().eval()
    graph, x = mp.trace(net, rows(4)[:2]), rows(4)
    found = collect_columns(graph, [x])
    for weight, columns in found.items():
        plain_columns = all_columns(graph, x, weight)
        torch.testing.assert_close(columns.moment[:, :-1, :-1], plain_columns.transpose(1, 2) @ plain_columns)
        assert columns.shift == ("first.bias" if weight == "first.weight" else "")  # the norm serves two


def test_many_rows_are_sampled_by_the_seed() -> None:
    graph = mp.trace(nn.Conv2d(1, 2, 3, padding=1), torch.randn(2, 1, 40, 40))
    data = [torch.randn(40, 1, 40, 40)]
    state = torch.random.get_rng_state()
    a, b, c = (collect_columns(graph, data, seed=seed)["weight"] for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert float(a.moment[0, -1, -1]) == 16384
    assert torch.equal(a.moment, b.moment)
    assert not torch.equal(a.moment, c.moment)
    torch.testing.assert_close(a.energy, c.energy, rtol=0.1, atol=0.0)


# ---- criteria


@pytest.mark.parametrize("ridge", [1e-9, RIDGE])
@pytest.mark.parametrize(
    ("build", "shape", "weight"),
    [
        (perceptron, (6,), "2.weight"),
        (lambda: perceptron(bias=False), (6,), "2.weight"),
        (convolutional, (2, 5, 5), "4.weight"),
        (convolutional, (2, 5, 5), "8.weight"),
    ],
)
def test_the_error_of_a_unit_is_that_of_removing_it_and_solving_again(
    build: Callable[[], nn.Module], shape: tuple[int, ...], weight: str, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaprune.curvature.RIDGE", ridge)
    x = rows(*shape)
    graph = mp.trace(build(), x[:2])
    columns = collect_columns(graph, [x])[weight]
    part = next(p for p in group_of(graph, weight, 1).slices if (p.tensor, p.dim) == (weight, 1))
    found = removal_error(columns, graph.values[weight].detach(), part)
    assert found is not None
    plain, matrix = all_columns(graph, x, weight)[0], columns.layer.matrix(graph.values[weight].detach())[0]
    shifted = bool(columns.shift)
    output = plain @ matrix
    energy = float((output - output.mean(0) if shifted else output).square().sum())
    each = columns.layer.width // columns.layer.shape[1]
    for unit, positions in enumerate(part.index.tolist()):
        lost = {p * each + k for p in positions for k in range(each)}
        kept = [c for c in range(columns.layer.width) if c not in lost]
        _, error = refitted(plain, matrix, kept, ridge, shifted)
        assert float(found[unit]) == pytest.approx(error / energy, rel=1e-6)


def test_obspa_sums_over_readers_and_counts_depthwise_matrices_whole() -> None:
    net, x = convolutional(), rows(2, 5, 5)
    graph = mp.trace(net, x[:2])
    group, seen = group_of(graph, "4.weight", 1), evidence(graph, [x])
    assert seen.statistics is not None
    values, moments = seen.weights.values, seen.statistics.columns
    part = next(p for p in group.slices if (p.tensor, p.dim) == ("4.weight", 1))
    behind = removal_error(moments["4.weight"], values["4.weight"].detach(), part)
    assert behind is not None
    outputs = net[2](net[1](net[0](x))).detach()  # type: ignore[index, operator]
    depthwise = outputs.var((0, 2, 3)) / outputs.var((0, 2, 3)).sum()
    expected = behind + depthwise
    torch.testing.assert_close(CRITERIA["obspa"].function(group, seen), expected / expected.mean())


def test_wanda_is_weights_times_activations() -> None:
    net, x = convolutional(), rows(2, 5, 5)
    graph = mp.trace(net, x[:2])
    group, seen = group_of(graph, "4.weight", 1), evidence(graph, [x])
    expected = torch.zeros(6, dtype=torch.float64)
    for weight in ("2.weight", "4.weight"):
        energy, value = all_columns(graph, x, weight).square().mean(1), graph.values[weight].detach()
        for unit in range(6):
            if weight == "2.weight":
                expected[unit] += (value[unit].square().flatten() * energy[unit]).sum()
            else:
                expected[unit] += (value[:, unit].square().flatten(1) * energy[0].reshape(6, 9)[unit]).sum()
    torch.testing.assert_close(CRITERIA["wanda"].function(group, seen), expected / expected.mean())


class Products(nn.Module):
    """Weights stored [inputs, outputs], read by matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(x @ self.a) @ self.b
        return y


def test_weights_stored_the_other_way_round_are_the_same_layer() -> None:
    torch.manual_seed(0)
    products, x = Products().double(), rows(6)
    twin = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 4, bias=False)).double()
    with torch.no_grad():
        twin[0].weight.copy_(products.a.T)
        twin[2].weight.copy_(products.b.T)
    one, two = mp.trace(products, x[:2]), mp.trace(twin, x[:2])
    first, second = group_of(one, "b", 0), group_of(two, "2.weight", 1)
    for name in ("wanda", "obspa"):
        score = CRITERIA[name].function
        torch.testing.assert_close(score(first, evidence(one, [x])), score(second, evidence(two, [x])))
    keep = (0, 2, 3, 6)
    cuts = (cut_to(one, {first.name: keep}), cut_to(two, {second.name: keep}))
    updated = [obs_update(cut, [x]).module for cut in cuts]
    torch.testing.assert_close(updated[0](x), updated[1](x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(updated[0](x), cuts[0].module(x))


def test_units_that_no_layer_reads_are_scored_by_magnitude() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.softmax(net.q(x) @ net.k(x).transpose(1, 2), -1) @ net.v(x)
        out: Tensor = net.o(y)
        return out

    parts = {"q": nn.Linear(5, 6), "k": nn.Linear(5, 6), "v": nn.Linear(5, 7), "o": nn.Linear(7, 3)}
    graph, x = mp.trace(oracle.alive(Net(body, **parts)), torch.randn(2, 4, 5)), torch.randn(40, 4, 5)
    seen, inner = evidence(graph, [x]), group_of(graph, "q.weight", 0)
    for name in ("wanda", "obspa"):
        assert torch.equal(CRITERIA[name].function(inner, seen), magnitude(inner, seen))
        assert not torch.allclose(
            CRITERIA[name].function(group_of(graph, "o.weight", 1), seen).float(),
            magnitude(group_of(graph, "o.weight", 1), seen),
            rtol=0.05,
        )


def test_what_does_not_vary_costs_nothing_where_a_shift_can_replace_it() -> None:
    net = perceptron()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0.0, 3.0  # type: ignore[index, union-attr, operator]
        net[0].weight[5] = net[0].weight[4]  # type: ignore[index, union-attr]
        net[0].bias[5] = net[0].bias[4]  # type: ignore[index, union-attr]
    x = rows(6)
    graph = mp.trace(net, x[:2])
    score = CRITERIA["obspa"].function(group_of(graph, "2.weight", 1), evidence(graph, [x]))
    assert float(score[[2, 4, 5]].max()) < 0.02  # a constant unit, and two of which either can stand for both
    assert float(score[[0, 1, 3, 6, 7, 8]].min()) > 0
    updated = obs_update(cut_to(graph, {"0": (0, 1, 3, 4, 6, 7, 8)}), [x], ridge=1e-9)
    torch.testing.assert_close(updated.module(x), net(x), rtol=1e-6, atol=1e-6)


# ---- the weight update


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
