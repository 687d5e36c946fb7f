"""Search problems made of formulas, with their exact fronts: back ends are judged on them in milliseconds.

There are 40 groups of 8 units. Group i at w = k / 8 of its width has the damage

    x_i = (1 - w)^(p_i)        with p_i in {1.5, 2, 2.5, 3},

each unit of it costs c_i in {1, ..., 12}, and the whole network's error and cost are

    error = (sum_i a_i x_i + s * sum_i b_i x_i x_(i+1)) / (sum_i a_i + s * sum_i b_i)
    cost  = sum_i c_i k_i / (8 * sum_i c_i),

both 0 at best and 1 at worst. With s = 0 the error is separable; with s > 0 neighbours make each other's damage worse.
Costs are whole numbers times a constant, so dynamic programming over (the width of the last group, the cost so far)
gives the least error at each cost exactly, for any s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.polynomial import Monomials
from metaprune.search.backends import find
from metaprune.search.division import Part
from metaprune.search.evaluate import Evaluator, Fidelity
from metaprune.search.front import Front
from metaprune.search.ledger import Ledger, Result
from metaprune.search.space import SearchSpace
from metaprune.search.variables import Width

GROUPS, UNITS = 40, 8


@dataclass(frozen=True)
class Toy:
    """One such problem; it is a cost model too.

    Attributes:
        interaction: s in the formula.
        seed: Of its coefficients.
        groups: Number of groups.
    """

    interaction: float = 0.0
    seed: int = 0
    groups: int = GROUPS

    @cached_property
    def _drawn(self) -> tuple[NDArray[np.float64], ...]:
        draw = np.random.default_rng(self.seed)
        weights = draw.lognormal(sigma=1.0, size=self.groups)
        units = draw.integers(1, 13, self.groups).astype(float)
        powers = draw.choice([1.5, 2.0, 2.5, 3.0], self.groups)
        pairs = draw.lognormal(sigma=1.0, size=self.groups - 1)
        return weights, units, powers, pairs

    @property
    def sizes(self) -> NDArray[np.float64]:
        return np.full(self.groups, float(UNITS))

    def evaluate(self, what: str, kept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs of kept counts, shape [plans, groups]."""
        assert what == "macs"
        return kept @ self._drawn[1]

    def monomials(self, what: str, place: Mapping[int, int]) -> Monomials:
        """Costs multiplied out over the groups in `place`, the others whole."""
        assert what == "macs"
        prices = {(place[i],): float(c) for i, c in enumerate(self._drawn[1]) if i in place}
        return {(): UNITS * sum(float(c) for i, c in enumerate(self._drawn[1]) if i not in place), **prices}

    @cached_property
    def damage(self) -> NDArray[np.float64]:
        """x_i at each kept count, shape [groups, UNITS + 1]."""
        return (1 - np.arange(UNITS + 1) / UNITS) ** self._drawn[2][:, None]

    def error(self, kept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Errors of kept counts, shape [plans, groups]."""
        weights, _, _, pairs = self._drawn
        x = self.damage[np.arange(self.groups), kept.astype(int)]  # [plans, groups]
        total = x @ weights + self.interaction * (x[:, :-1] * x[:, 1:]) @ pairs
        return total / (weights.sum() + self.interaction * pairs.sum())

    @cached_property
    def space(self) -> SearchSpace:
        choices, order = tuple(range(1, UNITS + 1)), tuple(range(UNITS))
        widths = tuple(Width(f"g{i}", i, choices, order) for i in range(self.groups))
        return SearchSpace(widths, self, f"toy {self.interaction} {self.seed} {self.groups}", ("macs",))

    def measure(self, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        kept = self.space.counts(config[None])
        fraction = self.evaluate("macs", kept)[0] / self.evaluate("macs", self.sizes[None])[0]
        return Result((float(self.error(kept)[0]), float(fraction)), 1.0)

    def evaluator(self, evaluations: int, ledger: Ledger | None = None, parts: int = 0) -> Evaluator:
        division = ToyDivision(self, parts) if parts else None
        return Evaluator(self.space, ("error", "macs"), self.measure, evaluations, ledger=ledger, division=division)

    def search(self, backend: str, evaluations: int, seed: int = 0, init: Front | None = None, parts: int = 0) -> Front:
        """The front that a back end finds, from that of another search if there is one."""
        start = self.space.checked([point.config for point in init.points] if init is not None else [])
        return find(backend)(self.space, self.evaluator(evaluations, parts=parts), None, seed, start)

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """The front: the least error at each cost, without what is dominated, shape [points, 2]."""
        weights, units, _, pairs = self._drawn
        x, cost = self.damage[:, 1:], units.astype(int)
        total = int(UNITS * units.sum())
        best = np.full((UNITS, total + 1), np.inf)  # by width of the last group and cost so far
        best[np.arange(UNITS), cost[0] * np.arange(1, UNITS + 1)] = weights[0] * x[0]
        for i in range(1, self.groups):
            after = np.full_like(best, np.inf)
            for k in range(UNITS):
                joint = self.interaction * pairs[i - 1] * x[i - 1][:, None] * x[i, k]
                step = cost[i] * (k + 1)
                after[k, step:] = (best + joint).min(axis=0)[: total + 1 - step] + weights[i] * x[i, k]
            best = after
        least = best.min(axis=0) / (weights.sum() + self.interaction * pairs.sum())
        stays = least < np.minimum.accumulate(np.concatenate([[np.inf], least[:-1]]))
        return np.stack([least[stays], np.flatnonzero(stays) / total], axis=1)


@dataclass(frozen=True)
class ToyDivision:
    """Runs of consecutive groups; a run's own error is what the formula says with all others whole.

    Attributes:
        toy: The problem.
        count: Number of runs.
    """

    toy: Toy
    count: int
    forwards: float = 0.0

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        units = self.toy._drawn[1]
        runs = np.array_split(np.arange(self.toy.groups), self.count)
        return tuple(
            Part(f"run {i}", tuple(run.tolist()), float(units[run].sum() / units.sum())) for i, run in enumerate(runs)
        )

    def measure(self, number: int, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        assert (np.delete(config, self.parts[number].variables) == UNITS - 1).all()
        share = self.parts[number].share
        return Result((float(self.toy.error(self.toy.space.counts(config[None]))[0]),), share)


SEPARABLE = Toy()
INTERACTING = Toy(interaction=2.0)
