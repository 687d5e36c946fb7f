"""The back end "random": networks drawn at random over the whole range of costs. Others have to beat it."""

from __future__ import annotations

import numpy as np

from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.front import Front
from metaprune.search.space import Configs, SearchSpace

_PATIENCE = 20  # draws of nothing new, one after the other, after which a small space counts as searched through
_DRAWS = 64


def run(space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs) -> Front:
    """Evaluates `init`, then random configurations (see `SearchSpace.sample`), until no evaluation is left.

    A longer search with the same seed begins with the evaluations of a shorter one.
    """
    generator = np.random.default_rng(seed)
    evaluate(evaluate.fresh(init))
    misses = 0
    while evaluate.left and misses < _PATIENCE:
        drawn = evaluate.fresh(space.sample(generator, _DRAWS, budget))
        evaluate(drawn)
        misses = 0 if len(drawn) else misses + 1
    return evaluate.front()
