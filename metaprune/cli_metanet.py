"""Commands of the metanetwork: zoos of measured networks, and what is fitted on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import metaprune as mp
from metaprune.cli_shared import AsJson, Debug, Seed, errors_in_one_line, print_json, progress_bar
from metaprune.graphs.errors import OptionError
from metaprune.metanet.building import build as build_zoo
from metaprune.metanet.sources import SOURCES
from metaprune.metanet.team import joined
from metaprune.metanet.zoo import Zoo

zoo_app = typer.Typer(help="Zoos of small networks that a metanetwork learns from.", no_args_is_help=True)

Directory = Annotated[Path | None, typer.Option(help="Fashion-MNIST's files, if not the Debian package's.")]


@zoo_app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder of the zoo, to go on from.", file_okay=False)],
    networks: Annotated[int, typer.Option(help="Members of the zoo.")] = 120,
    data: Annotated[str, typer.Option(help=f"What they learn: {', '.join(SOURCES)} or both.")] = "fashion-mnist",
    directory: Directory = None,
    processes: Annotated[int, typer.Option(help="Processes of one thread each.")] = 1,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train random networks of many families and measure what losing their units costs."""
    with errors_in_one_line(debug):
        with progress_bar("members") as bar:
            zoo = build_zoo(out, networks, data, seed, processes, directory, progress=bar)
        _report_zoo(zoo, as_json)


@zoo_app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a zoo.", file_okay=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the members of a zoo by family, and those that are broken."""
    with errors_in_one_line(debug):
        zoo = Zoo.open(folder)
        zoo.check()
        _report_zoo(zoo, as_json)


def fit(
    zoo: Annotated[Path, typer.Argument(help="Folder that zoo build has written.", file_okay=False)],
    out: Annotated[Path, typer.Option(help="FILE.safetensors for what was learned; its card is FILE.json.")],
    work: Annotated[Path | None, typer.Option(help="Folder of the fit, to go on from.", file_okay=False)] = None,
    heads: Annotated[str, typer.Option(help="What is learned: curves; joint, rewrite too if named.")] = "curves,joint",
    directory: Directory = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Learn from a zoo what pruning costs, and tell how well that holds for families left out.

    Several processes, started by torchrun --nproc-per-node N -m metaprune fit ..., share the head rewrite.
    """
    with errors_in_one_line(debug):
        if out.suffix != ".safetensors":
            raise OptionError(f"out: a name that ends in .safetensors is needed, not {out.name!r}")
        opened = Zoo.open(zoo, directory)
        with joined() as team, progress_bar("networks") as bar:
            pruner = mp.fit(opened, heads.split(","), work, seed, progress=bar)
        if team.leads:
            pruner.save(out, out.with_suffix(".json"))
            _report_fit(pruner.card, out, opened, as_json)


def _report_zoo(zoo: Zoo, as_json: bool) -> None:
    families = zoo.by_family()
    missing = {"skipped": dict(zoo.skipped), "failed": dict(zoo.failed)}
    if as_json:
        print_json({"folder": str(zoo.folder), "members": len(zoo), "families": families, **missing})
        return
    headings = ("family", "members", "early", "pruned", "MMACs", "units", "accuracy", "worst", "best")
    table = Table(title=f"{zoo.folder}: {len(zoo)} members")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for name, row in families.items():
        counts = (str(row[key]) for key in ("members", "early", "pruned"))
        accuracies = (f"{row[key]:.1%}" for key in ("accuracy", "worst", "best"))
        table.add_row(name, *counts, f"{row['macs'] / 1e6:.2f}", f"{row['units']:.0f}", *accuracies)
    console = Console()
    console.print(table)
    for what, reasons in missing.items():
        for name, reason in reasons.items():
            console.print(Text(f"{what}: {name}: {reason}"))


def _report_fit(card: Mapping[str, Any], out: Path, zoo: Zoo, as_json: bool) -> None:
    networks = len(card["zoo"]["networks"])
    skipped = {**zoo.skipped, **card["zoo"]["skipped"]}
    rows = list(_held_out(card["validation"]))
    if as_json:
        rewriting = card.get("rewrite") and _rewriting(card["rewrite"])
        told = {"rewriting": rewriting} if rewriting else {}
        print_json({"out": str(out), "networks": networks, "skipped": skipped, "held_out": rows, **told})
        return
    table = Table(title=f"{out}: {networks} networks, judged by families that were left out")
    for heading in ("looks at", "predicts", "R2", "least R2 of a network", "rank correlation"):
        table.add_column(heading, justify="left" if heading in ("looks at", "predicts") else "right")
    for row in rows:
        numbers = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("r2", "least_r2", "spearman"))
        table.add_row(row["sight"], row["head"], *numbers)
    console = Console()
    console.print(table)
    if "rewrite" in card:
        found = _rewriting(card["rewrite"])
        console.print(f"rewriting: step {found['step']} of {found['steps']} is kept, loss {found['loss']:.3f} there")
    for name, reason in skipped.items():
        console.print(Text(f"skipped: {name}: {reason}"))


def _rewriting(about: Mapping[str, Any]) -> dict[str, Any]:
    """The step that was kept of a training, of how many, and the loss there, on families left out if there are any."""
    loss = next(row[-1] for row in about["history"] if row[0] == about["step"])
    return {"step": about["step"], "steps": about["steps"], "loss": loss}


def _held_out(validation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each quantity that a head predicts, from the figures of a card."""
    for sight, heads in validation.items():
        for head, found in heads.items():
            parts = {f"{head}, {name}": part for name, part in found.items() if isinstance(part, dict) and "r2" in part}
            for name, part in (parts or {head: found}).items():
                correlation = next((value for key, value in part.items() if key.startswith("spearman")), None)
                about = {"r2": part["r2"], "least_r2": part["least r2 of a network"], "spearman": correlation}
                yield {"sight": sight, "head": name, **about}
