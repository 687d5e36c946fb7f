"""The inverse block Fisher matrix against explicit inverses, and departures against brute force over sets of units."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.criteria import CRITERIA, Evidence, Weights
from metaprune.datasets import digits
from metaprune.graphs.errors import OptionError
from metaprune.mfac import DAMPING, InverseFisher, departures, marginal_losses
from metaprune.statistics import collect
from tests.support import oracle


def gradients(samples: int, size: int, seed: int = 0) -> Tensor:
    """Correlated gradients of uneven size, shape [samples, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.randn(samples, size, dtype=torch.float64, generator=generator) @ mixing


def fisher(rows: Tensor, damping: float) -> Tensor:
    return damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / len(rows)


@pytest.mark.parametrize(("samples", "size"), [(5, 12), (12, 12), (40, 12), (1, 1), (64, 128)])
def test_the_recursion_gives_the_inverse(samples: int, size: int) -> None:
    rows = gradients(samples, size)
    damping = 0.1 * float(rows.square().mean())
    inverse, expected = InverseFisher(rows, damping), torch.linalg.inv(fisher(rows, damping))
    scale = float(expected.abs().max())
    columns = torch.stack([inverse.column(unit) for unit in range(size)])
    assert float((columns - expected).abs().max()) < 1e-9 * scale
    assert float((inverse.diagonal - expected.diagonal()).abs().max()) < 1e-9 * scale
    vector = gradients(1, size, seed=1)[0]
    assert float((inverse.times(vector) - expected @ vector).abs().max()) < 1e-9 * scale * float(vector.norm())


def test_a_unit_that_is_removed_leaves_the_inverse_of_the_rest() -> None:
    rows = gradients(8, 20)
    inverse = InverseFisher(rows, 0.5)
    rest = list(range(20))
    for unit in (3, 17, 0, 11, 8):
        inverse.remove(unit)
        rest.remove(unit)
        expected = torch.linalg.inv(fisher(rows, 0.5)[rest][:, rest])
        assert float((inverse.diagonal[rest] - expected.diagonal()).abs().max()) < 1e-9
        column = inverse.column(rest[4])
        assert float((column[rest] - expected[4]).abs().max()) < 1e-9
        assert float(column[unit].abs()) < 1e-9


def least_loss(matrix: Tensor, gone: list[int]) -> float:
    """The least of d^T F d / 2 with d = -1 for the units that are gone, by solving for those of the others."""
    rest = [unit for unit in range(len(matrix)) if unit not in gone]
    change = -torch.ones(len(matrix), dtype=torch.float64)
    if rest:
        change[rest] = torch.linalg.solve(matrix[rest][:, rest], matrix[rest][:, gone].sum(1))
    return 0.5 * float(change @ matrix @ change)


def test_increases_add_up_to_the_least_loss_of_the_set() -> None:
    rows = gradients(9, 14)
    order, increases = departures(rows, 0.2)
    matrix = fisher(rows, 0.2)
    assert sorted(order) == list(range(14))
    for count in range(1, 15):
        assert float(increases[:count].sum()) == pytest.approx(least_loss(matrix, order[:count]), rel=1e-9)


def test_every_departure_is_the_cheapest_and_the_sets_are_near_the_best() -> None:
    ratios = []
    for seed in range(6):
        rows = gradients(6, 9, seed)
        matrix = fisher(rows, 0.1 * float(rows.square().mean()))
        order, increases = departures(rows, 0.1 * float(rows.square().mean()))
        for step in range(9):
            costs = [least_loss(matrix, [*order[:step], u]) for u in range(9) if u not in order[:step]]
            assert least_loss(matrix, order[: step + 1]) == pytest.approx(min(costs), rel=1e-9)
        best = min(least_loss(matrix, list(chosen)) for chosen in combinations(range(9), 4))
        ratios.append(float(increases[:4].sum()) / best)
    assert min(ratios) >= 1 - 1e-9
    assert float(np.median(ratios)) < 1.1


def test_of_two_units_that_do_the_same_one_stays() -> None:
    rows = gradients(200, 6)
    rows[:, 5] = rows[:, 0]  # either can stand in for the other
    scores = marginal_losses(rows, damping=1e-3)
    one, other = sorted([float(scores[0]), float(scores[5])])
    assert one == float(scores.min())
    assert other > 100 * one
    alone = 0.5 / torch.linalg.inv(fisher(rows, 1e-3 * float(rows.square().mean()))).diagonal()
    assert float(alone[0]) == pytest.approx(float(alone[5]))  # without recomputation both would go


def test_of_two_units_that_cancel_both_go_for_nothing() -> None:
    rows = gradients(50, 4)
    rows[:, 3] = -rows[:, 0]
    scores = marginal_losses(rows, damping=1e-6)
    assert float(scores[[0, 3]].max()) < 1e-3 * float(scores[[1, 2]].min())


def test_independent_units_score_by_the_diagonal() -> None:
    rows = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    damping = DAMPING * float(rows.square().mean())
    assert torch.allclose(marginal_losses(rows), 0.5 * (rows.square().mean(0) + damping))


@pytest.mark.parametrize("size", [1, 30, 70])
def test_scores_are_the_convex_part_of_the_losses_in_order(size: int) -> None:
    rows = gradients(20, size)
    order, increases = departures(rows, DAMPING * float(rows.square().mean()))
    scores = marginal_losses(rows)
    assert scores.argsort().tolist() == order  # strictly ascending: sorting gives the order of departure back
    assert (scores[order].diff() > 0).all()
    sums, convex = increases.cumsum(0), scores[order].cumsum(0)
    assert (convex <= sums * (1 + 1e-9)).all()
    assert float(convex[-1]) == pytest.approx(float(sums[-1]), rel=1e-9)
    points = np.vstack([[0, 0], np.stack([np.arange(1, size + 1), sums.numpy()], 1)])
    for k in range(1, size + 1):  # the greatest convex minorant: the lowest chord over k
        chords = [
            points[i, 1] + (points[j, 1] - points[i, 1]) * (k - i) / (j - i)
            for i in range(k)
            for j in range(k, size + 1)
        ]
        assert float(convex[k - 1]) == pytest.approx(min(chords), rel=1e-9)


def test_wide_groups_are_taken_in_blocks() -> None:
    rows = gradients(10, 25)
    damping = DAMPING * float(rows.square().mean())
    scores = marginal_losses(rows, block=10)
    for start in (0, 10, 20):
        part = rows[:, start : start + 10]
        relative = damping / float(part.square().mean())
        assert torch.equal(scores[start : start + 10], marginal_losses(part, relative))


def test_a_group_without_gradients_costs_nothing() -> None:
    assert torch.equal(marginal_losses(torch.zeros(4, 3)), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": float("nan")}, {"block": 0}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        marginal_losses(gradients(3, 2), **options)  # type: ignore[arg-type]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 10)]
    return oracle.alive(nn.Sequential(*layers))


def test_the_criterion_sees_single_samples_and_diagonals_stay_as_they_were() -> None:
    train, _ = digits()
    graph = mp.trace(network(), train.images[:2])
    data = [train.images[:40]]
    plain, found = collect(graph, data), collect(graph, data, per_sample=True)
    assert not plain.rows
    group = next(group for group in graph.groups if not group.pinned)
    rows = found.rows[group.name]
    assert rows.shape == (40, group.size)
    assert rows.dtype == torch.float32
    assert torch.equal(found.gates[group.name].square, plain.gates[group.name].square)
    assert torch.allclose(rows.double().square().mean(0), plain.gates[group.name].square, rtol=1e-5)
    scores = CRITERIA["fisher_block"].function(group, Evidence(Weights({}), found))
    assert torch.equal(scores, marginal_losses(rows))


def test_twin_channels_do_not_both_go() -> None:
    net = network()
    with torch.no_grad():  # channel 1 becomes a copy of channel 0: each can be missed, but not both
        for parameter in (net[0].weight, net[0].bias):
            parameter[0] *= 3
            parameter[1] = parameter[0]
        net[2].weight[:, 0] /= 3
        net[2].weight[:, 1] = net[2].weight[:, 0]
    train, _ = digits()
    graph = mp.trace(net, train.images[:2])
    plan = mp.plan(graph, "width=0.75", criterion="fisher_block", data=[train.images[:100]], only="0")
    assert len({0, 1} & set(plan.keep["0"])) == 1
    assert (plan.provenance["allocator"], plan.provenance["samples"]) == ("cost", 100)
