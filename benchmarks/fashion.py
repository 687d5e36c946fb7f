"""The accuracy benchmark's networks on Fashion-MNIST, and how they are trained once, before any pruning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import metaprune as mp

Data = tuple[mp.Batches, mp.Batches, mp.Batches]


class Flatten(nn.Sequential):
    """Three convolutions and a flatten head."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 48), (48, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


class Vgg(nn.Sequential):
    """Six convolutions in three stages and a pooled head."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        inputs = 1
        for stage, width in enumerate((24, 48, 96)):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers += [nn.MaxPool2d(2)] if stage < 2 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet(nn.Sequential):
    """The CIFAR residual network of so many blocks in each of three stages, 16 to 64 channels wide."""

    def __init__(self, blocks: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        inputs = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(blocks):
                layers.append(_Block(inputs, width, 2 if stage and not block else 1))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flatten CNN": Flatten,
    "ResNet-8": lambda: ResNet(1),
    "ResNet-20": lambda: ResNet(3),
    "small VGG": Vgg,
}
EPOCHS = 5


def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(logits.float(), labels)


def settings(epochs: int) -> mp.Settings:
    """The one recipe of all training in the benchmark."""
    return mp.Settings(epochs=epochs, lr=0.05, channels_last=True)


def data(seed: int) -> Data:
    """20,000 images to train on, 5,000 to choose by, 10,000 to report on."""
    return mp.fashion_mnist(subset=20_000, validation=5_000, size=128, seed=seed)


def dense(name: str, seed: int, batches: mp.Batches, folder: Path) -> nn.Module:
    """The trained network; it is trained once and kept in a file."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    path = folder / f"{name.replace(' ', '-')}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        mp.train(model, batches, objective, settings(EPOCHS), seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()
