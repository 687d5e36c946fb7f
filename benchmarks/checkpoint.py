"""Fits the checkpoint that comes with metaprune on a zoo, and writes it with its card to checkpoints/.

    python benchmarks/checkpoint.py ZOO [--work runs/fit]

The zoo is what `metaprune zoo build` writes. A fit that was stopped goes on when it is called again with the same work
folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import metaprune as mp

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def main() -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", type=Path, help="folder of a zoo")
    parser.add_argument("--work", type=Path, help="folder of the fit, to go on from")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder that the two files are written to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pruner = mp.fit(mp.Zoo.open(arguments.zoo), out=arguments.work, seed=arguments.seed)
    file = arguments.out / "default.safetensors"
    pruner.save(file, file.with_suffix(".json"))
    print(json.dumps(pruner.card["validation"]["data"]["curves"]["compensated"], indent=2))
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
