"""Structured pruning of neural networks: exact, certified and without per-architecture code.

Importing this package loads nothing but the standard library; every public name is fetched on first use (PEP 562), so
that a user of `metaprune.graphs` does not pay for search engines or graph neural networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaprune.additive import additivity
    from metaprune.api import Pruned, apply, load, plan, prune, trace
    from metaprune.brain_surgeon import obs_update
    from metaprune.curves import Sensitivity
    from metaprune.data import Batches
    from metaprune.dataless import refit_without_data
    from metaprune.datasets import cifar, digits, fashion_mnist
    from metaprune.engines import measure_latency
    from metaprune.evaluation import evaluate
    from metaprune.exploration import explore
    from metaprune.graphs.certificate import Certificate
    from metaprune.graphs.errors import BudgetInfeasible, MetapruneError
    from metaprune.graphs.plan import Plan
    from metaprune.latency import LatencyTable
    from metaprune.metanet.fitting import fit
    from metaprune.metanet.pruner import MetaPruner
    from metaprune.metanet.rewrite_training import RewriteCourse
    from metaprune.metanet.zoo import Zoo
    from metaprune.prune_aware import train_tolerant
    from metaprune.reconstruction import reconstruct
    from metaprune.recovery import recalibrate, recover
    from metaprune.schedules import train_pruned
    from metaprune.search.front import Front
    from metaprune.sensing import sensitivity
    from metaprune.sparse import Sparse
    from metaprune.sparsification import sparsify
    from metaprune.task import Task
    from metaprune.training import Settings, train

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "BudgetInfeasible",
    "Certificate",
    "Front",
    "LatencyTable",
    "MetaPruner",
    "MetapruneError",
    "Plan",
    "Pruned",
    "RewriteCourse",
    "Sensitivity",
    "Settings",
    "Sparse",
    "Task",
    "Zoo",
    "__version__",
    "additivity",
    "apply",
    "cifar",
    "digits",
    "evaluate",
    "explore",
    "fashion_mnist",
    "fit",
    "load",
    "measure_latency",
    "obs_update",
    "plan",
    "prune",
    "recalibrate",
    "reconstruct",
    "recover",
    "refit_without_data",
    "sensitivity",
    "sparsify",
    "trace",
    "train",
    "train_pruned",
    "train_tolerant",
]

_HOMES = {
    "metaprune.additive": ("additivity",),
    "metaprune.api": ("Pruned", "apply", "load", "plan", "prune", "trace"),
    "metaprune.curves": ("Sensitivity",),
    "metaprune.data": ("Batches",),
    "metaprune.dataless": ("refit_without_data",),
    "metaprune.datasets": ("cifar", "digits", "fashion_mnist"),
    "metaprune.engines": ("measure_latency",),
    "metaprune.evaluation": ("evaluate",),
    "metaprune.exploration": ("explore",),
    "metaprune.graphs.certificate": ("Certificate",),
    "metaprune.graphs.errors": ("BudgetInfeasible", "MetapruneError"),
    "metaprune.graphs.plan": ("Plan",),
    "metaprune.latency": ("LatencyTable",),
    "metaprune.metanet.fitting": ("fit",),
    "metaprune.metanet.pruner": ("MetaPruner",),
    "metaprune.metanet.rewrite_training": ("RewriteCourse",),
    "metaprune.metanet.zoo": ("Zoo",),
    "metaprune.brain_surgeon": ("obs_update",),
    "metaprune.prune_aware": ("train_tolerant",),
    "metaprune.reconstruction": ("reconstruct",),
    "metaprune.recovery": ("recalibrate", "recover"),
    "metaprune.schedules": ("train_pruned",),
    "metaprune.sensing": ("sensitivity",),
    "metaprune.sparse": ("Sparse",),
    "metaprune.sparsification": ("sparsify",),
    "metaprune.search.front": ("Front",),
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
