"""The search space of a network: configurations as vectors of levels, their costs, and moves among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metaprune.graphs.errors import LoadError, OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.polynomial import Monomials
from metaprune.search.budget import COUNTED, Budget, infeasible
from metaprune.search.variables import Counts, Variable, Width, best_first, ladder, read

Configs = NDArray[np.int64]
"""Levels by variable, shape [configurations, variables]."""

SCHEMA = 1
LEVELS = 16  # choices of a group unless told otherwise
_HALVINGS = 40
_STEEPEST = 8.0  # log of the largest exponent that tilts a sample towards either end


class CostModel(Protocol):
    """Costs of networks by the kept counts of their groups; `metaprune.graphs.cost.Costs` is one."""

    @property
    def sizes(self) -> Counts:
        """Full size of every group, shape [groups]."""

    def evaluate(self, what: str, kept: Counts) -> Counts:
        """A cost for kept counts of shape [plans, groups]; shape [plans]. It never falls when a count rises."""

    def monomials(self, what: str, place: Mapping[int, int]) -> Monomials:
        """The cost multiplied out over the groups in `place`, which gives their variables, the others whole."""


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All that a search may choose.

    A configuration is one level per variable. All methods take and give many at once, shape [configurations,
    variables], and are vectorised over them.

    Attributes:
        variables: What is decided.
        costs: The cost model.
        graph: Fingerprint of the graph that plans are made for.
        named: Names of the costs that the model knows.
    """

    variables: tuple[Variable, ...]
    costs: CostModel
    graph: str
    named: tuple[str, ...] = COUNTED

    def __post_init__(self) -> None:
        if not self.variables:
            raise OptionError("search space: no group may shrink, so there is nothing to choose")

    @staticmethod
    def of(
        graph: Graph,
        free: Sequence[int],
        scores: Sequence[Counts],
        step: Sequence[int] | NDArray[np.int64],
        minimum: Sequence[int] | NDArray[np.int64],
        levels: int = LEVELS,
    ) -> SearchSpace:
        """One `Width` for each group that may shrink.

        Args:
            graph: The network.
            free: Indices of the groups.
            scores: Scores of the units of each, shape [size] each; the best stay longest.
            step: For each, what kept counts are multiples of.
            minimum: For each, the least kept count.
            levels: At most this many choices in a group.

        Raises:
            OptionError: Fewer than two levels, or no groups.
        """
        if type(levels) is not int or levels < 2:
            raise OptionError(f"levels: at least 2 are needed in a group, not {levels!r}")
        widths = []
        for i, values, by, least in zip(free, scores, step, minimum, strict=True):
            group = graph.groups[i]
            choices = ladder(group.size, int(least), int(by), levels)
            if len(choices) > 1:
                widths.append(Width(group.name, i, choices, best_first(values)))
        return SearchSpace(tuple(widths), graph.coupling.costs, graph.fingerprint)

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        """Number of levels of each variable, shape [variables]."""
        return np.array([variable.levels for variable in self.variables], dtype=np.int64)

    @property
    def size(self) -> int:
        """Number of configurations."""
        return prod(self.levels.tolist())

    @property
    def least(self) -> Configs:
        """The configuration that keeps least, shape [1, variables]."""
        return np.zeros((1, len(self.variables)), dtype=np.int64)

    @property
    def whole(self) -> Configs:
        """The configuration that takes nothing away, shape [1, variables]."""
        return self.levels[None] - 1

    def checked(self, configs: ArrayLike) -> Configs:
        """Configurations as an array of shape [n, variables]; raises `OptionError` for anything else."""
        array = np.asarray(configs)
        if array.size == 0:
            return np.empty((0, len(self.variables)), dtype=np.int64)
        if array.ndim != 2 or array.shape[1] != len(self.variables) or not np.issubdtype(array.dtype, np.integer):
            raise OptionError(
                f"configurations: integers of shape [n, {len(self.variables)}] are needed, "
                f"not {array.dtype} of shape {list(array.shape)}"
            )
        if ((array < 0) | (array >= self.levels)).any():
            raise OptionError("configurations: a level is out of the range of its variable")
        return array.astype(np.int64)

    # Costs

    def counts(self, configs: Configs) -> Counts:
        """Kept counts of all groups, shape [configurations, groups]."""
        kept = np.tile(np.asarray(self.costs.sizes, dtype=float), (len(configs), 1))
        for variable, levels in zip(self.variables, configs.T, strict=True):
            variable.write(levels, kept)
        return kept

    def fractions(self, cost: str, configs: Configs) -> Counts:
        """The kept fraction of a cost, shape [configurations]."""
        if cost not in self.named:
            raise OptionError(f"cost: {cost!r} is none of {', '.join(self.named)}")
        full = self.costs.evaluate(cost, np.asarray(self.costs.sizes, dtype=float)[None])[0]
        return self.costs.evaluate(cost, self.counts(configs)) / max(float(full), 1e-30)

    def excess(self, configs: Configs, budget: Budget | None) -> Counts:
        """Largest ratio of a cost to its limit, shape [configurations]; at most 1 is within the budget."""
        worst = np.zeros(len(configs))
        for cost, limit in () if budget is None else budget.limits:
            worst = np.maximum(worst, self.fractions(cost, configs) / limit)
        return worst

    def check(self, budget: Budget | None) -> None:
        """Raises `BudgetInfeasible` with what can be attained where no configuration is within the budget.

        Raises:
            OptionError: The budget is a width, which says all that there would be to choose, or of an unknown cost.
        """
        if budget is None:
            return
        if budget.width is not None:
            raise OptionError("budget: a search needs a cost, such as macs=0.5; width leaves it nothing to choose")
        for cost, limit in budget.limits:
            if cost not in self.named:
                raise OptionError(f"budget: a search can be held to {', '.join(self.named)}, not to {cost!r}")
            attainable = float(self.fractions(cost, self.least)[0])
            if attainable > limit:
                raise infeasible(cost, limit, attainable)

    # Configurations

    def repair(self, configs: ArrayLike, budget: Budget | None) -> Configs:
        """Configurations brought within a budget, never over it; those that are within it stay as they are.

        All levels of a configuration are lowered in proportion until it fits; then single levels are given back, those
        first that lost most by rounding, until no single one that was wanted still fits.

        Raises:
            BudgetInfeasible: Nothing is within the budget.
        """
        self.check(budget)
        wanted = self.checked(configs)
        found = wanted.copy()
        over = np.flatnonzero(self.excess(wanted, budget) > 1)
        if len(over):
            found[over] = self._lowered(wanted[over], budget)
        return found

    def _lowered(self, wanted: Configs, budget: Budget | None) -> Configs:
        low, high = np.zeros(len(wanted)), np.ones(len(wanted))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = self.excess(np.floor(wanted * middle[:, None]).astype(np.int64), budget) <= 1
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        exact = wanted * low[:, None]
        found = np.floor(exact).astype(np.int64)
        order = np.argsort(found - exact, axis=1, kind="stable").T  # [variables, configurations]
        rows = np.arange(len(wanted))
        while True:
            before = found
            for column in order:
                more = found.copy()
                more[rows, column] = np.minimum(more[rows, column] + 1, wanted[rows, column])
                found = np.where((self.excess(more, budget) <= 1)[:, None], more, found)
            if (found == before).all():
                return found

    def sample(self, generator: np.random.Generator, count: int, budget: Budget | None = None) -> Configs:
        """Random configurations whose costs cover the whole range instead of its middle.

        Levels that are drawn uniformly make networks of about half the cost, the more so the more variables there
        are. Here a configuration is drawn uniformly, u in [0, 1) by variable, and tilted: levels are those of
        u^(1 / t), with the t that brings the cost nearest to a target from below (t = 1 is the plain draw). Targets
        are evenly spread: any first part of a longer sample covers the range too, and equals the shorter sample.

        Args:
            generator: Source of randomness.
            count: How many.
            budget: All are within it. The first cost of the budget, else the first the model knows, is the one
                whose range is covered.
        """
        self.check(budget)
        limits = dict(budget.limits) if budget is not None else {}
        cost = next(iter(limits), self.named[0])
        shift = float(generator.random())
        draws = generator.random((count, len(self.variables)))
        least = float(self.fractions(cost, self.least)[0])
        targets = least + (_spread(count) + shift) % 1.0 * (min(limits.get(cost, 1.0), 1.0) - least)
        low, high = np.full(count, -_STEEPEST), np.full(count, _STEEPEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = self.fractions(cost, self._tilted(draws, middle)) <= targets
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return self.repair(self._tilted(draws, low), budget)

    def _tilted(self, draws: Counts, tilt: Counts) -> Configs:
        levels = np.floor(self.levels * draws ** np.exp(-tilt)[:, None]).astype(np.int64)
        return np.minimum(levels, self.levels - 1)

    def uniform(self, fractions: ArrayLike) -> Configs:
        """The diagonal: for each fraction, shape [n], the configuration whose variables all come nearest to it."""
        wanted = np.atleast_1d(np.asarray(fractions, dtype=float))
        columns = [
            np.abs(variable.fractions[None] - wanted[:, None]).argmin(axis=1)  # [n]
            for variable in self.variables
        ]
        return np.stack(columns, axis=1).astype(np.int64)

    def neighbours(self, config: ArrayLike) -> Configs:
        """All configurations that differ in one variable by one level; `config` has shape [variables]."""
        (own,) = self.checked(np.asarray(config)[None])
        steps = np.eye(len(own), dtype=np.int64)
        around = np.concatenate([own - steps, own + steps])
        legal = ((around >= 0) & (around < self.levels)).all(axis=1)
        return around[legal]

    # Plans

    def decode(self, config: ArrayLike, budget: str = "", provenance: Mapping[str, Any] | None = None) -> Plan:
        """The plan that a configuration, shape [variables], stands for."""
        rows = self.checked(np.asarray(config)[None])
        reached = {cost: float(self.fractions(cost, rows)[0]) for cost in self.named}
        return Plan(self.keep(config), self.graph, budget, reached, provenance or {})

    def keep(self, config: ArrayLike) -> dict[str, tuple[int, ...]]:
        """The units that stay, by group, where any go, for one configuration, shape [variables]."""
        (row,) = self.checked(np.asarray(config)[None])
        found: dict[str, tuple[int, ...]] = {}
        for variable, level in zip(self.variables, row.tolist(), strict=True):
            found |= variable.edit(level)
        return found

    def encode(self, plan: Plan) -> NDArray[np.int64]:
        """The configuration nearest to a plan, shape [variables]; a plan that this space made gives its own.

        Counts are taken over as the nearest levels. Which units stay is the space's own ranking.

        Raises:
            PlanError: The plan is of another network.
        """
        if plan.graph and plan.graph != self.graph:
            raise PlanError("the plan was made for another network: its axis table differs")
        return np.array([variable.nearest(plan.keep) for variable in self.variables], dtype=np.int64)

    def key(self, config: ArrayLike) -> str:
        """Canonical hash of a configuration, shape [variables], in this space: equal for equal networks only."""
        (row,) = self.checked(np.asarray(config)[None])
        return hashlib.sha256(f"{self.digest}:{row.tolist()}".encode()).hexdigest()[:32]

    # Files

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the space as JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The space as JSON text, without the cost model, which follows from the graph."""
        variables = [variable.to_dict() for variable in self.variables]
        return json.dumps({"schema": SCHEMA, "graph": self.graph, "costs": list(self.named), "variables": variables})

    @staticmethod
    def from_json(text: str, graph: Graph) -> SearchSpace:
        """The space in a JSON text.

        Raises:
            LoadError: The text is damaged, or of another network than `graph`.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"search space: not JSON: {error}") from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA or not isinstance(body.get("variables"), list):
            raise LoadError(f"search space: schema {SCHEMA} with a list of variables is needed")
        if body.get("graph") != graph.fingerprint:
            raise LoadError("search space: it is of another network: the axis table differs")
        named = tuple(str(cost) for cost in body.get("costs", COUNTED))
        return SearchSpace(tuple(map(read, body["variables"])), graph.coupling.costs, graph.fingerprint, named)


def _spread(count: int) -> Counts:
    """The first numbers of the van der Corput sequence in base 2: every first part of it is evenly spread in [0, 1)."""
    bits = np.arange(count)[:, None] >> np.arange(32) & 1  # [count, 32]
    spread: Counts = (bits * 0.5 ** np.arange(1, 33)).sum(axis=1)
    return spread
