"""What every arm of the accuracy benchmark is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fashion
import torch
from torch import Tensor, nn

import metaprune as mp

SAMPLES = 500
DENSE_EPOCHS = 0.75
"""The allowance of a trained row: the multiply-adds of so many epochs of training of the dense network."""


@dataclass
class Case:
    """One trained network and its data.

    Attributes:
        name: Of the network.
        seed: Of its training, its data and everything that an arm draws.
        model: The dense network; arms work on copies.
        graph: Its graph.
        train: Images to train on.
        test: Images that are scored.
        calibration: `SAMPLES` of the training images in batches, not augmented.
        shared: What several rows of the case start from, made once; see `accuracy_peer.sparse`.
    """

    name: str
    seed: int
    model: nn.Module
    graph: Any
    train: mp.Batches
    test: mp.Batches
    calibration: list[tuple[Tensor, Tensor]]
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense network for one image."""
        return self.graph.cost().macs

    @cached_property
    def score(self) -> float:
        """Test accuracy of the dense network."""
        return mp.evaluate(self.model, self.test)


@dataclass
class Made:
    """A smaller network.

    Attributes:
        module: The network.
        macs: Its multiply-adds for one image.
        params: Its parameters.
        pruned: The cut it came from, where it is one of ours.
        seconds: CPU seconds that went into it in an earlier row, in what the rows of a case share.
    """

    module: nn.Module
    macs: int
    params: int
    pruned: mp.Pruned | None = None
    seconds: float = 0.0


Arm = Callable[[Case, float], Made]
"""Function of a case and the fraction of the multiply-adds that may stay."""


class Steps:
    """A loader's batches, again and again, up to a number of steps."""

    def __init__(self, batches: mp.Batches, steps: int) -> None:
        self.batches, self.steps, self.generator = batches, steps, batches.generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.steps
        while left:
            for batch in self.batches:
                yield batch
                left -= 1
                if not left:
                    return


def load(name: str, seed: int, folder: Path) -> Case:
    """A network of the benchmark; it is trained once and kept in the folder."""
    training, _, test = fashion.data(seed)
    return case_of(name, seed, fashion.dense(name, seed, training, folder / "dense"), training, test)


def case_of(name: str, seed: int, model: nn.Module, train: mp.Batches, test: mp.Batches) -> Case:
    """A case of a trained network and its data."""
    model = model.to(memory_format=torch.channels_last)  # as all of it is trained; it saves time in scoring too
    plain = replace(train, augment=None, size=100, generator=torch.Generator().manual_seed(seed))
    calibration = [batch for batch, _ in zip(plain, range(SAMPLES // 100), strict=False)]
    return Case(name, seed, model, mp.trace(model, test.images[:1]), train, test, calibration)
