"""Probes on a network that really learned the digits: each figure is computed a second time by other means."""

import copy
import dataclasses
import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import probes
from metaprune.datasets import digits
from metaprune.graphs.errors import OptionError, PlanError
from metaprune.graphs.plan import Plan
from metaprune.losses import cross_entropy
from metaprune.recovery import recalibrate
from metaprune.training import Settings, train

pytestmark = pytest.mark.xdist_group("probes")  # one process: the fixture is expensive


class Net(nn.Module):
    """Convolutions with batch norm, one of them bypassed by a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
        self.outer = nn.Conv2d(10, 12, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        logits: Tensor = self.head(self.last(y + self.outer(self.inner(y))).amax((2, 3)))
        return logits


@pytest.fixture(scope="module")
def task() -> mp.Task:
    train_half, held_out = digits()
    torch.manual_seed(0)
    model = Net()

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    train(model, train_half, objective, Settings(epochs=4))
    return mp.Task(model.eval(), held_out.images[:1], train_half, held_out)


@pytest.fixture(scope="module")
def graph(task: mp.Task) -> Any:
    return mp.trace(task.model, task.inputs)


@pytest.fixture(scope="module")
def pruned(graph: Any) -> mp.Pruned:
    return mp.prune(graph, budget="macs=0.4")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def plain(report: Any) -> list[dict[str, Any]]:
    """The rows after a trip through strict JSON."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(report.rows(), allow_nan=False))
    assert rows == report.rows()
    assert len({tuple(row) for row in rows}) == 1
    return rows


def test_scratch_learns_from_fresh_weights(task: mp.Task, pruned: mp.Pruned) -> None:
    dense, cut = bits(task.model), bits(pruned.module)
    short, long = (probes.scratch(task, pruned, epochs) for epochs in (1, 4))
    assert long.score > 0.7
    assert long.score > short.score
    assert long == probes.scratch(task, pruned, 4)
    assert long.given == task.score(pruned.module)
    assert (long.epochs, long.equal, long.macs) == (4, "epochs", pruned.cost["after"].macs)
    assert same(dense, bits(task.model))
    assert same(cut, bits(pruned.module))
    assert plain(long)[0]["score"] == long.score


def test_scratch_does_not_depend_on_the_inherited_weights(task: mp.Task, pruned: mp.Pruned) -> None:
    other = copy.deepcopy(pruned.module)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.normal_(0, 3)
    assert (
        probes.scratch(task, dataclasses.replace(pruned, module=other), 1).score
        == probes.scratch(task, pruned, 1).score
    )


def test_equal_flops_are_more_epochs(task: mp.Task, pruned: mp.Pruned) -> None:
    before, after = (pruned.cost[when].macs for when in ("before", "after"))
    steps: list[tuple[int, int]] = []
    found = probes.scratch(task, pruned, 2, equal="flops", progress=lambda done, total: steps.append((done, total)))
    assert found.epochs == round(2 * before / after) >= 4
    assert len(steps) == found.epochs * len(task.train)
    assert abs(found.epochs * after - 2 * before) <= after / 2
    assert probes.scratch(task, pruned, 1, equal="flops", dense_macs=3 * after).epochs == 3


def test_scratch_takes_settings(task: mp.Task, pruned: mp.Pruned) -> None:
    slow = probes.scratch(task, pruned, 1, Settings(epochs=99, lr=1e-6))
    assert slow.epochs == 1
    assert slow.score < 0.4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1, "equal": "time"}, "equal: 'time'"),
        ({"epochs": 1, "dense_macs": 10}, "dense_macs"),
        ({"epochs": 1, "equal": "flops", "dense_macs": 0}, "dense_macs"),
    ],
)
def test_scratch_names_bad_options(task: mp.Task, pruned: mp.Pruned, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        probes.scratch(task, pruned, **options)


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall (1945): concordant minus discordant pairs over the geometric mean of the pairs not tied in either."""
    pairs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    untied = [sum(pair[side] != 0 for pair in pairs) for side in (0, 1)]
    return float(sum(a * b for a, b in pairs) / np.sqrt(untied[0] * untied[1]))


def test_rank_fidelity_is_tau_b() -> None:
    generator = np.random.default_rng(0)
    proxy, one, two = generator.integers(5, size=(3, 15)).astype(float)  # with ties
    single = probes.rank_fidelity(proxy, one, resamples=50)
    assert single.tau == pytest.approx(tau_b(proxy, one))
    assert single.ceiling is None
    double = probes.rank_fidelity(proxy, one, two, resamples=50)
    assert double.tau == pytest.approx((tau_b(proxy, one) + tau_b(proxy, two)) / 2)
    assert double.ceiling == pytest.approx(tau_b(one, two))
    assert double.count == plain(double)[0]["count"] == 15
    assert plain(single)[0]["ceiling_low"] is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    correlation = 0.6
    truth = 2 / np.pi * np.arcsin(correlation)  # Kendall's tau of a bivariate normal distribution
    inside = 0
    for seed in range(30):
        a, noise = np.random.default_rng(seed).normal(size=(2, 30))
        found = probes.rank_fidelity(a, correlation * a + 0.8 * noise, confidence=0.8, resamples=100, seed=seed)
        assert found.low <= found.tau <= found.high
        inside += found.low <= truth <= found.high
    assert 18 <= inside <= 29


def test_more_configurations_narrow_the_interval_and_the_seed_decides() -> None:
    a, noise = np.random.default_rng(3).normal(size=(2, 80))
    few, many = (probes.rank_fidelity(a[:n], (a + noise)[:n], resamples=100) for n in (10, 80))
    assert many.high - many.low < few.high - few.low
    assert few == probes.rank_fidelity(a[:10], (a + noise)[:10], resamples=100)
    assert few != probes.rank_fidelity(a[:10], (a + noise)[:10], resamples=100, seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"proxy": [1, 2]}, "proxy: one number"),
        ({"proxy": [1, 1, 1]}, "proxy: all values are equal"),
        ({"final_a": [1, 2, float("nan")]}, "final_a: a value is not finite"),
        ({"final_b": [1, 2, 3, 4]}, "equal lengths"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_rank_fidelity_names_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        probes.rank_fidelity(**{"proxy": [1, 2, 3], "final_a": [1, 3, 2], **options})


def test_ablation_is_a_real_cut_of_one_group(task: mp.Task, graph: Any) -> None:
    dense, source = bits(task.model), task.train.generator  # type: ignore[attr-defined]
    state = source.get_state()
    found = probes.ablation(graph, task, (0.5, 0.1))
    assert same(dense, bits(task.model))
    assert torch.equal(state, source.get_state())
    assert (found.score, found.macs) == (task.score(), graph.cost().macs)
    free = [group.name for group in graph.groups if not group.pinned]
    assert [(row["group"], row["fraction"]) for row in plain(found)] == [(n, f) for f in (0.5, 0.1) for n in free]
    assert not found.untouched
    for trial in found.trials:
        alone = mp.prune(graph, budget=f"width={trial.fraction}", only=trial.group)
        assert list(alone.plan.keep) == [trial.group]
        source.manual_seed(0)
        recalibrate(alone.module, task.train)
        assert trial.score == pytest.approx(task.score(alone.module), abs=1e-12)
        assert trial.macs == alone.cost["after"].macs < found.macs
        assert trial.kept == len(alone.plan.keep[trial.group]) < trial.size
    assert max(row["drop"] for row in found.rows()) > 0.2


def test_a_group_that_loses_nothing_is_not_reported_as_robust(task: mp.Task, graph: Any) -> None:
    found = probes.ablation(graph, task, (0.955,), certify=False)  # 11.46 of 12 units: 11; 9.55 of 10: all
    assert found.untouched == ("inner.0",)
    assert "inner.0" not in {trial.group for trial in found.trials}


def test_ablation_with_data(task: mp.Task, graph: Any) -> None:
    data = [next(iter(task.val))[0][:32]]
    found = probes.ablation(graph, task, (0.5,), criterion="fisher_block", data=data, certify=False)
    assert len(found.trials) == 3
    assert all(0 <= trial.score <= 1 for trial in found.trials)


@pytest.mark.parametrize("fractions", [(), (0.0,), (1.0,), (0.5, 1.5)])
def test_ablation_names_bad_fractions(task: mp.Task, graph: Any, fractions: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="fractions"):
        probes.ablation(graph, task, fractions)


def index(values: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """The PQ index written with means of powers: |w|_p d^(-1/p) is the power mean of order p."""
    low, high = ((values.double().abs() ** e).mean() ** (1 / e) for e in (p, q))
    return float(1 - low / high)


def test_pqi_of_weights_and_of_unit_scores(task: mp.Task, graph: Any) -> None:
    curve = probes.pqi_curve(graph, widths=(1.0, 0.5))
    table = {(row["width"], row["group"]): row for row in plain(curve)}
    for width in (1.0, 0.5):
        module = mp.prune(graph, budget=f"width={width}").module
        weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.ndim > 1])
        assert table[width, None]["index"] == pytest.approx(index(weights), rel=1e-6)
        assert table[width, None]["count"] == len(weights)
    net = task.model
    norms = (net.inner[0].weight.square().sum((1, 2, 3)) + net.outer.weight.square().sum((0, 2, 3))).detach()
    norms = (norms + net.inner[1].weight.detach() ** 2 + net.inner[1].bias.detach() ** 2).sqrt()
    assert table[1.0, "inner.0"]["index"] == pytest.approx(index(norms), rel=1e-5)
    assert table[0.5, "inner.0"]["index"] == pytest.approx(index(norms.sort().values[-5:]), rel=1e-5)
    assert table[0.5, "inner.0"]["count"] == 5


def test_pqi_knows_its_extremes_and_no_scale(graph: Any) -> None:
    from metaprune.search.pqi import pq_index

    assert pq_index(np.full(7, 3.0), 0.5, 1.0) == pytest.approx(0, abs=1e-12)
    assert pq_index(np.eye(7)[2], 0.5, 1.0) == pytest.approx(1 - 1 / 7, abs=1e-12)
    values = np.random.default_rng(0).normal(size=50)
    assert pq_index(1e250 * values, 0.5, 2.0) == pytest.approx(pq_index(values, 0.5, 2.0), rel=1e-12)
    assert pq_index(np.zeros(4), 0.5, 1.0) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"p": 1.0}, "p, q"), ({"p": 0.0}, "p, q"), ({"widths": ()}, "widths"), ({"widths": (0.0,)}, "width")],
)
def test_pqi_names_bad_options(graph: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        probes.pqi_curve(graph, **options)


def test_collapse_of_a_bypassed_group_does_not_throttle(graph: Any) -> None:
    report = probes.collapse(graph, Plan({"inner.0": (3,)}, graph.fingerprint))
    assert [r.group for r in report.collapsed] == ["inner.0"]
    narrowest = report.narrowest
    assert narrowest is not None
    assert (narrowest.group, narrowest.kept, narrowest.size, narrowest.fraction) == ("inner.0", 1, 10, 0.1)
    assert narrowest.single
    assert not narrowest.thin  # a tenth is not below a tenth
    assert not report.throttled


@pytest.mark.parametrize("group", ["stem.0", "last.0"])
def test_collapse_of_a_group_on_every_path_throttles(graph: Any, group: str) -> None:
    report = probes.collapse(graph, Plan({group: (0,)}, graph.fingerprint))
    assert report.throttled
    assert [r.group for r in report.collapsed if r.single and r.thin] == [group]
    assert len(plain(report)) == 3


def test_collapse_reads_plans_and_pruned_networks(graph: Any, pruned: mp.Pruned) -> None:
    report = probes.collapse(graph, pruned, threshold=0.75)
    assert report == probes.collapse(graph, pruned.plan, threshold=0.75)
    kept = {name: len(units) for name, units in pruned.plan.keep.items()}
    for row in report.rows():
        assert row["kept"] == kept.get(row["group"], row["size"])
        assert row["thin"] == (row["kept"] / row["size"] < 0.75)
    whole = probes.collapse(graph, Plan({}, graph.fingerprint))
    assert not whole.collapsed
    assert not whole.throttled


def test_collapse_refuses_another_networks_plan(graph: Any) -> None:
    with pytest.raises(PlanError, match="another network"):
        probes.collapse(graph, Plan({}, "other"))
    with pytest.raises(PlanError, match="no group"):
        probes.collapse(graph, Plan({"no such": (0,)}, ""))
