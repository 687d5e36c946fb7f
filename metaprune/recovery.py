"""The recovery ladder: from closed-form repairs to training with the dense network as teacher.

A recipe is a list of rungs joined by "+", taken in order: `"least_squares+kd_features"`. Each rung maps a pruned
network to another; the one that came in stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.calibration import Leaves, Unlabelled
from metaprune.compensation import absorb, match_moments
from metaprune.data import Inputs, Loader
from metaprune.evaluation import called, device_of, evaluating, predict
from metaprune.features import Features
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph
from metaprune.imitation import imitate
from metaprune.losses import decoupled_distillation, distillation, standardised_distillation
from metaprune.reconstruction import reconstruct
from metaprune.task import Task, check_loader
from metaprune.training import Objective, Progress, Settings, seeded, train

if TYPE_CHECKING:
    from metaprune.api import Pruned

_SOFT, _HARD = 0.9, 0.1  # with T = 4: Dong and Yang (2019), arXiv 1905.09717
_FEATURES = 1.0  # weight of feature matching beside them
_EPOCHS = 3
_SMALL_STEPS = Settings(lr=1e-3, optimizer="adamw")  # of imitation, whose loss has no scale that suits SGD
_DEFAULT = {True: "least_squares+finetune", False: "least_squares+imitate"}  # with and without a task


@dataclasses.dataclass(frozen=True)
class _Means:
    """What a rung may use besides the pruned network; teacher and settings are None unless they were given."""

    loader: Loader
    teacher: nn.Module | None
    settings: Settings | None
    epochs: int
    seed: int
    progress: Progress | None

    def settings_or(self, default: Settings) -> Settings:
        """The settings that were given, or a rung's own with the number of epochs asked for."""
        return dataclasses.replace(default, epochs=self.epochs) if self.settings is None else self.settings


_Rung: TypeAlias = "Callable[[Pruned, _Means], Pruned]"
_LabelledRung: TypeAlias = "Callable[[Pruned, _Means, Task], Pruned]"
_SoftLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of the logits of student and teacher, shape (..., classes), and the labels."""
Watch: TypeAlias = Callable[[nn.Module, int, int], None]
"""Called after each training step with the network, the number of steps done and the number of steps of the rung."""


def recover(
    pruned: Pruned,
    task: Task | Loader,
    teacher: nn.Module | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    settings: Settings | None = None,
    watch: Watch | None = None,
) -> Pruned:
    """Repairs and trains a pruned network back.

    The rungs, in the order of their cost. Without labels and without training: "recalibrate" (statistics of batch
    norms), "absorb" (the mean of what was cut goes into biases; only as the first rung of a network that nothing was
    fitted to), "norm_scale" (means and deviations of channels, see `metaprune.compensation.match_moments`),
    "least_squares" (see `metaprune.reconstruct`).
    Training without labels: "imitate" (outputs of any kind follow the dense network's, and so do the ends of residual
    blocks; see `metaprune.imitation`).
    Training with labels: "finetune" (the task's loss), "kd" (distillation), "kd_standardised" (of standardised logits),
    "kd_decoupled" (with a weight of its own for the classes that are not the label; labels are class indices),
    "kd_features" ("kd", and the ends of residual blocks follow the kept channels of the dense network's).
    In "kd_features" and "imitate", what a native module does only in training, beyond batch norm and dropout, is not
    done.

    Args:
        pruned: What `prune` or `apply` returned; it is not changed.
        task: The data and the loss; or, for rungs without labels, nothing but batches of inputs or of (inputs, labels),
            to be gone through once per epoch.
        teacher: The network whose outputs are distilled; by default the task's own, for "imitate" the network that was
            cut. It is not changed. Features always come from the network that was cut.
        recipe: Rungs joined by "+"; by default "least_squares+finetune" for a task, else "least_squares+imitate".
        epochs: Passes over the training data of each rung that trains; by default those of `settings` or 3.
        seed: Of every random choice; equal seeds on one thread give equal weights to the bit.
        progress: Called after each training step with the steps done and the steps of the rung.
        settings: Hyper-parameters of the rungs that train; by default those of `Settings()`, and for "imitate"
            `Settings(lr=1e-3, optimizer="adamw")`.
        watch: Called after each training step with the network as it is then, to score it on the way for instance, the
            steps done and the steps of the rung. It leaves the network as it is, and torch's random state too.

    Returns:
        The same pruned network with recovered weights, in eval mode. Its certificate speaks of the cut, not of what
        was done since; `notes` says that.

    Raises:
        OptionError: An unknown rung, one that needs the labels of a task where there are only inputs, a bad number of
            epochs or another than that of `settings`, a rung that the network or its labels do not allow, or a teacher
            with other outputs.
        TrainingError: A loss or gradient is not finite.
    """
    if isinstance(task, Task):
        labelled, loader = task, task.train
    else:
        check_loader("task", task)
        labelled, loader = None, Unlabelled(pruned.original, task)
    recipe = recipe if recipe is not None else _DEFAULT[labelled is not None]
    names = [name.strip() for name in recipe.split("+")]
    _check_rungs(names, labelled)
    recovered = dataclasses.replace(pruned, module=copy.deepcopy(pruned.module))

    def after(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if watch is not None:
            watch(recovered.module, done, total)

    means = _Means(loader, teacher, settings, _epochs(epochs, settings), seed, after)
    for name in names:
        with seeded(recovered.module, loader, seed):
            if labelled is not None and name in _LABELLED:
                recovered = _LABELLED[name](recovered, means, labelled)
            else:
                recovered = _UNLABELLED[name](recovered, means)
    note = f"recovered by {recipe} ({means.epochs} epochs per training rung, seed {seed})"
    return dataclasses.replace(recovered, module=recovered.module.eval(), notes=(*recovered.notes, note))


def _check_rungs(names: list[str], task: Task | None) -> None:
    for name in names:
        if name not in RUNGS:
            raise OptionError(f"recipe: {name!r} is unknown, choose from {', '.join(sorted(RUNGS))}, joined by '+'")
        if name in _LABELLED and task is None:
            raise OptionError(
                f"recipe: {name!r} needs labels, so a Task; without, choose from {', '.join(sorted(_UNLABELLED))}"
            )


def _epochs(epochs: int | None, settings: Settings | None) -> int:
    if settings is None:
        return Settings(epochs=_EPOCHS if epochs is None else epochs).epochs
    if epochs is not None and epochs != settings.epochs:
        raise OptionError(f"epochs: {epochs} and the {settings.epochs} of settings contradict each other")
    return settings.epochs


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
    statistics = _BatchStatistics(model.buffers())
    seen = 0
    with evaluating(model), torch.no_grad():
        for inputs, labels in loader:
            with statistics:
                called(model, inputs)
            seen += len(labels)
            if seen >= samples:
                break
        statistics.store()
    return len(statistics.sums)


def recalibrate_values(graph: Graph, values: Mapping[str, Tensor], batches: Iterable[Leaves]) -> int:
    """Does what `recalibrate` does to the tensors that a graph is run with, in place.

    Args:
        graph: The network.
        values: Its tensors, those that are changed of its own.
        batches: Values of its input nodes; all of them are used.

    Returns:
        Number of normalisations that were recalibrated.
    """
    statistics = _BatchStatistics(values[info.name] for info in graph.tensors.values() if info.kind == "buffer")
    with torch.no_grad():
        for batch in batches:
            with statistics:
                execute(graph, values, batch)
        statistics.store()
    return len(statistics.sums)


class _BatchStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator whose running mean is one of some buffers with the batch's own statistics, and sums them."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers = {buffer.data_ptr(): buffer for buffer in buffers}
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
    recalibrate(pruned.module, means.loader)
    return pruned


def _absorb(pruned: Pruned, means: _Means) -> Pruned:
    return absorb(pruned, means.loader, seed=means.seed)


def _norm_scale(pruned: Pruned, means: _Means) -> Pruned:
    return match_moments(pruned, means.loader, seed=means.seed)


def _least_squares(pruned: Pruned, means: _Means) -> Pruned:
    return reconstruct(pruned, means.loader, seed=means.seed)


def _imitate(pruned: Pruned, means: _Means) -> Pruned:
    teacher = None if means.teacher is pruned.original.source else means.teacher
    return imitate(pruned, means.loader, means.settings_or(_SMALL_STEPS), teacher, means.seed, means.progress)


def _finetune(pruned: Pruned, means: _Means, task: Task) -> Pruned:
    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        return task.criterion(logits, labels)

    _train(pruned.module, objective, means)
    return pruned


def _distil(soft: _SoftLoss, weight: float, hard: float) -> _LabelledRung:
    """A rung that minimises `weight * soft(student, teacher, labels) + hard * task loss`."""

    def distil(pruned: Pruned, means: _Means, task: Task) -> Pruned:
        teacher = _copied(_teacher(means, task), pruned)

        def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
            with torch.no_grad():
                target = predict(teacher, inputs)
            return _mixed(soft, weight, hard, task, logits, target, labels)

        _train(pruned.module, objective, means)
        return pruned

    return distil


def _distil_features(pruned: Pruned, means: _Means, task: Task) -> Pruned:
    """Distillation, and the distance of features."""
    features = Features(pruned)
    given = _teacher(means, task)
    teacher = features.dense if given is pruned.original.source else _copied(given, pruned)

    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = predict(features.dense, inputs)
            target = target if teacher is features.dense else predict(teacher, inputs)
        loss = _mixed(_plain, _SOFT, _HARD, task, logits, target, labels)
        return loss + _FEATURES * features.distance().to(loss.device)

    _train(features.student, objective, means)
    note = f"features of {len(features.names)} nodes distilled from the network that was cut"
    return dataclasses.replace(pruned, notes=(*pruned.notes, note))


def _teacher(means: _Means, task: Task) -> nn.Module:
    return task.model if means.teacher is None else means.teacher


def _copied(teacher: nn.Module, pruned: Pruned) -> nn.Module:
    return copy.deepcopy(teacher).to(device_of(pruned.module)).eval()


def _train(model: nn.Module, objective: Objective, means: _Means) -> None:
    train(model, means.loader, objective, means.settings_or(Settings()), means.seed, progress=means.progress)


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


_UNLABELLED: dict[str, _Rung] = {
    "recalibrate": _recalibrate,
    "absorb": _absorb,
    "norm_scale": _norm_scale,
    "least_squares": _least_squares,
    "imitate": _imitate,
}
_LABELLED: dict[str, _LabelledRung] = {
    "finetune": _finetune,
    "kd": _distil(_plain, weight=_SOFT, hard=_HARD),
    "kd_standardised": _distil(_standardised, weight=9.0, hard=0.1),  # the weights of arXiv 2403.01643
    "kd_decoupled": _distil(decoupled_distillation, weight=1.0, hard=1.0),  # those of arXiv 2203.08679, no warm-up
    "kd_features": _distil_features,
}
RUNGS = (*_UNLABELLED, *_LABELLED)
