"""What the commands share: options, targets, errors in one line, a progress bar, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from metaprune import targets
from metaprune.graphs.errors import MetapruneError
from metaprune.training import Progress as Report

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
RoundTo = Annotated[int, typer.Option(min=1, help="Keep multiples of this many units.")]
Kinds = Annotated[str | None, typer.Option(help="Prune these kinds only, for instance heads,ffn.")]
Only = Annotated[list[str] | None, typer.Option(help="Prune these groups or tensors only (glob, repeatable).")]
Protect = Annotated[list[str] | None, typer.Option(help="Keep these groups or tensors whole (glob, repeatable).")]


@contextlib.contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Ends the process with exit code 2 and one line where a request can not be met; with `debug` the error passes."""
    try:
        yield
    except (MetapruneError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}"), style="red")
        raise typer.Exit(2) from error


@contextlib.contextmanager
def progress_bar(steps: str) -> Iterator[Report]:
    """A progress bar on standard error, as a function of the steps done and the steps in all, 0 where unknown."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_interactive) as bar:
        row = bar.add_task(steps, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total or None)


def network(target: str) -> tuple[Any, Any]:
    """Model and example inputs of a target."""
    return targets.saved(target) if Path(target).is_dir() else targets.build(target)


def print_json(value: object) -> None:
    """Writes JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
