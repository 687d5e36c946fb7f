"""A task: a network, the data it works on, and how its work is judged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from metaprune.data import Inputs, Loader
from metaprune.evaluation import METRICS, Metric, evaluate, named
from metaprune.graphs.errors import OptionError
from metaprune.losses import LOSSES, Loss


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Attributes:
        model: The network.
        inputs: An example batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        train: Batches of (inputs, labels) to learn from; gone through once per epoch.
        val: Batches of (inputs, labels) to judge by; never trained on.
        loss: `"cross_entropy"`, or a function of (logits, labels) that returns a scalar.
        metric: `"accuracy"`, or a function of (logits, labels) that returns the mean over a batch, one
            number; more is better.

    Raises:
        OptionError: An attribute is not what it has to be; the message names it.
    """

    model: nn.Module
    inputs: Inputs
    train: Loader
    val: Loader
    loss: str | Loss = "cross_entropy"
    metric: str | Metric = "accuracy"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise OptionError(f"model: an nn.Module is needed, not {type(self.model).__name__}")
        if not isinstance(self.inputs, Tensor | tuple | dict):
            raise OptionError(f"inputs: a tensor, tuple or dict is needed, not {type(self.inputs).__name__}")
        check_loader("train", self.train)
        check_loader("val", self.val)
        _check_function("loss", named(self.loss, LOSSES, "loss"))
        _check_function("metric", named(self.metric, METRICS, "metric"))

    @property
    def criterion(self) -> Loss:
        """The loss as a function of (logits, labels)."""
        return named(self.loss, LOSSES, "loss")

    def score(self, model: nn.Module | None = None) -> float:
        """The metric of a network (default: the task's own) over `val`."""
        return evaluate(self.model if model is None else model, self.val, self.metric)


def check_loader(option: str, loader: object) -> None:
    """Checks that batches can be gone through again and again, and are counted.

    Raises:
        OptionError: They can not, or there are none; the message names the option.
    """
    if isinstance(loader, Tensor | str | Mapping):
        raise OptionError(f"{option}: batches are needed (a loader or a list), not a {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise OptionError(f"{option}: an iterator is empty after one pass; give a list or a loader")
    if not (hasattr(loader, "__iter__") and hasattr(loader, "__len__")):
        raise OptionError(f"{option}: batches with a length are needed, not {type(loader).__name__}")
    try:
        length = len(loader)
    except TypeError as error:  # a DataLoader over an IterableDataset has a __len__ that raises
        raise OptionError(f"{option}: the number of batches must be known ({error})") from error
    if length == 0:
        raise OptionError(f"{option}: no batches")


def _check_function(option: str, function: object) -> None:
    if not callable(function):
        raise OptionError(f"{option}: a name or a function is needed, not {type(function).__name__}")
