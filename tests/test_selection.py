"""The allocator "measured": distortions as an independent computation finds them, and blends of allocations."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune import judge, trials
from metaprune.distances import distortion
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.judge import Judge
from metaprune.reconstruction import FINE
from metaprune.search.allocate import uniform
from metaprune.search.blends import blends
from metaprune.search.budget import Budget
from metaprune.search.cost_aware import cost_aware
from metaprune.search.problem import Problem
from metaprune.selection import Choice, around, nearest


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(64, 1, 6, 6))  # running statistics
    return model.eval().double()


@cache
def _graph() -> Graph:
    return mp.trace(_network(), _images(1))


def _images(count: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(graph: Graph, budget: str, seed: int = 0) -> Problem:
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    draw = np.random.default_rng(seed)
    scores = [draw.gamma(1.0, size=graph.groups[i].size) * draw.gamma(1.0) for i in free]
    ones = np.ones(len(free), dtype=np.int64)
    return Problem(graph.coupling.costs, free, scores, Budget.parse(budget), ones, ones)


def test_distortions_are_those_of_the_fitted_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "COARSE", FINE)  # as for a fit that is to be kept
    model, images = _network(), _images()
    graph = mp.trace(model, images[:1])
    groups = [group for group in graph.groups if not group.pinned]
    plans = [{g.name: tuple(range(g.size // 2)) for g in groups}, {groups[0].name: (0, 3)}, {}]
    found = Judge(graph, [images]).distortions(plans)
    with torch.no_grad():
        wanted = model(images[40:]).log_softmax(1)
        for keep, value in zip(plans, found, strict=True):
            pruned = mp.apply(graph, Plan(keep, graph.fingerprint, "", {}, {}))
            small = mp.reconstruct(pruned, [images[:40]]).module
            expected = F.kl_div(small(images[40:]).log_softmax(1), wanted, log_target=True, reduction="batchmean")
            assert value == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
    assert found[0] > found[1] > found[2] == pytest.approx(0, abs=1e-12)


def test_the_nearest_choice_is_planned() -> None:
    graph = _graph()
    plan = mp.plan(graph, "macs=0.4", data=[_images(200)])
    losses = plan.provenance["measured"]
    assert plan.provenance["allocator"] == "measured"
    assert len(losses) == 4
    assert all(np.isfinite(loss) and loss > 0 for loss in losses.values())
    best = min(losses.values())
    assert Judge(graph, [_images(200)]).distortions([plan.keep]) == [pytest.approx(best)]
    assert 0.36 < plan.reached["macs"] <= 0.4


def test_a_criterion_without_data_can_be_measured_too() -> None:
    model = _network()
    for call in (mp.plan, mp.prune):
        made: Any = call(mp.trace(model, _images(1)), budget="macs=0.5", criterion="fpgm", allocator="measured",
                         data=[_images(50)])  # fmt: skip
        provenance = (made if isinstance(made, Plan) else made.plan).provenance
        assert (provenance["criterion"], provenance["allocator"]) == ("fpgm", "measured")
        assert any(name.endswith("fpgm and magnitude") for name in provenance["measured"])


def test_ranks_share_places_and_both_scores_count() -> None:
    graph = _graph()
    problem = _problem(graph, "macs=0.5")
    groups = [graph.groups[i] for i in problem.free]
    norms = [np.arange(g.size, dtype=float) for g in groups]
    last = around(problem, uniform(problem), "x", {"y": [-n for n in norms], "magnitude": norms})[-1]
    assert last.name == "all x, y and magnitude"
    assert all(np.ptp(scores) == 0 for scores in last.scores)  # opposite orders: every unit has the same place
    tied = around(problem, uniform(problem), "x", {"magnitude": [np.zeros(g.size) for g in groups]})[-1]
    assert all(np.all(s == (len(s) + 1) / 2) for s in tied.scores)


def test_a_choice_keeps_the_best_units() -> None:
    graph = _graph()
    groups = [group for group in graph.groups if not group.pinned]
    scores = [np.sin(np.arange(g.size) * 2.0) for g in groups]
    kept = np.array([3, groups[1].size, 1])
    keep = Choice("", scores, kept).keep(groups)
    assert keep == {
        groups[0].name: tuple(sorted(np.argsort(-scores[0])[:3].tolist())),
        groups[2].name: (int(np.argmax(scores[2])),),
    }


def test_a_network_that_does_not_run_is_infinitely_far(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph()
    groups = [group for group in graph.groups if not group.pinned]
    choices = [Choice(str(n), [np.arange(g.size, dtype=float) for g in groups], np.array([n, n, n])) for n in (2, 5)]
    whole = trials.cut

    def damaged(dense: Graph, keep: Any) -> Any:
        made = whole(dense, keep)
        if len(next(iter(keep.values()))) == 5:
            name = next(n for n, value in made.graph.values.items() if value.ndim == 4)
            values = {**made.graph.values, name: made.graph.values[name][:, :1].expand(-1, 3, -1, -1)}
            return dataclasses.replace(made, graph=dataclasses.replace(made.graph, values=values))
        return made

    monkeypatch.setattr(trials, "cut", damaged)
    chosen, losses = nearest(groups, choices, Judge(graph, [_images(50)]))
    assert chosen.name == "2"
    assert losses["5"] == float("inf")
    assert losses["2"] < float("inf")


def test_distortion_of_other_outputs_is_the_relative_squared_error() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    assert float(distortion([a, 2 * a], [b, b])) == pytest.approx(
        float(((a - b).square().sum() + (2 * a - b).square().sum()) / (2 * b.square().sum())), rel=1e-5
    )
    logits = torch.randn(6, 4)
    assert float(distortion([logits + 3], [logits]).abs().max()) < 1e-9
    assert len(distortion([logits], [logits])) == 6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", ["macs=0.5", "macs=0.2", "params=0.4,macs=0.6", "width=0.5"])
def test_blends_lie_between_uniform_and_the_other(seed: int, budget: str) -> None:
    graph = _graph()
    problem = _problem(graph, budget, seed)
    other = cost_aware(problem)
    found = blends(problem, other, [0.0, 0.5, 1.0])
    assert np.array_equal(found[0], uniform(problem))
    assert np.array_equal(found[2], other)
    for kept in found:
        assert problem.budget.width is not None or problem.excess(kept) <= 1
    apart = [float(np.abs(np.log(kept / problem.sizes) - np.log(other / problem.sizes)).sum()) for kept in found]
    assert apart[0] + 0.5 >= apart[1] >= apart[2] == 0


def test_bad_input() -> None:
    graph = _graph()
    with pytest.raises(OptionError, match="two samples"):
        Judge(graph, [_images(1)])
    with pytest.raises(OptionError, match="no samples"):
        Judge(graph, [])
    with pytest.raises(OptionError, match="allocator 'measured' needs calibration data"):
        mp.plan(graph, "macs=0.5", allocator="measured")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(OptionError, match="meta device"):
        Judge(mp.trace(empty, torch.empty(1, 1, 8, 8, device="meta")), [_images(4)])
