"""Small networks whose sensitivity is looked at: a residual one, a transformer block, one that concatenates."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.support.layers import convolutional, perceptron, rows

EVERY = 1000  # levels: more than there are


def residual() -> nn.Module:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.stem_norm(net.stem(x)))
        y = torch.relu(y + net.norm(net.second(torch.relu(net.first(y)))))
        out: Tensor = net.head(torch.relu(net.last(y)).mean((2, 3)))
        return out

    parts = {"first": conv(6, 5), "second": conv(5, 6, bias=False), "last": conv(6, 7), "head": nn.Linear(7, 4)}
    norms = {"stem_norm": nn.BatchNorm2d(6), "norm": nn.BatchNorm2d(6)}
    return oracle.alive(Net(body, stem=conv(2, 6, bias=False), **norms, **parts)).double().eval()


def transformer() -> nn.Module:
    """Two heads of four, a feed-forward part, layer norms; the output is one row for each of five tokens."""

    def body(net: Any, x: Tensor) -> Tensor:
        y = net.embed(x)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(net.norm1(y)).chunk(3, -1))
        y = y + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y + net.down(F.gelu(net.up(net.norm2(y))))
        out: Tensor = net.head(net.norm3(y))
        return out

    norms = {f"norm{i}": nn.LayerNorm(8) for i in (1, 2, 3)}
    parts = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "up": nn.Linear(8, 10), "down": nn.Linear(10, 8)}
    return oracle.alive(Net(body, embed=nn.Linear(3, 8), head=nn.Linear(8, 3), **norms, **parts)).double().eval()


def concatenating() -> nn.Module:
    def body(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.stem(x))
        y = torch.cat([y, torch.relu(net.one(net.norm1(y).relu()))], 1)
        y = torch.cat([y, torch.relu(net.two(net.norm2(y).relu()))], 1)
        out: Tensor = net.head(y.flatten(1))
        return out

    parts = {"one": conv(4, 3, bias=False), "two": conv(7, 3), "head": nn.Linear(10 * 9, 4)}
    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(7)}
    return oracle.alive(Net(body, stem=conv(2, 4), **norms, **parts)).double().eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (residual, (2, 5, 5)),
    "transformer": (transformer, (5, 3)),
    "dense": (concatenating, (2, 3, 3)),
    "perceptron": (perceptron, (6,)),
    "unshifted": (lambda: perceptron(bias=False), (6,)),
    "convolutional": (convolutional, (2, 5, 5)),
}


@functools.cache
def traced(name: str) -> tuple[Graph, Tensor]:
    """One of the networks, and inputs."""
    build, shape = NETWORKS[name]
    return mp.trace(build(), rows(*shape)[:2]), rows(*shape)[:45]


@functools.cache
def small() -> tuple[Graph, Tensor]:
    """A network of two outputs, so that two directions span them."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    x = rows(5)
    return mp.trace(oracle.alive(net).double(), x[:2]), x


def free(graph: Graph) -> list[Group]:
    return [group for group in graph.groups if not group.pinned]
