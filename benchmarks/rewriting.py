"""Pruning without any data, and what rewriting the weights that stay is worth: the same masks, rewritten and not.

Some families of a zoo are left out of the fit, and their trained networks are pruned by what was fitted on the others,
from their weights alone. Nothing is trained or measured after the cut.

    metaprune zoo build --out runs/zoo --networks 72 --data fashion-mnist --processes 2
    python benchmarks/rewriting.py --zoo runs/zoo              # goes on where stopped
    python benchmarks/rewriting.py --zoo runs/zoo --table      # results/rewriting.json, README

The fit may be shared by several processes, to the same result; they write to the same folder:

    torchrun --nproc-per-node 2 -m metaprune fit runs/zoo --heads curves,rewrite --work runs/fit --out x.safetensors
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ledger import appending, read_rows
from metanet import NORMAL, UNSEEN, Seen, unseen
from report import provenance, put_table
from torch import Tensor

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "rewriting.json"
BUDGETS = (0.5, 0.25, 0.125)
FULL = mp.RewriteCourse(masks=6, steps=1000, every=100, rate=1e-3)
DESIGNS = {
    "rewriting head on the refit": FULL,
    "rewriting head on the refit, vectors alone": replace(FULL, ratio=1e-3, vector_ratio=0.3),
    "rewriting head on the network as it was": replace(FULL, refit=False, ratio=0.3, vector_ratio=1.0),
}
MASKS, REFIT, DATA = "masked, nothing else", "refit without data", "least squares on 512 images"
FIRST, *OTHERS = DESIGNS


class Networks(Seen):
    """The members of a zoo that a fit may see, opened by name."""

    def __init__(self, zoo: mp.Zoo) -> None:
        super().__init__(zoo)
        self.member = zoo.member


def fitted(zoo: mp.Zoo, design: str, out: Path, seed: int) -> mp.MetaPruner:
    """A pruner that has not seen the families it is judged on; kept in a file."""
    number = list(DESIGNS).index(design)
    path = out / f"pruner-{number}.safetensors"
    if not path.exists():
        folder, first = (out / f"fit-{i}" for i in (number, 0))
        if number:  # all but the rewriting head is the same
            shutil.copytree(first, folder, ignore=shutil.ignore_patterns("rewrite"), dirs_exist_ok=True)
        mp.fit(Networks(zoo), ("curves", "rewrite"), folder, seed, rewriting=DESIGNS[design]).save(path)
    return mp.MetaPruner.load(path)


def outputs(module: Callable[[Tensor], Tensor], batches: mp.Batches) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a network on all samples, and the labels."""
    with torch.no_grad():
        pairs = [(module(images).log_softmax(1), labels) for images, labels in batches]
    return torch.cat([own for own, _ in pairs]), torch.cat([labels for _, labels in pairs])


def measure(zoo: mp.Zoo, pruners: dict[str, mp.MetaPruner], out: Path) -> None:
    """Prunes every network in every arm and at every budget."""
    done = {tuple(row["key"]) for row in read_rows(out)}
    arms = (MASKS, REFIT, DATA, *pruners)
    with appending(out / "rows-0.jsonl") as add:
        for name in unseen(zoo):
            if done.issuperset((name, budget, arm) for budget in BUDGETS for arm in arms):
                continue
            member = zoo.member(name)
            graph = mp.trace(member.task.model, member.task.inputs)
            encoded = pruners[FIRST].encode(graph)
            dense, labels = outputs(member.task.model, member.task.val)
            for budget in BUDGETS:
                plan = pruners[FIRST].plan(encoded, f"macs={budget}")
                for arm in arms:
                    if (name, budget, arm) in done:
                        continue
                    began = time.process_time()
                    module = pruned_by(arm, pruners, graph, plan, member)
                    seconds = time.process_time() - began
                    found, _ = outputs(module, member.task.val)
                    facts = {
                        "accuracy": float((found.argmax(1) == labels).double().mean()),
                        "dense": float((dense.argmax(1) == labels).double().mean()),
                        "kl": float(F.kl_div(found, dense, log_target=True, reduction="batchmean")),
                        "macs": plan.reached["macs"],
                        "seconds": round(seconds, 3),
                    }
                    add({"key": (name, budget, arm), "family": zoo.facts[name]["family"], **facts})
                    print(name, budget, arm, f"{facts['accuracy']:.3f} {facts['kl']:.3f}", flush=True)


def pruned_by(arm: str, pruners: dict[str, mp.MetaPruner], graph: Any, plan: mp.Plan, member: Any) -> Any:
    """The module that an arm makes of a network and a plan."""
    if arm == REFIT:
        return mp.apply(graph.with_values(mp.refit_without_data(graph, plan)), plan).module
    if arm in pruners:
        head = pruners[arm].rewriter
        assert head is not None
        return mp.apply(graph.with_values(head.rewritten(graph, plan)), plan).module
    pruned = mp.apply(graph, plan)
    return pruned.module if arm == MASKS else mp.reconstruct(pruned, member.calibration).module


def table(rows: list[dict[str, Any]], cards: dict[str, dict[str, Any]]) -> str:
    """Mean accuracy and divergence, and paired differences to the masks alone with intervals of 90 %."""
    found: dict[tuple[float, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        name, budget, arm = row["key"]
        found[budget, arm][name] = row
    arms = (MASKS, REFIT, *cards, DATA)
    whole = sorted(set.intersection(*(set(found[budget, arm]) for budget in BUDGETS for arm in arms)))
    heads = " | ".join(f"MACs {budget:g}" for budget in BUDGETS)
    lines = [f"| accuracy (KL to the dense network in nats), no data | {heads} |", "|---" * (len(BUDGETS) + 1) + "|"]
    for arm in arms:
        cells = []
        for budget in BUDGETS:
            own = [found[budget, arm][name] for name in whole]
            accuracy, divergence = (statistics.mean(row[key] for row in own) for key in ("accuracy", "kl"))
            cells.append(f"{100 * accuracy:.1f} ({divergence:.2f})")
        shown = f"for comparison, with data: {arm}" if arm == DATA else arm
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| points of accuracy more than the masks alone, 90 % interval (worst network) | {heads} |",
        lines[1],
    ]
    for arm in arms[1:]:
        cells = []
        for budget in BUDGETS:
            gaps = [
                100 * (found[budget, arm][name]["accuracy"] - found[budget, MASKS][name]["accuracy"]) for name in whole
            ]
            error = NORMAL * statistics.stdev(gaps) / len(gaps) ** 0.5
            cells.append(f"{statistics.mean(gaps):+.1f} ± {error:.1f} ({min(gaps):+.1f})")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    dense = 100 * statistics.mean(found[BUDGETS[0], MASKS][name]["dense"] for name in whole)
    seconds = statistics.median(row["seconds"] for row in rows if row["key"][2] == REFIT)
    kept = "; ".join(f"{name}: step {card['step']} of {card['steps']}, {_least(card)}" for name, card in cards.items())
    lines += [
        "",
        f"{len(whole)} networks of the families {', '.join(UNSEEN)}, which no fit has seen; dense {dense:.1f}. Refit "
        f"and certified cut take {seconds:.1f} CPU seconds (median). Steps that were kept, by families held out of "
        f"training, and the least loss on those relative to that at step 0: {kept}.",
    ]
    return "\n".join(lines) + "\n"


def _least(card: dict[str, Any]) -> str:
    first, best = card["history"][0][-1], min(row[-1] for row in card["history"])
    return f"{best / first:.2f}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/rewriting"))
    parser.add_argument("--seed", type=int, default=0, help="of the fits")
    parser.add_argument("--designs", type=int, default=len(DESIGNS), help="so many of the designs, the first ones")
    parser.add_argument("--table", action="store_true", help="write results and README from the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = list(DESIGNS)[: options.designs]
    zoo = mp.Zoo.open(options.zoo)
    pruners = {name: fitted(zoo, name, options.out, options.seed) for name in names}
    if not options.table:
        measure(zoo, pruners, options.out)
        return
    rows = [row for row in read_rows(options.out) if row["key"][2] in (MASKS, REFIT, DATA, *names)]
    cards = {name: pruner.card["rewrite"] for name, pruner in pruners.items()}
    about = provenance(f"python benchmarks/rewriting.py --zoo runs/zoo --seed {options.seed}")
    RESULTS.write_text(json.dumps({**about, "cards": cards, "rows": rows}, indent=1) + "\n")
    put_table("rewriting", table(rows, cards))


if __name__ == "__main__":
    main()
