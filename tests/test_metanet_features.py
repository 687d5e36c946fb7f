"""Features of networks and of cuts against closed forms, and the exchange of units between groups."""

from typing import Any

import numpy as np
import pytest
import torch

import metaprune as mp
from metaprune.curvature import RIDGE, collect_columns
from metaprune.graphs.errors import OptionError
from metaprune.metanet.describe import describe, observe, reader_errors
from metaprune.metanet.examples import orders
from metaprune.metanet.schema import Schema
from metaprune.metanet.structure import structure
from metaprune.search.budget import Budget
from metaprune.search.exchange import exchanged
from metaprune.search.problem import Kept, Problem
from tests.support.little_zoo import LittleZoo, graph_of, labels_of, task_of

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo and its fit are expensive


@pytest.mark.parametrize("name", ["plain-1", "residual-0"])
def test_errors_of_readers_are_those_of_least_squares(name: str) -> None:
    graph, data = graph_of(name), task_of(name).train
    draw = torch.Generator().manual_seed(0)
    for columns in collect_columns(graph, data, 50).values():
        layer, size = columns.layer, 5
        places = torch.randint(0, size + 1, (layer.groups, layer.width), generator=draw)  # some columns always stay
        weight = graph.values[layer.weight].detach()
        plain, fitted = reader_errors(columns, weight, places, size)
        matrix = layer.matrix(weight.double())[0]
        raw, hessian = columns.moment[0, :-1, :-1], columns.hessian(RIDGE)[0]
        energy = (matrix * (hessian @ matrix)).sum()
        for kept in range(size + 1):
            gone = places[0] < size - kept
            lost = matrix[gone]
            assert plain[kept] == pytest.approx(float((lost * (raw[gone][:, gone] @ lost)).sum() / energy), abs=1e-9)
            stay = torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ lost)
            change = torch.zeros_like(matrix)
            change[gone], change[~gone] = lost, -stay
            assert fitted[kept] == pytest.approx(float((change * (hessian @ change)).sum() / energy), abs=1e-9)
        assert plain[size] == fitted[size] == 0


def test_block_fisher_is_the_mean_square_of_the_summed_gradients() -> None:
    graph, order = graph_of("chain-0"), labels_of("chain-0").order
    statistics = observe(graph, task_of("chain-0").train, 40)
    found = describe(graph, order, statistics)
    assert statistics.sharp is not None
    for what, rows in (("", statistics.rows), (" at temperature 1", statistics.sharp.rows)):
        at = found.schema.cut.index(f"log block Fisher gone{what}")
        for name, units in order.items():
            for kept in range(found.sizes[name]):
                pull = rows[name][:, units[: found.sizes[name] - kept]].double().sum(1)
                expected = float((0.5 * pull.square().mean()).log())
                assert float(found.cuts[name][kept, at]) == pytest.approx(expected, abs=1e-4)
                if what:
                    assert torch.allclose(found.pulls[name][kept].double(), pull, atol=1e-5)


def test_features_do_not_depend_on_the_numbering_of_units() -> None:
    model = task_of("chain-1").model
    graph = graph_of("chain-1")
    name = next(group.name for group in graph.groups if not group.pinned)
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    values = {key: value.clone() for key, value in model.state_dict().items()}
    for part in graph.group(name).slices:
        values[part.tensor] = values[part.tensor].index_select(part.dim, turn)
    moved = LittleZoo(("chain-1",))
    other = mp.trace(next(iter(moved)).task.model, task_of("chain-1").inputs)
    other.values = {key: values.get(key, value) for key, value in other.values.items()}
    data = task_of("chain-1").train
    order = labels_of("chain-1").order
    renamed = {**order, name: torch.argsort(turn)[order[name]]}
    for sight in (False, True):
        statistics = [observe(g, data, 40) if sight else None for g in (graph, other)]
        one, two = describe(graph, order, statistics[0]), describe(other, renamed, statistics[1])
        for group in order:
            assert torch.allclose(one.cuts[group], two.cuts[group], atol=2e-3)
        assert torch.allclose(one.units[name][turn], two.units[name], atol=2e-3)


def test_costs_and_names_of_features() -> None:
    graph = graph_of("residual-0")
    found = describe(graph, orders(graph, "magnitude"))
    assert found.schema == Schema.of(False)
    costs = graph.coupling.costs
    for name, table in found.cuts.items():
        number, size = graph.coupling.number(name), found.sizes[name]
        assert table.shape == (size + 1, len(found.schema.cut))
        assert found.units[name].shape == (size, len(found.schema.unit))
        counts = costs.sizes.copy()
        counts[number] = size // 2
        expected = np.log(costs.evaluate("macs", counts[None])[0] / costs.full.macs)
        assert float(table[size // 2, found.schema.cut.index("log kept macs")]) == pytest.approx(expected, abs=1e-5)
    layout = structure(graph)
    stream = max(layout.features, key=lambda name: layout.features[name][5])  # read by most
    assert graph.group(stream).kind == "residual"
    with pytest.raises(OptionError, match="each of its"):
        describe(graph, {name: torch.zeros(size) for name, size in found.sizes.items()})


def test_an_encoder_adds_states_and_another_schema() -> None:
    graph, order = graph_of("plain-0"), orders(graph_of("plain-0"), "magnitude")
    states = {name: torch.randn(len(units), 3) for name, units in order.items()}
    found = describe(graph, order, None, lambda graph: states)
    assert found.schema.digest == Schema.of(False, 3).digest != Schema.of(False).digest
    for name, units in order.items():
        kept, gone = found.cuts[name][2, -6:-3], found.cuts[name][2, -3:]
        assert torch.allclose(kept, states[name][units[-2:]].mean(0), atol=1e-5)
        assert torch.allclose(gone, states[name][units[:-2]].mean(0), atol=1e-5)
        assert torch.allclose(found.units[name][:, -3:], states[name], atol=1e-6)
    with pytest.raises(OptionError, match="encoder: it gives no state"):
        describe(graph, order, None, lambda graph: {})


def test_exchange_finds_the_optimum_of_two_groups_and_never_loses() -> None:
    graph = graph_of("plain-0")
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    ones = np.ones(len(free), dtype=np.int64)
    scores = [np.ones(graph.groups[i].size) for i in free]
    problem = Problem(graph.coupling.costs, free, scores, Budget.parse("macs=0.5"), ones, ones)
    harm = np.random.default_rng(0).gamma(1.0, size=(len(free), 20)).cumsum(1)[:, ::-1]

    def losses(kept: Kept) -> Any:
        return harm[np.arange(len(free)), kept].sum(1)

    every = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in problem.sizes), indexing="ij"), -1).reshape(-1, 2)
    within = problem.budget.excess(problem.costs, problem.full(every)) <= 1
    best = losses(every[within]).min()
    for start in every[within][::7]:
        found, loss = exchanged(problem, losses, start)
        assert problem.excess(found) <= 1
        assert loss == losses(found[None])[0] <= losses(start[None])[0]
        assert loss == pytest.approx(best)
