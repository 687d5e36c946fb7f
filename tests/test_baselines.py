"""Baseline allocators against closed formulas, and all allocators against the promise that budgets make."""

import itertools
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.graphs.ir import Graph
from metaprune.search.allocate import ALLOCATORS, find
from metaprune.search.baselines import Crop
from metaprune.search.budget import Budget
from metaprune.search.densities import erdos_renyi, leaving, left, spread
from metaprune.search.layers import Layers
from metaprune.search.problem import Problem, least_kept


class _Residual(nn.Module):
    """Two residual blocks around one stream, and a gated unit that two layers write."""

    def __init__(self, width: int = 24, inner: int = 40) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.ModuleList([nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)])
        self.gate, self.value = nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1)
        self.back = nn.Conv2d(inner, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first[1](self.first[0](x).relu())
        x = x + self.back(self.gate(x).sigmoid() * self.value(x))
        return self.head(x.mean((2, 3)))


def _chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def _mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(), nn.Conv2d(24, 40, 1), nn.ReLU(),
        nn.Conv2d(40, 40, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4),
    )  # fmt: skip


def _transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "chain": (_chain, (1, 3, 8, 8)),
    "residual": (_Residual, (1, 3, 8, 8)),
    "depthwise": (_mobile, (1, 3, 8, 8)),
    "transformer": (_transformer, (1, 6, 32)),
}


@cache
def graph(name: str) -> Graph:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return mp.trace(build(), torch.randn(shape))


def problem(name: str, budget: str, step: int = 1, seed: int = 0) -> Problem:
    traced = graph(name)
    free = [i for i, group in enumerate(traced.groups) if not group.pinned]
    draw = np.random.default_rng(seed)
    scores = [draw.gamma(0.7, size=traced.groups[i].size) for i in free]
    steps = np.array([step if traced.groups[i].kind in ("channels", "residual", "ffn") else 1 for i in free])
    least = np.maximum([traced.groups[i].minimum for i in free], steps)

    def loss(kept: NDArray[np.int64]) -> NDArray[np.float64]:
        """What goes, and more of it where the next group has lost much too."""
        gone = 1 - kept / [len(own) for own in scores]
        return (gone**2).sum(axis=1) + (gone[:, :-1] * gone[:, 1:]).sum(axis=1)

    return Problem(traced.coupling.costs, free, scores, Budget.parse(budget), steps, least, seed, measure=loss)


def rigl(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """The loop of the paper's own code: dense layers are set aside until no share exceeds 1."""
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest:
            return [1.0] * len(shapes)
        raw = {i: sum(shapes[i]) / prod(shapes[i]) for i in rest}
        wanted = density * sum(map(prod, shapes)) - sum(prod(shapes[i]) for i in dense)
        scale = wanted / sum(raw[i] * prod(shapes[i]) for i in rest)
        most = max(raw.values())
        if most * scale <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == most}


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8),
    st.floats(0.001, 1.0),
)
def test_erk_densities_are_those_of_the_paper(shapes: list[tuple[int, ...]], density: float) -> None:
    found = erdos_renyi(shapes, density)
    assert found == pytest.approx(rigl(shapes, density), rel=1e-9, abs=1e-12)
    assert float(found @ [prod(shape) for shape in shapes]) == pytest.approx(density * sum(map(prod, shapes)))


@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 1))
def test_a_ranking_of_all_weights_is_a_sort(values: list[list[float]], share: float) -> None:
    scores = [np.array(layer) for layer in values]
    sizes = np.array([len(layer) for layer in scores])
    count = round(share * int(sizes.sum()))
    kept = left(leaving(scores), sizes, count)
    best = sorted(itertools.chain(*values), reverse=True)[:count]
    assert kept.sum() == count
    chosen = [x for layer, k in zip(values, kept.tolist(), strict=True) for x in sorted(layer, reverse=True)[:k]]
    assert sorted(chosen, reverse=True) == best


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=8), st.floats(-1, 1))
def test_counts_are_spread_to_the_last_weight(layers: list[tuple[int, float]], off: float) -> None:
    sizes, densities = np.array([n for n, _ in layers]), np.array([d for _, d in layers])
    count = int(np.clip(round(float(sizes @ densities) + off * len(layers)), 0, sizes.sum()))
    kept = spread(densities, sizes, count)
    assert kept.sum() == count
    assert ((kept >= 0) & (kept <= sizes)).all()
    assert (np.abs(kept - densities * sizes) <= len(layers) + 1).all()


def test_erk_widths_on_a_chain_follow_the_formula() -> None:
    task = problem("chain", "params=0.4")
    kept = find("erk")(task)
    shapes = [(32, 3, 3, 3), (64, 32, 3, 3), (48, 64, 3, 3), (10, 48)]
    widths = [np.clip(np.array(rigl(shapes, d)[:3]), 0.1, 1) * task.sizes for d in np.linspace(0, 1, 401)]
    expected = [width for width in widths if task.excess(np.floor(width).astype(int)) <= 1][-1]
    assert (np.abs(kept - expected) <= 2).all()
    assert kept[0] / 32 > kept[1] / 64  # small layers keep more


def test_lamp_widths_are_the_shares_of_the_highest_scores() -> None:
    task = problem("chain", "macs=0.4")
    weights = [v for v in graph("chain").values.values() if v.ndim > 1]
    scores = []
    for weight in weights:  # equation 2, weight by weight
        squares = np.sort(weight.detach().double().numpy().ravel() ** 2)
        scores.append(squares / np.cumsum(squares[::-1])[::-1])
    every = np.sort(np.concatenate(scores))
    best = np.zeros(3)
    for share in np.linspace(0, 1, 401)[1:]:
        threshold = every[len(every) - max(1, round(share * len(every)))]
        counts = np.array([np.mean(s >= threshold) for s in scores])[:3] * task.sizes
        if task.excess(np.maximum(np.floor(counts), np.ceil(task.sizes / 10)).astype(int)) <= 1:
            best = counts
    assert (np.abs(find("lamp")(task) - best) <= 1.5).all()


@pytest.mark.parametrize("budget", ["params=0.5", "params=0.3", "params=0.15", "macs=0.4"])
def test_precrop_widths_solve_the_equation(budget: str) -> None:
    task = problem("chain", budget)
    crop, layers = Crop(task, Layers.of(task)), Layers.of(task)
    floor = least_kept(task) / task.sizes
    for density in (0.05, 0.2, 0.6):
        densities = erdos_renyi(layers.shapes, density)
        before = 1.0
        for i, found in enumerate(crop.fractions(densities, density).tolist()):  # c_l * c_(l-1) = p_l * original
            wanted = densities[i] / before
            assert found == pytest.approx(min(max(wanted, floor[i]), 1.0))
            before = found
    kept = find("precrop")(task)
    name = budget.split("=")[0]
    reached = task.costs.evaluate(name, task.full(kept[None]))[0] / task.costs.evaluate(name, task.costs.sizes[None])[0]
    assert 0.98 * float(budget.split("=")[1]) <= reached <= float(budget.split("=")[1])


def test_precrop_takes_roots_in_residual_streams() -> None:
    task = problem("residual", "params=0.5")
    layers = Layers.of(task)
    densities = np.linspace(0.2, 0.7, len(layers.all))
    found = dict(zip(task.free, Crop(task, layers).fractions(densities, 0.5), strict=True))
    of = {layer.weight: (d, prod(layer.shape)) for layer, d in zip(layers.all, densities, strict=True)}
    groups = graph("residual").groups
    writes = {groups[i].kind: i for i in task.free}
    stream = [of[f"{name}.weight"] for name in ("stem", "first.1", "back")]
    width = np.sqrt(sum(d * n for d, n in stream) / sum(n for _, n in stream))
    assert found[writes["residual"]] == pytest.approx(width)
    inner = next(i for i in task.free if any(p.tensor == "first.0.weight" and p.dim == 0 for p in groups[i].slices))
    gated = next(i for i in task.free if any(p.tensor == "gate.weight" and p.dim == 0 for p in groups[i].slices))
    assert found[inner] == pytest.approx(of["first.0.weight"][0] / width)
    assert found[gated] == pytest.approx((of["gate.weight"][0] + of["value.weight"][0]) / 2 / width)


def test_grouped_convolutions_hand_on_what_they_read() -> None:
    layers = Layers.of(problem("depthwise", "macs=0.5"))
    names = [[layers.all[i].weight for i in writers] for writers in layers.writers]
    assert ["0.weight"] in names
    assert all("2.weight" not in writers for writers in names)


def test_random_widths_are_seeded_and_differ() -> None:
    draw = [find("random")(problem("chain", "macs=0.4", seed=seed)) for seed in range(12)]
    again = find("random")(problem("chain", "macs=0.4", seed=3))
    assert np.array_equal(draw[3], again)
    assert len({tuple(kept.tolist()) for kept in draw}) >= 11
    fractions = np.stack(draw) / problem("chain", "macs=0.4").sizes
    assert (fractions.max(0) - fractions.min(0) >= 0.3).all()
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    find("random")(problem("chain", "macs=0.4"))
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]


UNMEASURED = sorted(ALLOCATORS.keys() - {"spdy", "refined"})  # these need networks to measure
BUDGETS = [("macs=0.25", 1), ("macs=0.1", 1), ("params=0.5", 4), ("bytes=0.5", 4), ("macs=0.5,params=0.3", 1)]


@pytest.mark.parametrize("allocator", UNMEASURED)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_allocator_keeps_the_promise_of_a_budget(
    name: str, allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaprune.search.spdy.EVALUATIONS", 32)
    for budget, step in BUDGETS:
        task = problem(name, budget, step)
        try:
            kept = find(allocator)(task)
        except BudgetInfeasible:
            assert task.excess(task.minimum) > 1
            continue
        assert task.excess(kept) <= 1
        assert ((kept >= task.minimum) & (kept <= task.sizes)).all()
        assert ((kept % task.step == 0) | (kept == task.minimum) | (kept == task.sizes)).all()
        if allocator != "uniform":
            assert (kept >= least_kept(task) - task.step).all()
        more = [np.minimum(kept + row, task.sizes) for row in np.diag(task.step) if (kept + row <= task.sizes).any()]
        one = [counts for counts in more if (counts > kept).any()]
        assert task.excess(kept) >= 0.98 or all(task.excess(counts) > 1 for counts in one)
        if budget == BUDGETS[0][0]:
            assert np.array_equal(find(allocator)(task), kept)


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
def test_every_allocator_leaves_to_the_budget_what_it_settles(allocator: str) -> None:
    allocate = find(allocator)
    task = problem("chain", "width=0.5")
    assert np.array_equal(allocate(task), task.sizes // 2)
    task = problem("residual", "macs=1.0")
    assert np.array_equal(allocate(task), task.sizes)
    with pytest.raises(BudgetInfeasible) as error:
        allocate(problem("chain", "macs=0.0001"))
    assert error.value.attainable > 0.0001


@pytest.mark.parametrize("allocator", ["erk", "lamp", "precrop", "random"])
def test_plans_name_the_allocator_and_are_cut(allocator: str) -> None:
    pruned = mp.prune(graph("residual"), budget="macs=0.4", allocator=allocator, seed=5)
    assert pruned.plan.provenance["allocator"] == allocator
    assert 0.38 <= pruned.plan.reached["macs"] <= 0.4
    assert pruned.certificate is not None
    assert pruned.certificate.ok


def test_groups_that_no_linear_layer_writes_go_by_the_whole_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 20, 3), nn.ReLU(), nn.ConvTranspose2d(20, 10, 3), nn.ReLU(),
                          nn.ConvTranspose2d(10, 3, 3))  # fmt: skip
    traced = mp.trace(model, torch.randn(1, 2, 5, 5))
    for allocator in ("erk", "precrop", "lamp"):
        plan = mp.plan(traced, "macs=0.5", allocator=allocator)
        even = mp.plan(traced, "macs=0.5", allocator="uniform")
        assert {g: len(k) for g, k in plan.keep.items()} == {g: len(k) for g, k in even.keep.items()}


def test_lamp_needs_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    traced = mp.trace(model, torch.empty(1, 4, device="meta"))
    with pytest.raises(OptionError, match="allocator: 'lamp'"):
        mp.plan(traced, "macs=0.5", allocator="lamp")
    assert mp.plan(traced, "macs=0.5", allocator="erk").reached["macs"] <= 0.5
