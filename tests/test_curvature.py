"""Second moments and the criteria that read them: against brute force on all rows at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.brain_surgeon import obs_update
from metaprune.criteria import CRITERIA, Evidence, Weights, magnitude
from metaprune.curvature import RIDGE, collect_columns
from metaprune.graphs.ir import Graph
from metaprune.removal import removal_error
from metaprune.statistics import collect_second_moments
from tests.support import oracle
from tests.support.cases import Net
from tests.support.layers import all_columns, convolutional, cut_to, group_of, perceptron, refitted, rows


def evidence(graph: Graph, data: Any) -> Evidence:
    values = {name: graph.values[name] for name, info in graph.tensors.items() if info.kind == "parameter"}
    return Evidence(Weights(values), collect_second_moments(graph, data))


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
