"""Small networks whose linear layers are looked at one by one, and least squares by numpy."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import linear_layers
from metaprune.graphs.replay import Replay
from tests.support import oracle
from tests.support.cases import conv

Array = NDArray[np.float64]


def perceptron(bias: bool = True) -> nn.Module:
    return oracle.alive(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=bias))).double()


def convolutional() -> nn.Module:
    """Each kind of reader: a convolution, a depthwise one, one before a norm, a linear layer behind a flattening."""
    layers = [conv(2, 6), nn.ReLU(), conv(6, 6, groups=6), nn.Tanh(), conv(6, 5, bias=False), nn.BatchNorm2d(5)]
    return oracle.alive(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 25, 3))).double().eval()


def rows(*shape: int, seed: int = 1) -> Tensor:
    """Inputs of mean 0.3, more of them than a chunk and no multiple of it."""
    return torch.randn(83, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


def all_columns(graph: Graph, x: Tensor, weight: str) -> Tensor:
    """The columns of a layer on all inputs at once, shape [groups, rows, width]."""
    layer = next(layer for layer in linear_layers(graph).values() if layer.weight == weight)
    replay = Replay(graph, {n: v.detach() for n, v in graph.values.items()}, [{next(iter(graph.example)): x}])
    replay._left.update([layer.input])
    return layer.columns(replay.get(layer.input)[0])


def refitted(x: Tensor, weight: Tensor, kept: Sequence[int], ridge: float, shifted: bool) -> tuple[Array, float]:
    """Least squares by numpy on rows: the weights that stay nearest without some columns, and the least objective.

    The ridge is written as rows that ask for the dense weights.
    """
    data, dense = x.numpy(), weight.numpy()
    data = data - data.mean(0) if shifted else data
    strength = (ridge * np.square(data).sum(0).mean()) ** 0.5
    wide = np.concatenate([data, strength * np.eye(data.shape[1])])
    goal = wide @ dense
    found, *_ = np.linalg.lstsq(wide[:, kept], goal, rcond=None)
    return found, float(np.square(wide[:, kept] @ found - goal).sum())


def group_of(graph: Graph, weight: str, dim: int) -> Group:
    return next(g for g in graph.groups if any((p.tensor, p.dim) == (weight, dim) for p in g.slices))


def cut_to(graph: Graph, keep: dict[str, tuple[int, ...]]) -> mp.Pruned:
    return mp.apply(graph, dataclasses.replace(mp.plan(graph, "macs=1.0"), keep=keep))
