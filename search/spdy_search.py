"""The back end "spdy": layer-adaptive allocation, with curves that count as much as the objective shows at each cost.

Frantar and Alistarh, SPDY: Accurate Pruning with Speedup Guarantees (ICML 2022, arXiv 2201.13096, section 3.2), give
every curve one coefficient. Here the coefficients change along the front: what a group does depends on how much of the
others is left. They are read off the slopes of the objective (see `coefficients`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metaprune.search.budget import Budget
from metaprune.search.coefficients import corrected, neighbours
from metaprune.search.evaluate import Evaluator
from metaprune.search.front import Front
from metaprune.search.problem import Counts
from metaprune.search.separation import Separable, affordable, harmful, measured, priced
from metaprune.search.space import Configs, SearchSpace
from metaprune.search.sweep import Mix, Sweep, walk

_CURVES = _CORRECTIONS = 0.35  # of the evaluations, at most
_PLACES = 4  # on the front where the coefficients are corrected, one after the other and again
_PARTS = 8  # of the front, each with its own coefficients


def run(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> Front:
    """Evaluates `init` and each variable alone, corrects the curves along the front, and evaluates what is then best.

    Where that ends before the evaluations do, as in small spaces, the front's neighbours are evaluated (see
    `sweep.walk`). There is no random choice in it.

    Raises:
        OptionError: All objectives are costs, or a variable is not the width of one group.
        BudgetInfeasible: Nothing is within the budget.
    """
    costs = priced(evaluate.objectives, space, budget)
    evaluate(evaluate.fresh(init))
    most = evaluate.left
    model = measured(space, evaluate, budget, affordable(space, evaluate, _CURVES))
    corrections = _Corrections(model, evaluate)
    sweep = Sweep(model, evaluate, costs, corrections.logarithms)
    corrections.run(sweep, int(_CORRECTIONS * most))
    sweep.run(_PARTS)
    walk(space, evaluate, budget, costs)
    return evaluate.front()


class _Corrections:
    """Coefficients at the allocations where they were corrected, and between them."""

    def __init__(self, model: Separable, evaluate: Evaluator) -> None:
        self._model, self._evaluate = model, evaluate
        self._column = harmful(evaluate.objectives, model.space)
        self._levels = [np.arange(len(lv)) for lv in model.levels]
        self._harm = [curve[lv] for curve, lv in zip(model.curves, model.levels, strict=True)]
        self._found: dict[tuple[int, ...], Counts] = {}

    def logarithms(self, mix: Mix, place: float) -> Counts | None:
        """Logarithms of the coefficients, shape [variables], between those of the nearest allocations by cost."""
        if not self._found:
            return None
        places = np.zeros(len(self._found))
        for cost, weight in mix.items():
            places += weight * self._model.space.fractions(cost, np.array(list(self._found)))
        order = np.argsort(places, kind="stable")
        table = np.stack(list(self._found.values()))[order]  # [allocations, variables]
        return np.array([np.interp(place, places[order], column) for column in table.T])

    def run(self, sweep: Sweep, most: int) -> None:
        """Corrects at places that are spread over the front, as often as so many evaluations allow, once at least."""
        rounds = max(1, most // (1 + len(self._levels)))
        count = min(rounds, _PLACES)
        for number in range(rounds):
            mix = sweep.mixes[number % len(sweep.mixes)]
            low, high = sweep.ends(mix)
            place = low + (high - low) * (number % count + 0.5) / count
            corners = sweep.corners(mix, place)
            below = corners[sweep.places(mix, corners) <= place]
            if most > 0 and len(below):
                most -= self._correct(below[-1], self.logarithms(mix, place), most)

    def _correct(self, choice: NDArray[np.int64], logarithms: Counts | None, most: int) -> int:
        """Corrects at one allocation, and gives the number of evaluations."""
        before = self._evaluate.left
        start = np.zeros(len(self._levels)) if logarithms is None else logarithms
        loss = float(self._evaluate(choice[None])[0, self._column])
        others = self._model.within(neighbours(choice, self._levels, self._harm))
        spent = np.cumsum([not self._evaluate.known(other) for other in others]) + before - self._evaluate.left
        others = others[spent <= most]
        if np.isfinite(loss):
            losses = self._evaluate(others)[:, self._column]
            found = corrected(start, self._harm, choice, loss, others, losses)
            self._found[tuple(choice.tolist())] = found
        return before - self._evaluate.left
