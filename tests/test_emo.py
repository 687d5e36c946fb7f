"""Networks in parts: cuts, features and fronts of parts against the whole network, and how they are joined."""

import itertools
from typing import Any

import moocore
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import metaprune as mp
from metaprune.calibration import leaves_of
from metaprune.graphs import structure
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute, input_leaves
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.segments import narrow_cuts, places, segments
from metaprune.parts import Sections, even_cuts
from metaprune.search.backends import find
from metaprune.search.budget import Budget
from metaprune.search.division import Division
from metaprune.search.evaluate import Evaluator, Fidelity
from metaprune.search.front import Front
from metaprune.search.impairment import Class, impairments
from metaprune.search.joining import Items, Joint
from metaprune.search.ledger import Ledger
from metaprune.search.space import SearchSpace
from metaprune.trials import Bench
from tests.support import digits_search
from tests.support.patients import Block
from tests.support.toy import INTERACTING, SEPARABLE, UNITS, Toy


def _staged() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 1, 1), nn.ReLU(), Block(6, 6, 1), Block(6, 8, 2), Block(8, 8, 1), Block(8, 12, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> Graph:
    return mp.trace(_staged(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits_search.task().train.images[:60]


def _space(graph: Graph, levels: int = 16) -> SearchSpace:
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    draw = np.random.default_rng(0)
    scores = [draw.random(graph.groups[i].size) for i in free]
    return SearchSpace.of(graph, free, scores, [1] * len(free), [1] * len(free), levels)


def _bench(graph: Graph, images: Tensor) -> Bench:
    leaves = leaves_of(graph, [images], len(images))
    return Bench(graph, leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :])


# Segments


def test_narrow_cuts_are_the_values_without_which_nothing_goes_on(graph: Graph) -> None:
    cuts = narrow_cuts(graph)
    view = graph.networkx()
    fed = {name for name, node in graph.nodes.items() if node.op == "input"}
    (start,), (end,) = fed, [name for name in graph.nodes if not graph.users[name]]
    for name in graph.nodes:
        without = view.subgraph(set(view) - {name})
        computed = graph.nodes[name].op not in ("input", "tensor") and name != end
        reached = name in (start, end) or start not in without or _connected(without, start, end)
        assert (name in cuts) == (computed and not reached), name


def _connected(view: Any, start: str, end: str) -> bool:
    seen, stack = {start}, [start]
    while stack:
        new = set(view.successors(stack.pop())) - seen
        seen |= new
        stack += new
    return end in seen


def test_segments_put_together_are_the_network(graph: Graph, images: Tensor) -> None:
    cuts = narrow_cuts(graph)
    for chosen in (cuts[2:3], cuts[1::4], cuts):
        value: Any = images
        for segment in segments(graph, chosen):
            value = segment.graph.run(None, value)
        assert torch.equal(value, graph.run(None, images))
        macs = sum(segment.graph.cost().macs for segment in segments(graph, chosen))
        assert macs == graph.cost().macs
    with pytest.raises(OptionError, match="are not narrow cuts"):
        segments(graph, ["nowhere"])
    with pytest.raises(OptionError, match="are not narrow cuts"):
        segments(graph, cuts[:2][::-1])


def test_groups_play_a_role_where_their_tensors_are_read(graph: Graph) -> None:
    cuts = narrow_cuts(graph)[3::5]
    found = places(graph, cuts)
    reads = [{node.args[0] for node in s.graph.nodes.values() if node.op == "tensor"} for s in segments(graph, cuts)]
    for group, (first, last) in zip(graph.groups, found.tolist(), strict=True):
        own = [i for i, names in enumerate(reads) if any(part.tensor in names for part in group.slices)]
        if not group.pinned:
            assert (first, last) == (min(own), max(own))


def test_even_cuts_are_the_best_there_are(graph: Graph) -> None:
    cuts = narrow_cuts(graph)
    names = {group.name for group in graph.groups if not group.pinned}
    chosen = [group.name in names for group in graph.groups]

    def value(way: tuple[str, ...]) -> tuple[int, int] | None:
        span = places(graph, way)[chosen]
        own = [int((span == part).all(axis=1).sum()) for part in range(len(way) + 1)]
        across = sum(int(((span[:, 0] <= cut) & (span[:, 1] > cut)).sum()) for cut in range(len(way)))
        return (across, sum(n**2 for n in own)) if all(own) else None

    for parts in (2, 3):
        best = min(v for way in itertools.combinations(cuts, parts - 1) if (v := value(way)) is not None)
        assert value(tuple(even_cuts(graph, names, parts))) == best
    assert even_cuts(graph, names, 1) == []
    assert even_cuts(graph, set(), 3) == []


# Parts


def test_a_part_is_judged_on_features_of_the_dense_network(graph: Graph, images: Tensor) -> None:
    space = _space(graph)
    sections = Sections(space, _bench(graph, images))
    assert len(sections.parts) > 1
    assert sum(part.share for part in sections.parts) == pytest.approx(1)
    names = [variable.name for variable in space.variables]
    cuts = [part.name for part in sections.parts[:-1]]
    span = places(graph, cuts)[[graph.coupling.number(name) for name in names]]
    own = {v: number for number, part in enumerate(sections.parts) for v in part.variables}
    for variable, (first, last) in enumerate(span.tolist()):
        shared = first != last or graph.group(names[variable]).name not in {names[v] for v in own}
        assert shared or own[variable] == first
    assert 0 < len(own) < len(names)
    draw = np.random.default_rng(1)
    for number, part in enumerate(sections.parts):
        whole = space.whole[0]
        assert sections.measure(number, whole, Fidelity(30, "none")).values == (0.0,)
        config = whole.copy()
        config[list(part.variables)] = draw.integers(0, space.levels[list(part.variables)])
        found = sections.measure(number, config, Fidelity(30, "none"))
        assert found.values == (pytest.approx(_by_gates(graph, cuts, number, space, config, images[30:]), rel=1e-4),)
        fitted = sections.measure(number, config, Fidelity(30))
        assert fitted.values is not None
        assert 0 < fitted.values[0] < (found.values or (0.0,))[0]
        assert fitted.forwards < 6 * 30 + 30


def _by_gates(
    graph: Graph, cuts: list[str], number: int, space: SearchSpace, config: NDArray[np.int64], images: Tensor
) -> float:
    """The relative error of a part's output in the whole network whose removed units are masked by gates."""
    gates = {name: torch.zeros(graph.group(name).size) for name in space.keep(config)}
    for name, units in space.keep(config).items():
        gates[name][list(units)] = 1
    end = cuts[number] if number < len(cuts) else next(iter(structure.refs(graph.signature.output)))
    seen: list[Tensor] = []

    def watch(node: Node, value: Any) -> None:
        if node.name == end:
            seen.append(value)

    with torch.no_grad():
        for chosen in (Gates(graph.coupling, gates), None):
            execute(graph, graph.values, input_leaves(graph, images), chosen, watch=watch)
    changed, dense = seen
    return float((changed - dense).square().sum() / dense.square().sum())


def test_networks_that_can_not_be_divided_are_searched_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    task = digits_search.task()
    small = mp.trace(model, task.inputs)
    assert Sections(_space(small), _bench(small, task.train.images[:20])).parts == ()
    front = mp.explore(small, "emo", evaluations=8, data=[task.train.images[:40]], samples=20)
    assert front.evaluations == 8 == len(front)


# Joining


def _classes(toy: Toy, division: Division) -> list[Class]:
    """All configurations of some parts of few groups, with what the formula says they do alone."""
    found = []
    for part in division.parts:
        rows = np.array(list(itertools.product(range(0, UNITS, 2), repeat=len(part.variables))), dtype=np.int64)
        rows = np.concatenate([rows, np.full((1, len(part.variables)), UNITS - 1)])
        whole = toy.space.whole.repeat(len(rows), axis=0)
        whole[:, list(part.variables)] = rows
        found.append(Class(part.variables, rows, toy.error(toy.space.counts(whole))))
    return found


def test_impairments_are_what_items_do_to_the_whole_network() -> None:
    toy = Toy(0.0, 0, 6)
    evaluate = toy.evaluator(100, parts=3)
    assert evaluate.division is not None
    classes = _classes(toy, evaluate.division)
    skewed = [
        Class(own.variables, own.configs, own.proxy * factor) for own, factor in zip(classes, (1, 7, 0.1), strict=True)
    ]
    for most in (13, 100):
        for item, own in zip(impairments(toy.space, evaluate, None, skewed, 0, most), classes, strict=True):
            assert item.harm == pytest.approx(own.proxy, abs=1e-9)
    capped = impairments(toy.space, toy.evaluator(100), Budget.parse("macs=0.5"), skewed, 0, 100)
    assert all(np.isfinite(item.harm).all() and item.harm.min() == 0 for item in capped)
    nothing = impairments(toy.space, toy.evaluator(100), None, skewed, 0, 0)
    assert [item.harm.max() for item in nothing] == [own.proxy.max() for own in skewed]


@pytest.mark.parametrize("shared", [(), (1, 4)])
def test_the_joint_front_is_that_of_all_combinations(shared: tuple[int, ...]) -> None:
    """Against brute force, on a real network's cost, in which shared widths multiply with others."""
    task = digits_search.task()
    graph = mp.trace(_staged(), task.inputs)
    space = _space(graph, 6)
    draw = np.random.default_rng(0)
    if not shared:
        inside = [[v] for v in range(3)]  # not coupled: of different parts
        space = SEPARABLE.space
        keep = np.array(list(itertools.product(range(UNITS), repeat=3)))
    else:
        sections = Sections(space, _bench(graph, task.train.images[:4]))
        inside = [list(part.variables[:1]) for part in sections.parts]
        own = {v for part in sections.parts for v in part.variables}
        shared = tuple(v for v in range(len(space.variables)) if v not in own)[:2]
        keep = np.array(list(itertools.product(*(range(space.levels[v]) for row in (*inside, shared) for v in row))))
    columns = [v for row in inside for v in row] + list(shared)
    curves = {v: [*np.sort(draw.gamma(1, 1, space.levels[v] - 1))[::-1].tolist(), 0.0] for v in columns}
    items = [Items((v,), np.arange(space.levels[v])[:, None], np.array(curves[v])) for v in columns]
    model = Joint(space, items[: len(inside)], items[len(inside) :], {"macs": 1.0})
    rows = space.whole.repeat(len(keep), axis=0)
    rows[:, columns] = keep
    harm = np.stack([np.array(curves[v])[keep[:, i]] for i, v in enumerate(columns)], axis=1).sum(axis=1)
    cost = space.fractions("macs", rows)
    configs, harms = model.front()
    exact = [np.array(curves[v])[configs[:, v]] for v in columns]
    assert harms == pytest.approx(np.sum(exact, axis=0))
    corner = [1.001, float(harm.max()) * 1.001]
    found = moocore.hypervolume(np.stack([model.cost(configs), harms], axis=1), ref=corner)
    best = moocore.hypervolume(np.stack([cost, harm], axis=1), ref=corner)
    assert 0.93 * best <= found <= best + 1e-9
    for low, high in itertools.pairwise(range(len(configs))):
        limit = float(model.cost(configs[[low, high]]).mean())
        choice = model.optimum(configs[[low, high]], limit)
        assert choice is not None
        (picked,), value = choice
        assert space.fractions("macs", picked[None])[0] <= limit * (1 + 1e-9)
        same = (keep[:, len(inside) :] == picked[list(shared)]).all(axis=1) & (cost <= limit * (1 + 1e-12))
        assert value == pytest.approx(harm[same].min(), abs=1e-9)


# Searches


def _search(toy: Toy, evaluations: int, parts: int, seed: int = 0, ledger: Ledger | None = None) -> Front:
    evaluate = toy.evaluator(evaluations, ledger, parts)
    return find("emo")(toy.space, evaluate, None, seed, toy.space.checked([]))


def test_parts_learn_what_curves_do_not_show() -> None:
    for toy, least in ((SEPARABLE, 0.975), (INTERACTING, 0.975)):
        best = float(moocore.hypervolume(toy.exact, ref=[1, 1]))
        evaluate = toy.evaluator(300, parts=6)
        found = find("emo")(toy.space, evaluate, None, 0, toy.space.checked([]))
        assert found.hypervolume() >= least * best
        assert evaluate.spent == pytest.approx(300, abs=1)
        assert found.evaluations == evaluate.evaluations < 300
    additive = find("dp")(toy.space, toy.evaluator(300), None, 0, toy.space.checked([]))
    assert found.hypervolume() > additive.hypervolume()


def test_a_search_in_parts_goes_on_from_any_line_of_its_ledger(tmp_path: Any) -> None:
    def search(name: str) -> str:
        with Ledger(tmp_path / name, {}) as ledger:
            return _search(INTERACTING, 60, 6, ledger=ledger).to_json()

    undisturbed = search("whole")
    content = (tmp_path / "whole").read_bytes()
    for cut in np.random.default_rng(0).integers(2, len(content), 4).tolist():
        (tmp_path / "torn").write_bytes(content[:cut])
        assert search("torn") == undisturbed
        assert (tmp_path / "torn").read_bytes() == content


def test_parts_are_asked_for_within_what_is_left() -> None:
    evaluate = SEPARABLE.evaluator(2, parts=4)
    most = evaluate.affordable(0)
    rows = SEPARABLE.space.sample(np.random.default_rng(0), most + 1)
    with pytest.raises(OptionError, match="of a part are asked for, 2 whole ones are left"):
        evaluate.part(0, rows)
    values = evaluate.part(0, rows[:-1])
    spent = evaluate.spent
    assert evaluate.part(0, rows[:-1]).tolist() == values.tolist()
    assert evaluate.spent == spent <= 2
    with pytest.raises(OptionError, match="division: the network was not divided"):
        Evaluator(SEPARABLE.space, ("error",), SEPARABLE.measure, 1).part(0, rows)


def test_a_divided_network_is_searched_better_than_at_random(images: Tensor) -> None:
    task = digits_search.task()
    options: dict[str, Any] = {"evaluations": 30, "samples": 32, "criterion": "magnitude"}
    names = ("distortion", "macs")
    front, random = (mp.explore(task, backend, names, **options) for backend in ("emo", "random"))
    assert front.hypervolume() > random.hypervolume()
    assert front.evaluations < 30
    point = front.best(macs=0.5)
    recovered = mp.recover(mp.apply(mp.trace(task.model, task.inputs), point.plan), task, recipe="least_squares")
    assert recovered.cost["after"].macs <= 0.5 * recovered.cost["before"].macs
