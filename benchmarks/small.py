"""Small random networks on Fashion-MNIST of 7 x 7 pixels: each seed is another architecture, trained in seconds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import fashion
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import metaprune as mp

FAMILIES = ("residual", "bottleneck", "chain", "plain")
STEPS = 350


class _Unit(nn.Sequential):
    """A convolution, with its norm or a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, norm: bool = True) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm))
        if norm:
            self.append(nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1 with a narrow middle."""

    def __init__(self, inputs: int, width: int, stride: int, narrow: int) -> None:
        super().__init__()
        if narrow:
            units = [_Unit(inputs, narrow, 1), _Unit(narrow, narrow, 3, stride), _Unit(narrow, width, 1)]
        else:
            units = [_Unit(inputs, width, 3, stride), _Unit(width, width)]
        self.units = nn.ModuleList(units)
        plain = stride == 1 and inputs == width
        self.short = nn.Identity() if plain else _Unit(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for unit in self.units[:-1]:
            y = F.relu(unit(y))
        return F.relu(self.units[-1](y) + self.short(x))


def network(seed: int) -> nn.Module:
    """A network of 0.1 to 1.3 million multiply-adds; the families take turns."""
    draw = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    if family in ("residual", "bottleneck"):
        body, width = _residual(draw, narrow=family == "bottleneck")
    else:
        body, width = _chain(draw, norm=family == "chain")
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def _residual(draw: random.Random, narrow: bool) -> tuple[list[nn.Module], int]:
    width = draw.choice((12, 16, 24))
    layers: list[nn.Module] = [_Unit(1, width), nn.ReLU()]
    for stage in range(2):
        wider = round(width * draw.choice((1, 1.5, 2)))
        for block in range(draw.choice((1, 2, 3))):
            stride = 2 if stage and not block else 1
            layers.append(_Block(width, wider, stride, max(8, 2 * wider // 3) if narrow else 0))
            width = wider
    return layers, width


def _chain(draw: random.Random, norm: bool) -> tuple[list[nn.Module], int]:
    depth = draw.choice((3, 4, 5, 6))
    smaller = draw.randrange(1, depth)
    width, inputs = draw.choice((12, 16, 24, 32)), 1
    layers: list[nn.Module] = []
    for place in range(depth):
        stride = 2 if place == smaller and not norm else 1
        if place == smaller and norm:
            layers.append(nn.MaxPool2d(2))
        layers += [_Unit(inputs, width, 3, stride, norm), nn.ReLU()]
        inputs, width = width, min(64, max(8, round(width * draw.choice((0.75, 1, 1.5, 2)))))
    return layers, inputs


def data(seed: int) -> tuple[mp.Batches, mp.Batches]:
    """12,000 images to train on and the 10,000 test images, averaged over squares of four pixels."""
    train, _, test = mp.fashion_mnist(subset=12_000, validation=5_000, size=128, seed=seed)
    return replace(train, images=F.avg_pool2d(train.images, 4)), replace(test, images=F.avg_pool2d(test.images, 4))


def dense(seed: int, train: mp.Batches, folder: Path) -> nn.Module:
    """The trained network; it is trained once and kept in a file."""
    torch.manual_seed(seed)
    model = network(seed)
    path = folder / f"small-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        epochs = round(STEPS / len(train))
        mp.train(model, train, fashion.objective, mp.Settings(epochs=epochs, lr=0.05), seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()
