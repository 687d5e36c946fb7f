"""Mutation test of the certificate: every mutant of correct cuts of eight networks, and how many it notices.

    python benchmarks/mutation.py --out benchmarks/results/mutation.json

A mutant is `caught` (the certificate fails), an `error` (it does not run), `equivalent` (an oracle of its own finds it
equal to the masked original) or `missed`. Exit code 1 if one was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUTCOMES = ("caught", "error", "equivalent", "missed")


def main() -> int:
    """Judges all mutants; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="cuts per network")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    options = parser.parse_args()
    from tests.support.mutation import Patient
    from tests.support.patients import PATIENTS, admit

    torch.set_num_threads(1)
    start = time.process_time()
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    by_network: dict[str, Counter[str]] = defaultdict(Counter)
    missed: list[dict[str, Any]] = []
    for name in PATIENTS:
        for seed in range(2, 2 + options.seeds):
            patient = Patient(*admit(name, seed), seed=seed)
            if not patient.is_certified():
                raise SystemExit(f"{name}: the correct cut itself is not certified")
            for mutant in patient.mutants():
                verdict = patient.judge(mutant)
                by_kind[mutant.kind][verdict.outcome] += 1
                by_network[name][verdict.outcome] += 1
                if verdict.outcome == "missed":
                    where = {"network": name, "seed": seed, "kind": mutant.kind, "where": mutant.where}
                    missed.append(where | {"error": verdict.error, "stated": mutant.kept is not None})
    total = sum(by_kind.values(), Counter())
    wrong = total["caught"] + total["error"] + total["missed"]
    result = {
        "torch": torch.__version__,
        "mutants": sum(total.values()),
        "not_equivalent": wrong,
        "caught_percent": round(100 * (wrong - total["missed"]) / wrong, 2),
        "caught_among_those_that_run_percent": round(100 * total["caught"] / (total["caught"] + total["missed"]), 2),
        "total": {key: total[key] for key in OUTCOMES},
        "by_kind": {kind: {key: counts[key] for key in OUTCOMES} for kind, counts in sorted(by_kind.items())},
        "by_network": {name: {key: counts[key] for key in OUTCOMES} for name, counts in by_network.items()},
        "missed": missed[:100],
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':36s}" + "".join(f"{key:>12s}" for key in OUTCOMES))
    for kind, counts in sorted(by_kind.items()):
        print(f"{kind:36s}" + "".join(f"{counts[key]:12d}" for key in OUTCOMES))
    for entry in missed:
        print("MISSED", entry)
    print({key: value for key, value in result.items() if not isinstance(value, (dict, list))})
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
