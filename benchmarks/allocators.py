"""The same ranking of units under every allocator: which says best how many units each group keeps?

Every arm ranks units by block Fisher and fits the weights that remain by least squares on the same 500 unlabelled
images; only the kept counts differ. Beside the scores stands how far sums over single groups can be trusted: Kendall's
tau between them and the joint loss of random plans, and the tau of the joint loss with itself on other samples.

    python benchmarks/allocators.py --part 0/2     # half of the rows; goes on where it was stopped
    python benchmarks/allocators.py --part 1/2
    python benchmarks/allocators.py --table        # results/allocators.json and the README's table
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accuracy import Plan, measure
from accuracy_arms import Trained, handed_back
from accuracy_case import Arm, Case, Made, load
from ledger import read_rows
from report import provenance, put_table

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "allocators.json"
DENSE = HERE.parent / "runs" / "accuracy"
RANKING = "fisher_block"
FITTED = "fitted"


def _allocated(allocator: str, curves: str | None = None) -> Arm:
    """Counts of an allocator, of a kind of curve where one is named, and units by the one ranking."""

    def arm(case: Case, budget: float) -> Made:
        data = case.calibration
        key = f"plan {allocator} {curves} {budget}"
        if key not in case.shared:
            case.shared[key] = planned(case, budget)
        return handed_back(mp.reconstruct(mp.apply(case.graph, case.shared[key]), data, seed=case.seed))

    def planned(case: Case, budget: float) -> mp.Plan:
        data = case.calibration
        if curves is None:
            return mp.plan(case.graph, f"macs={budget}", RANKING, allocator, data, seed=case.seed)
        judged = data if allocator == "spdy" else None
        return mp.plan(case.graph, f"macs={budget}", sensitivity(case, curves), allocator, judged, seed=case.seed)

    return arm


def sensitivity(case: Case, curves: str) -> mp.Sensitivity:
    """Curves of a case, found once; those that are fitted are measured with the layers that read a group refitted."""
    key = f"sensitivity {curves}"
    if key not in case.shared:
        fitted = curves == FITTED
        case.shared[key] = mp.sensitivity(
            case.graph,
            case.calibration,
            RANKING,
            method="anchored" if fitted else curves,
            compensate=fitted,
            seed=case.seed,
        )
    found: mp.Sensitivity = case.shared[key]
    return found


ARMS: dict[str, Arm] = {
    "random": _allocated("random"),
    "uniform": _allocated("uniform"),
    "global": _allocated("global"),
    "ERK": _allocated("erk"),
    "LAMP": _allocated("lamp"),
    "PreCrop": _allocated("precrop"),
    "cost": _allocated("cost"),
    "dp, scores": _allocated("dp"),
    "dp, one-pass curves": _allocated("dp", "one_pass"),
    "dp, measured curves": _allocated("dp", "measured"),
    "dp, fitted curves": _allocated("dp", FITTED),
    "spdy, one-pass curves": _allocated("spdy", "one_pass"),
    "refined": _allocated("refined"),
}
OWN, RIVALS = ("dp, fitted curves", "spdy, one-pass curves"), ("uniform", "global")
RECOVERED = (*RIVALS, *OWN)
BUDGETS = (0.5, 0.25, 0.125)
PLAN = Plan(
    seeds={"ResNet-20": 5, "small VGG": 5},
    budgets=BUDGETS,
    trained_budgets={"ResNet-20": BUDGETS, "small VGG": BUDGETS},
    tables={"none": ARMS, "equal FLOPs": {arm: Trained(ARMS[arm]) for arm in RECOVERED}},
    load=lambda name, seed, out: load(name, seed, DENSE),
)


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="this process's share of the seeds: number/of")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "allocators")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = list(PLAN.rows())
    if not options.table:
        measure(PLAN, keys, options.out, *map(int, options.part.split("/")))
        return
    rows = [row for row in read_rows(options.out) if tuple(row["key"]) in set(keys)]
    there = sorted({tuple(row["key"][:2]) for row in rows})
    trust = [trusted(name, seed, method) for name, seed in there for method in METHODS]
    about = provenance("python benchmarks/allocators.py", ("scipy", "pymoo"))
    RESULTS.write_text(json.dumps({**about, "rows": rows, "trust": trust}, indent=1) + "\n")
    put_table("allocators", table(rows, trust))


METHODS = ("one_pass", "measured", FITTED)


def trusted(name: str, seed: int, method: str) -> dict[str, Any]:
    """How far the sums of a kind of curve agree with the joint loss."""
    case = load(name, seed, DENSE)
    found = mp.additivity(case.graph, sensitivity(case, method), case.calibration, seed=seed)
    facts = {key: getattr(found, key) for key in ("kind", "ratio", "tau", "ceiling")}
    return {"network": name, "seed": seed, "method": method, **facts}


HEADINGS = {"none": "accuracy, no training steps", "equal FLOPs": "accuracy, after training of equal FLOPs"}


def table(rows: list[dict[str, Any]], trust: list[dict[str, Any]]) -> str:
    """Mean scores of each network and budget, and how far sums can be trusted."""
    lines = []
    for kind, arms in PLAN.tables.items():
        lines += scores_table(HEADINGS[kind], list(arms), [row for row in rows if row["key"][3] == kind])
    for method in METHODS:
        own = [t for t in trust if t["method"] == method]
        tau, ceiling, ratio = (statistics.mean(t[key] for t in own) for key in ("tau", "ceiling", "ratio"))
        lines.append(
            f"Sums of {method.replace('_', '-')} curves against the joint loss of 20 random plans: tau {tau:.2f} "
            f"(ceiling {ceiling:.2f}), joint loss over sum {ratio:.2f}."
        )
    return "\n".join(lines) + "\n"


def scores_table(heading: str, arms: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """One row for each arm, one column for each network and budget, over the seeds that have every arm.

    Below stand paired differences, with their standard errors.
    """
    scores: dict[tuple[str, int, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        name, seed, budget, _, arm = row["key"]
        scores[name, seed, budget][arm] = 100 * row["score"]
    cells = [(name, budget) for name in PLAN.seeds for budget in BUDGETS]
    full = {
        (name, budget): [own for (n, _, b), own in scores.items() if (n, b) == (name, budget) and len(own) == len(arms)]
        for name, budget in cells
    }
    lines = [f"| {heading} | " + " | ".join(f"{name}, MACs {b:g}" for name, b in cells) + " |"]
    lines.append("|---" * (len(cells) + 1) + "|")
    for arm in arms:
        means = [f"{statistics.mean(own[arm] for own in full[cell]):.1f}" if full[cell] else "-" for cell in cells]
        lines.append(f"| {arm} | " + " | ".join(means) + " |")
    for own, other in product(OWN, RIVALS):
        gaps = [[found[own] - found[other] for found in full[cell]] for cell in cells]
        lines.append(f"| *{own}* over *{other}* | " + " | ".join(map(_with_error, gaps)) + " |")
    return [*lines, "| seeds | " + " | ".join(str(len(full[cell])) for cell in cells) + " |", ""]


def _with_error(gaps: list[float]) -> str:
    """Mean and standard error."""
    if not gaps:
        return "-"
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.1f}{error}"


if __name__ == "__main__":
    main()
