"""How good, and how fast, are the allocators that work on curves, on the costs of large networks?

    python benchmarks/allocation.py            # results/allocation.json and the README's table
    python benchmarks/allocation.py --table    # only the table, from the JSON

Weights are random and so are the curves, convex ones of random height and steepness for each group. Times are CPU
seconds of one thread, for a plan from curves that are there, without tracing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import provenance, put_table

import metaprune as mp

RESULTS = Path(__file__).resolve().parent / "results" / "allocation.json"
NETWORKS = ("resnet50", "vit_b_16", "mobilenet_v2", "densenet121")
ALLOCATORS = ("dp", "milp", "lagrange", "uniform")
BUDGETS = ("macs=0.5", "macs=0.5,params=0.4,bytes=0.7")
FRONT = np.linspace(0.1, 0.95, 40)


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        rows = [row for name in options.only.split(",") for row in measured(name)]
        if options.only.split(",") != list(NETWORKS):
            return
        about = provenance("python benchmarks/allocation.py", ("scipy", "numpy"))
        RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    put_table("allocation", table(json.loads(RESULTS.read_text())["rows"]))


def measured(name: str) -> list[dict[str, Any]]:
    """One row for each allocator and budget, and one for the whole front."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    graph = mp.trace(model, torch.randn(1, 3, 224, 224))
    curves = synthetic(graph)
    mp.plan(graph, "macs=0.9", curves, allocator="uniform")  # cost polynomials are made once
    rows = []
    for budget in BUDGETS:
        for allocator in ALLOCATORS:
            start = time.process_time()
            plan = mp.plan(graph, budget, curves, allocator=allocator)
            seconds = time.process_time() - start
            row = {"network": name, "groups": len(curves.order), "budget": budget, "allocator": allocator}
            solver = plan.provenance.get("solver", {})
            row |= {"reached": dict(plan.reached), "seconds": round(seconds, 3), "gap": solver.get("gap")}
            row |= {"harm": harm(graph, curves, plan), "by": solver.get("by")}
            rows.append(row)
            print(json.dumps(row), flush=True)
    start = time.process_time()
    for share in FRONT:
        mp.plan(graph, f"macs={share}", curves, allocator="lagrange")
    seconds = round(time.process_time() - start, 2)
    rows.append({"network": name, "budget": "front", "allocator": "lagrange", "seconds": seconds})
    print(name, "front", seconds, flush=True)
    return rows


def synthetic(graph: Any) -> mp.Sensitivity:
    """Random curves: a height times a power, from 1 to 4, of the share of units that go."""
    by_weights = mp.sensitivity(graph)
    draw = np.random.default_rng(0)
    curves = {}
    for name, order in by_weights.order.items():
        share = 1 - np.arange(len(order) + 1) / len(order)
        curves[name] = draw.gamma(1.5) * share ** draw.uniform(1, 4)
    return dataclasses.replace(by_weights, curves={"synthetic": curves})


def harm(graph: Any, curves: mp.Sensitivity, plan: mp.Plan) -> float:
    """Summed harm of a plan."""
    return float(sum(curve[len(plan.keep[name])] for name, curve in curves.of().items() if name in plan.keep))


def table(rows: list[dict[str, Any]]) -> str:
    """Harm over that of the best, seconds and gap."""
    lines = [
        "| MACs 0.5 of | groups | " + " | ".join(ALLOCATORS) + " | 40 budgets |",
        "|---" * (len(ALLOCATORS) + 3) + "|",
    ]
    for budget in BUDGETS:
        if budget != BUDGETS[0]:
            title = budget.replace("=", " ").replace(",", ", ")
            lines.append(f"| *{title}* |" + " |" * (len(ALLOCATORS) + 2))
        for name in dict.fromkeys(row["network"] for row in rows):
            own = {row["allocator"]: row for row in rows if (row["network"], row["budget"]) == (name, budget)}
            best = min(row["harm"] for row in own.values())
            cells = [_cell(own[allocator], best) for allocator in ALLOCATORS]
            front = next(row for row in rows if (row["network"], row["budget"]) == (name, "front"))
            seconds = f"{front['seconds']:.1f} s" if budget == BUDGETS[0] else ""
            lines.append(f"| {name} | {own['dp']['groups']} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], best: float) -> str:
    gap = row["gap"]
    proof = "" if row["by"] is None else ", proven" if gap == 0 else ", gap ?" if gap is None else f", gap {gap:.1%}"
    return f"{row['harm'] / best:.3f} ({row['seconds']:.2f} s{proof})"


if __name__ == "__main__":
    main()
