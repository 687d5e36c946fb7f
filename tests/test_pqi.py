"""The PQ index against hand values, its lower bound against brute force, and the allocator that follows from it."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.graphs.ir import Graph
from metaprune.search.allocate import find
from metaprune.search.budget import Budget
from metaprune.search.pqi import needed, pq_index, sap
from metaprune.search.problem import Problem
from tests.support import oracle

EXPONENTS = [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)]
SCORES = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)


@pytest.mark.parametrize(("p", "q"), EXPONENTS)
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_ends_of_the_index(size: int, p: float, q: float) -> None:
    one_hot = np.zeros(size)
    one_hot[size // 2] = 3.0
    assert abs(pq_index(np.full(size, 0.37), p, q)) <= 1e-12
    assert abs(pq_index(one_hot, p, q) - (1 - size ** (1 / q - 1 / p))) <= 1e-12
    assert pq_index(np.zeros(size), p, q) == 0


def test_a_value_by_hand() -> None:
    # d = 2, p = 1/2, q = 1: 1 - (1 + 3)^2 / (2 * 10) for scores 1 and 9
    assert abs(pq_index(np.array([1.0, 9.0])) - 0.2) <= 1e-12
    # r >= 2 * (1 + 1)^-2 * 0.8
    assert abs(needed(np.array([1.0, 9.0]), eta=1.0) - 0.4) <= 1e-12


@given(SCORES, st.floats(1e-3, 1e3), st.sampled_from(EXPONENTS))
def test_a_factor_changes_nothing_and_the_index_stays_in_its_range(
    values: list[float], factor: float, exponents: tuple[float, float]
) -> None:
    scores, (p, q) = np.array(values), exponents
    index = pq_index(scores, p, q)
    assert 0 <= index <= 1 - len(scores) ** (1 / q - 1 / p) + 1e-9
    assert abs(pq_index(factor * scores, p, q) - index) <= 1e-6
    assert abs(pq_index(-scores[::-1], p, q) - index) <= 1e-9


@given(SCORES, st.sampled_from(EXPONENTS), st.sampled_from([0.0, 1e-3, 0.3]))
def test_no_fewer_units_than_the_bound_hold_the_scores(
    values: list[float], exponents: tuple[float, float], eta: float
) -> None:
    scores, (p, q) = np.sort(np.array(values))[::-1], exponents
    assume(scores.any())  # the index of nothing but zeros is a convention, of which the theorem does not speak
    powers = scores**p
    enough = [r for r in range(1, len(scores) + 1) if powers[r:].sum() <= eta * powers[:r].sum()]
    assert needed(scores, p, q, eta) <= enough[0] + 1e-6


@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_exponents_out_of_order_are_named(p: float, q: float) -> None:
    with pytest.raises(OptionError, match="p: exponents"):
        pq_index(np.ones(3), p, q)


def test_bad_scores_and_shares_are_named() -> None:
    with pytest.raises(OptionError, match="scores"):
        pq_index(np.ones(0))
    with pytest.raises(OptionError, match="eta"):
        needed(np.ones(3), eta=-0.1)


@cache
def graph() -> Graph:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)]
    return mp.trace(oracle.alive(nn.Sequential(*layers)), torch.randn(2, 6))


def problem(budget: str, shapes: tuple[float, ...], step: int = 1, seed: int = 0) -> Problem:
    """Groups of 40 units whose scores are gamma distributed: the smaller the shape, the less even they are."""
    traced = graph()
    free = [i for i, group in enumerate(traced.groups) if not group.pinned]
    generator = np.random.default_rng(seed)
    scores = [generator.gamma(shape, 1.0, traced.groups[i].size) for i, shape in zip(free, shapes, strict=True)]
    steps = np.full(len(free), step, dtype=np.int64)
    return Problem(traced.coupling.costs, free, scores, Budget.parse(budget), steps, steps.copy())


@pytest.mark.parametrize(
    "budget", ["macs=0.8", "macs=0.5", "macs=0.2", "params=0.4", "bytes=0.6", "macs=0.5,params=0.3"]
)
@pytest.mark.parametrize("step", [1, 4])
def test_a_budget_is_met_and_not_wasted(budget: str, step: int) -> None:
    for seed in range(4):
        task = problem(budget, (0.2, 1.0, 9.0), step, seed)
        kept = sap(task)
        assert task.excess(kept) <= 1
        assert (kept >= task.minimum).all()
        assert (kept <= task.sizes).all()
        assert (kept % step == 0).all()
        more = [kept + step * np.eye(len(kept), dtype=np.int64)[i] for i in range(len(kept)) if kept[i] < 40]
        assert task.excess(kept) >= 0.98 or all(task.excess(counts) > 1 for counts in more)


@pytest.mark.parametrize("order", [(0.2, 1.0, 9.0), (9.0, 0.2, 1.0), (1.0, 9.0, 0.2)])
def test_groups_with_uneven_scores_lose_more(order: tuple[float, ...]) -> None:
    for budget in ("macs=0.7", "macs=0.5", "params=0.4"):
        kept = sap(problem(budget, order))
        by_shape = [kept[order.index(shape)] for shape in (0.2, 1.0, 9.0)]
        assert by_shape == sorted(set(by_shape)), by_shape


def test_shares_lost_are_in_the_ratio_of_the_demands() -> None:
    task = problem("macs=0.75", (0.5, 1.0, 2.0))
    lost = (task.sizes - sap(task)) / task.sizes
    demand = np.array([1 - needed(s) / len(s) for s in task.scores])
    gamma = lost / demand
    assert np.ptp(gamma) <= 2 / 40 / demand.min()  # each count is a unit off at most, and may get one back


def test_even_scores_make_it_uniform() -> None:
    task = problem("macs=0.5", (1.0, 1.0, 1.0))
    even = Problem(task.costs, task.free, [np.ones(40)] * 3, task.budget, task.step, task.minimum)
    assert (sap(even) == find("uniform")(even)).all()


def test_nothing_goes_when_everything_fits_and_width_is_width() -> None:
    assert (sap(problem("macs=1.0", (0.2, 1.0, 9.0))) == 40).all()
    assert (sap(problem("width=0.5", (0.2, 1.0, 9.0))) == 20).all()


def test_what_can_not_be_met_is_said_and_the_least_can() -> None:
    with pytest.raises(BudgetInfeasible) as error:
        sap(problem("macs=0.001", (0.2, 1.0, 9.0)))
    task = problem(f"macs={error.value.attainable + 1e-9}", (0.2, 1.0, 9.0))
    assert (sap(task) == 1).all()


@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "fpgm", "random"])
def test_it_is_an_allocator_of_plans(criterion: str) -> None:
    assert find("sap") is sap
    pruned = mp.prune(graph(), budget="macs=0.4", criterion=criterion, allocator="sap")
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    assert 0.36 <= pruned.plan.reached["macs"] <= 0.4
    assert pruned.plan.provenance["allocator"] == "sap"
