"""The command `explore`: a search for the best trade-offs, and what came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import metaprune as mp
from metaprune import targets
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
from metaprune.exploration import Watch
from metaprune.search.backends import BACKENDS

_SHOWN = 8  # points, evenly out of the front, while a search runs


def explore(
    target: Annotated[
        str, typer.Argument(help="MODULE:FUNCTION returning a Task; with --noise also what prune accepts.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the search, to go on from.", file_okay=False)] = None,
    backend: Annotated[str, typer.Option(help=f"How networks are looked for: {', '.join(BACKENDS)}.")] = "random",
    objectives: Annotated[str | None, typer.Option(help="What is to be small, for instance error,macs.")] = None,
    evaluations: Annotated[int, typer.Option(help="Networks that may be judged.")] = 100,
    budget: Annotated[str | None, typer.Option(help="What all of them are within: macs=0.5, params=0.3, ...")] = None,
    noise: Annotated[bool, typer.Option("--noise", help="Judge by the outputs for noise, without any data.")] = False,
    protect: Protect = None,
    only: Only = None,
    kinds: Kinds = None,
    round_to: RoundTo = 1,
    workers: Annotated[int, typer.Option(help="Processes that judge networks at the same time.")] = 1,
    init: Annotated[Path | None, typer.Option(help="FILE of another search's front, to start from.")] = None,
    plot: Annotated[Path | None, typer.Option(help="FILE.png or .svg for a picture of the front.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search for the best trade-offs between what a pruned network is worth and what it costs.

    With --out a search that was killed goes on, called again with the same options.
    """
    with errors_in_one_line(debug), _live() as watch:
        front = mp.explore(
            mp.trace(*network(target)) if noise else targets.task(target),
            backend=backend,
            objectives=objectives.split(",") if objectives else None,
            evaluations=evaluations,
            budget=budget,
            out=out,
            seed=seed,
            data="noise" if noise else None,
            protect=protect or (),
            only=only or (),
            kinds=kinds.split(",") if kinds else None,
            round_to=round_to,
            workers=workers,
            init=None if init is None else mp.Front.load(init),
            watch=watch,
        )
        if plot is not None:
            front.plot(plot)
    report_front(front, out, as_json)


@contextlib.contextmanager
def _live() -> Iterator[Watch | None]:
    """A table on a terminal's standard error that follows the search: evaluations, hypervolume, points of the front."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield None
        return
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        yield lambda front, spent, allowed: live.update(_progress(front, spent, allowed))


def _progress(front: mp.Front, spent: int, allowed: int) -> Table:
    failed = f", {front.failed} failed" if front.failed else ""
    title = f"{spent} of {allowed} evaluations, hypervolume {front.hypervolume():.4f}{failed}"
    table = Table(*front.objectives, title=title)
    step = max(1, -(-len(front) // _SHOWN))
    for point in front.points[::step]:
        table.add_row(*(f"{value:.4g}" for value in point.objectives))
    return table


def report_front(front: mp.Front, out: Path | None, as_json: bool) -> None:
    """Prints a front, for people or for machines; the knee is marked."""
    rows = [dict(zip(front.objectives, point.objectives, strict=True)) for point in front.points]
    if as_json:
        print_json(
            {
                "out": None if out is None else str(out),
                "evaluations": front.evaluations,
                "failed": front.failed,
                "forwards": front.forwards,
                "hypervolume": front.hypervolume(),
                "knee": front.points.index(front.knee()),
                "points": [
                    {"objectives": row, "reached": dict(point.plan.reached)}
                    for row, point in zip(rows, front.points, strict=True)
                ],
            }
        )
        return
    where = "" if out is None else f", saved to {out}"
    knee = front.knee()
    table = Table(*front.objectives, title=f"{len(front)} points of {front.evaluations} evaluations{where}")
    for row, point in zip(rows, front.points, strict=True):
        table.add_row(*(f"{value:.4g}" for value in row.values()), style="bold" if point is knee else None)
    console = Console()
    console.print(table)
    console.print(Text(f"hypervolume {front.hypervolume():.4f}; the knee of the front is in bold"))
    if front.failed:
        console.print(Text(f"note: {front.failed} networks could not be judged"))
