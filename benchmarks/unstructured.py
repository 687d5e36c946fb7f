"""Unstructured pruning of small trained networks: layer-adaptive knapsack against rules that look at weights alone.

Every arm has the same trained networks (`small.py`) and the same 64 unlabelled images. Zero training steps: weights go
at once, and the statistics of batch norms are taken anew. Trained: weights go at once or in equal factors, and so many
epochs in all are trained around the zeros, as many after each part. The test images choose nothing.

    python benchmarks/unstructured.py               # goes on where it was stopped
    python benchmarks/unstructured.py --table       # results/unstructured.json of what is there
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import fashion
import small
import torch
from ledger import appending, read_rows
from report import provenance
from torch import Tensor, nn

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "unstructured.json"
SEEDS = range(24, 28)  # one of each family
SAMPLES = 64
FINAL = 0.95
SPARSITIES = (0.5, 0.8, FINAL)
LEVELS = 51
EPOCHS = 2
PARTS = {"no training": 0, "at once, trained": 1, "in 2 parts, trained": 2}
ARMS: dict[str, dict[str, Any]] = {
    "dp, worst image": {"method": "dp"},
    "dp, mean": {"method": "dp", "worst_case": False},
    "global": {"method": "global"},
    "LAMP": {"method": "lamp"},
    "ERK": {"method": "erk"},
    "uniform": {"method": "uniform"},
}


def main() -> None:
    """Measures, or writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "unstructured")
    parser.add_argument("--seeds", default=f"{SEEDS.start}-{SEEDS.stop}", help="networks: first-behind the last")
    parser.add_argument("--table", action="store_true", help="only write the results of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(*map(int, options.seeds.split("-")))
    if not options.table:
        _measure(options.out, seeds)
    rows = sorted(read_rows(options.out), key=lambda row: [str(part) for part in row["key"]])
    print(table(rows))
    about = provenance("python benchmarks/unstructured.py")
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _measure(out: Path, seeds: range) -> None:
    done = {tuple(row["key"]) for row in read_rows(out)}
    with appending(out / "rows-0.jsonl") as add:
        for seed in seeds:
            train, test = small.data(seed)
            model = small.dense(seed, train, out / "dense")
            plain = replace(train, augment=None, size=SAMPLES, generator=torch.Generator().manual_seed(seed))
            data = [next(iter(plain))]
            about = {"family": small.FAMILIES[seed % len(small.FAMILIES)], "dense": mp.evaluate(model, test)}
            for mode, parts in PARTS.items():
                for sparsity in (FINAL,) if parts else SPARSITIES:
                    for arm, options in ARMS.items():
                        key = (seed, mode, sparsity, arm)
                        if key in done:
                            continue
                        start = time.process_time()
                        sparse = _pruned(model, train, data, sparsity, parts, seed, options)
                        seconds = time.process_time() - start
                        facts = {
                            "score": mp.evaluate(sparse.module, test),
                            "sparsity": sparse.sparsity,
                            "distortion": sparse.distortion,
                            "predicted": sparse.provenance.get("predicted"),
                            "optimal": sparse.provenance.get("optimal"),
                            "density": sparse.density,
                            "cpu_seconds": seconds,
                        }
                        add({"key": key, **about, **facts})
                        print(*key, f"{facts['score']:.4f}", f"{seconds:.1f} s", flush=True)


def _pruned(
    model: nn.Module,
    train: mp.Batches,
    data: list[tuple[Tensor, Tensor]],
    sparsity: float,
    parts: int,
    seed: int,
    options: dict[str, Any],
) -> mp.Sparse:
    """The sparse network: recalibrated without training (`parts` 0), else trained after each part of the pruning."""
    for part in range(1, max(1, parts) + 1):
        reached = 1 - (1 - sparsity) ** (part / max(1, parts))
        sparse = mp.sparsify(model, data[0][0][:2], reached, data=data, levels=LEVELS, seed=seed, **options)
        if parts:
            with sparse.held() as module:
                recipe = mp.Settings(epochs=EPOCHS // parts, lr=0.05)
                mp.train(module, train, fashion.objective, recipe, seed)
        else:
            mp.recalibrate(sparse.module, data)
        model = sparse.module.eval()
    return sparse


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracies over the networks, and the mean distortion that pruning made before any repair."""
    scores: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for row in rows:
        _, mode, sparsity, arm = row["key"]
        scores[mode, sparsity, arm].append(100 * row["score"])
    columns = list(
        dict.fromkeys((mode, s) for mode, parts in PARTS.items() for s in ((FINAL,) if parts else SPARSITIES))
    )
    lines = [
        "| accuracy | " + " | ".join(f"{mode}, {s:g}" for mode, s in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm in ARMS:
        cells = [scores.get((mode, s, arm)) for mode, s in columns]
        lines.append(f"| {arm} | " + " | ".join(f"{statistics.mean(c):.1f}" if c else "" for c in cells) + " |")
    dense = {row["key"][0]: 100 * row["dense"] for row in rows}
    counts = sorted({len(found) for found in scores.values()})
    return "\n".join([*lines, "", f"dense {statistics.mean(dense.values()):.1f}; networks per cell {counts}"])


if __name__ == "__main__":
    main()
