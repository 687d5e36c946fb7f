"""How long does pruning take, and how does the time grow with the network?

    python benchmarks/scaling.py            # results/scaling.json and the README's table
    python benchmarks/scaling.py --table    # only the table, from the JSON

Times are CPU seconds of one thread, warm: each case is a forked child of a process that has already pruned a tiny
network. `least` of several repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chains
import report
import torch
from coverage import write
from engines import warm
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
Maker = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def image(size: int) -> tuple[Tensor]:
    """A batch of one image."""
    return (torch.randn(1, 3, size, size),)


def vision(name: str, size: int) -> Maker:
    """A maker of a network of torchvision."""

    def make() -> Any:
        import torchvision

        return torchvision.models.get_model(name, weights=None), image(size)

    return make


CASES: dict[str, Maker] = {
    "resnet50": vision("resnet50", 64),
    "densenet201": vision("densenet201", 64),
    "swin_t": vision("swin_t", 64),
    "llama_2_layers": lambda: (chains.llama(), (torch.randint(0, 131, (1, 12)),)),
    **{f"residual_{n}": lambda n=n: (chains.residual(n), image(8)) for n in (25, 50, 100, 200, 400)},
    **{f"plain_{n}": lambda n=n: (chains.plain(n), image(8)) for n in (25, 50, 100, 200, 400)},
    **{f"dense_{n}": lambda n=n: (chains.dense(n), image(8)) for n in (10, 20, 40, 80)},
    "operators_10000": lambda: (chains.residual(1430, 8), image(4)),
}
# The last has 10,000 operators: seven a block.


def size_of(name: str, facts: dict[str, Any]) -> float | None:
    """What the time of a chain is measured against: nodes, or channel slots of a dense chain."""
    kind, _, number = name.rpartition("_")
    return chains.dense_slots(int(number)) if kind == "dense" else facts.get("nodes")


def measure_metaprune(model: nn.Module, inputs: Any, note: Callable[..., None]) -> None:
    """Seconds of tracing, grouping and planning, cutting, and cutting with the certificate.

    `export` is `torch.export` alone, once more: the part of tracing that is torch's.
    """
    import metaprune

    clock = time.process_time
    start = clock()
    graph = metaprune.trace(model, inputs)
    note(trace=clock() - start, nodes=len(graph.nodes))
    start = clock()
    plan = metaprune.plan(graph, budget="width=0.5", criterion="magnitude", allocator="uniform")
    note(groups_and_plan=clock() - start, groups=len(graph.groups))
    start = clock()
    metaprune.apply(graph, plan, certify=False)
    note(apply=clock() - start)
    start = clock()
    metaprune.apply(graph, plan)
    note(apply_certified=clock() - start)
    pair = tuple(torch.cat([x, x]) for x in inputs)
    start = clock()
    with torch.no_grad():
        batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in pair)
        torch.export.export(model, pair, strict=False, dynamic_shapes=batch)
    note(export=clock() - start)


def measure_torch_pruning(model: nn.Module, inputs: Any, note: Callable[..., None]) -> None:
    """Seconds of the constructor (which builds the graph and its groups) and of one step."""
    import torch_pruning as tp

    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    fresh: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    clock = time.process_time
    start = clock()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, inputs[0], importance=importance, pruning_ratio=0.5, ignored_layers=heads, **fresh
    )
    note(groups_and_plan=clock() - start)
    start = clock()
    pruner.step()
    note(apply=clock() - start)


MEASURE = {"metaprune": measure_metaprune, "torch_pruning": measure_torch_pruning}


def run(engine: str, name: str, limit: int, part: Path) -> dict[str, Any]:
    """One case in a forked child with a limit on its CPU time."""
    part.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # of a child that is about to end
        facts: dict[str, Any] = {}

        def note(**more: Any) -> None:
            facts.update({key: round(v, 4) if isinstance(v, float) else v for key, v in more.items()})
            facts["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            write(part, facts)

        try:
            model, inputs = CASES[name]()
            used = int(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (used + limit, used + limit + 2))
            MEASURE[engine](model.eval(), inputs, note)
        except Exception as error:
            note(error=f"{type(error).__name__}: {error}"[:300])
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    facts = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        facts["error"] = f"not finished after {limit} CPU s" if late else f"signal {os.WTERMSIG(status)}"
    return facts


def least(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The least of every time over repetitions."""
    best = dict(runs[0])
    for other in runs[1:]:
        best |= {key: min(best[key], v) for key, v in other.items() if isinstance(v, float) and key in best}
    return best


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of a least-squares line through (log size, log seconds)."""
    if len(points) < 3:
        return None
    logs = [(math.log(x), math.log(max(y, 1e-4))) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def exponents(cases: dict[str, dict[str, Any]], nodes: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Growth of every phase, and of pruning without tracing (`prune`), by kind of chain."""
    table: dict[str, dict[str, float | None]] = {}
    for kind in ("residual", "plain", "dense"):
        own = {name: facts for name, facts in cases.items() if name.startswith(kind + "_")}
        table[kind] = {}
        for phase in ("export", "trace", "groups_and_plan", "apply", "apply_certified", "prune"):
            points = []
            for name, facts in own.items():
                wanted = ("groups_and_plan", "apply") if phase == "prune" else (phase,)
                size = size_of(name, nodes.get(name, {}))
                if all(key in facts for key in wanted) and size:
                    points.append((size, sum(facts[key] for key in wanted)))
            slope = exponent(points)
            table[kind][phase] = None if slope is None else round(slope, 2)
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(MEASURE))
    parser.add_argument("--only", default="", help="names of cases, joined by commas")
    parser.add_argument("--cpu", type=int, default=120, help="CPU seconds that a case may take")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only write the README's table")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        RESULTS.parent.mkdir(exist_ok=True)
        made = report.provenance(" ".join(["python", *sys.argv])) | {"repeat": options.repeat}
        cases = results.setdefault("cases", {})
        for engine in options.engines.split(","):
            results.setdefault("made_by", {})[engine] = made
            warm(engine)
            for name in options.only.split(",") if options.only else CASES:
                runs = []
                while len(runs) < options.repeat and not (runs and "error" in runs[-1]):
                    runs.append(run(engine, name, options.cpu, RESULTS.with_suffix(".child")))
                cases.setdefault(engine, {})[name] = least(runs)
                print(engine, name, cases[engine][name], flush=True)
                nodes = cases.get("metaprune", {})
                results["exponents"] = {each: exponents(found, nodes) for each, found in cases.items()}
                write(RESULTS, results)
    report.scaling(results)


if __name__ == "__main__":
    main()
