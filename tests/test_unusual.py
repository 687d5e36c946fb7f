"""Allocation where networks, data or options are unusual: small groups, values that are no numbers, misfits."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible, MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.search.budget import Budget
from metaprune.search.instance import from_problem
from metaprune.search.lagrange import lagrange
from metaprune.search.problem import Problem, check_feasible


class Shares(nn.Module):
    """Its values are divided by their sum: no number is left where that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        return self.head(h / h.sum(1, keepdim=True))


def _mlp(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    pairs = pairwise(widths)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return mp.trace(_mlp(6, 12, 9, 3), torch.randn(8, 6))


@pytest.fixture(scope="module")
def shares() -> Graph:
    torch.manual_seed(0)
    return mp.trace(Shares(), torch.randn(8, 6))


def _data(width: int = 6, count: int = 8) -> list[Tensor]:
    return [torch.randn(count, width, generator=torch.Generator().manual_seed(1))]


def test_a_group_of_two_has_one_anchor() -> None:
    small = mp.trace(_mlp(6, 2, 5, 3), torch.randn(8, 6))
    curves = mp.sensitivity(small, _data(), levels=7)
    sizes = {group.name: group.size for group in small.groups}
    for name, levels in curves.levels.items():
        assert levels.tolist() == list(range(1, sizes[name]))  # all of them, and not the whole group
        for kind in curves.kinds:
            assert np.isfinite(curves.of(kind)[name][1:]).all()


@pytest.mark.parametrize("allocator", ["spdy", "dp", "milp", "lagrange"])
def test_widths_at_which_there_are_no_numbers_are_left_out(shares: Graph, allocator: str) -> None:
    curves = mp.sensitivity(shares, _data(), method="measured", levels=20)
    assert any(np.isinf(curve[1:]).any() for curve in curves.of().values())
    data = _data() if allocator == "spdy" else None
    plan = mp.plan(shares, "macs=0.5", curves, allocator=allocator, data=data)
    assert plan.reached["macs"] <= 0.5
    assert all(np.isfinite(curves.of()[name][len(units)]) for name, units in plan.keep.items())


def test_networks_without_numbers_are_infinitely_far(shares: Graph) -> None:
    plan = mp.plan(shares, "params=0.3,macs=0.6", allocator="spdy", criterion="magnitude", data=_data())
    assert plan.provenance["solver"]["loss"] is None or plan.provenance["solver"]["loss"] >= 0
    json.loads(plan.to_json(), parse_constant=pytest.fail)  # numbers that JSON has


def test_a_cut_that_gives_no_numbers_is_certified_or_refused(shares: Graph) -> None:
    (free,) = (group for group in shares.groups if group.name == "b")
    for unit in range(free.size):
        plan = mp.Plan({"b": (unit,)}, shares.fingerprint)
        try:
            pruned = mp.apply(shares, plan)
        except MetapruneError:
            continue
        assert pruned.certificate is not None
        assert pruned.certificate.ok


@pytest.mark.parametrize("allocator", ["spdy", "refined", "measured"])
def test_plans_that_measure_need_numbers(graph: Graph, allocator: str) -> None:
    data = [torch.full((8, 6), float("nan"))]
    with pytest.raises(MetapruneError, match="data: the network's output is not finite"):
        mp.plan(graph, allocator=allocator, criterion="magnitude", data=data)


@pytest.mark.parametrize(
    "call",
    [
        lambda graph, data: mp.plan(graph, criterion="fisher", data=data),
        lambda graph, data: mp.plan(graph, criterion="magnitude", allocator="spdy", data=data),
        lambda graph, data: mp.plan(graph, criterion="magnitude", allocator="measured", data=data),
        lambda graph, data: mp.sensitivity(graph, data, "magnitude"),
        lambda graph, data: mp.explore(graph, data=data, evaluations=2, criterion="magnitude"),
        lambda graph, data: mp.sparsify(graph, data=data),
        lambda graph, data: mp.prune(graph, data=data, criterion="magnitude"),
    ],
)
@pytest.mark.parametrize("data", [_data(5), [_data()[0].double()]], ids=["shape", "dtype"])
def test_samples_that_do_not_fit_are_refused(graph: Graph, call: Any, data: Any) -> None:
    with pytest.raises(OptionError, match="data: a sample does not fit"):
        call(graph, data)


def test_samples_of_another_size_are_taken_where_the_network_runs_on_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    graph = mp.trace(net, torch.randn(4, 1, 8, 8))
    assert mp.sensitivity(graph, [torch.randn(4, 1, 12, 12)], "magnitude").samples == 4


@pytest.mark.parametrize("seed", [-1, 2**70, 1.0, "x", True])
@pytest.mark.parametrize(
    "call",
    [
        lambda graph, seed: mp.plan(graph, allocator="random", seed=seed),
        lambda graph, seed: mp.plan(graph, "macs=0.5", allocator="spdy", data=_data(), seed=seed),
        lambda graph, seed: mp.sensitivity(graph, "noise", seed=seed),
        lambda graph, seed: mp.additivity(graph, mp.sensitivity(graph), _data(), seed=seed),
        lambda graph, seed: mp.explore(graph, data=_data(), evaluations=2, seed=seed),
        lambda graph, seed: mp.sparsify(graph, method="uniform", seed=seed),
        lambda graph, seed: mp.LatencyTable().calibrate(graph, seed=seed),
    ],
)
def test_seeds_are_whole_numbers_that_generators_take(graph: Graph, call: Any, seed: Any) -> None:
    with pytest.raises(OptionError, match="seed: must be a whole number"):
        call(graph, seed)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda g: mp.plan(g, allocator=["dp"]), "allocator:"),
        (lambda g: mp.plan(g, allocator=""), "allocator:"),
        (lambda g: mp.plan(g, criterion=["fisher"]), "criterion:"),
        (lambda g: mp.plan(g, criterion=""), "criterion:"),
        (lambda g: mp.plan(g, "width=0.5,width=0.4"), "budget: width is given twice"),
        (lambda g: mp.plan(g, "macs=0.5,macs=0.4"), "budget: macs is given twice"),
        (lambda g: mp.plan(g, "macs=0.5", mp.sensitivity(g), "global"), "allocator: 'global' adds up"),
        (lambda g: mp.plan(g, "macs=0.5", mp.sensitivity(g), "cost"), "allocator: 'cost' adds up"),
        (lambda g: mp.sensitivity(g, _data(), kinds=5), "kinds:"),
        (lambda g: mp.explore(g, backend=["dp"], data=_data()), "backend:"),
        (lambda g: mp.explore(g, budget="latency=0.5", data=_data()), "budget: a search can be held to macs"),
        (lambda g: mp.sparsify(g, sparsity="0.5", method="uniform"), "sparsity:"),
        (lambda g: mp.sparsify(g, sparsity=0.5, method="dp", data=_data(), worst_case="mean"), "worst_case:"),
        (lambda g: mp.additivity(g, "curves", _data()), "sensitivity"),
        (lambda g: mp.additivity(g, mp.sensitivity(g), _data(), samples="8"), "samples:"),
        (lambda g: mp.LatencyTable(path=3), "path:"),
        (lambda g: mp.LatencyTable().predict(g, [float("nan")] * len(g.groups)), "kept:"),
    ],
)
def test_options_without_a_meaning_are_named(graph: Graph, call: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        call(graph)


def test_plans_that_lose_nothing_are_not_blamed_on_other_options() -> None:
    net = _mlp(6, 8, 3)
    nn.init.zeros_(net[2].weight)  # the units are of no use, whichever go
    graph = mp.trace(net, torch.randn(8, 6))
    with pytest.raises(OptionError, match=r"^(sensitivity|data): "):
        mp.additivity(graph, mp.sensitivity(graph, _data(), "magnitude"), _data(), plans=4)
    with pytest.raises(OptionError, match="data: all plans lose the same"):
        mp.additivity(graph, mp.sensitivity(graph), _data(), plans=4)


def test_groups_are_named_as_the_graph_names_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 6, 2), nn.ReLU(), nn.Conv1d(6, 2, 1))
    graph = mp.trace(net, torch.randn(4, 2, 12))
    (name,) = (group.name for group in graph.groups if not group.pinned and "[" in group.name)
    assert name not in mp.plan(graph, "macs=0.5", protect=name).keep
    assert set(mp.plan(graph, "macs=0.8", only=name).keep) == {name}


def test_the_least_that_is_named_can_be_asked_for() -> None:
    for widths in ((6, 12, 9, 3), (5, 17, 7), (7, 11, 13, 4)):
        graph = mp.trace(_mlp(*widths), torch.randn(8, widths[0]))
        for allocator in ("uniform", "dp"):
            with pytest.raises(BudgetInfeasible) as error:
                mp.plan(graph, "macs=0.0001", allocator=allocator)
            named = re.search(r"least is (macs=[\d.]+)$", str(error.value))
            assert named is not None
            assert mp.plan(graph, named[1], allocator=allocator).reached["macs"] <= float(named[1][5:])


def test_the_tolerance_of_solvers_does_not_exceed_budgets() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 1))
        graph = mp.trace(net, torch.randn(2, 8, 2048, 2048))
    costs = graph.coupling.costs
    (free,) = [i for i, group in enumerate(graph.groups) if not group.pinned]
    one = np.ones(1, dtype=np.int64)
    half = float(costs.evaluate("macs", np.where(np.arange(len(costs.sizes)) == free, 16, costs.sizes)[None])[0])
    full = float(costs.evaluate("macs", costs.sizes[None])[0])
    curve = np.linspace(1, 0, 33)
    for below, kept in ((0.4, 15), (0.0, 16)):  # multiply-adds that the budget lacks
        budget = Budget.parse(f"macs={(half - below) / full!r}")
        problem = Problem(costs, [free], [curve[1:]], budget, one, one)
        check_feasible(problem)
        found = lagrange(from_problem(problem, [curve], [np.arange(1, 33)]))
        assert 1 + found.choice[0] == kept


def test_what_can_not_be_written_is_named(graph: Graph, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    writers = [mp.sensitivity(graph).save, mp.plan(graph).save, mp.LatencyTable().save]
    for save in writers:
        with pytest.raises(MetapruneError, match="can not be written"):
            save(file / "below.json")


def test_a_budget_that_options_stand_in_the_way_of_names_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    graph = mp.trace(model, torch.randn(2, 8))
    first = graph.groups[0].name
    mp.plan(graph, "macs=0.2")
    with pytest.raises(BudgetInfeasible, match=r"or less without protect$") as caught:
        mp.plan(graph, "macs=0.2", protect=[first])
    assert caught.value.attainable > 0.2
    with pytest.raises(BudgetInfeasible, match=r"or less without round_to$"):
        mp.plan(graph, "macs=0.2", round_to=16)
    with pytest.raises(BudgetInfeasible, match=r"or less without round_to and protect$"):
        mp.plan(graph, "macs=0.2", round_to=32, protect=[first])
    with pytest.raises(BudgetInfeasible, match=r"the least is macs=[0-9.]+$"):
        mp.plan(graph, "macs=0.0001", protect=[first])
