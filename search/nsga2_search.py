"""The back end "nsga2": the whole network, level by level, by NSGA-II (see `evolution`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.evolution import Evolution, Values
from metaprune.search.front import Front
from metaprune.search.separation import priced
from metaprune.search.space import Configs, SearchSpace
from metaprune.search.sweep import walk


def run(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> Front:
    """Evaluates `init` and the diagonal, and breeds from them until no evaluation is left.

    Where nothing new comes up before that, as in small spaces, the front's neighbours are evaluated (see
    `sweep.walk`).

    Raises:
        BudgetInfeasible: Nothing is within the budget.
    """
    space.check(budget)
    evolve(space, evaluate, budget, seed, init)
    walk(space, evaluate, budget, priced(evaluate.objectives, space, budget))
    return evaluate.front()


def evolve(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> None:
    """NSGA-II, from all that was evaluated already, until no evaluation is left or nothing new comes up."""
    engine = Evolution(
        space.levels, costs_known(space, evaluate.objectives), seed, init, lambda rows: space.repair(rows, budget)
    )
    rows, values = evaluate.archive()
    if len(rows):
        engine.tell(rows, values)
    while evaluate.left:
        rows = engine.ask(evaluate.left)
        if not len(rows):
            return
        engine.tell(rows, evaluate(rows))


def costs_known(space: SearchSpace, objectives: tuple[str, ...]) -> Callable[[Configs], Values]:
    """The objectives that the space's cost model states, as `Evolution` wants them."""

    def known(configs: Configs) -> Values:
        values = np.full((len(configs), len(objectives)), np.nan)
        for number, name in enumerate(objectives):
            if name in space.named:
                values[:, number] = space.fractions(name, configs)
        return values

    return known
