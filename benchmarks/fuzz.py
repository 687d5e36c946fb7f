"""Fuzz campaign: random networks pruned by random plans, each judged by an oracle of its own.

    python benchmarks/fuzz.py --cases 5000 --seed 0 --out benchmarks/results/fuzz.json

Case `i` of seed `s` is the same network on every machine. The file is written every 50 cases and a second call goes on
where the first one stopped, unless the engine has changed since. Exit code 1 if an answer was wrong, an exception had
no name, or over 2 % were refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Runs the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuzz.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    state = resumed(options.out, options.seed)
    start = time.process_time() - state["cpu_seconds"]
    for case in range(state["done"], options.cases):
        step(state, case, options.seed * 1_000_000 + case)
        if (case + 1) % 50 == 0 or case + 1 == options.cases:
            state["cpu_seconds"] = round(time.process_time() - start, 1)
            save(options.out, state)
            print(f"{case + 1:6d} {state['verdicts']}", flush=True)
    counts = Counter(state["verdicts"])
    print(json.dumps(summary(state), indent=1))
    wrong = counts["silent"] + counts["miscounted"] + counts["crash"]
    return int(wrong > 0 or counts["refused"] > 0.02 * state["done"])


def step(state: dict[str, Any], case: int, seed: int) -> None:
    """Runs one case into the tallies."""
    from tests.support.random_cases import draw, examine
    from tests.support.random_networks import describe

    program = draw(seed)
    outcome = examine(program)
    state["done"] = case + 1
    for table, key in (("verdicts", outcome.verdict), ("kinds", outcome.kind or "none"), ("starts", program.start)):
        state[table][key] = state[table].get(key, 0) + 1
    if outcome.verdict == "exact":
        state["removed"] += outcome.removed
        state["cut"] += outcome.removed > 0
        state["telling"] += outcome.removed > 0 and outcome.change > 1e-6
        state["operators"] += outcome.nodes
    if outcome.verdict != "exact" or outcome.detail:
        from tests.support.random_networks import build

        steps = describe(build(program)[2]).splitlines()
        failure = {
            "seed": seed,
            "verdict": outcome.verdict,
            "detail": outcome.detail,
            "program": repr(program),
            "steps": steps,
        }
        state["failures"] = [*state["failures"], failure][:200]
        print(f"{seed} {outcome.verdict}: {outcome.detail}", flush=True)


def identity(seed: int) -> dict[str, Any]:
    """What a campaign is about: its seed, torch, and the sources of the engine."""
    digest = hashlib.sha256()
    for folder in ("graphs", "search", "metaprune"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return {"seed": seed, "torch": torch.__version__, "engine": digest.hexdigest()[:16]}


def resumed(path: Path, seed: int) -> dict[str, Any]:
    """The tallies of an earlier run with this seed, or new ones."""
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        if all(state.get(key) == value for key, value in identity(seed).items()):
            return state
    return identity(seed) | {
        "done": 0,
        "verdicts": {},
        "kinds": {},
        "starts": {},
        "cut": 0,
        "telling": 0,
        "removed": 0.0,
        "operators": 0,
        "cpu_seconds": 0.0,
        "failures": [],
    }


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes the tallies in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state | {"summary": summary(state)}, indent=1) + "\n")
    part.replace(path)


def summary(state: dict[str, Any]) -> dict[str, float]:
    """Rates for people."""
    exact = max(1, state["verdicts"].get("exact", 0))
    return {
        "refused_percent": round(100 * state["verdicts"].get("refused", 0) / max(1, state["done"]), 2),
        "cut_percent": round(100 * state["cut"] / exact, 1),
        "telling_percent": round(100 * state["telling"] / exact, 1),
        "mean_parameters_removed_percent": round(100 * state["removed"] / exact, 1),
        "mean_operators": round(state["operators"] / exact, 1),
        "cpu_seconds_per_case": round(state["cpu_seconds"] / max(1, state["done"]), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
