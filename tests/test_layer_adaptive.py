"""Allocation by curves: exact on small networks, never over budget, never worse than any other allocator's sum."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.graphs.ir import Graph
from metaprune.judge import Judge
from metaprune.search.allocate import ALLOCATORS, find
from metaprune.search.budget import Budget
from metaprune.search.problem import Problem, least_kept

SOLVERS = ("dp", "milp", "lagrange")


class _Residual(nn.Module):
    """A stem, two residual blocks with inner widths, and a head."""

    def __init__(self, width: int, inner: tuple[int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.ModuleList([nn.Conv2d(width, n, 3, padding=1) for n in inner])
        self.second = nn.ModuleList([nn.Conv2d(n, width, 3, padding=1) for n in inner])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, second in zip(self.first, self.second, strict=True):
            x = (x + second(first(x).relu())).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _graph(width: int = 12, inner: tuple[int, int] = (20, 9), seed: int = 0) -> Graph:
    torch.manual_seed(seed)
    return mp.trace(_Residual(width, inner).double().eval(), torch.randn(1, 1, 6, 6, dtype=torch.float64))


def _images(count: int = 60, seed: int = 0) -> list[Tensor]:
    return [torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]


def _problem(graph: Graph, budget: str, seed: int = 0, step: int = 1) -> Problem:
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    draw = np.random.default_rng(seed)
    scores = [draw.gamma(1.0, size=graph.groups[i].size) * draw.gamma(1.0) for i in free]
    ones = np.ones(len(free), dtype=np.int64)
    curves = []
    for size in (graph.groups[i].size for i in free):
        curve = np.append(np.sort(draw.gamma(0.3, size=size))[::-1], 0.0)
        curve[: int(draw.integers(1, 2))] = np.inf
        curves.append(curve)
    return Problem(graph.coupling.costs, free, scores, Budget.parse(budget), step * ones, step * ones, seed, curves)


def _harm(problem: Problem, kept: Any) -> float:
    assert problem.curves is not None
    return float(sum(curve[k] for curve, k in zip(problem.curves, kept, strict=True)))


@pytest.mark.parametrize("budget", ["macs=0.5", "macs=0.25", "params=0.4", "macs=0.6,params=0.45,bytes=0.8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_least_sum_of_all_allocations_is_found(budget: str, seed: int) -> None:
    graph = _graph(6, (9, 4), seed)
    problem = _problem(graph, budget, seed)
    least = least_kept(problem)
    every = np.array(list(itertools.product(*(range(a, b + 1) for a, b in zip(least, problem.sizes, strict=True)))))
    fits = problem.budget.excess(problem.costs, problem.full(every)) <= 1
    best = min(_harm(problem, kept) for kept in every[fits])
    for name in ("dp", "milp"):
        kept = find(name)(problem)
        assert problem.excess(kept) <= 1
        assert _harm(problem, kept) == pytest.approx(best, abs=1e-12)
        assert problem.record["gap"] == pytest.approx(0, abs=1e-7)
        assert problem.record["harm"] == pytest.approx(best, abs=1e-12)
    assert best - 1e-12 <= _harm(problem, find("lagrange")(problem)) <= 1.5 * best + 1e-12


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("budget", ["macs=0.5", "macs=0.2", "macs=0.5,params=0.4"])
def test_no_other_allocator_has_a_lower_sum(budget: str, step: int) -> None:
    graph = _graph(48, (100, 70))
    problem = _problem(graph, budget, step=step)
    found = {}
    for name in SOLVERS:
        kept = found[name] = find(name)(problem)
        assert 0.96 if step > 1 else 0.98 < problem.excess(kept) <= 1
        assert not (kept[kept < problem.sizes] % step).any()
        assert (kept >= problem.minimum).all()
    least = least_kept(problem)
    for name in sorted(set(ALLOCATORS) - {*SOLVERS, "spdy", "refined"}):
        other = find(name)(problem)
        if (other >= least).all():
            assert _harm(problem, found["milp"]) <= _harm(problem, other) * 1.02 + 1e-9, name


def test_a_plan_by_measured_curves_says_how_it_was_found(tmp_path: Any) -> None:
    graph = _graph()
    plan = mp.plan(graph, "macs=0.5", allocator="dp", data=_images())
    assert plan.reached["macs"] <= 0.5
    assert plan.provenance["curves"]["kind"] == "kl"
    assert plan.provenance["curves"]["forwards"] > 0
    solver = plan.provenance["solver"]
    assert solver["gap"] == 0
    curves = mp.sensitivity(graph, _images(), "fisher_block", method="anchored", compensate=True)
    assert mp.plan(graph, "macs=0.5", curves).keep == plan.keep  # "dp" is what curves are for
    counts = {group.name: len(plan.keep.get(group.name, range(group.size))) for group in graph.groups}
    assert solver["harm"] >= sum(curves.of()[name][counts[name]] for name in curves.order) - 1e-12
    for name, kept in plan.keep.items():
        assert kept == curves.keep(name, len(kept))
    assert mp.apply(graph, plan).certificate.ok
    curves.save(tmp_path / "curves.json")
    again = mp.Sensitivity.load(tmp_path / "curves.json", graph)
    assert mp.plan(graph, "macs=0.5", again, allocator="milp").keep.keys() == plan.keep.keys()


def test_spdy_measures_what_it_returns() -> None:
    graph, data = _graph(), _images(100)
    plan = mp.plan(graph, "macs=0.4", allocator="spdy", data=data)
    solver = plan.provenance["solver"]
    assert Judge(graph, data).distortions([plan.keep]) == [pytest.approx(solver["loss"])]
    assert solver["loss"] <= min(solver["loss_of_solver"], solver["loss_of_uniform"])
    assert plan.reached["macs"] <= 0.4
    before = np.random.get_state()[1].tolist()
    again = mp.plan(graph, "macs=0.4", allocator="spdy", data=data)
    assert again.keep == plan.keep
    assert again.provenance["solver"] == solver
    assert np.random.get_state()[1].tolist() == before  # nobody else's draws are touched


def test_what_does_not_go_together_is_refused() -> None:
    graph = _graph()
    curves = mp.sensitivity(graph, _images())
    with pytest.raises(OptionError, match="other weights"):
        mp.plan(_graph(seed=1), "macs=0.5", curves)
    with pytest.raises(OptionError, match="another network"):
        mp.plan(_graph(width=10), "macs=0.5", curves)
    with pytest.raises(OptionError, match="data: with curves"):
        mp.plan(graph, "macs=0.5", curves, data=_images())
    with pytest.raises(OptionError, match="'spdy' needs calibration data"):
        mp.plan(graph, "macs=0.5", curves, allocator="spdy")
    with pytest.raises(OptionError, match="no samples"):
        mp.plan(graph, "macs=0.5", allocator="dp", data=[])
    for name in (*SOLVERS, "spdy"):
        with pytest.raises(BudgetInfeasible, match=r"macs=0.0001 can not be met; the least is macs=") as error:
            mp.plan(graph, "macs=0.0001", allocator=name, data=_images())
        assert 0.0001 < error.value.attainable < 0.1


def test_curves_and_calibration_for_the_fit_go_together() -> None:
    graph = _graph()
    curves = mp.sensitivity(graph, _images())
    pruned = mp.prune(graph, budget="macs=0.5", criterion=curves, data=_images())
    assert pruned.plan.provenance["allocator"] == "dp"
    assert any("fitted by least squares" in note for note in pruned.notes)
