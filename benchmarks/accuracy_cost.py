"""What the accuracy benchmark will take, from a few timed steps of each network."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fashion
import torch
from accuracy_arms import Trained
from accuracy_case import Arm, Case, Steps
from accuracy_peer import sparse_steps
from torch import nn

import metaprune as mp

STEPS = 15
NARROW = 0.125  # the fraction of the multiply-adds of the second network that is timed
PLANNING = (
    1.5  # CPU seconds of a row before anything is trained or scored, about the mean of the table without training
)


@dataclass(frozen=True)
class Pace:
    """CPU seconds as lines in the fraction of the multiply-adds: a small network is slower for each of them.

    Attributes:
        case: The network.
        step: Of a training step, as (constant, slope).
        scoring: Of a pass over the test images.
        teacher: Of a teacher's part of a step.
    """

    case: Case
    step: tuple[float, float]
    scoring: tuple[float, float]
    teacher: float

    def seconds(self, arm: Arm | Trained, budget: float) -> float:
        """Of a row."""
        scoring = self.scoring[0] + self.scoring[1] * budget
        if not isinstance(arm, Trained):
            return PLANNING + scoring
        macs = round(budget * self.case.macs)
        step = self.step[0] + self.step[1] * budget + (self.teacher if arm.recipe != "finetune" else 0)
        return PLANNING + 3 * scoring + arm.steps(self.case, macs) * step


def print_cost(
    rows: list[tuple[str, int, float, str, str]],
    tables: Mapping[str, Mapping[str, Arm | Trained]],
    load: Callable[[str, int, Path], Case],
    folder: Path,
) -> None:
    """Prints CPU hours by table and network; dense networks that are not there yet are trained for it."""
    paces = {name: pace(load(name, 0, folder)) for name in dict.fromkeys(key[0] for key in rows)}
    hours: dict[str, float] = defaultdict(float)
    prepared = set()
    for name, seed, budget, table, label in rows:
        arm, own = tables[table][label], paces[name]
        seconds = own.seconds(arm, budget)
        if isinstance(arm, Trained) and arm.before and (name, seed) not in prepared:  # once for all rows of a case
            prepared.add((name, seed))
            seconds += sparse_steps(own.case) * sum(own.step)
        hours[f"{table}, {name}"] += seconds / 3600
    for title, value in hours.items():
        print(f"{title}: {value:.2f} CPU hours")
    print(f"in all: {sum(hours.values()):.2f} CPU hours")


def pace(case: Case) -> Pace:
    """Times a few steps and a scoring of the dense network and of a narrow one."""
    plan = mp.plan(case.graph, f"macs={NARROW}", "magnitude", "uniform")
    narrow = mp.apply(case.graph, plan).module.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(case.model)
    steps = [_of_training(network, case) for network in (narrow, dense)]
    scorings = [_seconds(lambda network=network: mp.evaluate(network, case.test)) for network in (narrow, dense)]
    return Pace(case, _line(steps), _line(scorings), _of_teaching(dense, case))


def _of_training(network: nn.Module, case: Case) -> float:
    """CPU seconds of a step, after a first run that fills caches."""
    for steps in (2, STEPS):
        loader = Steps(case.train, steps)
        seconds = _seconds(lambda loader=loader: mp.train(network, loader, fashion.objective, fashion.settings(1)))
    return seconds / STEPS


def _of_teaching(network: nn.Module, case: Case) -> float:
    """CPU seconds of the answers to a batch."""
    batches = [images for images, _ in Steps(case.train, STEPS)]

    def answer() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for images in batches:
                network(images)

    return _seconds(answer) / STEPS


def _line(seconds: list[float]) -> tuple[float, float]:
    """Constant and slope of the line through the seconds at `NARROW` and at 1."""
    slope = (seconds[1] - seconds[0]) / (1 - NARROW)
    return seconds[1] - slope, slope


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
