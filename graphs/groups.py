"""Groups: units that stand on the same axes, so that any number of them may go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a tensor that goes with each unit of a group.

    Attributes:
        tensor: Name of the tensor.
        dim: Its dimension.
        index: Positions along that dimension, shape [units, positions per unit].
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are pruned by number: any subset with at least `minimum` members is a legal choice.

    Attributes:
        name: Unique name, after the module that writes the units.
        kind: `channels`, `residual`, `ffn`, `heads`, `head_dim`, `kv_group`, `query_group`, `conv_group`, `hidden`, ...
        size: Number of units.
        slices: Parameter slices of the units.
        reason: Why nothing of it can go; empty for a prunable group.
        minimum: Least number of units that must stay.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    reason: str = ""
    minimum: int = 1

    @property
    def pinned(self) -> bool:
        """Whether nothing of it can go."""
        return bool(self.reason)

    def __repr__(self) -> str:
        return f"Group({self.name}, {self.kind}, {self.size} units{', pinned: ' + self.reason if self.reason else ''})"
