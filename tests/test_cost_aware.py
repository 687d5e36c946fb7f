"""Cost-aware allocation against exhaustive search, and its budgets."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible
from metaprune.graphs.ir import Graph
from metaprune.search.allocate import cost_aware
from metaprune.search.budget import Budget
from metaprune.search.problem import Problem
from tests.support import oracle


def graph() -> Graph:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)]
    return mp.trace(oracle.alive(nn.Sequential(*layers)), torch.randn(2, 5))


def problem(budget: str, seed: int, step: int = 1) -> Problem:
    traced = graph()
    free = [i for i, group in enumerate(traced.groups) if not group.pinned]
    generator = np.random.default_rng(seed)
    scores = [generator.gamma(0.5, 10.0 ** generator.uniform(-1, 1), traced.groups[i].size) for i in free]
    steps = np.full(len(free), step, dtype=np.int64)
    return Problem(traced.coupling.costs, free, scores, Budget.parse(budget), steps, steps.copy())


def harm(task: Problem, kept: np.ndarray) -> float:
    return sum(float(np.sort(s)[: len(s) - k].sum()) for s, k in zip(task.scores, kept.tolist(), strict=True))


def optimum(task: Problem) -> float:
    """The least importance that any legal plan within the budget (and the floor of a tenth) loses."""
    floor = np.maximum(task.minimum, np.ceil(0.1 * task.sizes).astype(int))
    plans = np.array(list(product(*(range(f, n + 1) for f, n in zip(floor, task.sizes, strict=True)))))
    fits = task.budget.excess(task.costs, task.full(plans)) <= 1
    return min(harm(task, plan) for plan in plans[fits])


@pytest.mark.parametrize("budget", ["macs=0.7", "macs=0.5", "macs=0.25", "params=0.4", "macs=0.5,params=0.4"])
def test_it_comes_close_to_the_best_of_all_plans(budget: str) -> None:
    ratios = []
    for seed in range(12):
        task = problem(budget, seed)
        kept = cost_aware(task)
        assert task.excess(kept) <= 1
        assert (kept >= task.minimum).all()
        assert (kept <= task.sizes).all()
        ratios.append(harm(task, kept) / optimum(task))
    assert min(ratios) >= 1 - 1e-9
    assert float(np.median(ratios)) <= 1.02
    assert max(ratios) <= 1.25


def test_steps_are_kept() -> None:
    task = problem("macs=0.5", 3, step=2)
    assert (cost_aware(task) % 2 == 0).all()


def test_nothing_goes_when_everything_fits() -> None:
    task = problem("macs=1.0", 0)
    assert (cost_aware(task) == task.sizes).all()


def test_what_can_not_be_met_is_said() -> None:
    with pytest.raises(BudgetInfeasible) as error:
        cost_aware(problem("macs=0.01", 0))
    assert 0.01 < error.value.attainable < 0.2


def test_half_the_width_is_half_of_every_group() -> None:
    task = problem("width=0.5", 0)
    assert (cost_aware(task) == task.sizes // 2).all()
