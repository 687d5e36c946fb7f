"""How long something takes, on a machine that others use too.

On one thread the clock is the CPU time of that thread, so time in which it waits for a processor does not count. What
is left of other work (cold caches, a shared core or memory bus) only ever adds. So every run is measured in many short
batches, spread over several rounds, and the first decile counts: low, but no single lucky batch.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metaprune.graphs.errors import OptionError

Run = Callable[[], object]
_WARM_UP = 3  # calls before any clock is read
_BATCH = 3e-4  # seconds that a batch lasts at least
_BATCHES = 8  # in a row, in each round


@dataclass(frozen=True)
class Timing:
    """A measured time.

    Attributes:
        seconds: First decile over the batches, for one call.
        spread: Interquartile range over the batches, in seconds.
    """

    seconds: float
    spread: float


def timings(runs: Sequence[Run], threads: int = 1, rounds: int = 5) -> list[Timing]:
    """Times of one call of each of several functions.

    Args:
        runs: What is measured; all take turns in every round.
        threads: Torch threads while they run. On one, CPU time of the calling thread counts, on more, wall time.
        rounds: How often each is measured, in eight batches.

    Raises:
        OptionError: `threads` or `rounds` is not a positive whole number.
    """
    check_count("threads", threads)
    check_count("rounds", rounds)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    samples: list[list[float]] = [[] for _ in runs]
    with pinned(threads), torch.no_grad(), _without_collection():
        repeats = [_repeats(run, clock) for run in runs]
        for _ in range(rounds):
            for run, count, seen in zip(runs, repeats, samples, strict=True):
                run()  # the others have had the caches
                seen += [_batch(run, count, clock) for _ in range(_BATCHES)]
    return [_summary(seen) for seen in samples]


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_count(option: str, value: object) -> None:
    """Raises `OptionError` unless an option is a positive whole number."""
    if type(value) is not int or value < 1:
        raise OptionError(f"{option}: must be a positive whole number, not {value!r}")


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _repeats(run: Run, clock: Callable[[], int]) -> int:
    """Calls that fill a batch, found after the warm-up."""
    for _ in range(_WARM_UP):
        run()
    return max(1, math.ceil(_BATCH / max(_batch(run, 1, clock), 1e-7)))


def _batch(run: Run, count: int, clock: Callable[[], int]) -> float:
    """Mean seconds of one call over a batch."""
    start = clock()
    for _ in range(count):
        run()
    return (clock() - start) / count / 1e9


def _summary(samples: Sequence[float]) -> Timing:
    low, first, third = np.quantile(samples, (0.1, 0.25, 0.75))
    return Timing(float(low), float(third - first))
