"""Work for several processes, handed out one item at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from metaprune.graphs.errors import MetapruneError

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Sequence[Item], processes: int = 1) -> Iterator[tuple[Item, Result]]:
    """The items with what the work makes of them, in the order in which they are done.

    A process is given the next item when it is through with one, and ends when the process that gives them does, even
    if that is killed.

    Args:
        work: What is done, here for one process, else in processes that are started anew: something pickle takes.
        items: What it is done to.
        processes: At most so many.

    Raises:
        MetapruneError: A process died.
    """
    if processes == 1:
        yield from ((item, work(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    waiting, busy = list(reversed(items)), {}
    started = []
    try:
        for _ in range(min(processes, len(items))):
            mine, theirs = context.Pipe()
            started.append(context.Process(target=_serve, args=(theirs, work), daemon=True))
            started[-1].start()
            theirs.close()
            busy[mine] = waiting.pop()
            mine.send(busy[mine])
        while busy:
            for channel in wait(list(busy)):
                assert isinstance(channel, Connection)
                item = busy.pop(channel)
                try:
                    result = channel.recv()
                    if waiting:
                        busy[channel] = waiting.pop()
                        channel.send(busy[channel])
                except (EOFError, ConnectionError):
                    raise MetapruneError(f"processes: one died at {item}; what is done is kept") from None
                yield item, result
    finally:
        for process in started:
            process.terminate()
            process.join()


def _serve(channel: Connection, work: Callable[[Item], Result]) -> None:
    """What a process does: one item after the other, until nobody is there to give it another."""
    while True:
        try:
            item = channel.recv()
        except EOFError:
            return
        channel.send(work(item))
