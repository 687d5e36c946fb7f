"""Processes that train one model together, each on its share of the rows; see `torch.distributed`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from metaprune.graphs.errors import OptionError

_PATIENCE = timedelta(days=7)  # all wait for the first while it measures a zoo


@dataclass(frozen=True)
class Team:
    """A group of processes; by default one process alone, for which nothing here does anything.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Team:
        """The processes of torch's default group, where one was made; else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return Team(dist.get_rank(), dist.get_world_size())
        return Team()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of those that all work on."""
        return rows[self.rank :: self.size]

    def share_equally(self, rows: Tensor) -> Tensor:
        """The same, where means over each process's rows are averaged.

        Raises:
            OptionError: They do not go round.
        """
        if len(rows) % self.size:
            raise OptionError(f"batch: {len(rows)} networks in a step can not be shared by {self.size} processes")
        return self.share(rows)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Puts the means over processes into tensors that all have, as one message."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_((mean / self.size).view_as(tensor))

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Puts the sums over processes into tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The first process does what is in the block, then all others do, who find its files."""
        if not self.leads:
            self.wait()
        try:
            yield
        finally:
            if self.leads:
                self.wait()


@contextmanager
def joined() -> Iterator[Team]:
    """Joins the processes that `torchrun` started, over gloo; without it this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Team()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Team.here()
    finally:
        dist.destroy_process_group()
