"""Sensitivity curves as data: made from few points, without data, with senseless options, in files, and added up."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.monotone import along, non_increasing, through
from metaprune.ranking import score
from tests.support import oracle
from tests.support.cases import Net
from tests.support.layers import rows
from tests.support.sensitive import EVERY, free, small, traced

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
    graph, x = traced("residual")
    found = mp.sensitivity(graph)
    assert found.kinds == ("weights",)
    assert found.provenance["method"] == "weights"
    assert found.provenance["data"] is None
    assert (found.forwards, found.samples) == (0, 0)
    ranked = mp.sensitivity(graph, [x], "fisher", method="weights")
    assert (ranked.forwards, ranked.samples) == (3, len(x))
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
        ({"compensate": 2}, "compensate: must be"),
        ({"samples": 0}, "samples: must be"),
        ({"seed": 0.5}, "seed: must be"),
        ({"criterion": "guess"}, "criterion: 'guess' is none of"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    graph, x = small()
    with pytest.raises(OptionError, match=message):
        mp.sensitivity(graph, **{"data": [x], **options})


@pytest.mark.parametrize("method", ["measured", "one_pass", "anchored"])
def test_a_network_without_free_groups_has_no_curves(method: str) -> None:
    found = mp.sensitivity(mp.trace(nn.Linear(5, 3), rows(5)[:2].float()), [rows(5).float()], method=method)
    assert all(not found.of(kind) for kind in ("kl", "mse", "worst"))


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
        report = mp.additivity(graph, found, [x], plans=8)
        assert report.kind == "kl"
        assert report.low <= report.tau <= report.high
        lost = report.summed > 0
        assert report.ratio == pytest.approx(float((report.joint[lost] / report.summed[lost]).mean()))
        halves = [mp.additivity(graph, found, [x[half::2]], plans=8).joint for half in range(2)]
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
