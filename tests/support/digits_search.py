"""A small search on real data that a process of its own can make: it is killed and taken up again in the tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.losses import cross_entropy
from tests.support.patients import Block

EVALUATIONS = 10


@lru_cache(maxsize=1)
def task() -> mp.Task:
    """A residual network that went through the digits once, with batches in a fixed order."""
    train, val = digits(0)
    ordered = mp.Batches(train.images, train.labels, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), Block(8, 8, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip

    def objective(logits: Tensor, _: object, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    mp.train(model, ordered, objective, mp.Settings(epochs=1), seed=0)
    return mp.Task(model.eval(), val.images[:2], ordered, val)


def search(
    backend: str, out: str | Path | None, seed: int = 0, watch: Callable[[mp.Front, int, int], None] | None = None
) -> mp.Front:
    """The search: error against operations, all within 60 % of them."""
    return mp.explore(
        task(), backend, evaluations=EVALUATIONS, budget="macs=0.6", out=out, seed=seed, samples=64, watch=watch
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    search(sys.argv[1], sys.argv[2], watch=lambda *_: time.sleep(0.05))  # so that it is alive when it is killed
