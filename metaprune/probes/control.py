"""The control of every pruning result: the same architecture trained from fresh weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor

from metaprune.api import Pruned
from metaprune.data import Inputs
from metaprune.graphs.errors import OptionError
from metaprune.initialise import reinitialised
from metaprune.task import Task
from metaprune.training import Progress, Settings, train


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What a pruned architecture is worth without the weights it inherited.

    Attributes:
        score: Of the architecture trained from fresh weights.
        given: Of the pruned network as it was handed in.
        epochs: Passes over the training data that were made.
        equal: What was held equal, `epochs` or `flops`.
        macs: Multiply-adds of the architecture on the example batch.
    """

    score: float
    given: float
    epochs: int
    equal: str
    macs: int

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        return [dataclasses.asdict(self)]


def scratch(
    task: Task,
    pruned: Pruned,
    epochs: int,
    settings: Settings | None = None,
    equal: Literal["epochs", "flops"] = "epochs",
    dense_macs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scratch:
    """Trains a pruned architecture from fresh weights: the control of Liu et al. (ICLR 2019, arXiv 1810.05270).

    With `equal="epochs"` (their Scratch-E) it sees the data as often as the training it is compared with; with
    `equal="flops"` (Scratch-B) it may compute as much as a network of `dense_macs` does in `epochs` passes, to the
    nearest whole pass. Weights are drawn by `metaprune.initialise.reinitialised`; the loss is the task's.

    Args:
        task: The data, the loss and the metric.
        pruned: The architecture; its module is not changed.
        epochs: Passes over the training data of the training that is compared with.
        settings: Hyper-parameters; their number of epochs is not used.
        equal: What is held equal.
        dense_macs: With `equal="flops"`, multiply-adds on the example batch of the network that is compared with; by
            default the network before the cut.
        seed: Of the weights and of the training.
        progress: Called after each training step.

    Raises:
        OptionError: A bad number of epochs, an unknown `equal`, or `dense_macs` without `equal="flops"`.
    """
    macs = pruned.cost["after"].macs
    if type(epochs) is not int or epochs < 1:
        raise OptionError(f"epochs: a positive whole number is needed, not {epochs!r}")
    if equal not in ("epochs", "flops"):
        raise OptionError(f"equal: {equal!r} is unknown, choose from epochs, flops")
    if dense_macs is not None and (equal != "flops" or dense_macs < 1):
        raise OptionError(f"dense_macs: {dense_macs} means nothing with equal={equal!r}")
    if equal == "flops":
        epochs = max(1, round(epochs * (dense_macs or pruned.cost["before"].macs) / max(macs, 1)))

    def objective(logits: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        return task.criterion(logits, labels)

    fresh = reinitialised(pruned.module, pruned.graph, seed)
    settings = dataclasses.replace(settings or Settings(), epochs=epochs)
    train(fresh, task.train, objective, settings, seed, progress=progress)
    return Scratch(task.score(fresh), task.score(pruned.module), epochs, equal, macs)
