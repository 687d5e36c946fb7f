"""What items of a network's parts do to the whole network, from few evaluations of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.joining import Items
from metaprune.search.space import Configs, SearchSpace

Values = NDArray[np.float64]

_LOOKED = 4  # items of a class that are looked at
_LEAST = 0.01  # of the mean ratio of impairment to proxy: no item is harmless
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Class:
    """Items and what is known of their harm from the part alone.

    Attributes:
        variables: Numbers of the variables that they decide.
        configs: Their levels, shape [items, variables of it].
        proxy: Harm in a unit of the class's own, 0 where nothing is taken away, shape [items].
    """

    variables: tuple[int, ...]
    configs: Configs
    proxy: Values


def impairments(
    space: SearchSpace, evaluate: Evaluator, budget: Budget | None, classes: Sequence[Class], column: int, most: int
) -> list[Items]:
    """The classes with harms in the unit of an objective.

    Some items of every class are put into the network alone, the middle first, and the network is evaluated: its
    objective less that of the network without the item is the item's impairment. In between, the ratio of impairment
    to proxy is interpolated. Classes of which nothing is known have the mean ratio. The network that items are put into
    is the widest within the budget whose levels are all lowered in proportion.

    Args:
        space: The space.
        evaluate: Evaluates.
        budget: Every network that is evaluated is within it.
        classes: The classes.
        column: Number of the objective.
        most: Evaluations that may be spent.
    """
    background: NDArray[np.int64] = space.repair(space.whole, budget)[0]
    asked: dict[tuple[int, int], NDArray[np.int64]] = {}
    orders = [_order(own) for own in classes]
    spent = int(not evaluate.known(background))
    for turn, number in product(range(_LOOKED), range(len(classes))):
        if turn < len(orders[number]):
            item = int(orders[number][turn])
            row = background.copy()
            own = list(classes[number].variables)
            row[own] = np.minimum(row[own], classes[number].configs[item])
            price = int(not evaluate.known(row))
            if (row == background).all() or spent + price > most:
                continue
            spent += price
            asked[number, item] = row
    if not asked:
        return [Items(own.variables, own.configs, own.proxy) for own in classes]
    base = float(evaluate(background[None])[0, column])
    losses = evaluate(np.stack(list(asked.values())))[:, column] - base
    told: list[dict[float, float]] = [{} for _ in classes]
    for (number, item), loss in zip(asked, losses.tolist(), strict=True):
        if np.isfinite(loss):
            proxy = float(classes[number].proxy[item])
            told[number][proxy] = max(loss, 0.0) / max(proxy, _TINY)
    ratios = [np.mean(list(own.values())) for own in told if own]
    mean = float(np.mean(ratios)) if ratios else 1.0
    return [_scaled(own, known, mean or 1.0) for own, known in zip(classes, told, strict=True)]


def _order(own: Class) -> NDArray[np.int64]:
    """Items to look at: the middle one by proxy first, then the worst, then between."""
    harmful = np.flatnonzero(own.proxy > 0)
    ranked = harmful[np.argsort(own.proxy[harmful], kind="stable")]
    last = len(ranked) - 1
    places = [last // 2, last, last // 4, (3 * last) // 4]
    order: NDArray[np.int64] = ranked[list(dict.fromkeys(places))] if len(ranked) else ranked
    return order


def _scaled(own: Class, ratios: dict[float, float], mean: float) -> Items:
    """Harms by the ratios at some proxies, never falling as the proxy rises."""
    if ratios:
        at = np.array(sorted(ratios))
        least = _LEAST * max(mean, max(ratios.values()))
        factor = np.interp(own.proxy, at, np.maximum([ratios[proxy] for proxy in at.tolist()], least))
    else:
        factor = np.full(len(own.proxy), mean)
    order = np.argsort(own.proxy, kind="stable")
    harm = np.empty(len(order))
    harm[order] = np.maximum.accumulate((own.proxy * factor)[order])
    return Items(own.variables, own.configs, harm)
