"""Search spaces: ladders of widths, costs of whole populations, repair, samples, and the way to plans and back."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.graphs.cost import counted
from metaprune.graphs.errors import BudgetInfeasible, LoadError, OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.surgery import cut
from metaprune.planning import may_shrink
from metaprune.search.budget import Budget
from metaprune.search.space import SearchSpace
from metaprune.search.variables import best_first, ladder
from tests.support.patients import Block
from tests.support.toy import SEPARABLE, Toy


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), Block(8, 8, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip
    return mp.trace(model.eval(), torch.randn(2, 1, 8, 8))


def _space(graph: Graph, levels: int = 6, round_to: int = 1) -> SearchSpace:
    free, step, least = may_shrink(graph, round_to)
    draw = np.random.default_rng(0)
    scores = [draw.normal(size=graph.groups[i].size) for i in free]
    return SearchSpace.of(graph, free, scores, step, least, levels)


@pytest.mark.parametrize(
    ("size", "minimum", "step", "levels", "expected"),
    [
        (8, 1, 1, 16, (1, 2, 3, 4, 5, 6, 7, 8)),
        (64, 8, 8, 16, (8, 16, 24, 32, 40, 48, 56, 64)),
        (20, 8, 8, 16, (8, 16, 20)),
        (101, 1, 1, 5, (1, 26, 51, 76, 101)),
        (7, 7, 1, 4, (7,)),
        (9, 2, 1, 2, (2, 9)),
    ],
)
def test_ladders(size: int, minimum: int, step: int, levels: int, expected: tuple[int, ...]) -> None:
    assert ladder(size, minimum, step, levels) == expected


def test_units_are_ranked_best_first_and_ties_by_number() -> None:
    assert best_first([1.0, 3.0, 1.0, 2.0]) == (1, 3, 0, 2)


def test_a_choice_keeps_the_best_units_and_a_part_of_what_larger_ones_keep(graph: Graph) -> None:
    free, step, least = may_shrink(graph)
    draw = np.random.default_rng(0)
    scores = {graph.groups[i].name: draw.normal(size=graph.groups[i].size) for i in free}
    space = SearchSpace.of(graph, free, list(scores.values()), step, least, 6)
    for variable in space.variables:
        kept = [set(variable.edit(level)[variable.name]) for level in range(3)]
        assert kept[0] < kept[1] < kept[2]
        values = scores[variable.name]
        for units in kept:
            assert min(values[list(units)]) > max(values[[unit for unit in range(len(values)) if unit not in units]])
        assert variable.edit(variable.levels - 1) == {}


def test_costs_of_a_population_are_those_counted_on_the_cut_graphs(graph: Graph) -> None:
    space = _space(graph)
    configs = space.sample(np.random.default_rng(0), 5)
    full = counted(graph)
    for cost in ("macs", "params", "bytes"):
        found = space.fractions(cost, configs)
        for config, value in zip(configs, found, strict=True):
            exact = getattr(counted(cut(graph, space.decode(config).keep).graph), cost) / getattr(full, cost)
            assert value == pytest.approx(exact, rel=1e-12)


def test_a_plan_and_its_configuration_are_one(graph: Graph) -> None:
    space = _space(graph, 5)
    for config in space.sample(np.random.default_rng(1), 20):
        plan = space.decode(config, "macs=0.5", {"method": "here"})
        assert space.encode(plan).tolist() == config.tolist()
        assert plan.reached["macs"] == pytest.approx(space.fractions("macs", config[None])[0])
    assert dict(space.decode(space.whole[0]).keep) == {}
    group = space.variables[0]
    between = Plan({group.name: tuple(range(4))}, graph.fingerprint)
    assert abs(len(space.decode(space.encode(between)).keep[group.name]) - 4) <= 1
    with pytest.raises(PlanError, match="another network"):
        space.encode(Plan({}, "something else"))


def test_round_to_and_pinned_groups_are_honoured(graph: Graph) -> None:
    space = _space(graph, round_to=4)
    assert {variable.name for variable in space.variables} <= {g.name for g in graph.groups if not g.pinned}
    for variable in space.variables:
        counts = variable.fractions * len(variable.order)
        assert (counts % 4 == 0).all() or len(variable.order) % 4
    counts = space.counts(space.least)[0]
    pinned = [i for i, group in enumerate(graph.groups) if group.pinned]
    assert counts[pinned].tolist() == [graph.groups[i].size for i in pinned]


@pytest.mark.parametrize("budget", ["macs=0.5", "macs=0.3,params=0.2", "bytes=0.4"])
def test_repair_is_within_the_budget_and_leaves_little_of_it(graph: Graph, budget: str) -> None:
    space, goal = _space(graph, 16), Budget.parse(budget)
    wanted = np.random.default_rng(0).integers(0, space.levels, (60, len(space.levels)))
    found = space.repair(wanted, goal)
    within = space.excess(wanted, goal) <= 1
    assert (found[within] == wanted[within]).all()
    assert (found <= wanted).all()
    assert space.excess(found, goal).max() <= 1
    for mine, theirs in zip(found[~within], wanted[~within], strict=True):
        for variable in np.flatnonzero(mine < theirs):
            more = mine.copy()
            more[variable] += 1
            assert space.excess(more[None], goal)[0] > 1
    assert (space.repair(found, goal) == found).all()
    assert (space.repair(wanted, None) == wanted).all()


def test_an_impossible_budget_names_what_can_be_attained(graph: Graph) -> None:
    space = _space(graph)
    with pytest.raises(BudgetInfeasible, match=r"macs=0\.001 can not be met; the least is macs=0\.0") as caught:
        space.repair(space.whole, Budget.parse("macs=0.001"))
    assert caught.value.attainable == pytest.approx(space.fractions("macs", space.least)[0])
    with pytest.raises(OptionError, match="budget: a search needs a cost"):
        space.check(Budget.parse("width=0.5"))


def test_samples_cover_the_whole_range_of_costs() -> None:
    space = SEPARABLE.space
    count = 100
    macs = space.fractions("macs", space.sample(np.random.default_rng(0), count))
    plain = space.fractions("macs", np.random.default_rng(0).integers(0, 8, (count, 40)))
    edges = np.linspace(1 / 8, 1, 11)
    assert np.histogram(macs, edges)[0].min() >= 7
    assert np.histogram(macs[:20], edges[::2])[0].min() >= 3
    assert (np.histogram(plain, edges)[0] == 0).sum() >= 6
    half = space.fractions("macs", space.sample(np.random.default_rng(0), count, Budget.parse("macs=0.5")))
    assert half.max() <= 0.5
    assert np.histogram(half, np.linspace(1 / 8, 0.5, 11))[0].min() >= 7


def test_samples_are_seeded_and_varied() -> None:
    space = SEPARABLE.space
    first = space.sample(np.random.default_rng(3), 50)
    assert (space.sample(np.random.default_rng(3), 50) == first).all()
    assert (space.sample(np.random.default_rng(3), 20) == first[:20]).all()
    assert len(np.unique(first, axis=0)) == 50
    assert len(np.unique(first[:, 0])) == 8


def test_uniform_and_neighbours() -> None:
    space = Toy(groups=3).space
    assert space.uniform([0.0, 0.5, 0.9, 1.0]).tolist() == [[0] * 3, [3] * 3, [6] * 3, [7] * 3]
    assert sorted(space.neighbours([0, 3, 7]).tolist()) == [[0, 2, 7], [0, 3, 6], [0, 4, 7], [1, 3, 7]]
    assert space.size == 512


def test_keys_are_canonical(graph: Graph) -> None:
    space, other = Toy(groups=3).space, Toy(groups=3, seed=1).space
    assert space.key([1, 2, 3]) == space.key(np.array([1, 2, 3], dtype=np.int32))
    assert len({space.key([a, b, 0]) for a in range(8) for b in range(8)}) == 64
    assert space.key([1, 2, 3]) != other.key([1, 2, 3])
    assert _space(graph).key(_space(graph).whole[0]) == _space(graph).key(_space(graph).whole[0])


def test_a_space_goes_through_json_and_back(graph: Graph) -> None:
    space = _space(graph)
    again = SearchSpace.from_json(space.to_json(), graph)
    assert again.variables == space.variables
    assert again.to_json() == space.to_json()
    assert again.digest == space.digest
    assert again.fractions("macs", again.least) == space.fractions("macs", space.least)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 1"),
        ({"graph": "x"}, "another network"),
        ({"variables": [{"kind": "magic"}]}, "kind 'magic' is unknown"),
        (
            {"variables": [{"kind": "width", "group": "a", "number": 0, "choices": [2, 1], "order": [0, 1]}]},
            "no ladder",
        ),
        ({"variables": [{"kind": "width", "group": "a", "number": 0, "choices": [2], "order": [0, 2]}]}, "damaged"),
    ],
)
def test_damaged_json_is_refused(graph: Graph, change: dict[str, object], message: str) -> None:
    body = json.loads(_space(graph).to_json()) | change
    with pytest.raises(LoadError, match=message):
        SearchSpace.from_json(json.dumps(body), graph)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([[0, 0]], "integers of shape"),
        ([[0.0, 0.0, 0.0]], "integers of shape"),
        ([[0, 0, 8]], "out of the range"),
        ([[0, -1, 0]], "out of the range"),
        ([0, 0, 0], "integers of shape"),
    ],
)
def test_what_is_no_configuration_is_refused(configs: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Toy(groups=3).space.checked(configs)


def test_a_space_without_anything_to_choose_is_refused(graph: Graph) -> None:
    with pytest.raises(OptionError, match="no group may shrink"):
        SearchSpace.of(graph, [], [], [], [])
    with pytest.raises(OptionError, match="levels: at least 2"):
        _space(graph, levels=1)
