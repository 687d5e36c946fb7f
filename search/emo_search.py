"""The back end "emo": NSGA-II in every part of the network, joined by what its points do to the whole.

Shang, Zhu, Wu, Zhang, Jiao and Xu, Evolutionary Multi-Objective Pruning by divide and conquer (EMO-PMS, arXiv
2303.16212; its second version is called EMO-DIR). The paper's abstract fixes the order of things: divide the network,
search each part by an evolutionary algorithm for several objectives, judge a part by its features without the rest of
the network, and join the parts' fronts by a ranking of global performance impairments. No code is published, and the
following are assumptions of this implementation:

- cuts lie where one value is all that goes on (see `metaprune.parts`), and a part's input is the dense network's;
- widths that several parts share are whole while parts are searched; their levels are classes of their own when parts
  are joined, with the square of what is taken away for a proxy, and what they save follows from the joint cost;
- a part's objectives are the relative squared error of its output features, once it is repaired in closed form, and
  the costs of the whole network of which only this part has shrunk. It is neither trained nor judged by a detector;
- impairments are measured for a few points of each part, and interpolated (see `impairment`);
- the ranking is the order along the convex hull of harm and cost; between the hull's corners the knapsack is solved
  exactly (see `joining`);
- what that leaves of the evaluations goes into NSGA-II on the whole network, from all that was evaluated by then.

An evaluation of a part counts by its share of the network's multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pymoo.util.ref_dirs import get_reference_directions

from metaprune.search.budget import Budget
from metaprune.search.division import Part
from metaprune.search.evaluate import Evaluator
from metaprune.search.evolution import Evolution, Values
from metaprune.search.front import Front, nondominated
from metaprune.search.impairment import Class, impairments
from metaprune.search.joining import Items, Joint
from metaprune.search.nsga2_search import costs_known, evolve
from metaprune.search.separation import harmful, priced
from metaprune.search.space import Configs, SearchSpace
from metaprune.search.sweep import scattered, walk

_PARTS, _IMPAIRMENTS, _JOINED = 0.35, 0.2, 0.5  # of the evaluations; the last, of what is left by then
_ITEMS = 40  # points of a part's front that are joined
_SHARES = 4  # in which weights of several costs are shared out
_NARROW = 1 / 64  # of a cost: a gap in which no optimum is looked for


def run(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> Front:
    """Evaluates `init`, searches the parts, and joins them; a network that has no parts is searched as one.

    Raises:
        OptionError: All objectives are costs.
        BudgetInfeasible: Nothing is within the budget.
    """
    costs = priced(evaluate.objectives, space, budget)
    column = harmful(evaluate.objectives, space)
    space.check(budget)
    evaluate(evaluate.fresh(init))
    if evaluate.division is not None and evaluate.division.parts:
        most = evaluate.left
        classes = _searched(space, evaluate, seed, costs, _PARTS * most) + _shared(space, evaluate.division.parts)
        items = impairments(space, evaluate, budget, classes, column, int(_IMPAIRMENTS * most))
        count = len(evaluate.division.parts)
        _join(space, evaluate, budget, costs, items[:count], items[count:])
    evolve(space, evaluate, budget, seed, init)
    walk(space, evaluate, budget, costs)
    return evaluate.front()


def _searched(space: SearchSpace, evaluate: Evaluator, seed: int, costs: tuple[str, ...], spend: float) -> list[Class]:
    """The front of every part: the error of its features against the costs of the network in which it alone shrinks.

    Each part has as many evaluations as the others, which count by their shares.
    """
    parts = evaluate.division.parts if evaluate.division is not None else ()
    each = int(spend / sum(part.share for part in parts))
    return [_front_of(number, part, space, evaluate, seed, costs, each) for number, part in enumerate(parts)]


def _front_of(
    number: int, part: Part, space: SearchSpace, evaluate: Evaluator, seed: int, costs: tuple[str, ...], most: int
) -> Class:
    own = list(part.variables)
    known = costs_known(space, ("features", *costs))

    def whole(rows: Configs) -> Configs:
        found = space.whole.repeat(len(rows), axis=0)
        found[:, own] = rows
        return found

    engine = Evolution(space.levels[own], lambda rows: known(whole(rows)), seed + number, space.whole[:, own])
    configs, values = [space.whole[:, own]], [np.concatenate([np.zeros((1, 1)), known(space.whole)[:, 1:]], axis=1)]
    engine.tell(configs[0], values[0])
    left = min(most, evaluate.affordable(number))
    while left:
        rows = engine.ask(left)
        if not len(rows):
            break
        found = known(whole(rows))
        found[:, 0] = evaluate.part(number, whole(rows))
        engine.tell(rows, found)
        configs.append(rows)
        values.append(found)
        left -= len(rows)
    rows, every = np.concatenate(configs), np.concatenate(values)
    runs = np.flatnonzero(np.isfinite(every).all(axis=1))
    stays = runs[nondominated(every[runs])]
    stays = stays[scattered(every[stays, 1:])[:_ITEMS]]
    return Class(part.variables, rows[stays], every[stays, 0])


def _shared(space: SearchSpace, parts: Sequence[Part]) -> list[Class]:
    """One class for each variable that is in no part."""
    own = {variable for part in parts for variable in part.variables}
    found = []
    for number, count in enumerate(space.levels.tolist()):
        if number not in own:
            levels = np.arange(count, dtype=np.int64)
            found.append(Class((number,), levels[:, None], _gone(space, number) ** 2))
    return found


def _gone(space: SearchSpace, number: int) -> Values:
    """The share that each level of a variable takes away."""
    fractions: Values = 1 - space.variables[number].fractions
    return fractions


def _join(
    space: SearchSpace,
    evaluate: Evaluator,
    budget: Budget | None,
    costs: tuple[str, ...],
    parts: list[Items],
    shared: list[Items],
) -> None:
    """Evaluates the joint front: corners of the hull in an order that soon covers it, then optima between them."""
    most = max(1, int(_JOINED * evaluate.left))
    stop = evaluate.left - most
    for row in get_reference_directions("das-dennis", len(costs), n_partitions=_SHARES).tolist():
        model = Joint(space, parts, shared, dict(zip(costs, row, strict=True)))
        configs, _ = model.front()
        configs = configs[space.excess(configs, budget) <= 1]
        order = configs[scattered(model.cost(configs)[:, None])]
        evaluate(evaluate.fresh(order)[: max(0, evaluate.left - stop)])
        gaps = [(float(high - low), i) for i, (low, high) in enumerate(pairwise(model.cost(configs)))]
        for width, i in sorted(gaps, reverse=True):
            if width < _NARROW or evaluate.left <= stop:
                break
            low, high = model.cost(configs[i : i + 2]).tolist()
            found = model.optimum(configs[i : i + 2], (low + high) / 2)
            if found is not None:
                inside = found[0][space.excess(found[0], budget) <= 1]
                evaluate(evaluate.fresh(inside))
