"""Atomic files: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from metaprune.graphs.errors import MetapruneError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary file in the same folder, syncs it, and renames it over `path`.

    Raises:
        MetapruneError: The file can not be written.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise MetapruneError(f"{path}: can not be written: {error.strerror or error}") from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
