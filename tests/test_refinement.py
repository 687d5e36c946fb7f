"""A predicted loss that is corrected by a few measurements leads to the best allocation, within the budget."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.search.budget import Budget
from metaprune.search.problem import Counts, Kept, Problem
from metaprune.search.refined import refined
from metaprune.search.refinement import Error, refine

LAYERS = 3


@pytest.fixture(scope="module")
def problem() -> Problem:
    widths = (3, 12, 10, 14)
    layers = [x for a, b in itertools.pairwise(widths) for x in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 4)).eval()
    graph = mp.trace(net, torch.randn(2, 3, 8, 8))
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    assert len(free) == LAYERS
    ones = np.ones(LAYERS, dtype=np.int64)
    scores = [np.ones(graph.groups[i].size) for i in free]
    return Problem(graph.coupling.costs, free, scores, Budget.parse("macs=0.4"), ones, ones)


def predicted(kept: Kept) -> Counts:
    found: Counts = np.exp(-0.1 * kept).sum(1)
    return found


def test_error_is_the_posterior_of_a_gaussian_process() -> None:
    draw = np.random.default_rng(0)
    sizes = np.array([8, 12])
    kept = np.stack([draw.integers(1, n + 1, 9) for n in sizes], axis=1)
    values = draw.normal(size=6)
    error = Error(sizes, kept[:6], values)
    mean, deviation = error(kept)
    places = torch.tensor(kept / sizes).log()
    squares = ((places[:, None] - places[None]) ** 2).mean(2)
    known = squares[:6, :6]
    length = float(np.median(known[known > 0]))
    whole = 1.0 + 0.25 * places @ places.T / 2 + max(0.25, values.var()) * torch.exp(-squares / (2 * length))
    noisy = whole[:6, :6] + 0.02 * torch.eye(6)
    across = torch.linalg.solve(noisy, whole[:6])
    assert np.allclose(mean, across.T @ torch.tensor(values))
    assert np.allclose(deviation**2, (whole - whole[:6].T @ across).diagonal())
    assert deviation[:6].max() < 0.15 < deviation[6:].max()


def test_an_offset_alone_moves_nothing(problem: Problem) -> None:
    start = {tuple(problem.minimum.tolist()): 5.0 * float(predicted(problem.minimum[None])[0])}
    found = refine(problem, predicted, lambda kept: 5.0 * predicted(kept), start, rounds=3)
    every = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in problem.sizes), indexing="ij"), -1).reshape(-1, LAYERS)
    within = every[problem.budget.excess(problem.costs, problem.full(every)) <= 1]
    assert min(found.values()) == pytest.approx(5.0 * predicted(within).min(), rel=1e-3)


def test_measurements_lead_from_a_wrong_prediction_to_near_the_best(problem: Problem) -> None:
    asked: list[tuple[int, ...]] = []

    def measured(kept: Kept) -> Counts:
        asked.extend(map(tuple, kept.tolist()))
        wrong = np.log(kept / problem.sizes) @ np.array([1.0, -0.3, -0.7])
        found: Counts = 3.0 * predicted(kept) * np.exp(-wrong)
        return found

    every = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in problem.sizes), indexing="ij"), -1).reshape(-1, LAYERS)
    within = every[problem.budget.excess(problem.costs, problem.full(every)) <= 1]
    best, naive = measured(within).min(), measured(within[predicted(within).argmin()][None])[0]
    start = within[predicted(within).argmin()]
    assert naive > 4 * best  # the prediction alone is far from the optimum
    asked.clear()
    found = refine(problem, predicted, measured, {tuple(start.tolist()): float(naive)}, rounds=6)
    assert min(found.values()) < 1.3 * best
    assert len(asked) == len(set(asked)) == len(found) <= 24
    assert (problem.budget.excess(problem.costs, problem.full(np.array(asked))) <= 1).all()


def test_nothing_measurable_ends_it(problem: Problem) -> None:
    start = tuple(problem.minimum.tolist())

    def impossible(kept: Kept) -> Counts:
        return np.full(len(kept), np.inf)

    assert refine(problem, predicted, impossible, {start: np.inf}) == {}
    assert refine(problem, predicted, impossible, {start: 1.0}, rounds=0) == {}
    found = refine(problem, predicted, impossible, {start: 1.0})
    assert found
    assert set(found.values()) == {np.inf}


def test_the_allocator_never_loses_to_its_starts(problem: Problem) -> None:
    asked: list[tuple[int, ...]] = []

    def measured(kept: Kept) -> Counts:
        asked.extend(map(tuple, kept.tolist()))
        found: Counts = predicted(kept) * np.exp(np.log(kept / problem.sizes) @ np.array([-0.9, 0.4, 0.2]))
        return found

    scores = [np.linspace(0.1, 1.0, size) for size in problem.sizes]
    posed = replace(problem, scores=scores, measure=measured)
    best = refined(posed)
    assert asked.index(tuple(best.tolist())) >= 4  # none of the starts
    losses = measured(np.array(asked))
    assert posed.record["loss"] == losses.min() == measured(best[None])[0]
    assert posed.record["loss_of_solver"] >= losses.min()
    assert posed.record["measured"] == len(set(asked)) <= 4 + 4 * 4
    with pytest.raises(OptionError, match="needs calibration data"):
        refined(replace(posed, measure=None))


def test_it_is_an_allocator_of_plans() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()  # fmt: skip
    data = [torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
    graph = mp.trace(net, data[0][:1])
    plan = mp.plan(graph, "macs=0.5", allocator="refined", data=data)
    about = plan.provenance["solver"]
    assert about["loss"] <= about["loss_of_solver"]
    assert 0.3 < plan.reached["macs"] <= 0.5
    assert plan.keep == mp.plan(graph, "macs=0.5", allocator="refined", data=data).keep
    pruned = mp.prune(graph, budget="macs=0.5", criterion="magnitude", allocator="refined", data=data)
    assert pruned.certificate is not None
    assert pruned.certificate.ok
