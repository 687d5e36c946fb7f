"""Accuracy against cost on Fashion-MNIST: zero training steps, and recovery at equal training FLOPs.

Every arm prunes the same trained networks to the same fractions of multiply-adds; what an arm reached is noted beside
its score. Without training every arm sees the same 500 unlabelled images. With training every arm may spend the same
multiply-adds, three for each of the network that is trained and one for a teacher, on top of what the dense network
was trained for. The test images are read once for each row; nothing is chosen by them.

    python benchmarks/accuracy.py --part 0/2        # half of the rows; goes on where it was stopped
    python benchmarks/accuracy.py --part 1/2
    python benchmarks/accuracy.py --table           # results/accuracy.json, the README's table, the plot
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fashion
import torch
from accuracy_report import write_report
from torch import Tensor, nn

import metaprune as mp

HERE = Path(__file__).resolve().parent
BUDGETS = (0.5, 0.25, 0.125)
SEEDS = {"flatten CNN": 5, "ResNet-8": 5, "ResNet-20": 3, "small VGG": 3}
SAMPLES = 500
ON_DATA = {"taylor", "fisher", "fisher_block", "obspa"}
DENSE_EPOCHS = 1.5  # what a trained arm may spend, in epochs of the dense network


@dataclass
class Case:
    """One trained network and its data."""

    name: str
    seed: int
    model: nn.Module
    graph: Any
    train: mp.Batches
    test: mp.Batches
    calibration: list[tuple[Tensor, Tensor]]

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense network for one image."""
        return self.graph.cost().macs


Made = tuple[nn.Module, int, int]
"""A network, its multiply-adds and its parameters."""
Arm = Callable[[Case, float], Made]


def _made(pruned: mp.Pruned) -> Made:
    return pruned.module, pruned.cost["after"].macs, pruned.cost["after"].params


def _planned(criterion: str, allocator: str, least_squares: bool = False) -> Arm:
    """Our own plans: batch norms recalibrated, or the weights fitted by least squares."""

    def arm(case: Case, budget: float) -> Made:
        given = case.calibration if criterion in ON_DATA else None
        plan = mp.plan(case.graph, f"macs={budget}", criterion, allocator, given, seed=case.seed)
        pruned = mp.apply(case.graph, plan)
        if least_squares:
            pruned = mp.reconstruct(pruned, case.calibration, seed=case.seed)
        else:
            mp.recalibrate(pruned.module, case.calibration)
        return _made(pruned)

    return arm


def _obspa(noise: bool) -> Arm:
    """OBSPA's scores and weight update, calibrated on images or on noise; batch norms on images."""

    def arm(case: Case, budget: float) -> Made:
        data: Any = "noise" if noise else case.calibration
        plan = mp.plan(case.graph, f"macs={budget}", "obspa", "global", data, seed=case.seed)
        pruned = mp.obs_update(mp.apply(case.graph, plan), data, SAMPLES, case.seed)
        mp.recalibrate(pruned.module, case.calibration)
        return _made(pruned)

    return arm


def _torch_pruning(global_: bool) -> Arm:
    """Torch-Pruning's group L2 norm, the largest network that its ratio allows within the budget."""

    def arm(case: Case, budget: float) -> Made:
        import torch_pruning as tp

        inputs = case.test.images[:1]

        def cut(ratio: float) -> tuple[nn.Module, int, int]:
            model = copy.deepcopy(case.model)
            last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            importance = tp.importance.GroupMagnitudeImportance(p=2)
            pruner = tp.pruner.BasePruner(
                model, inputs, importance, global_pruning=global_, pruning_ratio=ratio, max_pruning_ratio=0.9,
                ignored_layers=[last],
            )  # fmt: skip
            pruner.step()
            cost = mp.trace(model, inputs).cost()
            return model.eval(), cost.macs, cost.params

        low, high = 0.0, 0.95  # low is over the budget, high within
        best = cut(high)
        for _ in range(9):
            middle = (low + high) / 2
            made = cut(middle)
            if made[1] <= budget * case.macs:
                high, best = middle, made
            else:
                low = middle
        mp.recalibrate(best[0], case.calibration)
        return best

    return arm


def _closed_form(case: Case, budget: float) -> Made:
    """What `metaprune.prune` does by default when it has data."""
    return _made(mp.prune(case.graph, budget=f"macs={budget}", data=case.calibration, seed=case.seed))


WITHOUT_TRAINING: dict[str, Arm] = {
    "random, uniform": _planned("random", "uniform"),
    "L2, uniform": _planned("magnitude", "uniform"),
    "L2 over mean": _planned("magnitude", "global"),
    "L2 over maximum": _planned("magnitude_max", "global"),
    "Taylor": _planned("taylor", "global"),
    "Torch-Pruning, local": _torch_pruning(global_=False),
    "Torch-Pruning, global": _torch_pruning(global_=True),
    "Fisher, cost": _planned("fisher", "cost"),
    "block Fisher, cost": _planned("fisher_block", "cost"),
    "OBSPA with its update, real images": _obspa(noise=False),
    "OBSPA with its update, noise": _obspa(noise=True),
    "L2, uniform + least squares": _planned("magnitude", "uniform", True),
    "L2 over mean + least squares": _planned("magnitude", "global", True),
    "Taylor + least squares": _planned("taylor", "global", True),
    "OBSPA + least squares": _planned("obspa", "global", True),
    "Fisher, cost + least squares": _planned("fisher", "cost", True),
    "block Fisher, cost + least squares": _planned("fisher_block", "cost", True),
    "closed form (default)": _closed_form,
}


class _Steps:
    """A loader's batches, again and again, up to a number of steps."""

    def __init__(self, batches: mp.Batches, steps: int) -> None:
        self.batches, self.steps, self.generator = batches, steps, batches.generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.steps
        while left:
            for batch in self.batches:
                yield batch
                left -= 1
                if not left:
                    return


def _steps(case: Case, macs: int, teacher: bool) -> int:
    """Steps that the training budget pays for: three passes' worth for the student, one for a teacher."""
    spent = 3 * macs + (case.macs if teacher else 0)
    return round(DENSE_EPOCHS * 3 * case.macs / spent * len(case.train))


def _trained(start: Arm, scratch: bool = False) -> Arm:
    """An arm's network fine-tuned, or its structure trained from scratch."""

    def arm(case: Case, budget: float) -> Made:
        module, macs, params = start(case, budget)
        if scratch:
            torch.manual_seed(case.seed)
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        loader = _Steps(case.train, _steps(case, macs, teacher=False))
        mp.train(module, loader, fashion.objective, fashion.settings(1), case.seed)
        return module, macs, params

    return arm


def _distilled(recipe: str) -> Arm:
    """The closed form, then a recipe of `metaprune.recover` with the dense network as teacher."""

    def arm(case: Case, budget: float) -> Made:
        pruned = mp.prune(case.graph, budget=f"macs={budget}", data=case.calibration, seed=case.seed)
        loader = _Steps(case.train, _steps(case, pruned.cost["after"].macs, teacher=True))
        task = mp.Task(case.model, case.test.images[:2], loader, case.calibration)
        return _made(mp.recover(pruned, task, recipe=recipe, epochs=1, seed=case.seed))

    return arm


WITH_TRAINING: dict[str, Arm] = {
    "from scratch": _trained(WITHOUT_TRAINING["block Fisher, cost"], scratch=True),
    "random, uniform, fine-tuned": _trained(WITHOUT_TRAINING["random, uniform"]),
    "L2 over mean, fine-tuned": _trained(WITHOUT_TRAINING["L2 over mean"]),
    "Torch-Pruning, local, fine-tuned": _trained(WITHOUT_TRAINING["Torch-Pruning, local"]),
    "Torch-Pruning, global, fine-tuned": _trained(WITHOUT_TRAINING["Torch-Pruning, global"]),
    "closed form, fine-tuned": _trained(WITHOUT_TRAINING["block Fisher, cost + least squares"]),
    "closed form, distilled": _distilled("kd_standardised"),
}
TABLES = {"none": WITHOUT_TRAINING, "equal FLOPs": WITH_TRAINING}


def rows(trained: bool) -> Iterator[tuple[str, int, float, str, str]]:
    """Network, seed, budget, table and arm of every row."""
    tables = TABLES if trained else {"none": WITHOUT_TRAINING}
    for table, arms in tables.items():
        for seed in range(max(SEEDS.values())):
            for name, seeds in SEEDS.items():
                budgets = BUDGETS if table == "none" or seeds == max(SEEDS.values()) else (0.25,)
                for budget in budgets if seed < seeds else ():
                    for arm in arms:
                        yield name, seed, budget, table, arm


def main() -> None:
    """Measures, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="this process's share of the networks and seeds: number/of")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "accuracy")
    parser.add_argument("--without-training", action="store_true", help="only the rows without training steps")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        _measure(options.out, *map(int, options.part.split("/")), trained=not options.without_training)
    write_report(options.out)


def _measure(out: Path, part: int, parts: int, trained: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    done = {tuple(row["key"]) for path in out.glob("rows-*.jsonl") for row in read_rows(path)}
    case: Case | None = None
    with (out / f"rows-{part}.jsonl").open("a") as ledger:
        for key in rows(trained):
            name, seed, budget, table, arm = key
            if seed % parts != part or key in done:
                continue
            if case is None or (case.name, case.seed) != (name, seed):
                case = _case(name, seed, out)
            start = time.process_time()
            module, macs, params = TABLES[table][arm](case, budget)
            spent = time.process_time() - start
            row = {
                "key": key,
                "score": mp.evaluate(module, case.test),
                "dense": mp.evaluate(case.model, case.test),
                "macs": macs / case.macs,
                "params": params / case.graph.cost().params,
                "cpu_seconds": round(spent, 2),
            }
            ledger.write(json.dumps(row) + "\n")
            ledger.flush()
            os.fsync(ledger.fileno())
            print(*key, f"{row['score']:.4f}", f"{row['macs']:.3f}", f"{spent:.1f}s", flush=True)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a ledger; a line that was cut off by a kill is left out, and done again."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _case(name: str, seed: int, out: Path) -> Case:
    training, _, test = fashion.data(seed)
    model = fashion.dense(name, seed, training, out / "dense")
    plain = replace(training, augment=None, size=100, generator=torch.Generator().manual_seed(seed))
    calibration = [batch for batch, _ in zip(plain, range(SAMPLES // 100), strict=False)]
    return Case(name, seed, model, mp.trace(model, test.images[:1]), training, test, calibration)


if __name__ == "__main__":
    main()
