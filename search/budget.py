"""Budgets: what is to be kept, as fractions of the full network's cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.cost import Costs
from metaprune.graphs.errors import BudgetInfeasible, OptionError

COUNTED = ("macs", "params", "bytes")
COSTS = (*COUNTED, "latency")
ROUNDING = 1e-13  # relative error of a cost in seconds: its sums are not of whole numbers


@dataclass(frozen=True)
class Budget:
    """Kept fractions by cost; `width` is the kept fraction of every group's units."""

    text: str
    limits: tuple[tuple[str, float], ...]
    width: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads `"macs=0.5"`, `"latency=0.6,params=0.3"` or `"width=0.5"`; raises `OptionError`."""
        given: dict[str, float] = {}
        for part in str(text).split(","):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            try:
                value = float(number)
            except ValueError:
                raise OptionError(f"budget: {part.strip()!r} is not of the form cost=fraction") from None
            if not equals or name not in (*COSTS, "width"):
                raise OptionError(f"budget: {name!r} is none of {', '.join(COSTS)}, width")
            if not 0 < value <= 1:
                raise OptionError(f"budget: {name} must be a kept fraction above 0 and at most 1, not {number}")
            if name in given:
                raise OptionError(f"budget: {name} is given twice in {text!r}")
            given[name] = value
        width = given.pop("width", None)
        limits = tuple(given.items())
        if width is not None and limits:
            raise OptionError("budget: width can not be combined with a cost")
        return Budget(str(text), limits, width)

    def restated(self, change: Callable[[float], float]) -> str:
        """The budget as text, with `change(fraction)` in the place of every kept fraction."""
        parts = self.limits if self.width is None else (("width", self.width),)
        return ",".join(f"{name}={change(fraction)!r}" for name, fraction in parts)

    def excess(self, costs: Costs, kept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Largest ratio of cost to its limit, for kept counts of shape [plans, groups]; at most 1 is within budget."""
        worst = np.zeros(len(kept))
        for name, fraction in self.limits:
            full = float(costs.evaluate(name, costs.sizes[None])[0])
            worst = np.maximum(worst, costs.evaluate(name, kept) / max(full * fraction, 1e-30) - ROUNDING)
        return worst


def infeasible(name: str, fraction: float, attainable: float) -> BudgetInfeasible:
    """The error of a cost that can not be brought down to a fraction; the least is rounded up, so it can be asked for.

    Args:
        name: Of the cost.
        fraction: What was asked for.
        attainable: The least kept fraction.
    """
    least = math.ceil(attainable * 1e4 - 1e-9) / 1e4
    return BudgetInfeasible(
        f"budget: {name}={fraction:.6g} can not be met; the least is {name}={least:.4f}", attainable
    )
