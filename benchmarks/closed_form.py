"""Zero training steps on many small networks, each of another architecture: is the closed form better, and always?

python benchmarks/closed_form.py --part 0/2     # half of the networks; goes on where it was stopped
python benchmarks/closed_form.py --part 1/2
python benchmarks/closed_form.py --table        # results/closed_form.json and the README's table
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import small
import torch
from report import provenance, put_table

import metaprune as mp

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
    "closed form (default)",
)
DEFAULT = ARMS[-1]
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
    rows = [row for path in sorted(options.out.glob("rows-*.jsonl")) for row in accuracy.read_rows(path)]
    rows = sorted((row for row in rows if row["key"][0] in seeds), key=lambda row: [str(part) for part in row["key"]])
    if len(rows) == len(seeds) * len(accuracy.BUDGETS) * len(ARMS):
        text = table(rows)
        print(text)
        if seeds == SEEDS:
            about = provenance("python benchmarks/closed_form.py")
            RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            put_table("closed-form", text)


def _measure(out: Path, seeds: range, part: int, parts: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    done = {tuple(row["key"]) for path in out.glob("rows-*.jsonl") for row in accuracy.read_rows(path)}
    with (out / f"rows-{part}.jsonl").open("a") as ledger:
        for seed in seeds[part::parts]:
            case = None
            for budget in accuracy.BUDGETS:
                for arm in ARMS:
                    key = (seed, budget, arm)
                    if key in done:
                        continue
                    case = case or _case(seed, out)
                    start = time.process_time()
                    module, macs, params = accuracy.WITHOUT_TRAINING[arm](case, budget)
                    spent = time.process_time() - start
                    row = {
                        "key": key,
                        "family": small.FAMILIES[seed % len(small.FAMILIES)],
                        "score": mp.evaluate(module, case.test),
                        "dense": mp.evaluate(case.model, case.test),
                        "macs": macs / case.macs,
                        "params": params / case.graph.cost().params,
                        "dense_params": case.graph.cost().params,
                        "cpu_seconds": round(spent, 3),
                    }
                    ledger.write(json.dumps(row) + "\n")
                    ledger.flush()
                    os.fsync(ledger.fileno())
                    print(*key, f"{row['score']:.4f}", flush=True)


def _case(seed: int, out: Path) -> accuracy.Case:
    train, test = small.data(seed)
    model = small.dense(seed, train, out / "dense")
    plain = replace(train, augment=None, size=100, generator=torch.Generator().manual_seed(seed))
    calibration = [batch for batch, _ in zip(plain, range(accuracy.SAMPLES // 100), strict=False)]
    return accuracy.Case("small", seed, model, mp.trace(model, test.images[:1]), train, test, calibration)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the networks, and how the default does against each rival network by network."""
    scores: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed, budget, arm = row["key"]
        scores[budget, arm][seed] = 100 * row["score"]
    dense = {row["key"][0]: 100 * row["dense"] for row in rows}
    lines = [
        "| accuracy, no training steps | " + " | ".join(f"MACs {b:g}" for b in accuracy.BUDGETS) + " |",
        "|---" * (len(accuracy.BUDGETS) + 1) + "|",
    ]
    for arm in ARMS:
        means = [statistics.mean(scores[budget, arm].values()) for budget in accuracy.BUDGETS]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    lines += ["", f"{len(dense)} networks, dense {statistics.mean(dense.values()):.1f}. The default against:", ""]
    lines += ["| difference ± standard error (worst network) |" + lines[0].split("|", 2)[2], lines[1]]
    for rival in RIVALS:
        cells = []
        for budget in accuracy.BUDGETS:
            gaps = [scores[budget, DEFAULT][seed] - value for seed, value in scores[budget, rival].items()]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            cells.append(f"{statistics.mean(gaps):+.1f} ± {error:.1f} ({min(gaps):+.1f})")
        lines.append(f"| {rival} | " + " | ".join(cells) + " |")
    spent = [row for row in rows if row["key"][2] == DEFAULT]
    seconds = sum(row["cpu_seconds"] for row in spent) / sum(row["dense_params"] for row in spent)
    return "\n".join([*lines, "", f"The default took {1e5 * seconds:.1f} CPU seconds per 100,000 parameters.", ""])


if __name__ == "__main__":
    main()
