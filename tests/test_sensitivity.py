"""Sensitivity curves: against whole gated runs, least squares by hand, Jacobians, and operations that were counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metaprune as mp
from metaprune.curvature import RIDGE, collect_columns
from metaprune.graphs import execute as executor
from metaprune.graphs.cost import macs_by_node
from metaprune.graphs.gates import Gates
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import linear_layers
from metaprune.masking import Change, measure
from metaprune.monotone import non_increasing
from metaprune.quadratic import quadratic_curves
from metaprune.ranking import score
from metaprune.removal import input_dim
from metaprune.statistics import open_gates
from tests.support import oracle
from tests.support.cases import Net
from tests.support.layers import all_columns, refitted, rows
from tests.support.sensitive import EVERY, NETWORKS, free, small, traced


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
    monkeypatch.setattr("metaprune.masking.chunk_size", lambda *_: 30)  # chunks, the last not full
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


def _by_hand(graph: Graph, x: Tensor, group: Group, kept: tuple[int, ...], shifts: dict[str, str]) -> dict[str, Tensor]:
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


def test_only_what_a_change_reaches_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
    changes = [Change({last.name: torch.ones(7, dtype=x.dtype)})] * 3
    measure(graph, changes, [{next(iter(graph.example)): row[None]} for row in x[:20]])
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


# ---- gates


def test_gates_act_only_where_their_groups_are() -> None:
    graph, _ = traced("residual")
    sites = {
        group.name: set(Gates(graph.coupling, {group.name: torch.ones(group.size)}).nodes) for group in free(graph)
    }
    read = {name: {graph.nodes[node].module.rpartition(".")[2] for node in nodes} for name, nodes in sites.items()}
    assert sorted(map(sorted, read.values())) == [["first", "last"], ["head"], ["second"]]
