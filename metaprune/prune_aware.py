"""Training before any cut, so that the network bears to be cut.

Each step masks the network down to a random budget, and its loss is that of the masked network: the units that come
first in the order of importance learn to do the work alone, the others to refine it. Yu, Yang, Xu, Yang and Huang,
Slimmable Neural Networks (ICLR 2019), arXiv 1812.08928, do so for a few widths; here the order is one of importance
and not of position, and the sizes are those of plans.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaprune.api import trace
from metaprune.data import Inputs
from metaprune.evaluation import device_of, predict
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import GatedModule
from metaprune.losses import distillation
from metaprune.planning import make_plan
from metaprune.ranking import Scores, score
from metaprune.recovery import recalibrate
from metaprune.schedules import seeded
from metaprune.search.allocate import MEASURED
from metaprune.search.budget import Budget
from metaprune.task import Task
from metaprune.training import Progress, Settings, train

LEVELS = 16  # budgets that are drawn from, evenly spaced from the smallest to the whole network


@dataclasses.dataclass(frozen=True, eq=False)
class Tolerant:
    """A network trained to be cut.

    Attributes:
        graph: The network with its trained weights, at full width; statistics of batch norm are those of full width.
        original: The network as it was, whose weights fixed the order of importance.
        scores: Of the units, which fix the order of importance.
        allocator: How many units each group keeps; None for the default of the criterion.
        seed: Of allocators that draw.
    """

    graph: Graph
    original: Graph
    scores: Scores
    allocator: str | None
    seed: int

    def plan(self, budget: str) -> Plan:
        """A plan of `graph` in the order it was trained with, which serves small budgets better than a new one.

        After the cut the statistics of batch norm should be measured anew: `recover` with recipe "recalibrate".

        Raises:
            BudgetInfeasible: No legal plan reaches the budget.
        """
        return make_plan(self.original, budget, self.scores, self.allocator, seed=self.seed)


def train_tolerant(
    task: Task,
    budget: str = "macs=0.25",
    epochs: int = 4,
    criterion: str | None = None,
    allocator: str | None = None,
    data: Any = None,
    distil: float = 0.0,
    straight_through: bool = False,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tolerant:
    """Trains a network at full width so that it loses little when it is cut.

    Args:
        task: The network, its data and its loss; the network is not changed.
        budget: The smallest budget that is drawn; the largest is the whole network. See `metaprune.plan`.
        epochs: Passes over the training data.
        criterion: What fixes the order of importance, once and on the weights before training; see `metaprune.plan`.
        allocator: How many units each group keeps at a budget; see `metaprune.plan`. By default the one that goes with
            the criterion; `"measured"` has no one order of importance and is refused.
        data: Batches for criteria that look at data; they are gone through once.
        distil: Weight, from 0 to 1, of distillation from the network as it was; the rest is the task's loss.
        straight_through: Whether masked units are trained too, with the gradient they would have if they were open.
            Without, they are trained in the steps in which they are open; on the digits that served better at nearly
            every budget.
        settings: Hyper-parameters of the training; `epochs` takes the place of theirs.
        seed: Of every random choice; equal seeds on one thread give equal weights to the bit.
        progress: Called after each training step with the steps done and the steps in all.

    Raises:
        BudgetInfeasible: No legal plan reaches the budget.
        OptionError: An option has no meaning.
        TrainingError: A loss or gradient is not finite.
    """
    if not 0 <= distil <= 1:
        raise OptionError(f"distil: a weight from 0 to 1 is needed, not {distil}")
    if allocator == MEASURED:
        raise OptionError(f"allocator: {MEASURED!r} ranks the units anew at each budget; one order is needed")
    settings = dataclasses.replace(settings or Settings(), epochs=epochs)
    graph = trace(task.model, task.inputs)
    # The trace reads the task's own weights; an order that is fixed must not follow them when they change.
    graph = graph.with_values({name: graph.values[name].detach().clone() for name in graph.tensors})
    with seeded(seed, data):
        scores = score(graph, criterion, data, seed)
    plans = [make_plan(graph, goal, scores, allocator, seed=seed) for goal in _levels(budget)]
    module = GatedModule(graph, straight_through)
    teacher = copy.deepcopy(task.model).to(device_of(module)).eval() if distil else None
    generator = torch.Generator().manual_seed(seed)

    def draw() -> None:
        module.mask(plans[int(torch.randint(LEVELS, (), generator=generator))].keep)

    def after(done: int, total: int) -> None:
        draw()
        if progress is not None:
            progress(done, total)

    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        loss = task.criterion(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            target = predict(teacher, inputs)
        return (1 - distil) * loss + distil * distillation(logits, target)

    with seeded(seed, task.train):
        draw()
        train(module, task.train, objective, settings, seed, progress=after)
        module.mask({})
        recalibrate(module, task.train)
    trained = {name: value.detach() for name, value in module.values.items()}
    return Tolerant(graph.with_values(trained), graph, scores, allocator, seed)


def _levels(budget: str) -> list[str]:
    """Budgets from the given one to the whole network, as text."""
    smallest = Budget.parse(budget)
    return [smallest.restated(partial(_between, level / (LEVELS - 1))) for level in range(LEVELS)]


def _between(share: float, kept: float) -> float:
    return kept + (1 - kept) * share
