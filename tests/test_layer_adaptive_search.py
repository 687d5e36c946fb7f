"""Separable models of search spaces and the searches that rest on them, against closed forms and exact optima."""

import itertools
from collections.abc import Callable

import moocore
import numpy as np
import pytest
from numpy.typing import NDArray

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.search.backends import find
from metaprune.search.budget import Budget
from metaprune.search.coefficients import corrected, evolved, neighbours
from metaprune.search.evaluate import Evaluator, Fidelity
from metaprune.search.lagrange import hull
from metaprune.search.layer_adaptive import dp
from metaprune.search.ledger import Result
from metaprune.search.problem import Problem
from metaprune.search.separation import measured, priced
from metaprune.search.spdy import EVALUATIONS, spdy
from metaprune.search.sweep import Sweep, scattered
from tests.support import digits_search
from tests.support.toy import INTERACTING, SEPARABLE, UNITS, Toy

EVERYTHING = 10_000
Losses = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _harms(toy: Toy) -> list[NDArray[np.float64]]:
    """Share of the whole error that each group alone does, by kept count."""
    weights, _, _, pairs = toy._drawn
    return list(toy.damage * weights[:, None] / (weights.sum() + toy.interaction * pairs.sum()))


# Curves


@pytest.mark.parametrize("toy", [SEPARABLE, INTERACTING], ids=["separable", "interacting"])
def test_curves_are_what_each_variable_does_alone(toy: Toy) -> None:
    evaluate = toy.evaluator(EVERYTHING)
    model = measured(toy.space, evaluate, None, EVERYTHING)
    assert evaluate.evaluations == 1 + toy.groups * (UNITS - 1)
    mean = np.mean([harm[1] for harm in _harms(toy)]) / (1 - 1 / UNITS) ** 2
    for curve, levels, harm in zip(model.curves, model.levels, _harms(toy), strict=True):
        least = 0.01 * mean * (1 - levels / UNITS) ** 2  # where a variable does next to nothing
        assert curve[levels] == pytest.approx(np.maximum(harm[levels], least), abs=1e-12)


@pytest.mark.parametrize("budget", ["macs=0.6", "macs=0.3"])
def test_curves_under_a_cap_have_the_same_differences(budget: str) -> None:
    evaluated: list[NDArray[np.int64]] = []

    def measure(config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        evaluated.append(config)
        return SEPARABLE.measure(config, fidelity)

    space, goal = SEPARABLE.space, Budget.parse(budget)
    evaluate = Evaluator(space, ("error", "macs"), measure, EVERYTHING)
    model = measured(space, evaluate, goal, EVERYTHING)
    assert space.excess(np.stack(evaluated), goal).max() <= 1
    for curve, levels, harm in zip(model.curves, model.levels, _harms(SEPARABLE), strict=True):
        assert levels[-1] == UNITS  # one variable can always be whole
        own = harm[levels]
        assert curve[levels] == pytest.approx(own, abs=0.02 * np.mean([h[1] for h in _harms(SEPARABLE)]))


def test_few_evaluations_are_shared_out_and_curves_are_never_rising() -> None:
    for most in (0, 1, 2, 30, 41, 100, 150):
        evaluate = INTERACTING.evaluator(EVERYTHING)
        model = measured(INTERACTING.space, evaluate, None, most)
        assert evaluate.evaluations <= most
        assert most < 41 or evaluate.evaluations >= most - 1
        assert most < 41 or len({round(float(curve[1]), 12) for curve in model.curves}) == INTERACTING.groups
        for curve, levels in zip(model.curves, model.levels, strict=True):
            assert np.isfinite(curve[levels]).all()
            assert (np.diff(curve) <= 0).all()
            assert curve[-1] == 0


def test_networks_that_do_not_run_are_the_worst() -> None:
    def measure(config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        return Result(None, 1.0) if config[3] < 2 or config[5] == 7 else SEPARABLE.measure(config, fidelity)

    evaluate = Evaluator(SEPARABLE.space, ("error", "macs"), measure, EVERYTHING)
    lame = measured(SEPARABLE.space, evaluate, None, EVERYTHING)  # the whole network does not run
    assert all(np.isfinite(curve).all() for curve in lame.curves)
    whole = SEPARABLE.space.whole[0]

    def sound(config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        return Result(None, 1.0) if config[3] < 2 else SEPARABLE.measure(config, fidelity)

    evaluate = Evaluator(SEPARABLE.space, ("error", "macs"), sound, EVERYTHING)
    model = measured(SEPARABLE.space, evaluate, None, EVERYTHING)
    others = sum(float(curve[1]) for v, curve in enumerate(model.curves) if v != 3)
    assert np.isfinite(model.curves[3]).all()
    assert min(model.curves[3][1:3]) > others > model.curves[3][3]
    found = hull(model.instance([model.limit({"macs": 1.0})]))
    assert (found[1:, 3] >= 2).all()
    assert (found == whole).all(axis=1).any()


def test_costs_of_instances_are_those_of_the_space() -> None:
    task = digits_search.task()
    space = mp.trace(task.model, task.inputs)
    costs = space.coupling.costs
    place = {g: v for v, g in enumerate(g for g, group in enumerate(space.groups) if not group.pinned)}
    draw = np.random.default_rng(0)
    kept = np.tile(costs.sizes, (20, 1))
    kept[:, list(place)] = draw.integers(1, costs.sizes[list(place)] + 1, (20, len(place)))
    for what in ("macs", "params", "bytes"):
        total = np.zeros(20)
        for key, coefficient in costs.monomials(what, place).items():
            total += coefficient * kept[:, [list(place)[v] for v in key]].prod(axis=1)
        assert total == pytest.approx(costs.evaluate(what, kept))


def test_points_are_taken_from_the_ends_inwards() -> None:
    places = np.linspace(0, 1, 9)[:, None]
    assert scattered(places)[:5].tolist() == [0, 8, 4, 2, 6]
    assert sorted(scattered(places).tolist()) == list(range(9))
    assert not len(scattered(np.empty((0, 2))))


# Fronts


def test_the_hull_of_a_separable_space_is_its_front() -> None:
    model = measured(SEPARABLE.space, SEPARABLE.evaluator(EVERYTHING), None, EVERYTHING)
    found = hull(model.instance([model.limit({"macs": 1.0})]))
    kept = found + 1.0
    values = np.stack([SEPARABLE.error(kept), SEPARABLE.space.fractions("macs", found)], axis=1)
    best = moocore.hypervolume(SEPARABLE.exact, ref=[1, 1])
    assert moocore.hypervolume(values, ref=[1, 1]) >= 0.99 * best


def test_optima_between_corners_are_exact() -> None:
    model = measured(SEPARABLE.space, SEPARABLE.evaluator(EVERYTHING), None, EVERYTHING)
    sweep = Sweep(model, SEPARABLE.evaluator(1), ("macs",))
    for place in (0.2, 0.37, 0.8):
        choice = sweep.optimum({"macs": 1.0}, place)
        exact = SEPARABLE.exact
        assert SEPARABLE.error(choice[None] + 1.0)[0] == pytest.approx(exact[exact[:, 1] <= place, 0].min(), rel=1e-3)


def _hypervolume(toy: Toy, backend: str, evaluations: int) -> float:
    front = find(backend)(toy.space, toy.evaluator(evaluations), None, 0, toy.space.checked([]))
    return front.hypervolume() / float(moocore.hypervolume(toy.exact, ref=[1, 1]))


def test_searches_come_near_the_exact_front() -> None:
    assert _hypervolume(SEPARABLE, "dp", 300) >= 0.995
    assert _hypervolume(SEPARABLE, "spdy", 300) >= 0.99
    for toy in (INTERACTING, Toy(2.0, 1)):
        lost, left = (1 - _hypervolume(toy, backend, 300) for backend in ("dp", "spdy"))
        assert left <= lost / 2


def test_small_spaces_are_searched_to_the_end() -> None:
    toy = Toy(2.0, 1, 4)
    kept = np.array(list(itertools.product(range(1, UNITS + 1), repeat=4)), dtype=float)
    values = np.stack([toy.error(kept), toy.evaluate("macs", kept) / toy.evaluate("macs", toy.sizes[None])], axis=1)
    best = float(moocore.hypervolume(values, ref=[1, 1]))
    found = {}
    for backend in ("dp", "spdy"):
        evaluate = toy.evaluator(200)
        found[backend] = find(backend)(toy.space, evaluate, None, 0, toy.space.checked([])).hypervolume() / best
        assert evaluate.left == 0  # it goes on where the model has no more to say
    assert found["spdy"] >= found["dp"] >= 0.98


@pytest.mark.parametrize("backend", ["dp", "spdy"])
def test_several_costs_and_several_harms(backend: str) -> None:
    task = digits_search.task()
    graph, data = mp.trace(task.model, task.inputs), [(task.train.images[:64], task.train.labels[:64])]
    names = ("macs", "distortion", "params")
    front = mp.explore(graph, backend, names, 40, "params=0.7", data=data, samples=32, repair="none", levels=6)
    assert len(front) > 5
    assert front.values[:, 2].max() <= 0.7
    random = mp.explore(graph, "random", names, 40, "params=0.7", data=data, samples=32, repair="none", levels=6)
    corner = [1.0, float(max(front.values[:, 1].max(), random.values[:, 1].max())), 1.0]
    assert front.hypervolume(corner) > random.hypervolume(corner)
    with pytest.raises(OptionError, match="objectives: one that is no cost is needed, not only params, macs"):
        mp.explore(graph, backend, ("params", "macs"), 10)


def test_without_a_cost_among_the_objectives_the_budget_names_it() -> None:
    space = SEPARABLE.space
    assert priced(("error", "macs"), space, Budget.parse("params=0.5")) == ("macs",)
    assert priced(("error",), space, Budget.parse("params=0.5")) == ("params",)
    assert priced(("error",), space, None) == ("macs",)


# Coefficients


def test_neighbours_change_one_group_by_one_level() -> None:
    levels = [np.array([2, 5, 9]), np.array([4]), np.array([1, 3])]
    curves = [np.arange(9, -1, -1.0), np.zeros(5), 10 * np.arange(3, -1, -1.0)]
    assert neighbours(np.array([7, 4, 1]), levels, curves).tolist() == [[7, 4, 3], [5, 4, 1]]
    assert neighbours(np.array([2, 4, 3]), levels, curves).tolist() == [[2, 4, 1], [5, 4, 3]]


def test_coefficients_are_those_of_the_slopes() -> None:
    draw = np.random.default_rng(0)
    curves = [np.sort(draw.gamma(1, 1, 9))[::-1].copy() for _ in range(7)]
    levels = [np.arange(1, 9)] * 7
    factors = np.exp(draw.normal(size=7))
    kept = draw.integers(1, 9, 7)

    def loss(rows: NDArray[np.int64], by: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([sum(f * c[k] for f, c, k in zip(by, curves, row.tolist(), strict=True)) for row in rows])

    others = neighbours(kept, levels, curves)
    for by, expected in ((np.full(7, 3.0), np.zeros(7)), (factors, np.log(factors / np.median(factors)))):
        logarithms = np.zeros(7)
        for _ in range(40):
            logarithms = corrected(logarithms, curves, kept, loss(kept[None], by)[0], others, loss(others, by))
        assert logarithms == pytest.approx(expected, abs=1e-9)
    same = corrected(np.ones(7), curves, kept, 1.0, others[:2], np.full(2, 1.0))  # no slope anywhere
    assert (same == 1).all()
    broken = corrected(np.zeros(7), curves, kept, 0.0, others, np.where(np.arange(7) == 3, np.inf, 1.0))
    assert np.isfinite(broken).all()


def test_evolution_keeps_to_its_seed_and_its_count() -> None:
    def descent(seed: int, evaluations: int) -> list[list[float]]:
        asked: list[list[float]] = []

        def losses(points: NDArray[np.float64]) -> NDArray[np.float64]:
            asked.extend(points.tolist())
            values = ((points - 0.5) ** 2).sum(axis=1)
            return np.where(points[:, 0] > 0.9, np.inf, values)

        evolved(losses, 4, seed, evaluations, 0.3)
        return asked

    before = np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    for seed in (0, 3):
        asked = descent(seed, 200)
        assert asked == descent(seed, 200)
        assert 150 < len(asked) <= 200
        assert np.abs(np.array(asked[-8:]) - 0.5).mean() < 0.1
        assert np.abs(asked).max() <= 1.5
    assert descent(0, 200) != descent(3, 200)
    assert before == (np.random.get_state()[1].tobytes(), np.random.get_state()[2])
    assert len(descent(0, 0)) == 0
    assert len(descent(0, 10)) <= 10


# The allocator


def _problem(toy: Toy, fraction: float, step: int = 1) -> Problem:
    steps = np.full(toy.groups, step)
    budget = Budget.parse(f"macs={fraction}")
    scores = [np.ones(UNITS)] * toy.groups

    def loss(kept: NDArray[np.int64]) -> NDArray[np.float64]:
        return toy.error(kept.astype(float))

    free = list(range(toy.groups))
    return Problem(toy, free, scores, budget, steps, steps.copy(), curves=_harms(toy), measure=loss)  # type: ignore[arg-type]


def _loss(toy: Toy, kept: NDArray[np.int64]) -> float:
    return float(toy.error(kept[None].astype(float))[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spdy_closes_half_of_what_harms_that_do_not_add_up_cost(seed: int) -> None:
    toy = Toy(2.0, seed)
    for fraction in (0.25, 0.5):
        problem = _problem(toy, fraction)
        kept = spdy(problem)
        assert problem.excess(kept) <= 1
        assert problem.record["measured"] <= EVALUATIONS
        assert problem.record["loss"] == _loss(toy, kept)
        best = toy.exact[toy.exact[:, 1] <= fraction, 0].min()  # proven; no search can do better
        loss, start = _loss(toy, kept), _loss(toy, dp(problem))
        assert start > best * 1.1
        assert loss - best <= (start - best) / 2


def test_spdy_closes_half_on_a_twin_that_brute_force_solves() -> None:
    shares = []
    kept = np.array(list(itertools.product((2, 4, 6, 8), repeat=8)))
    for seed in range(3):
        toy = Toy(4.0, seed, 8)
        costs, errors = toy.evaluate("macs", kept.astype(float)), toy.error(kept.astype(float))
        full = toy.evaluate("macs", toy.sizes[None])[0]
        for fraction in (0.4, 0.6):
            problem = _problem(toy, fraction, step=2)
            best = errors[costs <= fraction * full].min()
            start, loss = _loss(toy, dp(problem)), _loss(toy, spdy(problem))
            assert best - 1e-12 <= loss <= start + 1e-12
            if start > best + 1e-9:
                shares.append((start - loss) / (start - best))
    assert len(shares) >= 4
    assert min(shares) >= 0.5


def test_spdy_gives_the_same_answer_again_and_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    toy = Toy(2.0, 5, 8)
    problem = _problem(toy, 0.4)
    kept = spdy(problem)
    assert (spdy(_problem(toy, 0.4)) == kept).all()
    assert before == (np.random.get_state()[1].tobytes(), np.random.get_state()[2])
    assert problem.record["loss"] <= min(problem.record["loss_of_solver"], problem.record["loss_of_uniform"])
