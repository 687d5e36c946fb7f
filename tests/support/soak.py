"""Many prunes in one process: what stays in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.ir import Graph, Node
from tests.support.patients import PATIENTS, admit
from tests.support.random_cases import draw
from tests.support.random_networks import build


@dataclass(frozen=True)
class Sample:
    """Memory after some prunes: resident bytes, graphs and nodes still alive, all objects the collector knows."""

    prunes: int
    resident: int
    graphs: int
    nodes: int
    objects: int


def resident() -> int:
    """Resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def networks(distinct: int) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """The hand-written networks in turn, every `distinct`-th time one never seen before."""
    names, turn = list(PATIENTS), 0
    while True:
        if turn % distinct == distinct - 1:
            net, inputs, _ = build(draw(10_000_000 + turn))
            yield net, inputs
        else:
            yield admit(names[turn % len(names)], seed=turn % 3)
        turn += 1


def soak(prunes: int, every: int, distinct: int = 5) -> Iterator[Sample]:
    """Prunes `prunes` times, certified; a sample before the first one and after each `every`."""
    feed = networks(distinct)
    for done in range(prunes + 1):
        if done % every == 0:
            yield sample(done)
        if done < prunes:
            net, inputs = next(feed)
            pruned = mp.prune(net, inputs, budget="width=0.5")
            assert pruned.certificate is not None
            del net, inputs, pruned


def sample(done: int) -> Sample:
    """What is in memory now."""
    gc.collect()
    alive = gc.get_objects()
    kinds = [type(thing) for thing in alive]
    return Sample(done, resident(), kinds.count(Graph), kinds.count(Node), len(kinds))


def growth(samples: list[Sample], warm_up: int) -> float:
    """Growth of resident memory after the warm-up, as a fraction; the mean of the last three samples counts."""
    warm = [s.resident for s in samples if s.prunes >= warm_up]
    last = warm[-3:]
    return sum(last) / len(last) / warm[0] - 1
