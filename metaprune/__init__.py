"""Structured pruning of neural networks: exact, certified and without per-architecture code.

Importing this package loads nothing but the standard library; every public name is fetched on first use (PEP 562), so
that a user of `metaprune.graphs` does not pay for search engines or graph neural networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaprune.api import Pruned, apply, load, plan, prune, trace
    from metaprune.brain_surgeon import obs_update
    from metaprune.data import Batches
    from metaprune.datasets import cifar, digits, fashion_mnist
    from metaprune.engines import measure_latency
    from metaprune.evaluation import evaluate
    from metaprune.graphs.certificate import Certificate
    from metaprune.graphs.errors import BudgetInfeasible, MetapruneError
    from metaprune.graphs.plan import Plan
    from metaprune.latency import LatencyTable
    from metaprune.prune_aware import train_tolerant
    from metaprune.reconstruction import reconstruct
    from metaprune.recovery import recalibrate, recover
    from metaprune.schedules import train_pruned
    from metaprune.task import Task
    from metaprune.training import Settings, train

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "BudgetInfeasible",
    "Certificate",
    "LatencyTable",
    "MetapruneError",
    "Plan",
    "Pruned",
    "Settings",
    "Task",
    "__version__",
    "apply",
    "cifar",
    "digits",
    "evaluate",
    "fashion_mnist",
    "load",
    "measure_latency",
    "obs_update",
    "plan",
    "prune",
    "recalibrate",
    "reconstruct",
    "recover",
    "trace",
    "train",
    "train_pruned",
    "train_tolerant",
]

_HOMES = {
    "metaprune.api": ("Pruned", "apply", "load", "plan", "prune", "trace"),
    "metaprune.data": ("Batches",),
    "metaprune.datasets": ("cifar", "digits", "fashion_mnist"),
    "metaprune.engines": ("measure_latency",),
    "metaprune.evaluation": ("evaluate",),
    "metaprune.graphs.certificate": ("Certificate",),
    "metaprune.graphs.errors": ("BudgetInfeasible", "MetapruneError"),
    "metaprune.graphs.plan": ("Plan",),
    "metaprune.latency": ("LatencyTable",),
    "metaprune.brain_surgeon": ("obs_update",),
    "metaprune.prune_aware": ("train_tolerant",),
    "metaprune.reconstruction": ("reconstruct",),
    "metaprune.recovery": ("recalibrate", "recover"),
    "metaprune.schedules": ("train_pruned",),
    "metaprune.task": ("Task",),
    "metaprune.training": ("Settings", "train"),
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
