"""The command line: a thin layer over the public API.

Exit codes: 0 done, 1 a defect of metaprune (with a traceback), 2 bad usage or a request that can not be met.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import metaprune as mp
from metaprune import demo as demonstration
from metaprune import targets
from metaprune.cli_explore import explore
from metaprune.cli_metanet import fit, zoo_app
from metaprune.cli_shared import (
    AsJson,
    Debug,
    Kinds,
    Only,
    Protect,
    RoundTo,
    Seed,
    errors_in_one_line,
    network,
    print_json,
)
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.planning import JUDGED
from metaprune.search.allocate import ALLOCATORS

_ALLOCATORS = ", ".join(name for name in ALLOCATORS if name not in JUDGED)  # no calibration data come from a shell
app = typer.Typer(
    name="metaprune",
    help="Structured pruning of neural networks: exact, certified and without per-architecture code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(zoo_app, name="zoo")
app.command()(fit)
app.command()(explore)

Target = Annotated[str, typer.Argument(help="MODULE:FUNCTION returning (model, inputs), or a folder written by save.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the artefacts.", file_okay=False)] = Path("runs/demo"),
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Train, prune to a quarter of the MACs, certify, recover, save, reload, export: on digits, in under a minute."""
    with errors_in_one_line(debug):
        demonstration.show(Console(), out, seed)


@app.command()
def inspect(target: Target, as_json: AsJson = False, debug: Debug = False) -> None:
    """List what can be removed from a network, what can not and why, and what the network costs."""
    with errors_in_one_line(debug):
        graph = mp.trace(*network(target))
        groups = _groups(graph)
        if as_json:
            print_json({"cost": _cost(graph.cost()), "groups": groups, "notes": graph.notes})
            return
        cost = graph.cost()
        table = Table(title=f"{cost.macs:,} MACs, {cost.params:,} parameters")
        for heading in ("group", "kind", "units", "MACs/unit", "params/unit", "pinned because"):
            table.add_column(heading, justify="right" if "unit" in heading else "left")
        for group in groups:
            values = (group[key] for key in ("size", "macs_per_unit", "params_per_unit"))
            numbers = ["" if value is None else f"{value:,}" for value in values]
            table.add_row(*map(Text, (group["name"], group["kind"], *numbers, group["reason"])))
        console = Console()
        console.print(table)
        for note in graph.notes:
            console.print(Text(f"note: {note}"))


@app.command()
def prune(
    target: Target,
    budget: Annotated[str, typer.Option(help="What is kept: macs=0.5, latency=0.6, width=0.5, ...")],
    out: Annotated[Path, typer.Option(help="Folder for the pruned network.", file_okay=False)],
    criterion: Annotated[str | None, typer.Option(help="How units are ranked; magnitude by default.")] = None,
    allocator: Annotated[
        str | None, typer.Option(help=f"How the budget is shared among groups: {_ALLOCATORS}; global by default.")
    ] = None,
    pruner: Annotated[
        str | None,
        typer.Option(help="FILE written by fit, or default: one pass of a metanetwork; a Task gives it data, too."),
    ] = None,
    protect: Protect = None,
    only: Only = None,
    kinds: Kinds = None,
    round_to: RoundTo = 1,
    latency: Annotated[Path | None, typer.Option(help="Table of timed operators; read, and written back.")] = None,
    engine: Annotated[str | None, typer.Option(help="What operators are timed in: torch or onnxruntime.")] = None,
    seed: Seed = 0,
    certify: Annotated[bool, typer.Option(help="Prove the result equal to the masked network.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a network to a budget, certify the cut and save the result."""
    with errors_in_one_line(debug):
        table = _latency_table(latency, engine)
        options: dict[str, Any] = {
            "budget": budget,
            "protect": protect or (),
            "only": only or (),
            "kinds": kinds.split(",") if kinds else None,
            "round_to": round_to,
            "seed": seed,
            "certify": certify,
            "latency": table,
        }
        try:
            if pruner is None:
                pruned = mp.prune(*network(target), criterion=criterion, allocator=allocator, **options)
            elif criterion or allocator:
                raise OptionError("pruner: it ranks units and shares the budget itself: no criterion, no allocator")
            else:
                model, inputs, data = _network_and_data(target)
                pruned = mp.MetaPruner.load(pruner).prune(model, inputs, data=data, **options)
        finally:
            if table is not None and latency is not None:
                table.save()  # operators that were timed need not be again, whatever came of the plan
        pruned.save(out)
        _report(pruned, out, as_json)


def main() -> None:
    """Entry point of the console script; modules in the current directory can be named."""
    sys.path.insert(0, os.getcwd())
    warnings.showwarning = _warned
    app()


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the line of source that it comes from."""
    typer.echo(f"warning: {message}", err=True)


def _network_and_data(target: str) -> tuple[Any, Any, Any]:
    """Model and example inputs of a target; of a task the batches it is trained on, else None."""
    return (*targets.saved(target), None) if Path(target).is_dir() else targets.build_with_data(target)


def _latency_table(path: Path | None, engine: str | None) -> mp.LatencyTable | None:
    """The table in a file, or a new one; none when neither a file nor an engine is named."""
    if path is None and engine is None:
        return None
    if path is not None and path.exists() and engine is None:
        return mp.LatencyTable.load(path)
    return mp.LatencyTable(engine or "torch", path=path)


def _groups(graph: Graph) -> list[dict[str, Any]]:
    """One row per group; the cost of a unit is what goes when it alone is removed from the whole network."""
    costs = graph.coupling.costs
    one_less = costs.sizes - np.eye(len(costs.sizes))  # (groups, groups)
    macs = graph.cost().macs - costs.evaluate("macs", one_less)
    params = graph.cost().params - costs.evaluate("params", one_less)
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "macs_per_unit": None if group.pinned else round(macs[i]),
            "params_per_unit": None if group.pinned else round(params[i]),
            "pinned": group.pinned,
            "reason": group.reason,
        }
        for i, group in enumerate(graph.groups)
    ]


def _report(pruned: mp.Pruned, out: Path, as_json: bool) -> None:
    before, after = pruned.cost["before"], pruned.cost["after"]
    certificate = pruned.certificate
    if as_json:
        proof = None
        if certificate is not None:
            proof = {"ok": certificate.ok, "wiring": certificate.wiring, "function": certificate.function}
        print_json(
            {
                "out": str(out),
                "kind": pruned.kind,
                "before": _cost(before),
                "after": _cost(after),
                "certificate": proof,
                "notes": pruned.notes,
            }
        )
        return
    table = Table("", "before", "after", "kept", title=f"saved to {out} ({pruned.kind})")
    for name, old in _cost(before).items():
        new = _cost(after)[name]
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "")
    console = Console()
    console.print(table)
    console.print(Text(certificate.summary() if certificate is not None else "not certified"))
    for note in pruned.notes:
        console.print(Text(f"note: {note}"))


def _cost(cost: Any) -> dict[str, int]:
    return {"macs": cost.macs, "params": cost.params, "bytes": cost.bytes}
