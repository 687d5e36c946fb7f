"""How many networks does an engine prune, and are they right?

    python benchmarks/coverage.py --out runs/coverage       # hours; resumes where it stopped
    python benchmarks/coverage.py --out runs/coverage --table   # only results/coverage.json and the README's table

Every network is a forked child with a limit on its CPU time, and a JSON file that is rewritten after every phase.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import oracle
import report
import torch
from engines import ENGINES, Refused, warm
from random_weights import randomise
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NEXT = {"start": "build", "built": "prune", "pruned": "forward", "forward": "count", "counted": "oracle"}


def counted_macs(model: nn.Module, inputs: oracle.Inputs) -> tuple[int | None, str]:
    """Multiply-adds by torch's counter on the meta device, or on the CPU where a network makes CPU tensors itself.

    Attention runs as matrix products: the counter does not know the CPU's fused operator.
    """
    for device in ("meta", "cpu"):
        for gradients in (False, True):  # the counter refuses some networks without gradients
            try:
                moved = copy.deepcopy(model).eval().to(device)
                on_device = oracle.convert(inputs, lambda t, device=device: t.to(device))
                counter = FlopCounterMode(display=False, custom_mapping=_grouped())
                with torch.set_grad_enabled(gradients), sdpa_kernel(SDPBackend.MATH), counter:
                    oracle.call(moved, on_device)
                return counter.get_total_flops() // 2, device
            except Exception:  # tried in another way; the caller notes that none worked
                continue
    return None, "none"


def _grouped() -> dict[Any, Callable[..., int]]:
    """Products of row blocks with one matrix each (mixtures of experts), which torch's counter leaves out."""

    def flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * left[-2] * left[-1] * right[-1] * (left[0] if len(left) > 2 else 1)

    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {op: flops for op in (torch.ops.aten._grouped_mm, fallback) if op is not None}


def examine(network: networks.Network, engine: str, note: Callable[..., None]) -> None:
    """Builds, prunes, runs, counts and judges one network, noting facts after every phase."""
    torch.manual_seed(0)
    model, inputs = network.build()
    randomise(model.eval())
    original = copy.deepcopy(model)
    with torch.no_grad():
        oracle.call(model, inputs)  # a network that does not run itself says nothing about an engine
    macs, device = counted_macs(model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    note(phase="built", params_before=parameters, macs_before=macs, counter=device)
    result = ENGINES[engine](model, inputs, note)
    after = sum(p.numel() for p in result.module.parameters())
    note(phase="pruned", params_after=after, params_removed=round(1 - after / parameters, 4), **result.facts)
    result.module.eval()
    with torch.no_grad():
        oracle.call(result.module, inputs)
    note(phase="forward")
    cut, device = counted_macs(result.module, inputs)
    note(phase="counted", macs_after=cut, counter_after=device)
    if macs and cut is not None:
        note(macs_removed=round(1 - cut / macs, 4))
    note(phase="judged", **oracle.judge(original, result.module, inputs, networks.main_output, result.kept))


def child(network: networks.Network, engine: str, path: Path, limit: int) -> None:
    """The body of a forked child."""
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + limit, int(start) + limit + 2))
    facts: dict[str, Any] = {"network": network.name, "engine": engine, "cpu_limit": limit, "phase": "start"}

    def note(**more: Any) -> None:
        facts.update(more, cpu_seconds=round(time.process_time() - start, 2))
        facts["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        write(path, facts)

    note()
    try:
        examine(network, engine, note)
    except Refused as refusal:
        note(verdict="refused", error=str(refusal)[:500])
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        note(verdict=f"failed_{NEXT[facts['phase']]}", error=f"{type(error).__name__}: {error}"[:500], at=where)


def write(path: Path, facts: Any) -> None:
    """Writes JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n")
    part.replace(path)


def finish(path: Path, network: str, engine: str, status: int) -> dict[str, Any]:
    """Completes the file of a child that ended, by itself or not."""
    facts = json.loads(path.read_text()) if path.exists() else {"network": network, "engine": engine, "phase": "start"}
    if "verdict" not in facts:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        late = number in (signal.SIGXCPU, signal.SIGKILL)
        facts["verdict"] = f"failed_{NEXT.get(facts['phase'], 'oracle')}"
        facts["error"] = "CPU limit" if late else f"signal {number}"
    facts["finished"] = True
    write(path, facts)
    return facts


def run(todo: list[tuple[networks.Network, str, Path]], jobs: int, limit: int) -> None:
    """Runs every (network, engine) in a child of its own, `jobs` at a time."""
    live: dict[int, tuple[networks.Network, str, Path]] = {}

    def reap() -> None:
        pid, status = os.wait()
        network, engine, path = live.pop(pid)
        facts = finish(path, network.name, engine, status)
        shown = ("verdict", "params_removed", "error_plain", "error", "at", "kind", "cpu_seconds")
        print(network.name, engine, *(f"{k}={facts[k]}" for k in shown if k in facts), flush=True)

    for network, engine, path in todo:
        while len(live) >= jobs:
            reap()
        pid = os.fork()
        if pid == 0:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # warnings of a child that is about to end
            try:
                child(network, engine, path, limit)
            finally:
                os._exit(0)
        live[pid] = (network, engine, path)
    while live:
        reap()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coverage"), help="folder of the JSON files")
    parser.add_argument("--suites", default=",".join(networks.SUITES), help="also: decoders")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--only", default="", help="names of networks, without the suite, joined by commas")
    parser.add_argument("--skip", default="", help="likewise, to leave out")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cpu", type=int, default=120, help="CPU seconds that a network may take")
    parser.add_argument("--again", action="store_true", help="also what has been done, unless it was right")
    parser.add_argument("--table", action="store_true", help="only write the results and the README's table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        only, skip = (set(filter(None, text.split(","))) for text in (options.only, options.skip))
        chosen = [n for name in options.suites.split(",") for n in networks.suite(name).values()]
        for engine in options.engines.split(","):
            warm(engine)
        todo = []
        for engine in options.engines.split(","):
            for network in chosen:
                short = network.name.partition("/")[2]
                path = options.out / f"{network.name.replace('/', '__')}__{engine}.json"
                done = json.loads(path.read_text()) if path.exists() else {}
                right = str(done.get("verdict", "")).startswith("exact")
                if (
                    (only and short not in only)
                    or short in skip
                    or (done.get("finished") and (right or not options.again))
                ):
                    continue
                todo.append((network, engine, path))
        run(todo, options.jobs, options.cpu)
    report.coverage(options.out, " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
