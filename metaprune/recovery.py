"""Training a pruned network back: statistics first, then fine-tuning or distillation from the dense network.

A recipe is a list of rungs joined by "+", taken in order: `"recalibrate+kd"`. Each rung changes a copy of the pruned
network; the pruned network that came in stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.data import Inputs, Loader
from metaprune.evaluation import device_of, evaluating, predict
from metaprune.graphs.errors import OptionError
from metaprune.losses import distillation, standardised_distillation
from metaprune.task import Task
from metaprune.training import Progress, Settings, train

if TYPE_CHECKING:
    from metaprune.api import Pruned


@dataclasses.dataclass(frozen=True)
class _Rung:
    """What a rung may use besides the network it changes."""

    task: Task
    teacher: nn.Module
    settings: Settings
    seed: int
    progress: Progress | None


def recover(
    pruned: Pruned,
    task: Task,
    teacher: nn.Module | None = None,
    recipe: str = "kd",
    epochs: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pruned:
    """Trains a pruned network back.

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        task: The data and the loss.
        teacher: The network to distil from; by default the task's own. It is not changed.
        recipe: Rungs joined by "+": "recalibrate" (statistics of batch norm over the training data), "finetune"
            (the task's loss), "kd" (distillation), "kd_standardised" (distillation of standardised logits).
        epochs: Passes over the training data of each rung that trains.
        seed: Of every random choice; equal seeds on one thread give equal weights to the bit.
        progress: Called after each training step with the steps done and the steps of the rung.

    Returns:
        The same pruned network with recovered weights, in eval mode. Its certificate speaks of the cut, not of the
        training since; `notes` says what was done.

    Raises:
        OptionError: An unknown rung or a bad number of epochs.
        TrainingError: A loss or gradient is not finite.
    """
    names = [name.strip() for name in recipe.split("+")]
    for name in names:
        if name not in RUNGS:
            raise OptionError(f"recipe: {name!r} is unknown, choose from {', '.join(sorted(RUNGS))}, joined by '+'")
    settings = Settings(epochs=epochs)
    rung = _Rung(task, task.model if teacher is None else teacher, settings, seed, progress)
    module = copy.deepcopy(pruned.module)
    for name in names:
        RUNGS[name](module, rung)
    note = f"recovered by {recipe} ({epochs} epochs per training rung, seed {seed})"
    return dataclasses.replace(pruned, module=module.eval(), notes=(*pruned.notes, note))


def recalibrate(model: nn.Module, loader: Loader, samples: int = 4096) -> int:
    """Replaces the running statistics of every batch normalisation by those of the model's own activations.

    A pruned layer feeds its successors a different distribution; the stored mean and variance no longer fit. Each
    normalisation runs with the statistics of the batch, and their mean over the batches is stored. It works on the
    operators and not on module types, so it holds for any way of writing a network; everything else, dropout
    included, stays in eval mode.

    Args:
        model: Network, changed in place.
        loader: Batches of (inputs, labels); the labels are not used.
        samples: At most this many examples (rounded up to whole batches) are used.

    Returns:
        Number of normalisations that were recalibrated; 0 for a network without any.
    """
    statistics = _BatchStatistics(model)
    seen = 0
    with evaluating(model), torch.no_grad():
        for inputs, labels in loader:
            with statistics:
                predict(model, inputs)
            seen += len(labels)
            if seen >= samples:
                break
        statistics.store()
    return len(statistics.sums)


class _BatchStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator that takes a running mean and variance of the model with the batch's own, and sums them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers = {buffer.data_ptr(): buffer for buffer in model.buffers()}
        self.sums: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        arguments = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        mean, variance = arguments.get("running_mean"), arguments.get("running_var")
        if mean is None or variance is None or mean.data_ptr() not in self.buffers:
            return func(*args, **(kwargs or {}))
        values = arguments["input"]  # (batch, channels, ...)
        wide = values.double().movedim(1, 0).flatten(1)  # (channels, batch * ...)
        if wide.shape[1] < 2:  # one value has no variance: such a batch is left out
            return func(**arguments)
        batch_mean, batch_variance = wide.mean(1), wide.var(1)
        key = (mean.data_ptr(), variance.data_ptr())
        old_mean, old_variance, count = self.sums.get(key, (0.0, 0.0, 0))
        self.sums[key] = (old_mean + batch_mean, old_variance + batch_variance, count + 1)
        own = {"running_mean": batch_mean.to(mean.dtype), "running_var": wide.var(1, correction=0).to(variance.dtype)}
        return func(**{**arguments, **own})

    def store(self) -> None:
        """Writes the means over the batches into the model's buffers."""
        for (mean, variance), (sum_mean, sum_variance, count) in self.sums.items():
            self.buffers[mean].copy_(sum_mean / count)
            self.buffers[variance].copy_(sum_variance / count)


def _recalibrate(module: nn.Module, rung: _Rung) -> None:
    recalibrate(module, rung.task.train)


def _finetune(module: nn.Module, rung: _Rung) -> None:
    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        return rung.task.criterion(logits, labels)

    train(module, rung.task.train, objective, rung.settings, rung.seed, progress=rung.progress)


def _distil(soft: Callable[[Tensor, Tensor], Tensor], weight: float, hard: float) -> Callable[[nn.Module, _Rung], None]:
    """A rung that minimises `weight * soft(student, teacher) + hard * task loss`."""

    def distil(module: nn.Module, rung: _Rung) -> None:
        teacher = copy.deepcopy(rung.teacher).to(device_of(module)).eval()

        def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
            with torch.no_grad():
                target = predict(teacher, inputs)
            return weight * soft(logits, target) + hard * rung.task.criterion(logits, labels)

        train(module, rung.task.train, objective, rung.settings, rung.seed, progress=rung.progress)

    return distil


RUNGS: dict[str, Callable[[nn.Module, _Rung], None]] = {
    "recalibrate": _recalibrate,
    "finetune": _finetune,
    "kd": _distil(distillation, weight=0.9, hard=0.1),  # alpha = 0.9, T = 4: Dong and Yang (2019), arXiv 1905.09717
    "kd_standardised": _distil(standardised_distillation, weight=9.0, hard=0.1),  # the weights of arXiv 2403.01643
}
