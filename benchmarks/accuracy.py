"""Accuracy against cost on Fashion-MNIST: zero training steps, and recovery at equal training FLOPs.

Every arm prunes the same trained networks to the same fractions of multiply-adds; what an arm reached is noted beside
its score. Without training every arm sees the same 500 unlabelled images. With training every arm may spend the same
multiply-adds, three for each of the network that is trained and one for a teacher, on top of what the dense network
was trained for; all of them after one cut, but for half of those of Torch-Pruning's sparse learning, and one control
from scratch that makes as many epochs as the dense network did. A trained network is scored after the cut, after a
sixth of its steps and at their end. The test images choose nothing.

    python benchmarks/accuracy.py --cost            # CPU hours that the whole takes, from a few steps of each network
    python benchmarks/accuracy.py --part 0/2        # half of the rows; goes on where it was stopped
    python benchmarks/accuracy.py --part 1/2
    python benchmarks/accuracy.py --table           # results/accuracy.json, the README's tables, the plot
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy_arms import TABLES, Trained, measured
from accuracy_case import Arm, Case, load
from accuracy_cost import print_cost
from accuracy_report import write_report
from ledger import appending, read_rows

HERE = Path(__file__).resolve().parent
Key = tuple[str, int, float, str, str]
"""Network, seed, budget, table and arm of a row."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        seeds: Number of seeds of each network.
        budgets: Fractions of the multiply-adds that stay.
        trained_budgets: Those of them at which a network's rows are trained.
        tables: Arms by table.
        load: Makes a case of a network, a seed and the folder that trained networks are kept in.
    """

    seeds: Mapping[str, int]
    budgets: tuple[float, ...]
    trained_budgets: Mapping[str, tuple[float, ...]]
    tables: Mapping[str, Mapping[str, Arm | Trained]]
    load: Callable[[str, int, Path], Case] = load

    def rows(self, wanted: str = "") -> Iterator[Key]:
        """The rows of all tables or of one, seed by seed, those of a case one after the other."""
        for seed in range(max(self.seeds.values())):
            for name, seeds in self.seeds.items():
                for table, arms in self.tables.items():
                    budgets = self.budgets if table == "none" else self.trained_budgets[name]
                    for budget in budgets if seed < seeds and wanted in ("", table) else ():
                        for arm in arms:
                            yield name, seed, budget, table, arm


BUDGETS = (0.5, 0.25, 0.125)
PLAN = Plan(
    seeds={"flatten CNN": 5, "ResNet-8": 5, "ResNet-20": 3, "small VGG": 3},
    budgets=BUDGETS,
    trained_budgets={"flatten CNN": BUDGETS, "ResNet-8": BUDGETS, "ResNet-20": (0.25,), "small VGG": (0.25,)},
    tables=TABLES,
)


def main() -> None:
    """Measures, or writes the tables, or says what measuring would take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="this process's share of the seeds: number/of")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "accuracy")
    parser.add_argument("--only", default="", choices=list(PLAN.tables), help="rows of one table")
    parser.add_argument("--cell", default="", help="rows of one network, seed and budget: ResNet-8/0/0.125")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--cost", action="store_true", help="only print an estimate of the CPU hours")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        print_cost(list(PLAN.rows(options.only)), PLAN.tables, PLAN.load, options.out)
        return
    if not options.table:
        rows = [key for key in PLAN.rows(options.only) if options.cell in ("", f"{key[0]}/{key[1]}/{key[2]:g}")]
        measure(PLAN, rows, options.out, *map(int, options.part.split("/")))
    write_report(options.out)


def measure(plan: Plan, rows: list[Key], out: Path, part: int = 0, parts: int = 1) -> None:
    """Measures those rows of this process's share that no ledger in the folder holds."""
    done = {tuple(row["key"]) for row in read_rows(out)}
    case: Case | None = None
    with appending(out / f"rows-{part}.jsonl") as add:
        for key in rows:
            name, seed, budget, table, arm = key
            if seed % parts != part or key in done:
                continue
            if case is None or (case.name, case.seed) != (name, seed):
                case = plan.load(name, seed, out)
            facts = measured(plan.tables[table][arm], case, budget)
            add({"key": key, **facts})
            print(*key, *(f"{name} {value}" for name, value in facts.items()), flush=True)


if __name__ == "__main__":
    main()
