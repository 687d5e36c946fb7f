"""The recovery ladder: from closed-form repairs to training with the dense network as teacher.

A recipe is a list of rungs joined by "+", taken in order: `"least_squares+kd_features"`. Each rung maps a pruned
network to another; the one that came in stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.compensation import absorb, match_moments
from metaprune.data import Inputs, Loader
from metaprune.evaluation import device_of, evaluating, predict
from metaprune.features import matched_nodes, observe
from metaprune.graphs.errors import OptionError
from metaprune.graphs.portable import PortableModule, sharing
from metaprune.graphs.survivors import Survivors
from metaprune.losses import decoupled_distillation, distillation, feature_matching, standardised_distillation
from metaprune.reconstruction import reconstruct
from metaprune.task import Task
from metaprune.training import Objective, Progress, Settings, seeded, train

if TYPE_CHECKING:
    from metaprune.api import Pruned

_SOFT, _HARD = 0.9, 0.1  # with T = 4: Dong and Yang (2019), arXiv 1905.09717
_FEATURES = 1.0  # weight of feature matching beside them


@dataclasses.dataclass(frozen=True)
class _Means:
    """What a rung may use besides the pruned network."""

    task: Task
    teacher: nn.Module
    settings: Settings
    seed: int
    progress: Progress | None


_Rung: TypeAlias = "Callable[[Pruned, _Means], Pruned]"
_SoftLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of the logits of student and teacher, shape (..., classes), and the labels."""
Watch: TypeAlias = Callable[[nn.Module, int, int], None]
"""Called after each training step with the network, the number of steps done and the number of steps of the rung."""


def recover(
    pruned: Pruned,
    task: Task,
    teacher: nn.Module | None = None,
    recipe: str = "least_squares+kd_features",
    epochs: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Pruned:
    """Repairs and trains a pruned network back.

    The rungs, in the order of their cost. Without labels and without training, on `task.train`:
    "recalibrate" (statistics of batch norms), "absorb" (the mean of what was cut goes into biases; only as the first
    rung of a network that nothing was fitted to), "norm_scale" (means and deviations of channels, see
    `metaprune.compensation.match_moments`), "least_squares" (see `metaprune.reconstruct`).
    Training: "finetune" (the task's loss), "kd" (distillation), "kd_standardised" (of standardised logits),
    "kd_decoupled" (with a weight of its own for the classes that are not the label; labels are class indices),
    "kd_features" ("kd", and the ends of residual blocks follow the kept channels of the dense network's;
    what a native module does only in training, beyond batch norm and dropout, is not done).

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        task: The data and the loss.
        teacher: The network whose logits are distilled; by default the task's own. It is not changed. Features always
            come from the network that was cut.
        recipe: Rungs joined by "+".
        epochs: Passes over the training data of each rung that trains.
        seed: Of every random choice; equal seeds on one thread give equal weights to the bit.
        progress: Called after each training step with the steps done and the steps of the rung.
        watch: Called after each training step with the network as it is then, to score it on the way for instance, the
            steps done and the steps of the rung. It leaves the network as it is, and torch's random state too.

    Returns:
        The same pruned network with recovered weights, in eval mode. Its certificate speaks of the cut, not of what
        was done since; `notes` says that.

    Raises:
        OptionError: An unknown rung, a bad number of epochs, a rung that the network or its labels do not allow, or a
            teacher with other outputs.
        TrainingError: A loss or gradient is not finite.
    """
    names = [name.strip() for name in recipe.split("+")]
    for name in names:
        if name not in RUNGS:
            raise OptionError(f"recipe: {name!r} is unknown, choose from {', '.join(sorted(RUNGS))}, joined by '+'")
    recovered = dataclasses.replace(pruned, module=copy.deepcopy(pruned.module))

    def after(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if watch is not None:
            watch(recovered.module, done, total)

    means = _Means(task, task.model if teacher is None else teacher, Settings(epochs=epochs), seed, after)
    for name in names:
        with seeded(recovered.module, task.train, seed):
            recovered = RUNGS[name](recovered, means)
    note = f"recovered by {recipe} ({epochs} epochs per training rung, seed {seed})"
    return dataclasses.replace(recovered, module=recovered.module.eval(), notes=(*recovered.notes, note))


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


def _recalibrate(pruned: Pruned, means: _Means) -> Pruned:
    recalibrate(pruned.module, means.task.train)
    return pruned


def _absorb(pruned: Pruned, means: _Means) -> Pruned:
    return absorb(pruned, means.task.train, seed=means.seed)


def _norm_scale(pruned: Pruned, means: _Means) -> Pruned:
    return match_moments(pruned, means.task.train, seed=means.seed)


def _least_squares(pruned: Pruned, means: _Means) -> Pruned:
    return reconstruct(pruned, means.task.train, seed=means.seed)


def _finetune(pruned: Pruned, means: _Means) -> Pruned:
    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        return means.task.criterion(logits, labels)

    _train(pruned.module, objective, means)
    return pruned


def _distil(soft: _SoftLoss, weight: float, hard: float) -> _Rung:
    """A rung that minimises `weight * soft(student, teacher, labels) + hard * task loss`."""

    def distil(pruned: Pruned, means: _Means) -> Pruned:
        teacher = copy.deepcopy(means.teacher).to(device_of(pruned.module)).eval()

        def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
            with torch.no_grad():
                target = predict(teacher, inputs)
            return _mixed(soft, weight, hard, means.task, logits, target, labels)

        _train(pruned.module, objective, means)
        return pruned

    return distil


def _distil_features(pruned: Pruned, means: _Means) -> Pruned:
    """Distillation, and the mean of `feature_matching` over the nodes that are compared."""
    survivors = Survivors(pruned.original, pruned.plan.keep)
    names = matched_nodes(pruned.graph, survivors)
    student = sharing(pruned.graph, pruned.module)
    dense = PortableModule(pruned.original).to(device_of(pruned.module)).eval()
    own, wanted = observe(student, names), observe(dense, names)
    teacher: nn.Module = dense
    if means.teacher is not pruned.original.source:
        teacher = copy.deepcopy(means.teacher).to(device_of(pruned.module)).eval()

    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = predict(dense, inputs)
            target = target if teacher is dense else predict(teacher, inputs)
        loss = _mixed(_plain, _SOFT, _HARD, means.task, logits, target, labels)
        if not names:
            return loss
        apart = [feature_matching(own[name], survivors.part(name, wanted[name])) for name in names]
        return loss + _FEATURES * torch.stack(apart).mean()

    _train(student, objective, means)
    note = f"features of {len(names)} nodes distilled from the network that was cut"
    return dataclasses.replace(pruned, notes=(*pruned.notes, note))


def _train(model: nn.Module, objective: Objective, means: _Means) -> None:
    train(model, means.task.train, objective, means.settings, means.seed, progress=means.progress)


def _mixed(
    soft: _SoftLoss, weight: float, hard: float, task: Task, logits: Tensor, target: Tensor, labels: Tensor
) -> Tensor:
    """Distillation and the task's own loss, weighted."""
    student, teacher = _classes_last(logits, labels), _classes_last(target, labels)
    return weight * soft(student, teacher, labels) + hard * task.criterion(logits, labels)


def _classes_last(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of shape (batch, classes, ...) with a label for each position, as distillation takes them."""
    by_position = logits.ndim > 2 and labels.shape == logits.shape[:1] + logits.shape[2:]
    return logits.movedim(1, -1) if by_position else logits


def _plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distillation(student, teacher)


def _standardised(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return standardised_distillation(student, teacher)


RUNGS: dict[str, _Rung] = {
    "recalibrate": _recalibrate,
    "absorb": _absorb,
    "norm_scale": _norm_scale,
    "least_squares": _least_squares,
    "finetune": _finetune,
    "kd": _distil(_plain, weight=_SOFT, hard=_HARD),
    "kd_standardised": _distil(_standardised, weight=9.0, hard=0.1),  # the weights of arXiv 2403.01643
    "kd_decoupled": _distil(decoupled_distillation, weight=1.0, hard=1.0),  # those of arXiv 2203.08679, no warm-up
    "kd_features": _distil_features,
}
