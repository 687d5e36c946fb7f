"""The table of search back ends: one row and one file each."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from metaprune.graphs.errors import OptionError
from metaprune.search.budget import Budget
from metaprune.search.evaluate import Evaluator
from metaprune.search.front import Front
from metaprune.search.space import Configs, SearchSpace


class Run(Protocol):
    """A search."""

    def __call__(
        self, space: SearchSpace, evaluate: Evaluator, budget: Budget | None, seed: int, init: Configs
    ) -> Front:
        """Looks for the front of a space.

        Args:
            space: What may be chosen.
            evaluate: Gives objectives of configurations, and says how many evaluations are left.
            budget: What every configuration that is evaluated must be within; it can be met.
            seed: Of every random choice. Equal arguments give equal fronts to the bit; nothing but the evaluator's
                answers, such as the time or what a ledger holds already, may change the way a search takes.
            init: Configurations to start from, within the budget, shape [n, variables]; n may be 0. They are
                evaluated, as far as evaluations go, so that a front is never worse than its start.
        """


BACKENDS = {
    "dp": "metaprune.search.dp_search",
    "emo": "metaprune.search.emo_search",
    "nsga2": "metaprune.search.nsga2_search",
    "random": "metaprune.search.random_search",
    "spdy": "metaprune.search.spdy_search",
}
"""Module of each back end, which is loaded when it is asked for; its function `run` is the search."""


def find(name: str) -> Run:
    """The back end called `name`; raises `OptionError`."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise OptionError(f"backend: {name!r} is none of {', '.join(sorted(BACKENDS))}")
    return cast(Run, import_module(BACKENDS[name]).run)
