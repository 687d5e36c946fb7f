"""A thousand certified prunes in one process: does memory grow?

    python benchmarks/soak.py --prunes 1000 --out benchmarks/results/soak.json

Eight hand-written networks in turn, each fifth one a random network never seen before. Exit code 1 if resident memory
grows by more than 5 % after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMIT = 0.05


def main() -> int:
    """Runs the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prunes", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json")
    options = parser.parse_args()
    from tests.support.soak import growth, soak

    torch.set_num_threads(1)
    start, samples = time.process_time(), []
    for found in soak(options.prunes, options.every):
        samples.append(found)
        print(f"{found.prunes:5d} prunes  {found.resident / 2**20:8.1f} MiB  {found.objects} objects", flush=True)
    rise = growth(samples, options.warm_up)
    result = {
        "torch": torch.__version__,
        "prunes": options.prunes,
        "warm_up": options.warm_up,
        "growth_percent": round(100 * rise, 2),
        "cpu_seconds": round(time.process_time() - start, 1),
        "samples": [asdict(s) for s in samples],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"growth after {options.warm_up} prunes: {100 * rise:.2f} %")
    return int(rise > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
