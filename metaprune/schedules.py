"""Pruning in the course of training: when how much goes, on dense storage, until the cut at the end.

Units are masked, not removed: the plan is made anew at every event from the weights as they are then, so a unit that
was masked may come back, with the weights it had. Only `finalise` cuts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaprune.api import Pruned, apply, trace
from metaprune.data import Inputs
from metaprune.evaluation import named
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import GatedModule
from metaprune.planning import make_plan
from metaprune.ranking import default_criterion
from metaprune.recovery import recalibrate
from metaprune.search.budget import Budget
from metaprune.task import Task
from metaprune.training import Progress, Settings, train

RAMP = 0.5  # share of the training by the end of which the budget is reached


def _one_shot(done: float, final: float) -> float:
    return final


def _iterative(done: float, final: float) -> float:
    return float(final**done)


def _cubic(done: float, final: float) -> float:
    return final + (1 - final) * (1 - done) ** 3


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "one_shot": _one_shot,  # all at once
    "iterative": _iterative,  # each step leaves the same share of what the one before left
    "cubic": _cubic,  # fast at first, slower as less is left: Zhu and Gupta (2017), arXiv 1710.01878, equation 1
}


def kept_fraction(schedule: str, step: int, steps: int, final: float) -> float:
    """The fraction of a cost that is kept after some of the pruning steps.

    Args:
        schedule: `"one_shot"`, `"iterative"` or `"cubic"`.
        step: Pruning steps taken, from 0 (all is kept) to `steps` (`final` is).
        steps: Pruning steps in all.
        final: The fraction kept in the end.

    Raises:
        OptionError: An unknown schedule, a step out of range, or a fraction that is not above 0 and at most 1.
    """
    follow = named(schedule, SCHEDULES, "schedule")
    _check_steps(steps)
    if type(step) is not int or not 0 <= step <= steps:
        raise OptionError(f"step: a whole number from 0 to {steps} is needed, not {step!r}")
    if not 0 < final <= 1:
        raise OptionError(f"final: a kept fraction above 0 and at most 1 is needed, not {final}")
    return 1.0 if step == 0 else follow(step / steps, final)


def train_pruned(
    task: Task,
    budget: str,
    schedule: str = "cubic",
    steps: int = 4,
    epochs: int = 4,
    criterion: str | None = None,
    allocator: str | None = None,
    data: Any = None,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pruned:
    """Prunes a network while it trains, then cuts it.

    The network trains at full width with hard masks. The pruning steps are spread evenly over the first half of the
    training, the first of them at its start; "one_shot" prunes there once. Masked weights rest: they keep their
    values. In the end the statistics of batch norm are measured anew on the masked network, and that is cut.

    Args:
        task: The network, its data and its loss; the network is not changed.
        budget: What is kept in the end; see `metaprune.plan`.
        schedule: `"one_shot"`, `"iterative"` (each step keeps the same share of what is left) or `"cubic"`.
        steps: Number of pruning steps.
        epochs: Passes over the training data in all.
        criterion: How units are scored, at each step on the weights of that moment; see `metaprune.plan`.
        allocator: How many units each group keeps; see `metaprune.plan`.
        data: Batches of inputs or of (inputs, labels) for criteria that look at data.
        settings: Hyper-parameters of the training; `epochs` takes the place of theirs.
        seed: Of every random choice; equal seeds on one thread give equal weights to the bit.
        progress: Called after each training step with the steps done and the steps in all.

    Returns:
        The cut network in eval mode. Its certificate compares it with the masked network as trained.

    Raises:
        BudgetInfeasible: No legal plan reaches the budget; said before anything is trained.
        OptionError: An option has no meaning.
        TrainingError: A loss or gradient is not finite.
    """
    settings = dataclasses.replace(settings or Settings(), epochs=epochs)
    events = _events(budget, schedule, steps, epochs * len(task.train))
    if isinstance(data, Iterator):
        raise OptionError("data: an iterator is empty after one pass; give a list or a loader")
    graph = trace(task.model, task.inputs)
    criterion = default_criterion(criterion, data)
    make_plan(graph, budget, "magnitude", "uniform")  # what can not be met is said at once
    module = GatedModule(graph)
    masked = _Masked(module, graph)

    def prune(done: int) -> None:
        if done in events:
            current = graph.with_values(module.values)
            masked.follow(make_plan(current, events[done], criterion, allocator, data, seed=seed))

    def after(done: int, total: int) -> None:
        masked.rest()
        prune(done)
        if progress is not None:
            progress(done, total)

    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        return task.criterion(logits, labels)

    with seeded(seed, task.train, data):
        prune(0)
        train(module, task.train, objective, settings, seed, progress=after)
        with seeded(seed, task.train):  # the batches that `recover` measures on
            recalibrate(module, task.train)
    pruned = finalise(graph, module.values, masked.plan)
    note = f"pruned while training: schedule {schedule}, {steps} steps, {epochs} epochs, seed {seed}"
    return dataclasses.replace(pruned, module=pruned.module.eval(), notes=(*pruned.notes, note))


def finalise(graph: Graph, values: Mapping[str, Tensor], plan: Plan, certify: bool = True) -> Pruned:
    """Cuts a network whose units were only masked so far.

    Args:
        graph: The network as it was traced.
        values: Its tensors as they are now, such as `GatedModule.values`; see `Graph.with_values`.
        plan: What stays.
        certify: Whether to prove that the cut network equals the masked one; see `metaprune.apply`.

    Raises:
        OptionError: A tensor does not belong to the network.
        PlanError: The plan is of another network.
        CertificateError: The cut network differs from the masked one; nothing is returned.
    """
    return apply(graph.with_values(values), plan, certify)


@contextlib.contextmanager
def seeded(seed: int, *loaders: object) -> Iterator[None]:
    """Seeds what loaders draw from, torch's own generator or their attribute `generator`; the former is put back."""
    if type(seed) is not int:
        raise OptionError(f"seed: a whole number is needed, not {seed!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for loader in loaders:
            generator = getattr(loader, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        yield


def _events(budget: str, schedule: str, steps: int, training: int) -> dict[int, str]:
    """The budget that is pruned to after a number of training steps; a pruning step without a new one is left out."""
    named(schedule, SCHEDULES, "schedule")
    _check_steps(steps)
    goal = Budget.parse(budget)
    goals = [goal.restated(partial(kept_fraction, schedule, step, steps)) for step in range(steps + 1)]
    new = [step for step in range(steps) if goals[step + 1] != goals[step] or step == 0]
    return {int(RAMP * training * step / steps): goals[step + 1] for step in new}


def _check_steps(steps: object) -> None:
    if type(steps) is not int or steps < 1:
        raise OptionError(f"steps: a positive whole number is needed, not {steps!r}")


class _Masked:
    """The masked units of a module, and the weights that rest with them."""

    def __init__(self, module: GatedModule, graph: Graph) -> None:
        self._module = module
        self._graph = graph
        self._resting: list[tuple[Tensor, int, Tensor, Tensor]] = []  # tensor, dimension, positions, values
        self.plan = Plan({}, graph.fingerprint)

    def follow(self, plan: Plan) -> None:
        """Masks what the plan leaves out and opens all else."""
        self.plan = plan
        self._module.mask(plan.keep)
        values, tensors = self._module.values, self._graph.tensors
        self._resting = []
        for name, units in plan.keep.items():
            group = self._graph.group(name)
            gone = np.setdiff1d(np.arange(group.size), units)
            for part in group.slices:
                if tensors[part.tensor].kind == "parameter":
                    tensor = values[part.tensor].detach()
                    positions = torch.from_numpy(part.index[gone].flatten()).to(tensor.device)
                    self._resting.append((tensor, part.dim, positions, tensor.index_select(part.dim, positions)))

    def rest(self) -> None:
        """Takes back what momentum and weight decay did to masked weights; no gradient reaches them."""
        for tensor, dim, positions, values in self._resting:
            tensor.index_copy_(dim, positions, values)
