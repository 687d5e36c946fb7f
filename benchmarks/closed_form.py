"""Zero training steps on many small networks, each of another architecture: is the closed form better, and always?

Every arm has the same 500 unlabelled images; the fit by least squares is the same for all that have it.

    python benchmarks/closed_form.py --part 0/2     # half of the networks; goes on where it was stopped
    python benchmarks/closed_form.py --part 1/2
    python benchmarks/closed_form.py --table        # results/closed_form.json and the README's table
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import small
import torch
from accuracy import BUDGETS
from accuracy_arms import CLOSED_FORM, REFINED, ZERO_STEPS, measured
from accuracy_case import case_of
from ledger import appending, read_rows
from report import provenance, put_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "closed_form.json"
SEEDS = range(24, 48)  # those below 24 were looked at while the default was chosen
ARMS = (
    "L2 over mean",
    "L2 over mean + least squares",
    "L2, uniform + least squares",
    "OBSPA + least squares",
    "Fisher, cost + least squares",
    "block Fisher, cost + least squares",
    CLOSED_FORM,
    REFINED,
)
OURS = (CLOSED_FORM, REFINED)
RIVALS = ARMS[1:4]


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="this process's share of the networks: number/of")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "closed_form")
    parser.add_argument("--seeds", default=f"{SEEDS.start}-{SEEDS.stop}", help="networks: first-behind the last")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(*map(int, options.seeds.split("-")))
    if not options.table:
        _measure(options.out, seeds, *map(int, options.part.split("/")))
    rows = [row for row in read_rows(options.out) if row["key"][0] in seeds]
    rows.sort(key=lambda row: [str(part) for part in row["key"]])
    if len(rows) == len(seeds) * len(BUDGETS) * len(ARMS):
        text = table(rows)
        print(text)
        if seeds == SEEDS:
            about = provenance("python benchmarks/closed_form.py")
            RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            put_table("closed-form", text)


def _measure(out: Path, seeds: range, part: int, parts: int) -> None:
    done = {tuple(row["key"]) for row in read_rows(out)}
    with appending(out / f"rows-{part}.jsonl") as add:
        for seed in seeds[part::parts]:
            wanted = [(seed, budget, arm) for budget in BUDGETS for arm in ARMS if (seed, budget, arm) not in done]
            if not wanted:
                continue
            train, test = small.data(seed)
            case = case_of("small", seed, small.dense(seed, train, out / "dense"), train, test)
            about = {"family": small.FAMILIES[seed % len(small.FAMILIES)], "dense_params": case.graph.cost().params}
            for key in wanted:
                facts = measured(ZERO_STEPS[key[2]], case, key[1])
                add({"key": key, **about, **facts})
                print(*key, f"{facts['score']:.4f}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the networks, and how our own arms do against each rival network by network."""
    scores: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed, budget, arm = row["key"]
        scores[budget, arm][seed] = 100 * row["score"]
    dense = {row["key"][0]: 100 * row["dense"] for row in rows}
    lines = [
        "| accuracy, no training steps | " + " | ".join(f"MACs {b:g}" for b in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for arm in ARMS:
        means = [statistics.mean(scores[budget, arm].values()) for budget in BUDGETS]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    lines += ["", f"{len(dense)} networks, dense {statistics.mean(dense.values()):.1f}."]
    for own in OURS:
        spent = [row for row in rows if row["key"][2] == own]
        seconds = sum(row["cpu_seconds"] for row in spent) / sum(row["dense_params"] for row in spent)
        lines += ["", f"{own}, {1e5 * seconds:.1f} CPU seconds per 100,000 parameters, against:", ""]
        lines += ["| difference ± standard error (worst network) |" + lines[0].split("|", 2)[2], lines[1]]
        for rival in RIVALS:
            cells = []
            for budget in BUDGETS:
                gaps = [scores[budget, own][seed] - value for seed, value in scores[budget, rival].items()]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5
                cells.append(f"{statistics.mean(gaps):+.1f} ± {error:.1f} ({min(gaps):+.1f})")
            lines.append(f"| {rival} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
