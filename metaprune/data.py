"""Batches: what a loader is, a small in-memory one, and augmentations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.graphs.errors import OptionError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


class Loader(Protocol):
    """Batches of `(inputs, labels)` that can be gone through again and again; a torch `DataLoader` is one."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Goes through the batches once."""


@dataclass
class Batches:
    """Tensors in memory, served in batches.

    The order and the augmentations are drawn from `generator`, so equal generators give equal batches to the bit.

    Attributes:
        images: (n, ...) tensor.
        labels: (n,) tensor.
        size: Examples per batch; the last batch may be smaller.
        shuffle: Draw a new order for each pass.
        augment: Function of (batch of images, generator) that returns images of the same shape.
        generator: Source of all randomness of this loader.
    """

    images: Tensor
    labels: Tensor
    size: int = 128
    shuffle: bool = False
    augment: Augment | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise OptionError(f"labels: {len(self.labels)} labels for {len(self.images)} images")
        if len(self.images) == 0:
            raise OptionError("images: no examples")
        if self.size < 1:
            raise OptionError(f"size: a batch holds at least one example, not {self.size}")

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        order = torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)
        for chosen in torch.split(order, self.size):
            images = self.images[chosen]
            if self.augment is not None:
                images = self.augment(images, self.generator)
            yield images, self.labels[chosen]


def shift(pixels: int) -> Augment:
    """Augmentation that moves every image by up to `pixels` in each direction, filling with zeros.

    Shapes:
        images: (batch, channels, height, width), the same out.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = images.shape
        padded = F.pad(images, (pixels, pixels, pixels, pixels))
        top, left = torch.randint(2 * pixels + 1, (2, batch, 1), generator=generator)
        rows = top + torch.arange(height)  # (batch, height)
        columns = left + torch.arange(width)  # (batch, width)
        example = torch.arange(batch)[:, None, None]
        moved = padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]
        return moved.movedim(-1, 1).contiguous()

    return augment


def flip(probability: float = 0.5) -> Augment:
    """Augmentation that mirrors each image left to right with the given probability.

    Shapes:
        images: (batch, channels, height, width), the same out.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        mirrored = torch.rand(len(images), generator=generator) < probability
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    return augment


def compose(*augments: Augment) -> Augment:
    """Augmentation that applies others one after the other.

    Shapes:
        images: what each of them takes and returns.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in augments:
            images = step(images, generator)
        return images

    return augment
