"""One pass of the metanetwork on networks of families that it was not fitted on, against the closed form.

Some families of a zoo are left out of the fit, and their trained networks are pruned: without a training step, every
arm with the same 512 unlabelled images and the same fit by least squares. A second zoo is of another data set, which
no network of the fit has learned either.

    metaprune zoo build --out runs/zoo --networks 120 --data fashion-mnist --processes 2
    metaprune zoo build --out runs/zoo-digits --networks 26 --data digits --seed 1
    python benchmarks/metanet.py --zoo runs/zoo --other runs/zoo-digits --part 0/2     # and 1/2; goes on where stopped
    python benchmarks/metanet.py --zoo runs/zoo --other runs/zoo-digits --table        # results/metanet.json, README
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fashion
import torch
from accuracy_arms import REFINED, ZERO_STEPS, measured
from accuracy_case import Arm, Case, Made, Steps
from ledger import appending, read_rows
from report import provenance, put_table

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "metanet.json"
UNSEEN = ("convnext", "densenet", "mixer", "mobilenet", "resnext", "vit")
BUDGETS = (0.25, 0.125)
FLOOR = "block Fisher, cost + least squares"
RIVALS = ("L2 over mean + least squares", "L2, uniform + least squares", "OBSPA + least squares", FLOOR)
METANETWORKS = tuple(f"metanetwork, one pass, fitting seed {seed}" for seed in range(3))
UNREFINED = "metanetwork, not refined, fitting seed 0"
STEPS = 100
PER_FAMILY = 4
NORMAL = 1.645  # of a standard error: half of an interval of 90 %


def pruned_in_one_pass(pruner: mp.MetaPruner, **options: Any) -> Arm:
    """The arm of a fitted pruner; a case is encoded once for all budgets."""

    def arm(case: Case, budget: float) -> Made:
        began = time.process_time()
        spent = case.shared.get(("seconds", id(pruner)), 0.0)
        if not spent:
            case.shared["encoded", id(pruner)] = pruner.encode(case.graph, data=case.calibration, seed=case.seed)
            case.shared["seconds", id(pruner)] = time.process_time() - began
        pruned = pruner.prune(case.shared["encoded", id(pruner)], budget=f"macs={budget}", **options)
        case.shared["kept"] = pruned.plan.provenance["guard"]["kept"]
        return Made(pruned.module, pruned.cost["after"].macs, pruned.cost["after"].params, pruned, spent)

    return arm


def remembered(name: str, arm: Arm) -> Arm:
    """The same arm, which works once for a case and budget."""

    def again(case: Case, budget: float) -> Made:
        key = ("made", name, budget)
        if key not in case.shared:
            case.shared[key] = arm(case, budget)
        found: Made = case.shared[key]
        return replace(found, module=copy.deepcopy(found.module))

    return again


def trained(arm: Arm) -> Arm:
    """The same with a short training after it."""

    def longer(case: Case, budget: float) -> Made:
        made = arm(case, budget)
        settings = mp.Settings(epochs=1, lr=1e-3, weight_decay=0.01, optimizer="adamw")
        mp.train(made.module, Steps(case.train, STEPS), fashion.objective, settings, case.seed)
        return made

    return longer


def arms_of(pruners: list[mp.MetaPruner]) -> dict[str, Arm]:
    """All arms by name; those that are trained are the same with a suffix."""
    found = {arm: ZERO_STEPS[arm] for arm in (*RIVALS, REFINED)}
    found |= {arm: pruned_in_one_pass(pruner) for arm, pruner in zip(METANETWORKS, pruners, strict=True)}
    found[UNREFINED] = pruned_in_one_pass(pruners[0], refine=0)
    found = {name: remembered(name, arm) for name, arm in found.items()}
    return found | {then(arm): trained(found[arm]) for arm in (FLOOR, REFINED, METANETWORKS[0])}


def then(arm: str) -> str:
    """The name of an arm with training after it."""
    return f"{arm}, then {STEPS} steps"


class Seen:
    """The members of a zoo that a fit may see, with their labels."""

    def __init__(self, zoo: mp.Zoo) -> None:
        self.labels = zoo.labels
        self._zoo = zoo

    def __iter__(self) -> Any:
        return (member for member in self._zoo if member.family not in UNSEEN)


def fitted(zoo: mp.Zoo, out: Path, seed: int) -> mp.MetaPruner:
    """A pruner that has not seen the families which it is judged on; kept in a file."""
    path = out / f"pruner-{seed}.safetensors"
    if not path.exists():
        mp.fit(Seen(zoo), out=out / f"fit-{seed}", seed=seed).save(path)
    return mp.MetaPruner.load(path)


def unseen(zoo: mp.Zoo) -> list[str]:
    """The first trained members of the families left out, at most `PER_FAMILY` of each."""
    found: list[str] = []
    for family in UNSEEN:
        own = [n for n, facts in zoo.facts.items() if facts["family"] == family and facts["kind"] == "trained"]
        found += own[:PER_FAMILY]
    return sorted(found)


def case_of(zoo: mp.Zoo, name: str) -> Case:
    """A member as a case of the accuracy benchmark."""
    member = zoo.member(name)
    whole = member.calibration
    batches = list(zip(whole.images.split(128), whole.labels.split(128), strict=True))
    graph = mp.trace(member.task.model, member.task.inputs)
    seed = int(name.split("-")[0])
    return Case(name, seed, member.task.model, graph, member.task.train, member.task.val, batches)  # type: ignore[arg-type]


def measure(zoo: mp.Zoo, data: str, pruners: list[mp.MetaPruner], out: Path, part: int, parts: int) -> None:
    """Prunes this process's share of the networks, in every arm and at every budget."""
    arms = arms_of(pruners)
    done = {tuple(row["key"]) for row in read_rows(out)}
    with appending(out / f"rows-{part}.jsonl") as add:
        for name in unseen(zoo)[part::parts]:
            keys = [(data, name, budget, arm) for budget in BUDGETS for arm in arms]
            if done.issuperset(keys):
                continue
            case = case_of(zoo, name)
            for key in keys:
                if key not in done:
                    facts = measured(arms[key[3]], case, key[2])
                    kept = {"kept": case.shared["kept"]} if key[3] in METANETWORKS else {}
                    add({"key": key, "family": zoo.facts[name]["family"], **facts, **kept})
                    print(*key, f"{facts['score']:.4f}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Mean scores, and paired differences of the metanetwork to each other arm with intervals of 90 %."""
    found = {tuple(row["key"]): row for row in rows}
    untrained = (*RIVALS, REFINED, UNREFINED, *METANETWORKS)
    after = tuple(then(arm) for arm in (FLOOR, REFINED, METANETWORKS[0]))
    sets = [{key[:2] for key in found if key[2:] == (b, arm)} for b in BUDGETS for arm in (*untrained, *after)]
    whole = sorted(set.intersection(*sets))

    def scores(arm: str, budget: float) -> list[float]:
        return [100 * found[*key, budget, arm]["score"] for key in whole]

    heads = [f"MACs {budget:g}" for budget in BUDGETS]
    rule = "|---" * (len(BUDGETS) + 1) + "|"
    lines = [f"| accuracy, no training steps | {' | '.join(heads)} | CPU seconds |", rule + "---|"]
    for arm in untrained:
        means = [statistics.mean(scores(arm, budget)) for budget in BUDGETS]
        seconds = statistics.mean(found[*key, budget, arm]["cpu_seconds"] for key in whole for budget in BUDGETS)
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.1f}" for mean in means) + f" | {seconds:.1f} |")
    lines += ["", f"| its mean over seeds less, 90 % interval (worst network) | {' | '.join(heads)} |", rule]
    own = {
        b: [statistics.mean(values) for values in zip(*(scores(arm, b) for arm in METANETWORKS), strict=True)]
        for b in BUDGETS
    }
    for rival in (*RIVALS, REFINED, UNREFINED):
        cells = [_gap(own[budget], scores(rival, budget)) for budget in BUDGETS]
        lines.append(f"| {rival} | " + " | ".join(cells) + " |")
    lines += ["", f"| after {STEPS} steps | {' | '.join(heads)} |", rule]
    for arm in after:
        means = [f"{statistics.mean(scores(arm, budget)):.1f}" for budget in BUDGETS]
        lines.append(f"| {arm.removesuffix(then(''))} | " + " | ".join(means) + " |")
    for rival in after[:-1]:
        cells = [_gap(scores(after[-1], budget), scores(rival, budget)) for budget in BUDGETS]
        lines.append(f"| metanetwork less {rival.removesuffix(then(''))} | " + " | ".join(cells) + " |")
    passes = [found[*key, budget, arm] for key in whole for budget in BUDGETS for arm in METANETWORKS]
    closed = sum(row["kept"] == "closed form" for row in passes)
    by_data = {data: sum(key[0] == data for key in whole) for data in sorted({key[0] for key in whole})}
    counted = " and ".join(f"{count} on {data}" for data, count in by_data.items())
    dense = statistics.mean(100 * found[*key, BUDGETS[0], FLOOR]["dense"] for key in whole)
    lines += [
        "",
        f"{len(whole)} networks of the families {', '.join(UNSEEN)}, {counted}; dense {dense:.1f}. "
        f"The closed form's own plan was kept in {closed} of {len(passes)} cases.",
    ]
    return "\n".join(lines) + "\n"


def _gap(own: list[float], other: list[float]) -> str:
    gaps = [a - b for a, b in zip(own, other, strict=True)]
    error = NORMAL * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{statistics.mean(gaps):+.1f} ± {error:.1f} ({min(gaps):+.1f})"


def main() -> None:
    """Measures, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="zoo to fit on, and whose unseen families are pruned")
    parser.add_argument("--other", type=Path, help="zoo of another data set, of which only unseen families are pruned")
    parser.add_argument("--part", default="0/1", help="this process's share of the networks: number/of")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "metanet")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    zoos = [mp.Zoo.open(folder) for folder in (options.zoo, options.other) if folder is not None]
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        pruners = [fitted(zoos[0], options.out, seed) for seed in range(len(METANETWORKS))]
        for zoo in zoos:
            measure(zoo, zoo.settings["data"], pruners, options.out, *map(int, options.part.split("/")))
        return
    rows = read_rows(options.out)
    cards = [fitted(zoos[0], options.out, seed).card for seed in range(len(METANETWORKS))]
    about = provenance("python benchmarks/metanet.py", ("torch-geometric",))
    RESULTS.write_text(json.dumps({**about, "unseen": UNSEEN, "cards": cards, "rows": rows}, indent=1) + "\n")
    text = table(rows)
    print(text)
    put_table("metanet", text)


if __name__ == "__main__":
    main()
