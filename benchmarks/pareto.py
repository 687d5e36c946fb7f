"""How near do the search back ends come to the best trade-offs, and how fast?

    python benchmarks/pareto.py --part toy     # problems made of formulas, whose exact fronts are known
    python benchmarks/pareto.py --part real    # trained networks on Fashion-MNIST; resumes where it stopped
    python benchmarks/pareto.py --table        # results/pareto.json and the README's table of what is there

All arms have the same number of evaluations, in passes through the whole network: a part of it counts by its share,
and a seeded arm pays for the search that it starts from. Real fronts are searched on some of the validation images, and
their networks are then made and scored on others, which no search has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fashion
import moocore
import numpy as np
import torch
from ledger import appending, read_rows
from report import provenance, put_table

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pareto.json"
ARMS = {"random": (), "dp": (), "nsga2": (), "emo": (), "nsga2 from dp": ("dp",), "emo from dp": ("dp",)}
"""Each arm and the back end that it starts from, which has a third of its evaluations."""
PROBLEMS = {"separable": 0.0, "interacting": 2.0}
TOY_EVALUATIONS, TOY_SEEDS, TOY_PARTS = 1000, range(5), 6
NETWORKS = ("small VGG", "ResNet-20")
CURVE = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the evaluations at which anytime curves are read off."""


def main() -> None:
    """Measures what is missing, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="toy,real", help="toy, real or both")
    parser.add_argument("--out", type=Path, default=Path("runs/pareto"), help="folder of the rows and searches")
    parser.add_argument("--dense", type=Path, help="folder with a folder `dense` of trained networks; by default --out")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the real searches")
    parser.add_argument("--evaluations", type=int, default=100, help="of each real search")
    parser.add_argument("--samples", type=int, default=200, help="that each network is repaired with")
    parser.add_argument("--validation", type=int, default=1000, help="images that judge a network in the search")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        done = {tuple(row["key"]) for row in read_rows(options.out)}
        with appending(options.out / "rows-0.jsonl") as add:
            for key in wanted(options):
                if key not in done:
                    row = {"key": key, **(toy(*key[1:]) if key[0] == "toy" else real(key, options))}
                    print(json.dumps({name: row[name] for name in ("key", "hypervolume", "seconds")}), flush=True)
                    add(row)
    rows = read_rows(options.out)
    about = provenance("python benchmarks/pareto.py", ("pymoo", "moocore", "numpy"))
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    put_table("pareto", table(rows))


def wanted(options: argparse.Namespace) -> Iterable[tuple[Any, ...]]:
    """Keys of the rows that are asked for."""
    arms = options.arms.split(",")
    if "toy" in options.part:
        yield from (("toy", problem, arm, seed) for problem in PROBLEMS for arm in arms for seed in TOY_SEEDS)
    if "real" in options.part:
        sizes = options.evaluations, options.samples, options.validation
        for name in options.only.split(","):
            yield from (("real", name, arm, seed, *sizes) for seed in range(options.seeds) for arm in arms)


def toy(problem: str, arm: str, seed: int) -> dict[str, Any]:
    """A search of a problem made of a formula: its hypervolume over that of the exact front."""
    sys.path.insert(0, str(HERE.parent))
    from tests.support.toy import Toy

    made = Toy(PROBLEMS[problem])
    start = time.process_time()
    front, spent = None, 0
    for backend in (*ARMS[arm], arm.split()[0]):
        last = backend == arm.split()[0]
        evaluations = TOY_EVALUATIONS - spent if last else TOY_EVALUATIONS // 3
        front = made.search(backend, evaluations, seed, front, TOY_PARTS)
        spent += evaluations
    best = float(moocore.hypervolume(made.exact, ref=[1, 1]))
    share = front.hypervolume() / best
    return {"hypervolume": share, "seconds": time.process_time() - start, "evaluations": TOY_EVALUATIONS}


def real(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """A search of a trained network, and its front on images that it has not seen."""
    _, name, arm, seed, evaluations, samples, validation = key
    training, held, _ = fashion.data(seed)
    model = fashion.dense(name, seed, training, (options.dense or options.out) / "dense")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(training.images), generator=generator)[:samples]
    calibration = [(training.images[chosen], training.labels[chosen])]
    seen, unseen = (_batches(held, *span) for span in ((0, validation), (validation, len(held.images))))
    task = mp.Task(model, held.images[:1], calibration, seen)
    front, spent, forwards = None, 0, 0.0
    start = time.process_time()
    for backend in (*ARMS[arm], arm.split()[0]):
        last = backend == arm.split()[0]
        count = evaluations - spent if last else evaluations // 3
        out = options.out / "searches" / "-".join(map(str, key)).replace(" ", "_") / backend
        front = mp.explore(task, backend, ("error", "macs"), count, out=out, seed=seed, init=front, samples=samples)
        spent, forwards = spent + count, forwards + front.forwards
    seconds = time.process_time() - start
    graph = mp.trace(model, held.images[:1])
    errors = [1 - mp.evaluate(_made(graph, point.plan, calibration, seed), unseen) for point in front.points]
    points = [(error, point.objectives[1]) for error, point in zip(errors, front.points, strict=True)]
    before = evaluations - count
    return {
        "hypervolume": _volume(points),
        "on_search_data": front.hypervolume(),
        "dense_error": 1 - mp.evaluate(model, unseen),
        "points": points,
        "anytime": [_until(front, share * evaluations - before) for share in CURVE],
        "evaluations": evaluations,
        "forwards": round(forwards),
        "seconds": round(seconds, 1),
    }


def _batches(data: mp.Batches, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    spans = [(i, min(i + 250, last)) for i in range(first, last, 250)]
    return [(data.images[a:b], data.labels[a:b]) for a, b in spans]


def _made(graph: Any, plan: mp.Plan, calibration: Any, seed: int) -> torch.nn.Module:
    """The network that the search has judged."""
    return mp.reconstruct(mp.apply(graph, plan, certify=False), calibration, seed=seed).module


def _volume(points: Iterable[tuple[float, float]]) -> float:
    return float(moocore.hypervolume(np.array(list(points)), ref=[1.0, 1.0]))


def _until(front: mp.Front, spent: float) -> float:
    """Hypervolume on the search's own data by the time that so much was spent."""
    history = front.hypervolume_history()
    inside = history[history[:, 0] <= spent + 1e-9, 1]
    return float(inside[-1]) if len(inside) else 0.0


def table(rows: list[dict[str, Any]]) -> str:
    """Shares of the exact hypervolume, then hypervolumes on unseen images and over the search."""
    found = [row for row in rows if row["key"][0] == "toy"]
    lines = ["| 1,000 evaluations, % of the exact front | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    for problem in PROBLEMS:
        cells = []
        for arm in ARMS:
            shares = [100 * row["hypervolume"] for row in found if row["key"][1:3] == [problem, arm]]
            cells.append(f"{statistics.mean(shares):.1f} (least {min(shares):.1f})" if shares else "")
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    found = [row for row in rows if row["key"][0] == "real"]
    if found:
        shares = " | ".join(f"{share:.0%}" for share in CURVE)
        head = f"| network, evaluations | arm | unseen images | passes of one image | search data, by {shares} |"
        lines += ["", head, "|---" * (len(CURVE) + 4) + "|"]
    for row in found:
        _, name, arm, seed, evaluations, *_ = row["key"]
        curve = " | ".join(f"{value:.3f}" if value else "" for value in row["anytime"])
        title = f"{name}, {evaluations}, seed {seed}"
        lines.append(f"| {title} | {arm} | {row['hypervolume']:.4f} | {row['forwards']:,} | {curve} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
