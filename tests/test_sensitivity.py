"""Sensitivity curves: against whole gated runs, least squares by hand, Jacobians, and operations that were counted."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metaprune as mp
from metaprune.curvature import RIDGE, collect_columns
from metaprune.graphs import execute as executor
from metaprune.graphs.cost import macs_by_node
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import linear_layers
from metaprune.masking import Trial, measure
from metaprune.monotone import along, non_increasing, through
from metaprune.planning import score
from metaprune.quadratic import quadratic_curves
from metaprune.removal import input_dim
from metaprune.statistics import open_gates
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.support.layers import all_columns, convolutional, perceptron, refitted, rows

Array = NDArray[np.float64]
EVERY = 1000  # levels: more than there are


def residual() -> nn.Module:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.stem_norm(net.stem(x)))
        y = torch.relu(y + net.norm(net.second(torch.relu(net.first(y)))))
        out: Tensor = net.head(torch.relu(net.last(y)).mean((2, 3)))
        return out

    parts = {"first": conv(6, 5), "second": conv(5, 6, bias=False), "last": conv(6, 7), "head": nn.Linear(7, 4)}
    norms = {"stem_norm": nn.BatchNorm2d(6), "norm": nn.BatchNorm2d(6)}
    return oracle.alive(Net(body, stem=conv(2, 6, bias=False), **norms, **parts)).double().eval()


def transformer() -> nn.Module:
    """Two heads of four, a feed-forward part, layer norms; the output is one row for each of five tokens."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.embed(x)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(net.norm1(y)).chunk(3, -1))
        y = y + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y + net.down(F.gelu(net.up(net.norm2(y))))
        out: Tensor = net.head(net.norm3(y))
        return out

    norms = {f"norm{i}": nn.LayerNorm(8) for i in (1, 2, 3)}
    parts = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "up": nn.Linear(8, 10), "down": nn.Linear(10, 8)}
    return oracle.alive(Net(body, embed=nn.Linear(3, 8), head=nn.Linear(8, 3), **norms, **parts)).double().eval()


def concatenating() -> nn.Module:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.stem(x))
        y = torch.cat([y, torch.relu(net.one(net.norm1(y).relu()))], 1)
        y = torch.cat([y, torch.relu(net.two(net.norm2(y).relu()))], 1)
        out: Tensor = net.head(y.flatten(1))
        return out

    parts = {"one": conv(4, 3, bias=False), "two": conv(7, 3), "head": nn.Linear(10 * 9, 4)}
    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(7)}
    return oracle.alive(Net(body, stem=conv(2, 4), **norms, **parts)).double().eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (residual, (2, 5, 5)),
    "transformer": (transformer, (5, 3)),
    "dense": (concatenating, (2, 3, 3)),
    "perceptron": (perceptron, (6,)),
    "unshifted": (lambda: perceptron(bias=False), (6,)),
    "convolutional": (convolutional, (2, 5, 5)),
}


@functools.cache
def traced(name: str) -> tuple[Graph, Tensor]:
    """One of the networks, and inputs."""
    build, shape = NETWORKS[name]
    return mp.trace(build(), rows(*shape)[:2]), rows(*shape)[:45]


@functools.cache
def small() -> tuple[Graph, Tensor]:
    """A network of two outputs, so that two directions span them."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    x = rows(5)
    return mp.trace(oracle.alive(net).double(), x[:2]), x


def free(graph: Graph) -> list[Any]:
    return [group for group in graph.groups if not group.pinned]


def silenced(graph: Graph, x: Tensor, keep: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Distances by whole runs of the network, in the words of their definitions."""
    gates = {name: torch.zeros(graph.group(name).size, dtype=x.dtype) for name in keep}
    for name, units in keep.items():
        gates[name][list(units)] = 1
    with torch.no_grad():
        dense, mine = graph.run(None, x), graph.run(tensors, x, gates)
    errors = (mine - dense).square().flatten(1).mean(1)
    found = {"mse": float(errors.mean()), "worst": float(errors.max())}
    if dense.ndim == 2:
        p = dense.softmax(1)
        found["kl"] = float((p * (p.log() - mine.softmax(1).log())).sum(1).mean())
    return found


# ---- measured


@pytest.mark.parametrize("name", ["residual", "transformer", "dense"])
def test_measured_points_are_those_of_whole_gated_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaprune.masking.chunk_size", lambda graph: 30)  # chunks, the last not full
    graph, x = traced(name)
    found = mp.sensitivity(graph, [x[:40], x[40:]], "magnitude", levels=EVERY, method="measured")
    assert found.samples == len(x)
    assert found.kinds == (("mse", "worst") if name == "transformer" else ("kl", "mse", "worst"))
    assert set(found.order) == {group.name for group in free(graph)}
    scores = score(graph, "magnitude").units
    for group in free(graph):
        assert found.levels[group.name].tolist() == list(range(group.minimum, group.size))
        assert (np.diff(scores[group.name][found.order[group.name]]) <= 0).all()
        for i, count in enumerate(found.levels[group.name].tolist()):
            keep = {group.name: found.keep(group.name, count)}
            assert len(keep[group.name]) == count
            for kind, value in silenced(graph, x, keep, {}).items():
                assert found.points[kind][group.name][i] == pytest.approx(value, rel=1e-10, abs=1e-15)
        for kind in found.kinds:
            curve = found.of(kind)[group.name]
            assert curve.shape == (group.size + 1,)
            assert np.isinf(curve[: group.minimum]).all()
            assert (np.diff(curve[group.minimum :]) <= 0).all()
            assert curve[-1] == 0
            np.testing.assert_allclose(curve[group.minimum : -1], non_increasing(found.points[kind][group.name]))


def _by_hand(graph: Graph, x: Tensor, group: Any, kept: tuple[int, ...], shifts: dict[str, str]) -> dict[str, Tensor]:
    """All layers that read a group, fitted by numpy's least squares to what they give on all their inputs."""
    layers = {layer.weight: layer for layer in linear_layers(graph).values()}
    tensors: dict[str, Tensor] = {}
    for part in group.slices:
        layer = layers.get(part.tensor)
        if layer is None or part.dim != input_dim(layer) or layer.groups > 1:
            continue
        each = layer.width // layer.shape[part.dim]
        gone = np.delete(part.index, list(kept), axis=0).flatten()
        stays = np.setdiff1d(np.arange(layer.width), (gone[:, None] * each + np.arange(each)).flatten())
        columns, matrix = all_columns(graph, x, layer.weight)[0], layer.matrix(graph.values[layer.weight].detach())[0]
        shift = shifts[layer.weight]
        fitted = torch.zeros_like(matrix)
        fitted[stays] = torch.from_numpy(refitted(columns, matrix, stays.tolist(), RIDGE, bool(shift))[0])
        tensors[layer.weight] = layer.tensor(fitted[None])
        if shift:
            lost = columns.mean(0) @ (matrix - fitted)
            tensors[shift] = graph.values[shift].detach() + (lost if layer.bias else -lost)
    return tensors


@pytest.mark.parametrize("name", NETWORKS)
def test_compensated_points_are_those_of_layers_fitted_by_least_squares(name: str) -> None:
    graph, x = traced(name)
    found = mp.sensitivity(graph, [x], "magnitude", levels=EVERY, method="measured", compensate=True)
    plain = mp.sensitivity(graph, [x], "magnitude", levels=EVERY, method="measured")
    shifts = {weight: columns.shift for weight, columns in collect_columns(graph, [x]).items()}
    fitted: set[str] = set()
    for group in free(graph):
        for i, count in enumerate(found.levels[group.name].tolist()):
            kept = found.keep(group.name, count)
            tensors = _by_hand(graph, x, group, kept, shifts)
            fitted |= set(tensors)
            wanted = silenced(graph, x, {group.name: kept}, tensors)
            for kind, value in wanted.items():
                assert found.points[kind][group.name][i] == pytest.approx(value, rel=1e-7, abs=1e-13)
    assert fitted >= {
        weight for weight in shifts if any(p.dim and p.tensor == weight for g in free(graph) for p in g.slices)
    }
    better = [found.points["mse"][g.name].sum() < plain.points["mse"][g.name].sum() for g in free(graph)]
    assert np.mean(better) > 0.5


def test_only_what_a_trial_reaches_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = traced("residual")
    last = next(group for group in free(graph) if group.size == 7)
    runs: Counter[str] = Counter()

    def counted(name: str) -> None:
        plain = getattr(executor, name)

        def run(node: Any, *args: Any) -> Any:
            runs[node.module.rpartition(".")[2]] += node.base in ("conv2d", "linear")
            return plain(node, *args)

        monkeypatch.setattr(executor, name, run)

    counted("call")
    counted("gated_call")
    trials = [Trial({last.name: torch.ones(7, dtype=x.dtype)})] * 3
    measure(graph, trials, [{next(iter(graph.example)): row[None]} for row in x[:20]])
    assert {name: count for name, count in runs.items() if count} == {
        "stem": 1, "first": 1, "second": 1, "last": 1, "head": 4,
    }  # fmt: skip


def test_forwards_are_the_operations_that_were_counted() -> None:
    graph, x = traced("residual")
    macs = macs_by_node(graph)
    assert sum(macs.values()) == graph.cost().macs
    with FlopCounterMode(display=False) as once:
        graph.run(None, x)
    with FlopCounterMode(display=False) as counter:
        found = mp.sensitivity(graph, [x], "magnitude", levels=3, method="measured")
    assert found.forwards == pytest.approx(counter.get_total_flops() / once.get_total_flops(), rel=1e-12)
    scored = score(graph, "fisher", [x])
    for options, extra in (({"criterion": "fisher"}, 3), ({"criterion": scored}, 0), ({"compensate": True}, 1 + 3)):
        again = mp.sensitivity(graph, [x], levels=3, method="measured", **options)  # type: ignore[arg-type]
        assert again.forwards == pytest.approx(found.forwards + extra)
    assert mp.sensitivity(graph, [x], "magnitude", method="one_pass", kinds=["kl"]).forwards == 1 + 2 * 2
    assert mp.sensitivity(graph, [x], "magnitude", method="one_pass").forwards == 1 + 2 * (2 + 2)


def _resnet50(width: int) -> nn.Module:
    """The topology of He et al. (2016), table 1, at a fraction of its width."""

    def block(inputs: int, inner: int, stride: int) -> nn.Module:
        def body(net: Any, x: Tensor) -> Tensor:
            out: Tensor = torch.relu(net.main(x) + net.shortcut(x))
            return out

        sizes = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1))
        layers = [nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o)) for i, o, k, s in sizes]
        main = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        same = inputs == 4 * inner
        projection = nn.Sequential(nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
        return Net(body, main=main, shortcut=nn.Identity() if same else projection)

    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, count in enumerate((3, 4, 6, 3)):
        for number in range(count):
            layers.append(block(inputs, width << stage, 2 if stage and not number else 1))
            inputs = 4 * (width << stage)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 20)]
    return nn.Sequential(*layers[:3], nn.MaxPool2d(3, 2, 1), *layers[3:], *head).eval()


def test_anchored_curves_of_a_resnet_50_cost_a_tenth_of_a_table_of_sixteen_levels() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    graph = mp.trace(_resnet50(8), x)
    found = mp.sensitivity(graph, [x])
    assert len(found.order) == 37
    assert found.provenance["method"] == "anchored"
    assert 1 < found.forwards <= 0.1 * 16 * len(found.order)


# ---- one pass


@pytest.mark.parametrize("build", [small, lambda: traced("residual")])
def test_second_order_curves_are_those_of_the_jacobian(build: Any) -> None:
    graph, x = build()
    order = {g.name: np.random.default_rng(0).permutation(g.size) for g in free(graph)}
    leaves = [{next(iter(graph.example)): row[None]} for row in x]
    found, forwards = quadratic_curves(graph, order, leaves, ("kl", "mse", "worst"), directions=10)
    outputs = graph.run(None, x).shape[1]
    assert forwards == 1 + 2 * 2 * outputs
    ones = open_gates(graph)
    for group in free(graph):

        def output(gate: Tensor, row: Tensor, name: str = group.name) -> Any:
            return graph.run(None, row[None], {name: gate})[0]

        one = ones[group.name]
        moves = torch.stack([torch.func.jacrev(output)(one, row) for row in x]).detach()  # [samples, outputs, units]
        p = graph.run(None, x).softmax(1).detach()
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        for count in range(group.size + 1):
            gone = torch.zeros(group.size, dtype=x.dtype)
            gone[list(order[group.name][count:])] = 1
            change = moves @ gone  # [samples, outputs]
            errors = change.square().mean(1)
            wanted = {
                "kl": float(0.5 * torch.einsum("so,sop,sp->s", change, fisher, change).mean()),
                "mse": float(errors.mean()),
                "worst": float(errors.max()),
            }
            for kind, value in wanted.items():
                assert found[kind][group.name][count] == pytest.approx(value, rel=1e-9, abs=1e-14)


def test_few_directions_are_right_in_the_mean() -> None:
    graph, x = traced("residual")
    order = {g.name: np.arange(g.size) for g in free(graph)}
    leaves = [{next(iter(graph.example)): row[None]} for row in x]
    exact, _ = quadratic_curves(graph, order, leaves, ("kl", "mse"), directions=4)
    drawn = [quadratic_curves(graph, order, leaves, ("kl", "mse"), directions=1, seed=s)[0] for s in range(12)]
    for kind, curves in exact.items():
        for name, curve in curves.items():
            mean = np.mean([one[kind][name] for one in drawn], axis=0)
            np.testing.assert_allclose(mean, curve, rtol=0.2)
            assert not np.allclose(drawn[0][kind][name][:-1], curve[:-1], rtol=1e-3)


def test_second_order_is_exact_where_gates_act_linearly() -> None:
    net = oracle.alive(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))).double()
    x = rows(5)
    graph = mp.trace(net, x[:2])
    made = [
        mp.sensitivity(graph, [x], "fisher_block", EVERY if method == "measured" else None, method)
        for method in ("measured", "one_pass", "anchored")
    ]
    assert (np.diff(made[0].points["mse"]["0"]) < 0).all()  # so that nothing is pooled
    for kind in ("mse", "worst"):
        for name, curve in made[0].of(kind).items():
            np.testing.assert_allclose(made[1].of(kind)[name], curve, rtol=1e-10)
            np.testing.assert_allclose(made[2].of(kind)[name], curve, rtol=1e-8)
    assert not np.allclose(made[0].of("kl")["0"], made[1].of("kl")["0"], rtol=1e-3)


# ---- anchored


@pytest.mark.parametrize("compensate", [False, True])
def test_anchored_curves_go_through_what_was_measured_and_follow_the_shape(compensate: bool) -> None:
    graph, x = traced("residual")
    every = mp.sensitivity(graph, [x], "magnitude", EVERY, "measured", compensate)
    found = mp.sensitivity(graph, [x], "magnitude", 3, "anchored", compensate)
    for kind in found.kinds:
        for group in free(graph):
            name, kept = group.name, found.levels[group.name]
            assert len(kept) == 3
            assert kept[0] == group.minimum
            points = found.points[kind][name]
            np.testing.assert_allclose(points, every.points[kind][name][kept - group.minimum], rtol=1e-12)
            curve = found.of(kind)[name]
            np.testing.assert_allclose(curve[kept], non_increasing(points), rtol=1e-12)
            assert (np.diff(curve[group.minimum :]) <= 0).all()
            assert curve[-1] == 0
            assert curve[group.minimum] > 0


# ---- monotone curves


def test_pooling_is_the_nearest_non_increasing_sequence() -> None:
    draw = np.random.default_rng(0)
    for size in range(1, 9):
        values = draw.normal(size=size)
        closed = [min(max(values[a : b + 1].mean() for b in range(i, size)) for a in range(i + 1)) for i in range(size)]
        np.testing.assert_allclose(non_increasing(values), closed)


def test_powers_and_scaled_shapes_are_followed_exactly() -> None:
    kept, gone = np.array([2, 9, 19]), 20.0 - np.arange(21)
    wanted = 3.0 * gone**1.7
    curve = through(kept, wanted[kept], 20, 2)
    np.testing.assert_allclose(curve[2:], wanted[2:], rtol=1e-12)
    assert np.isinf(curve[:2]).all()
    shape = gone**2 + np.sin(gone)
    ratio = np.exp(0.1 * gone)
    for tangent in (False, True):
        found = along(kept[:2], (shape * ratio)[kept[:2]], shape, 2, tangent)
        np.testing.assert_allclose(found[2:10], (shape * ratio)[2:10], rtol=1e-8)
        end = ratio if tangent else np.full(21, ratio[9])
        np.testing.assert_allclose(found[10:], (shape * end)[10:], rtol=1e-8)
        assert np.isinf(found[:2]).all()


def test_zero_and_infinite_points_are_met() -> None:
    kept, shape = np.array([1, 4, 7]), np.zeros(11)
    for values in (np.array([5.0, 2.0, 0.0]), np.array([np.inf, 2.0, 1.0]), np.zeros(3)):
        for tangent in (False, True):
            for curve in (along(kept, values, shape, 1, tangent), through(kept, values, 10, 1)):
                assert not np.isnan(curve).any()
                np.testing.assert_array_equal(curve[kept], values)
                assert (curve[1:-1] >= curve[2:]).all()
                assert np.isfinite(curve[4:]).all()


def test_what_is_no_number_is_infinitely_far() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.stem(x))
        out: Tensor = net.over(y) / net.under(y)
        return out

    parts = {"over": nn.Linear(4, 3, bias=False), "under": nn.Linear(4, 3, bias=False)}
    net = Net(body, stem=nn.Linear(3, 4), **parts)
    with torch.no_grad():
        net.stem.bias.copy_(torch.tensor([3.0, -99.0, 2.0, 1.0]))  # the second unit is dead
    x = torch.rand(8, 3)
    graph = mp.trace(net, x[:2])
    scores = dataclasses.replace(score(graph), units={g.name: np.array([1.0, 9, 2, 3]) for g in free(graph)})
    found = mp.sensitivity(graph, [x], scores, method="measured")
    (curve,) = found.of("mse").values()
    assert np.isinf(curve[1])
    assert np.isfinite(curve[2:]).all()


# ---- without data


def test_weights_alone_give_shares_of_squared_norms() -> None:
    graph, _ = traced("residual")
    found = mp.sensitivity(graph)
    assert found.kinds == ("weights",)
    assert found.provenance["method"] == "weights"
    assert found.provenance["data"] is None
    assert (found.forwards, found.samples) == (0, 0)
    for group in free(graph):
        norms = np.zeros(group.size)
        for part in group.slices:
            if graph.tensors[part.tensor].kind == "parameter":
                moved = graph.values[part.tensor].detach().movedim(part.dim, 0).numpy()
                norms += np.array([np.square(moved[index]).sum() for index in part.index])
        best = np.argsort(-norms, kind="stable")
        curve = found.of()[group.name]
        for count in range(group.minimum, group.size + 1):
            assert curve[count] == pytest.approx(norms[best[count:]].sum() / norms.sum(), rel=1e-6)


@pytest.mark.parametrize("method", ["measured", "one_pass", "anchored"])
def test_noise_stands_for_data_and_equal_seeds_give_equal_bits(method: str) -> None:
    graph, _ = traced("residual")
    state = torch.random.get_rng_state()
    one, same, other = (mp.sensitivity(graph, "noise", method=method, samples=20, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.samples == 20
    assert one.provenance["data"] == "noise"
    assert all(np.array_equal(one.of()[name], same.of()[name]) for name in one.order)
    assert not all(np.array_equal(one.of()[name], other.of()[name]) for name in one.order)


def test_data_may_be_an_iterator_and_the_network_is_not_changed() -> None:
    graph, x = traced("residual")
    before = {name: value.detach().clone() for name, value in graph.values.items()}
    once = mp.sensitivity(graph, iter([(x, torch.zeros(len(x)))]), compensate=True)
    assert all(torch.equal(before[name], value) for name, value in graph.values.items())
    again = mp.sensitivity(graph, [x], compensate=True)
    assert all(np.array_equal(once.of()[name], again.of()[name]) for name in once.order)


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "data: there are no samples"),
        ({"method": "guess"}, "method: 'guess' is none of"),
        ({"data": None, "method": "measured"}, "data: method 'measured' needs"),
        ({"method": "weights", "criterion": "magnitude"}, "data: neither"),
        ({"kinds": ["cosine"]}, "kinds: 'cosine' is none of"),
        ({"kinds": []}, "kinds: at least one"),
        ({"data": None, "kinds": ["kl"]}, "kinds: method 'weights'"),
        ({"levels": 0}, "levels: must be"),
        ({"levels": 4, "method": "one_pass"}, "levels: method 'one_pass' measures nothing"),
        ({"compensate": True, "method": "one_pass"}, "compensate: method 'one_pass' measures nothing"),
        ({"samples": 0}, "samples: must be"),
        ({"seed": 0.5}, "seed: must be"),
        ({"criterion": "guess"}, "criterion: 'guess' is none of"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    graph, x = small()
    with pytest.raises(OptionError, match=message):
        mp.sensitivity(graph, **{"data": [x], **options})


def test_what_does_not_fit_the_network_is_refused() -> None:
    graph, x = small()
    with pytest.raises(OptionError, match="graph: a Graph"):
        mp.sensitivity(None, [x])  # type: ignore[arg-type]
    other = mp.trace(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)), x[:2].float())
    with pytest.raises(OptionError, match="criterion: the scores are not those of group"):
        mp.sensitivity(graph, [x], score(other))
    tokens, rowed = traced("transformer")
    with pytest.raises(OptionError, match="kinds: 'kl' needs one row of logits"):
        mp.sensitivity(tokens, [rowed], kinds=["kl"])
    with pytest.raises(MetapruneError, match="not finite"):
        mp.sensitivity(graph, [x * torch.nan], "magnitude", method="measured")
    with torch.device("meta"):
        meta = mp.trace(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 5))
    with pytest.raises(OptionError, match="meta device"):
        mp.sensitivity(meta)


# ---- files


def test_a_saved_table_comes_back_to_the_bit_and_is_refused_elsewhere(tmp_path: Path) -> None:
    graph, x = small()
    found = mp.sensitivity(graph, [x], levels=2)
    path = tmp_path / "tables" / "curves.json"
    found.save(path)
    again = mp.Sensitivity.load(path, graph)
    for name in ("forwards", "samples", "graph", "weights", "kinds"):
        assert getattr(again, name) == getattr(found, name)
    assert dict(again.provenance) == dict(found.provenance)
    for group in free(graph):
        assert np.array_equal(again.order[group.name], found.order[group.name])
        assert np.array_equal(again.levels[group.name], found.levels[group.name])
        for kind in found.kinds:
            assert np.array_equal(again.of(kind)[group.name], found.of(kind)[group.name])
            assert np.array_equal(again.points[kind][group.name], found.points[kind][group.name])
    with pytest.raises(OptionError, match="kind: 'cosine' is none of"):
        again.of("cosine")
    trained = graph.with_values({"0.weight": graph.values["0.weight"].detach() * 1.001})
    with pytest.raises(OptionError, match="other weights"):
        mp.Sensitivity.load(path, trained)
    other = mp.trace(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double(), x[:2])
    with pytest.raises(OptionError, match="another network"):
        mp.Sensitivity.load(path, other)
    assert mp.Sensitivity.load(path).forwards == found.forwards


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    graph, x = small()
    path = tmp_path / "curves.json"
    mp.sensitivity(graph, [x]).save(path)
    body = json.loads(path.read_text())
    name = next(iter(body["order"]))
    damages = [
        {"schema": 2},
        {"curves": {}},
        {"curves": {"kl": {name: [0.0]}}},
        {"curves": {"kl": [1.0]}},
        {"order": {**body["order"], name: [0] * len(body["order"][name])}},
        {"order": {**body["order"], name: [0.5]}},
        {"forwards": "many"},
        {"graph": 5},
    ]
    for damage in damages:
        path.write_text(json.dumps({**body, **damage}))
        with pytest.raises(LoadError, match="damaged"):
            mp.Sensitivity.load(path)
    path.write_text(json.dumps(body)[:-9])
    with pytest.raises(LoadError, match="damaged"):
        mp.Sensitivity.load(path)
    with pytest.raises(LoadError, match="can not be read"):
        mp.Sensitivity.load(tmp_path / "none.json")


# ---- additivity


@functools.cache
def _two_halves() -> tuple[Graph, Tensor]:
    """Two networks side by side: their errors stand in different outputs, so they add up."""

    def body(net: Any, x: Tensor) -> Tensor:
        return torch.cat([net.left(x), net.right(x)], 1)

    def half() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2))

    x = rows(5)
    return mp.trace(oracle.alive(Net(body, left=half(), right=half())).double(), x[:2]), x


@pytest.mark.parametrize("compensate", [False, True])
def test_independent_groups_add_up(compensate: bool) -> None:
    graph, x = _two_halves()
    found = mp.sensitivity(graph, [x], "magnitude", EVERY, "measured", compensate, kinds=["mse"])
    report = mp.additivity(graph, found, [x], seed=3)
    raw = {name: np.append(np.append(np.inf, found.points["mse"][name]), 0) for name in found.order}
    pooled = max(float(np.abs(found.of()[n][1:] - raw[n][1:]).max()) for n in raw)
    assert report.kind == "mse"
    assert report.samples == len(x)
    np.testing.assert_allclose(report.joint, report.summed, rtol=1e-9, atol=2 * pooled + 1e-12)
    assert report.ratio == pytest.approx(1, abs=0.02)
    assert report.tau > 0.9


def test_additivity_reports_what_was_measured() -> None:
    graph, x = traced("residual")
    for found in (mp.sensitivity(graph, [x], "magnitude"), mp.sensitivity(graph)):
        report = mp.additivity(graph, found, [x], plans=12)
        assert report.kind == "kl"
        assert report.low <= report.tau <= report.high
        lost = report.summed > 0
        assert report.ratio == pytest.approx(float((report.joint[lost] / report.summed[lost]).mean()))
        halves = [mp.additivity(graph, found, [x[half::2]], plans=12).joint for half in range(2)]
        assert report.ceiling == pytest.approx(kendalltau(*halves).statistic)
        assert report.tau == pytest.approx(np.mean([kendalltau(report.summed, half).statistic for half in halves]))
        sizes = (len(x[::2]), len(x[1::2]))
        np.testing.assert_allclose((halves[0] * sizes[0] + halves[1] * sizes[1]) / len(x), report.joint, rtol=1e-9)
    with pytest.raises(OptionError, match="kind: 'cosine'"):
        mp.additivity(graph, found, [x], kind="cosine")
    with pytest.raises(OptionError, match="plans: at least 3"):
        mp.additivity(graph, found, [x], plans=2)
    with pytest.raises(OptionError, match="at least 2 samples"):
        mp.additivity(graph, found, [x[:1]])
    with pytest.raises(OptionError, match="other weights"):
        mp.additivity(graph.with_values({"head.bias": torch.zeros(4, dtype=x.dtype)}), found, [x])


# ---- gates


def test_gates_act_only_where_their_groups_are() -> None:
    graph, _ = traced("residual")
    sites = {
        group.name: set(Gates(graph.coupling, {group.name: torch.ones(group.size)}).nodes) for group in free(graph)
    }
    read = {name: {graph.nodes[node].module.rpartition(".")[2] for node in nodes} for name, nodes in sites.items()}
    assert sorted(map(sorted, read.values())) == [["first", "last"], ["head"], ["second"]]
