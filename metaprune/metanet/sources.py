"""What the networks of a zoo learn: small images in ten classes, each data set loaded once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from metaprune.data import Batches
from metaprune.datasets import FASHION_AUGMENT, digits, fashion_mnist
from metaprune.graphs.errors import OptionError
from metaprune.metanet.architectures import Shape
from metaprune.task import Task

CALIBRATION = 512
_TRAINED_ON, _JUDGED_ON, _SIZE = 8_000, 2_000, 64


@dataclass(frozen=True, eq=False)
class Source:
    """One data set; the same split in every zoo, so that networks of several zoos can be compared.

    Attributes:
        train: To learn from, augmented.
        val: To judge by.
        epochs: Passes that make a network of the zoo.
        classes: Number of classes.
    """

    train: Batches
    val: Batches
    epochs: int
    classes: int = 10

    @property
    def shape(self) -> Shape:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def calibration(self) -> Batches:
        """The first training images as they are, to measure with."""
        return Batches(self.train.images[:CALIBRATION], self.train.labels[:CALIBRATION], CALIBRATION)

    def task(self, model: nn.Module) -> Task:
        """The task of a network; its training batches have a source of randomness of their own."""
        train = replace(self.train, generator=torch.Generator().manual_seed(0))
        return Task(model, self.train.images[:1], train, self.val)


def _digits(directory: str | None) -> Source:
    train, val = digits()
    return Source(train, val, epochs=20)


def _fashion_mnist(directory: str | None) -> Source:
    """Fashion-MNIST at 14 x 14 pixels, each the mean of four, normalised anew."""
    train, val, _ = fashion_mnist(directory, _TRAINED_ON, _JUDGED_ON, augment=None)
    small, held_out = (F.avg_pool2d(batches.images, 2) for batches in (train, val))
    std, mean = torch.std_mean(small, correction=0)
    return Source(
        Batches((small - mean) / std, train.labels, _SIZE, shuffle=True, augment=FASHION_AUGMENT),
        Batches((held_out - mean) / std, val.labels, _JUDGED_ON),
        epochs=4,
    )


SOURCES: dict[str, Callable[[str | None], Source]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def names_of(data: str) -> tuple[str, ...]:
    """The data sets that an option stands for: one by its name, or `"both"`; raises `OptionError` for another."""
    if data == "both":
        return tuple(SOURCES)
    if data not in SOURCES:
        raise OptionError(f"data: {data!r} is none of {', '.join(SOURCES)}, both")
    return (data,)


@cache
def source(name: str, directory: str | None = None) -> Source:
    """A data set by name.

    Args:
        name: In `SOURCES`.
        directory: Folder of Fashion-MNIST's files where it is not that of the Debian package.

    Raises:
        OptionError: An unknown name, or files that are not there.
        MetapruneError: scikit-learn is not installed, or a file is damaged.
    """
    if name not in SOURCES:
        raise OptionError(f"data: {name!r} is none of {', '.join(SOURCES)}")
    return SOURCES[name](directory)
