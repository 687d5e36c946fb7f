"""Structured pruning of neural networks: exact, certified and without per-architecture code.

Importing this package loads nothing but the standard library; every public name is fetched on first use (PEP 562), so
that a user of `metaprune.graphs` does not pay for search engines or graph neural networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaprune.api import Pruned, apply, load, plan, prune, trace
    from metaprune.graphs.certificate import Certificate
    from metaprune.graphs.errors import BudgetInfeasible, MetapruneError
    from metaprune.graphs.plan import Plan
    from metaprune.reconstruction import reconstruct
    from metaprune.recovery import recover
    from metaprune.task import Task

__version__ = "0.1.0"

__all__ = [
    "BudgetInfeasible",
    "Certificate",
    "MetapruneError",
    "Plan",
    "Pruned",
    "Task",
    "__version__",
    "apply",
    "load",
    "plan",
    "prune",
    "reconstruct",
    "recover",
    "trace",
]

_HOMES = {
    "metaprune.api": ("Pruned", "apply", "load", "plan", "prune", "trace"),
    "metaprune.graphs.certificate": ("Certificate",),
    "metaprune.graphs.errors": ("BudgetInfeasible", "MetapruneError"),
    "metaprune.graphs.plan": ("Plan",),
    "metaprune.reconstruction": ("reconstruct",),
    "metaprune.recovery": ("recover",),
    "metaprune.task": ("Task",),
}

if not TYPE_CHECKING:  # type checkers read the imports above, and then know every name there is

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(home), name)
                return value
        raise AttributeError(f"module 'metaprune' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
