"""Is a table of operators, each timed alone, a fair price list for a network and its cuts?

    python benchmarks/latency.py             # three networks, two engines; goes on where it was stopped
    python benchmarks/latency.py --table     # results/latency.json and the README's table

For each network and engine the sum of operator times is corrected on 10 networks (the whole one and 9 random cuts) and
judged on 40 other random cuts, measured end to end: the user's own module in torch, an ONNX file in onnxruntime. Then a
plan is made for a latency budget, and the pruned network is measured against the whole one. At last the plan that
does least harm within that latency is measured against the one of fewest multiply-adds that does no more harm.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ledger import appending, read_rows
from report import provenance, put_table
from torch import Tensor, nn

import metaprune as mp

RESULTS = Path(__file__).resolve().parent / "results" / "latency.json"
ENGINES = ("torch", "onnxruntime")
CALIBRATED_ON, JUDGED_ON, BUDGET = 10, 40, 0.6
STEPS = 1, 8
BISECTIONS = 12
PASSES = 6  # every network is measured so often, in turns; the least counts
NEAR = 0.15


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*unit(inputs, width, 3, stride), nn.ReLU(), *unit(width, width, 3))
        plain = stride == 1 and inputs == width
        self.short = nn.Identity() if plain else nn.Sequential(*unit(inputs, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Both paths."""
        return F.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions, wide in the middle (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        middle = 4 * inputs
        self.body = nn.Sequential(
            *unit(inputs, middle, 1), nn.ReLU6(), *unit(middle, middle, 3, stride, middle), nn.ReLU6(),
            *unit(middle, width, 1),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        """The narrow ends, added where they fit."""
        y = self.body(x)
        return x + y if self.residual else y


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def network(block: Callable[[int, int, int], nn.Module], stages: tuple[tuple[int, int], ...]) -> nn.Module:
    """A classifier of 32 x 32 pixels: stages of (width, blocks), each but the first at half the resolution."""
    layers: list[nn.Module] = [*unit(3, 16, 3), nn.ReLU()]
    inputs = 16
    for stage, (width, blocks) in enumerate(stages):
        for number in range(blocks):
            layers.append(block(inputs, width, 2 if stage and not number else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-8": lambda: network(Residual, ((16, 1), (32, 1), (64, 1))),
    "ResNet-20": lambda: network(Residual, ((16, 3), (32, 3), (64, 3))),
    "MobileNetV2-like": lambda: network(Inverted, ((16, 1), (24, 2), (32, 2), (64, 2))),
}


def random_plan(graph: Any, seed: int) -> mp.Plan:
    """Widths in eighths of every group: the network has one of its own, and each group another one around that."""
    draw = random.Random(seed)
    level = draw.uniform(0.2, 1.0)
    keep = {}
    for group in graph.groups:
        eighths = min(8, max(1, round(8 * level * draw.uniform(0.5, 1.5))))
        count = max(group.minimum, group.size * eighths // 8)
        if not group.pinned and count < group.size:
            keep[group.name] = tuple(range(count))
    return mp.Plan(keep, graph.fingerprint)


def fewest_macs(graph: Any, harm: float) -> mp.Plan:
    """The optimal plan of fewest multiply-adds that does no more harm than that, by bisection of its budget."""
    low, high = 0.0, 1.0
    plan = mp.Plan({}, graph.fingerprint)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            found = mp.plan(graph, f"macs={middle}", allocator="dp")
        except mp.BudgetInfeasible:
            low = middle
            continue
        if found.provenance["solver"]["harm"] <= harm:
            high, plan = middle, found
        else:
            low = middle
    return plan


def endpoints(graph: Any, plans: list[mp.Plan], engine: str, inputs: Tensor) -> list[float]:
    """Seconds of the networks that plans leave, end to end: all in turns, so that a busy minute spares none."""
    with tempfile.TemporaryDirectory() as folder:
        networks: list[Any] = []
        for number, plan in enumerate(plans):
            pruned = mp.apply(graph, plan, certify=False)
            networks.append(pruned.module)
            if engine == "onnxruntime":
                networks[-1] = Path(folder) / f"{number}.onnx"
                pruned.export_onnx(networks[-1])
        rounds = [[mp.measure_latency(n, inputs, engine).seconds for n in networks] for _ in range(PASSES)]
    return [min(times) for times in zip(*rounds, strict=True)]


def measured(name: str, engine: str) -> dict[str, Any]:
    """One row: predictions and measurements of one network in one engine."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 32, 32)
    graph = mp.trace(NETWORKS[name](), inputs)
    table = mp.LatencyTable(engine)
    correction = table.calibrate(graph, plans=CALIBRATED_ON, seed=0)
    plans = [random_plan(graph, seed) for seed in range(JUDGED_ON)]
    budgeted, budgets = {}, {}
    for step in STEPS:
        try:
            budgeted[step] = mp.plan(graph, f"latency={BUDGET}", latency=table, round_to=step)
        except mp.BudgetInfeasible as error:
            budgets[step] = {"attainable": error.attainable}
    short = max([BUDGET, *((1 + facts["attainable"]) / 2 for facts in budgets.values())])
    quick = mp.plan(graph, f"latency={short}", allocator="dp", latency=table)
    light = fewest_macs(graph, quick.provenance["solver"]["harm"])
    everything = [*plans, mp.Plan({}, graph.fingerprint), *budgeted.values(), quick, light]
    predicted = table.predictions(graph, everything)
    found = endpoints(graph, everything, engine, inputs)
    whole = predicted[len(plans)], found[len(plans)]
    for step, p, m in zip(budgeted, predicted[len(plans) + 1 :], found[len(plans) + 1 :], strict=False):
        budgets[step] = {"predicted": p / whole[0], "measured": m / whole[1], **budgeted[step].reached}
    return {
        "key": [name, engine],
        "operators_timed": len(table.times),
        "correction": {"intercept": correction.intercept, **correction.slopes},
        "predicted": predicted[: len(plans)],
        "measured": found[: len(plans)],
        "budgets": {str(step): facts for step, facts in budgets.items()},
        "equal_harm": {
            kind: {"harm": plan.provenance["solver"]["harm"], "macs": plan.reached["macs"], "measured": time / whole[1]}
            for kind, plan, time in zip(("latency", "macs"), (quick, light), found[-2:], strict=True)
        },
    }


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks, without ties."""
    ranks = [{v: i for i, v in enumerate(sorted(values))} for values in (a, b)]
    return statistics.correlation([ranks[0][x] for x in a], [ranks[1][y] for y in b])


def table(rows: list[dict[str, Any]]) -> str:
    """One line per network and engine.

    A shared machine is slower at one time than at another. The pace is the median of predicted over measured time;
    apart from it, what counts is how networks compare with each other.
    """
    lines = [
        "| network | engine | within 15 % | apart from pace | Spearman | latency=0.6, measured | with round_to=8 "
        "| least harm at 0.6 or half way to it, measured | fewest MACs of equal harm, measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [p / m for p, m in zip(row["predicted"], row["measured"], strict=True)]
        pace = statistics.median(ratios)
        near, apart = (sum(abs(r / by - 1) <= NEAR for r in ratios) / len(ratios) for by in (1.0, pace))
        budgets = [row["budgets"][str(step)] for step in STEPS]
        reached = [f"{b['measured']:.2f}" if "measured" in b else f"at least {b['attainable']:.2f}" for b in budgets]
        rank = spearman(row["predicted"], row["measured"])
        cells = [*row["key"], f"{near:.0%}", f"{apart:.0%} ({pace:.2f})", f"{rank:.3f}", *reached]
        cells += [f"{row['equal_harm'][kind]['measured']:.2f}" for kind in ("latency", "macs")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS.parents[2] / "runs" / "latency")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [[name, engine] for engine in options.engines.split(",") for name in options.networks.split(",")]
    if not options.table:
        done = [row["key"] for row in read_rows(options.out)]
        with appending(options.out / "rows-0.jsonl") as add:
            for name, engine in wanted:
                if [name, engine] not in done:
                    add(measured(name, engine))
                    print(name, engine, flush=True)
    rows = sorted((row for row in read_rows(options.out) if row["key"] in wanted), key=lambda r: wanted.index(r["key"]))
    print(table(rows))
    if len(rows) == len(ENGINES) * len(NETWORKS):
        about = provenance("python benchmarks/latency.py", ("onnxruntime",))
        RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        put_table("latency", f"{table(rows)}\n")


if __name__ == "__main__":
    main()
