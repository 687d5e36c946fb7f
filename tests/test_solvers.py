"""Exact solvers against brute force, against each other, and on the costs of real topologies."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.graphs.polynomial import Monomials
from metaprune.search.descent import Descent
from metaprune.search.dynamic import dynamic
from metaprune.search.elimination import Elimination, order_of
from metaprune.search.instance import Instance, Limit, Solution, brute_force
from metaprune.search.lagrange import hull, lagrange
from metaprune.search.milp import integer_program, solved
from metaprune.search.problem import Counts


def _instance(draw: np.random.Generator, variables: int, limits: int) -> Instance:
    """A chain with further products of up to three variables, squares among them; half of the harms have ties."""
    levels, harm = [], []
    for _ in range(variables):
        count = int(draw.integers(1, 5))
        levels.append(np.sort(draw.choice(np.arange(1, 20), size=count, replace=False)))
        values = draw.integers(0, 12, size=count).astype(float) if draw.random() < 0.5 else draw.gamma(1, 1, count)
        harm.append(np.sort(values)[::-1].copy())
    bounds = []
    for number in range(limits):
        terms: Monomials = {(): float(draw.integers(1, 5))}
        terms |= {(v,): float(draw.integers(0, 4)) for v in range(variables)}
        terms |= {(v, v + 1): float(draw.integers(1, 5)) for v in range(variables - 1)}
        for _ in range(int(draw.integers(0, variables + 1))):
            key = tuple(sorted(draw.integers(0, variables, size=int(draw.integers(2, 4))).tolist()))
            terms[key] = terms.get(key, 0.0) + float(draw.integers(1, 5))
        full = float(Limit("", terms, 1.0).at(np.array([[lv[-1] for lv in levels]], dtype=float))[0])
        bounds.append(Limit(f"cost {number}", terms, full * float(draw.uniform(0.05, 1))))
    return Instance(levels, harm, bounds)


def _instances(count: int, seed: int) -> Iterator[Instance]:
    draw = np.random.default_rng(seed)
    for number in range(count):
        yield _instance(draw, int(draw.integers(1, 7)), 1 + number % 3)


def _everything(instance: Instance) -> Counts:
    return np.array(list(itertools.product(*(range(len(levels)) for levels in instance.levels))))


@pytest.mark.parametrize("count", [250, pytest.param(850, marks=pytest.mark.nightly)])
def test_dynamic_program_integer_program_and_brute_force_agree(count: int) -> None:
    feasible = 0
    for number, instance in enumerate(_instances(count, seed=0)):
        if not instance.fits(np.zeros((1, len(instance.levels)), dtype=np.int64))[0]:
            continue
        feasible += 1
        best = brute_force(instance)
        choice, bound = solved(instance)  # by HiGHS alone
        assert choice is not None
        assert instance.fits(choice[None])[0]
        assert instance.harms(choice[None])[0] == pytest.approx(best.harm, abs=1e-6)
        assert bound == pytest.approx(best.harm, abs=1e-6)
        for solver in (dynamic, lagrange, integer_program) if number % 5 == 0 else (dynamic,):
            found = solver(instance)
            assert instance.fits(found.choice[None])[0]
            assert found.bound <= best.harm + 1e-9 <= found.harm + 2e-9
            if solver is not lagrange:
                assert found.harm == pytest.approx(best.harm, abs=1e-9)
                assert found.gap < 1e-6
    assert feasible >= 0.6 * count


@pytest.mark.parametrize("solver", [brute_force, dynamic, integer_program, lagrange])
def test_what_can_not_be_met_is_refused_with_the_least(solver: Callable[[Instance], Solution]) -> None:
    refused = 0
    for instance in _instances(120, seed=6):
        lowest = np.zeros((1, len(instance.levels)), dtype=np.int64)
        if instance.fits(lowest)[0]:
            continue
        refused += 1
        highest = np.array([[len(levels) - 1 for levels in instance.levels]])
        ratios = (instance.costs(lowest) / instance.costs(highest))[0]
        with pytest.raises(BudgetInfeasible) as error:
            solver(instance)
        assert error.value.attainable == pytest.approx(ratios[np.argmax(instance.costs(lowest)[0])])
    assert refused >= 10


def test_elimination_is_the_least_of_everything() -> None:
    draw = np.random.default_rng(1)
    for instance in _instances(60, seed=2):
        order = order_of(instance)
        assert order is not None
        elimination = Elimination(instance, order)
        prices = draw.gamma(1, 5, size=(4, len(instance.limits)))
        everything = _everything(instance)
        values = instance.harms(everything) + prices @ (instance.costs(everything).T - 1)
        choices, least = elimination.lowest(prices)
        np.testing.assert_allclose(least, values.min(axis=1), atol=1e-9)
        own = instance.harms(choices) + (prices * (instance.costs(choices) - 1)).sum(axis=1)
        np.testing.assert_allclose(own, least, atol=1e-9)
        by_level, inside, outside = elimination.bounds(prices[0])
        for variable, bounds in enumerate(by_level):
            expected = [values[0][everything[:, variable] == level].min() for level in range(len(bounds))]
            np.testing.assert_allclose(bounds, expected, atol=1e-9)
        for step, within, without in zip(elimination.steps, inside, outside, strict=True):
            for at in np.ndindex(*within.shape):
                same = (everything[:, list(step.rest)] == at).all(axis=1)
                assert within[at] + np.asarray(without)[at] == pytest.approx(values[0][same].min(), abs=1e-9)


def test_coordinate_descent_ends_where_no_single_level_is_better() -> None:
    draw = np.random.default_rng(3)
    for instance in _instances(30, seed=4):
        prices = draw.gamma(1, 5, size=(3, len(instance.limits)))
        choices, values = Descent(instance).lowest(prices)
        for choice, price, value in zip(choices, prices, values, strict=True):
            for variable, levels in enumerate(instance.levels):
                others = np.tile(choice, (len(levels), 1))
                others[:, variable] = np.arange(len(levels))
                moved = instance.harms(others) + (instance.costs(others) - 1) @ price
                assert value <= moved.min() + 1e-9


def test_hull_is_the_lower_convex_hull_of_everything() -> None:
    draw = np.random.default_rng(5)
    for _ in range(40):
        instance = _instance(draw, int(draw.integers(2, 6)), 1)
        found = hull(instance)
        cost, harm = instance.costs(found)[:, 0], instance.harms(found)
        everything = _everything(instance)
        all_costs, all_harms = instance.costs(everything)[:, 0], instance.harms(everything)
        assert (np.diff(cost) > 0).all() or len(found) == 1
        assert (np.diff(harm) < 0).all() or len(found) == 1
        for price in draw.gamma(0.5, 20, size=20):
            assert (harm + price * cost).min() == pytest.approx((all_harms + price * all_costs).min(), abs=1e-7)


def test_bad_instances_are_refused() -> None:
    one = Limit("macs", {(0,): 1.0}, 1.0)
    with pytest.raises(OptionError, match="limits"):
        Instance([np.array([1])], [np.zeros(1)], [])
    with pytest.raises(OptionError, match="variable 0 has 2 levels"):
        Instance([np.array([1, 2])], [np.zeros(1)], [one])
    with pytest.raises(OptionError, match="not finite"):
        Instance([np.array([1])], [np.array([np.nan])], [one])
