"""A ledger of measured rows: one line of JSON each, kept through any kill, read back to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The rows of all ledgers in a folder, each key once; what a kill cut off is left out, and done again."""
    rows: dict[tuple[Any, ...], Row] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[tuple(row["key"])] = row
    return list(rows.values())


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row to a file, on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a kill cut the last row off; the next one must not be joined to it
                file.write(b"\n")

        def add(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield add
