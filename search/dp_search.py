"""The back end "dp": layer-adaptive allocation as a search over the whole front.

Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks (ICCV 2023, arXiv
2308.10438), for widths of groups: what each does alone is measured, harms are taken to add up, and costs are exact.
"""

from __future__ import annotations

from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.front import Front
from metaprune.search.separation import affordable, measured, priced
from metaprune.search.space import Configs, SearchSpace
from metaprune.search.sweep import Sweep, walk

_CURVES = 0.5  # of the evaluations, at most


def run(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> Front:
    """Evaluates `init`, then each variable alone (see `separation.measured`), then what is best if harms add up.

    That is the convex hull of harm against cost, in an order that soon covers the range, and then the optimum at the
    middle of the widest gap in cost, again and again. Several costs are weighted against each other in several ways.
    Where that ends before the evaluations do, as in small spaces, the front's neighbours are evaluated (see
    `sweep.walk`). There is no random choice in it.

    Raises:
        OptionError: All objectives are costs, or a variable is not the width of one group.
        BudgetInfeasible: Nothing is within the budget.
    """
    costs = priced(evaluate.objectives, space, budget)
    evaluate(evaluate.fresh(init))
    model = measured(space, evaluate, budget, affordable(space, evaluate, _CURVES))
    Sweep(model, evaluate, costs).run(parts=1)
    walk(space, evaluate, budget, costs)
    return evaluate.front()
