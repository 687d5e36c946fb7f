"""A zoo of six tiny networks of three families on digits, labelled; its fit; and a network to try that on."""

import atexit
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune.calibration import leaves_of
from metaprune.graphs.ir import Graph
from metaprune.masking import Change, silenced
from metaprune.masking import measure as masked
from metaprune.metanet.ensembles import Course
from metaprune.metanet.fitting import fit
from metaprune.metanet.pruner import MetaPruner
from metaprune.reconstruction import COARSE
from metaprune.statistics import open_gates
from metaprune.trials import Bench, Trial

COURSE = Course(steps=60, every=20, batch=64)
SAMPLES = 128  # all there are


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def plain_layers(widths: tuple[int, ...], norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, (inputs, width) in enumerate(zip((1, *widths), widths, strict=False)):
        layers.append(nn.Conv2d(inputs, width, 3, stride=2 if number == 1 else 1, padding=1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
    return layers


NETWORKS = {
    "plain-0": lambda: (plain_layers((6, 8), False), 8),
    "plain-1": lambda: (plain_layers((8, 6, 8), False), 8),
    "chain-0": lambda: (plain_layers((6, 10), True), 10),
    "chain-1": lambda: (plain_layers((8, 8, 6), True), 6),
    "residual-0": lambda: ([*plain_layers((8, 8), True), _Block(8, 6)], 8),
    "residual-1": lambda: ([*plain_layers((6, 6), True), _Block(6, 8)], 6),
    "unseen": lambda: ([*plain_layers((7, 9), True), _Block(9, 7), nn.Conv2d(9, 8, 1), nn.ReLU()], 8),
}
ZOO = tuple(name for name in NETWORKS if name != "unseen")


@cache
def images() -> tuple[mp.Batches, mp.Batches]:
    train, test = mp.digits(size=64, seed=0)
    return train, test


@cache
def task_of(name: str) -> mp.Task:
    torch.manual_seed(list(NETWORKS).index(name))
    body, width = NETWORKS[name]()
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    train, test = images()

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    mp.train(model, train, objective, mp.Settings(epochs=2, lr=0.05), 0)
    return mp.Task(model.eval(), test.images[:1], [next(iter(train)), next(iter(train))], test)


@cache
def graph_of(name: str) -> Graph:
    task = task_of(name)
    return mp.trace(task.model, task.inputs)


@dataclass(frozen=True)
class LittleLabels:
    """What a zoo's labels hold, measured here by the same probes at few levels."""

    sizes: Mapping[str, int]
    order: Mapping[str, Tensor]
    ablation: Mapping[str, Tensor]
    levels: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    compensated: Mapping[str, Tensor]
    joint_kept: Tensor
    joint: Tensor


def measure_little(graph: Graph, data: Any, plans: int = 10) -> LittleLabels:
    groups = [group for group in graph.groups if not group.pinned]
    plain, fitted = (
        mp.sensitivity(graph, data, "fisher_block", 4, "measured", compensate, SAMPLES, 0, ("kl",))
        for compensate in (False, True)
    )
    ones, leaves = open_gates(graph), leaves_of(graph, data, SAMPLES)
    ablation = {}
    for group in groups:
        changes = [Change({group.name: silenced(ones[group.name], np.array([u]))}) for u in range(group.size)]
        ablation[group.name] = torch.from_numpy(masked(graph, changes, leaves).total("kl"))
    draw = np.random.default_rng(0)
    sizes = np.array([group.size for group in groups])
    kept = np.clip(np.round(sizes * draw.uniform(0.2, 1.0, (plans, len(groups)))), 1, sizes).astype(int)
    bench = Bench(graph, leaves[:50], leaves[-50:], 0, COARSE)
    keeps = [{g.name: plain.keep(g.name, k) for g, k in zip(groups, row, strict=True)} for row in kept.tolist()]
    with torch.no_grad():
        joint = [Trial(bench, keep).distortion() for keep in keeps]
    reverse = {name: torch.from_numpy(order[::-1].copy()) for name, order in plain.order.items()}
    levels, losses, mended = (
        {name: torch.from_numpy(values[::-1].copy()) for name, values in found.items()}
        for found in (plain.levels, plain.points["kl"], fitted.points["kl"])
    )
    counts = torch.from_numpy(kept)
    return LittleLabels(dict(zip(ablation, sizes.tolist(), strict=True)), reverse, ablation, levels, losses, mended,
                   counts, torch.tensor(joint, dtype=torch.float64))  # fmt: skip


@cache
def labels_of(name: str) -> LittleLabels:
    return measure_little(graph_of(name), task_of(name).train)


@dataclass(frozen=True)
class LittleMember:
    name: str
    family: str
    task: mp.Task


class LittleZoo:
    def __init__(self, names: tuple[str, ...] = ZOO) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[LittleMember]:
        return (LittleMember(name, name.split("-")[0], task_of(name)) for name in self.names)

    def labels(self, name: str) -> LittleLabels:
        return labels_of(name)


@cache
def folder_of_fit() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def pruner_of_zoo() -> MetaPruner:
    return fit(LittleZoo(), out=folder_of_fit(), course=COURSE, members=2, samples=SAMPLES)


def encoded_unseen(data: bool = True) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six networks span no wide range
        return pruner_of_zoo().encode(graph_of("unseen"), data=task_of("unseen").train if data else None)


def tensors_of(pruner: MetaPruner) -> dict[str, Tensor]:
    return {f"{sight}.{k}": v for sight, own in pruner.predictors.items() for k, v in own.tensors().items()}


def same(one: MetaPruner, other: MetaPruner) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
