"""Named lists of features, so that what was fitted on one list is never used on another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

STRUCTURE = (
    "log size",
    "log groups",
    "depth of writers",
    "depth of readers",
    "log writers",
    "log readers",
    "share of writers with a norm",
    "log taps of readers",
    "in grouped layers",
    "share of macs",
    "share of params",
    "share of bytes",
)
"""What a group is, whatever its weights."""

WEIGHTS_CUT = (
    "log kept fraction",
    "log gone fraction",
    "log kept macs",
    "log kept params",
    "log energy gone",
    "log norm scale gone",
    "log reader energy gone",
    "log reader energy gone, most",
)
WEIGHTS_SPREAD = ("energy q90/q50", "energy q50/q10", "scale q90/q50", "scale q50/q10")
DATA_CUT = (
    "log Fisher gone",
    "log Fisher gone, relative",
    "log block Fisher gone",
    "log block Fisher gone, relative",
    "log block Fisher gone at temperature 1",
    "log block Fisher gone at temperature 1, relative",
    "log slope gone",
    "log reader error",
    "log reader error, most",
    "log reader error after a fit",
    "log reader error after a fit, most",
    "share that no fit mends",
)
DATA_SPREAD = ("Fisher q90/q50", "Fisher q50/q10", "rank of gradients", "log Fisher of all groups")

WEIGHTS_UNIT = ("log energy over mean", "place by energy", "log norm scale over mean", "place by norm scale")
DATA_UNIT = (
    "log Fisher",
    "log Fisher over mean",
    "log Fisher at temperature 1",
    "log Fisher at temperature 1 over mean",
    "log slope over mean",
    "place in the order",
    "log activation energy over mean",
    "log error after a fit over mean",
)
GRAPH_CUT = ("log plain loss by the graph head", "log compensated loss by the graph head")
GRAPH_UNIT = ("log loss by the graph head",)


@dataclass(frozen=True)
class Schema:
    """The features of cuts, `(group, keep count)`, and of units, in order.

    Attributes:
        cut: Names of the features of a cut.
        unit: Names of the features of a unit.
    """

    cut: tuple[str, ...]
    unit: tuple[str, ...]

    @staticmethod
    def of(data: bool, states: int = 0) -> Schema:
        """The features with or without calibration data, and with an encoder's unit states of some width."""
        group = (*STRUCTURE, *WEIGHTS_SPREAD, *(DATA_SPREAD if data else ()))
        cut = (*group, *WEIGHTS_CUT, *(DATA_CUT if data else ()))
        unit = (*group, *WEIGHTS_UNIT, *(DATA_UNIT if data else ()))
        kept, gone, own = (tuple(f"{what} state {i}" for i in range(states)) for what in ("kept", "gone", "own"))
        return Schema((*cut, *kept, *gone), (*unit, *own))

    def with_graph(self) -> Schema:
        """The same features with what a graph head predicts behind them."""
        return Schema((*self.cut, *GRAPH_CUT), (*self.unit, *GRAPH_UNIT))

    @property
    def digest(self) -> str:
        """SHA-256 of the names in order."""
        return hashlib.sha256(repr((self.cut, self.unit)).encode()).hexdigest()
