"""The knapsack against brute force: optimal, within the capacity, honest about what thinning costs."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprune.graphs.errors import BudgetInfeasible, OptionError
from metaprune.search.knapsack import Solution, knapsack

Instance = tuple[list[np.ndarray], list[np.ndarray], int]


def instance(seed: int) -> Instance:
    """Up to six classes of up to five items; weights and values of few kinds make ties, capacities may be too small."""
    draw = np.random.default_rng(seed)
    kinds = int(draw.choice([2, 5, 50]))
    counts = draw.integers(1, 6, draw.integers(1, 7)).tolist()
    weights = [draw.integers(0, kinds, n) for n in counts]
    values = [
        draw.integers(0, kinds, n).astype(float) if seed % 2 else draw.lognormal(0, 3, n) * (draw.random(n) < 0.9)
        for n in counts
    ]
    return weights, values, int(draw.integers(0, max(1, sum(int(w.max()) for w in weights)) + 1))


def best(weights: list[np.ndarray], values: list[np.ndarray], capacity: int) -> tuple[float, int] | None:
    found = [
        (float(sum(v[j] for v, j in zip(values, choice, strict=True))), weight)
        for choice in product(*(range(len(w)) for w in weights))
        if (weight := sum(int(w[j]) for w, j in zip(weights, choice, strict=True))) <= capacity
    ]
    return min(found, default=None)


def check(task: Instance, found: Solution) -> None:
    weights, values, capacity = task
    assert found.weight == sum(int(w[j]) for w, j in zip(weights, found.choice, strict=True)) <= capacity
    assert found.value == pytest.approx(sum(float(v[j]) for v, j in zip(values, found.choice, strict=True)), abs=1e-12)


def test_it_is_brute_force_on_many_small_instances() -> None:
    solved = refused = 0
    for seed in range(500):
        task = instance(seed)
        wanted = best(*task)
        if wanted is None:
            refused += 1
            with pytest.raises(BudgetInfeasible) as error:
                knapsack(*task)
            assert error.value.attainable == sum(int(w.min()) for w in task[0]) > task[2]
            continue
        solved += 1
        found = knapsack(*task)
        check(task, found)
        assert found.gap == 0
        assert found.value == pytest.approx(wanted[0], rel=1e-8, abs=1e-12)
        if seed % 2:  # whole values add up without rounding, so that ties are ties
            assert found.weight == wanted[1]
    assert solved >= 300
    assert refused >= 20


def test_thinned_lists_never_exceed_and_say_how_far_they_may_be_off() -> None:
    off = 0
    for seed in range(300):
        task = instance(seed)
        wanted = best(*task)
        if wanted is None:
            continue
        found = knapsack(*task, points=2)
        check(task, found)
        assert wanted[0] - 1e-9 <= found.value <= wanted[0] + found.gap + 1e-9 * (1 + wanted[0])
        off += found.value > wanted[0] + 1e-9
    assert off > 0  # thinning was felt, or the bound was not tested


def test_a_large_instance_is_solved_as_dynamic_programming_over_all_weights_does() -> None:
    draw = np.random.default_rng(0)
    weights = [np.sort(draw.integers(0, 200, 30)) for _ in range(25)]
    values = [np.sort(draw.gamma(0.3, 1.0, 30))[::-1] * draw.gamma(1.0) for _ in range(25)]
    capacity = sum(int(w.max()) for w in weights) // 8
    table = np.full(capacity + 1, 0.0)  # the least value within each capacity
    for w, v in zip(weights, values, strict=True):
        new = np.full(capacity + 1, np.inf)
        for one, value in zip(w.tolist(), v.tolist(), strict=True):
            if one <= capacity:
                new[one:] = np.minimum(new[one:], table[: capacity + 1 - one] + value)
        table = new
    found = knapsack(weights, values, capacity)
    check((weights, values, capacity), found)
    assert found.gap == 0
    assert found.value == pytest.approx(table[-1], rel=1e-9)
    thin = knapsack(weights, values, capacity, points=20)
    assert thin.weight <= capacity
    assert table[-1] - 1e-9 <= thin.value <= table[-1] + thin.gap + 1e-9


@given(st.integers(0, 10_000), st.integers(1, 50))
@settings(max_examples=50)
def test_more_room_never_hurts(seed: int, more: int) -> None:
    weights, values, _ = instance(seed)
    least = sum(int(w.min()) for w in weights)
    assert knapsack(weights, values, least + more).value <= knapsack(weights, values, least).value + 1e-9


def test_infinite_values_are_never_picked() -> None:
    found = knapsack([np.array([1, 2])], [np.array([np.inf, 5.0])], 2)
    assert found.choice == (1,)
    with pytest.raises(BudgetInfeasible):
        knapsack([np.array([1, 2])], [np.array([np.inf, 5.0])], 1)


@pytest.mark.parametrize(
    ("weights", "values", "match"),
    [
        ([1, 2], [1.0], "shape"),
        ([-1, 2], [1.0, 2.0], "negative"),
        ([1, 2], [np.nan, 2.0], "values: class 0"),
        ([1, 2], [-np.inf, 2.0], "values: class 0"),
        ([1, 2], [np.inf, np.inf], "values: class 0"),
    ],
)
def test_bad_input_is_named(weights: list[int], values: list[float], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        knapsack([np.array(weights)], [np.array(values)], 5)
