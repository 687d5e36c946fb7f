"""Processes that judge networks at the same time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.search.evaluate import Fidelity, Measure
from metaprune.search.ledger import Result
from metaprune.search.space import Configs


class Workers:
    """Forked processes, each with the network and its data as they were when it began, and one thread.

    Called with configurations of shape [n, variables] it gives their results in order, whichever process is done
    first. With one worker the calling process does all of it. A worker ends when the process that began it is gone,
    however that ended.
    """

    def __init__(self, measure: Measure, count: int) -> None:
        """Takes what measures, and how many processes; raises `OptionError` for a number that means nothing."""
        if type(count) is not int or count < 1:
            raise OptionError(f"workers: at least 1 is needed, not {count!r}")
        if count > 1 and "fork" not in multiprocessing.get_all_start_methods():
            raise OptionError("workers: this system can not fork a process")
        if count > 1 and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise OptionError("workers: a process that uses an accelerator can not be forked; workers=1 is needed")
        self._measure = measure
        self._count = count
        self._lines: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("fork")
        for _ in range(self._count if self._count > 1 else 0):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._measure, theirs, [*self._lines, mine]), daemon=True)
            with warnings.catch_warnings():  # idle threads of a library hold no lock that a child needs
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._lines.append(mine)
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.join()

    def __call__(self, configs: Configs, fidelity: Fidelity) -> Iterator[Result]:
        """Results of configurations, in order.

        Raises:
            MetapruneError: A worker is gone, or what a worker raised.
        """
        if not self._lines:
            for row in configs:
                yield self._measure(row, fidelity)
            return
        free = list(self._lines)
        running: dict[int, Connection] = {}
        done: dict[int, Result] = {}
        asked = 0
        for number in range(len(configs)):
            while number not in done:
                while free and asked < len(configs):
                    free[-1].send((configs[asked], fidelity))
                    running[asked] = free.pop()
                    asked += 1
                self._collect(running, done, free)
            yield done.pop(number)

    def _collect(self, running: dict[int, Connection], done: dict[int, Result], free: list[Connection]) -> None:
        """Waits for at least one answer."""
        ready = multiprocessing.connection.wait(list(running.values()))
        for number, line in list(running.items()):
            if line in ready:
                try:
                    answer = line.recv()
                except EOFError:
                    raise MetapruneError("workers: a process ended before it was done, as by want of memory") from None
                del running[number]
                if isinstance(answer, BaseException):
                    raise answer
                done[number] = answer
                free.append(line)


def _serve(measure: Measure, line: Connection, others: list[Connection]) -> None:
    """Answers until the other end is closed; `others` are ends of the first process that a fork has copied."""
    for other in others:
        other.close()
    torch.set_num_threads(1)
    while True:
        try:
            row, fidelity = line.recv()
        except EOFError:
            os._exit(0)  # nothing that the first process has registered for its end is to run here
        try:
            line.send(_answer(measure, row, fidelity))
        except BrokenPipeError:
            os._exit(0)


def _answer(measure: Measure, row: NDArray[np.int64], fidelity: Fidelity) -> Result | Exception:
    try:
        return measure(row, fidelity)
    except Exception as error:  # it is raised again where the answer is read
        return error
