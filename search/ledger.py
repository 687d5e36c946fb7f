"""The ledger of a search: every evaluation is one line, on the disk before the next begins."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from metaprune.graphs.errors import LoadError, MetapruneError, OptionError

SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """What one evaluation gave.

    Attributes:
        values: Objectives; None where the network does not run or a value is not finite.
        forwards: Its cost, as forward passes of one sample through the dense network.
        note: Why there are no values.
    """

    values: tuple[float, ...] | None
    forwards: float
    note: str = ""


class Ledger:
    """Results by key, appended to a file that survives any kill.

    The first line says which search it is. A line that a kill cut short, the last, is dropped: what it stood for is
    evaluated again, to the same bits. Every line carries a checksum; any other damage is an error. The file is locked
    while it is open.

    Attributes:
        path: The file.
        results: What is known, by key.
    """

    def __init__(self, path: Path, search: Mapping[str, Any]) -> None:
        """Opens or begins a ledger.

        Args:
            path: The file.
            search: What its results depend on, as plain data.

        Raises:
            OptionError: The file is of another search, or in use.
            LoadError: The file is damaged.
            MetapruneError: The file can not be opened.
        """
        self.path = path
        self.results: dict[str, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise MetapruneError(f"out: {path} can not be opened: {error.strerror or error}") from error
        try:
            self._lock()
            self._read(json.loads(json.dumps({"schema": SCHEMA, **search})))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, result: Result) -> None:
        """Writes a result; it is on the disk when this returns."""
        values = None if result.values is None else list(result.values)
        self._append({"key": key, "values": values, "forwards": result.forwards, "note": result.note})
        self.results[key] = result

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"out: {self.path} is in use by another search") from None

    def _read(self, search: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._append(search)
            return
        header = self._body(lines[0], 1)
        for name in (*search, *header):
            if header.get(name) != search.get(name):
                raise OptionError(f"out: {self.path.parent} holds another search, with other {name}")
        for number, line in enumerate(lines[1:], 2):
            key, result = self._result(self._body(line, number), number)
            self.results[key] = result

    def _body(self, line: bytes, number: int) -> dict[str, Any]:
        check, _, text = line.partition(b" ")
        if check != _checksum(text):
            raise LoadError(f"{self.path}: line {number} is damaged")
        body = json.loads(text)
        if not isinstance(body, dict):
            raise LoadError(f"{self.path}: line {number} is damaged")
        return body

    def _result(self, body: dict[str, Any], number: int) -> tuple[str, Result]:
        try:
            values = body["values"]
            result = Result(
                None if values is None else tuple(map(float, values)), float(body["forwards"]), str(body["note"])
            )
            key = str(body["key"])
        except (KeyError, TypeError, ValueError):
            raise LoadError(f"{self.path}: line {number} is no evaluation") from None
        if not all(map(math.isfinite, (*(result.values or ()), result.forwards))):
            raise LoadError(f"{self.path}: line {number} holds a value that is not finite")
        return key, result

    def _append(self, body: Mapping[str, Any]) -> None:
        text = json.dumps(body, allow_nan=False).encode()
        self._file.write(_checksum(text) + b" " + text + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _checksum(text: bytes) -> bytes:
    return b"%08x" % crc32(text)
