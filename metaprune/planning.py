"""From a graph and a budget to a plan: which groups may shrink, what their units are worth, how many stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune import criteria
from metaprune.curves import Sensitivity
from metaprune.graphs.cost import Costs
from metaprune.graphs.errors import BudgetInfeasible, OptionError, check_seed
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.judge import Judge
from metaprune.latency import LatencyTable
from metaprune.ranking import Scores, default_criterion, unit_scores
from metaprune.search.allocate import MEASURED
from metaprune.search.allocate import find as find_allocator
from metaprune.search.budget import Budget
from metaprune.search.problem import Counts, Kept, Problem, check_feasible, finite
from metaprune.selection import Choice, around, nearest, reranked
from metaprune.sensing import sensitivity
from metaprune.tables import ANCHORED

REFINED = "refined"
JUDGED = (MEASURED, "spdy", REFINED)
"""Allocators that measure pruned networks."""
CURVED = ("dp", "milp", "lagrange", "spdy")
"""Allocators that work on curves, which are found where there are data and no criterion is named.

The layers that read a group are refitted before its harm is measured, as those of the pruned network will be. Without
the fit harm grows no further once the outputs are spoilt, and at low budgets some group seems to be for free; curves to
second order say too little of networks that keep a few units of each group.
"""

SCORED = ("global", "sap", "cost")
"""Allocators that compare scores of single units between groups."""

_FREE: Mapping[str, Any] = {"round_to": 1, "protect": [], "only": [], "kinds": None}
"""Options that keep units from going, and the values at which they do not."""
_COUNTED_IN_STEPS = ("channels", "residual", "ffn", "hidden", "other")


def make_plan(
    graph: Graph,
    budget: str = "macs=0.5",
    criterion: str | Scores | Sensitivity | None = None,
    allocator: str | None = None,
    data: Any = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    only: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    latency: LatencyTable | None = None,
) -> Plan:
    """See `metaprune.plan`; scores of the units that are there already are given as `criterion`, without data."""
    allocator, natural = _resolved(criterion, allocator, data)
    posed = pose(graph, budget, round_to, protect, only, kinds, seed, latency)
    found = _ranked(graph, posed.groups, criterion, allocator, data, seed)
    problem = posed.problem(found)
    chosen = _chosen(graph, posed.groups, problem, found.criterion, allocator, natural, data)
    provenance: dict[str, Any] = {"criterion": found.criterion, "allocator": allocator, "samples": found.samples}
    if found.about:
        provenance["curves"] = dict(found.about)
    if problem.record:
        provenance[MEASURED if allocator == MEASURED else "solver"] = problem.record
    return posed.plan(chosen, provenance)


@dataclass(frozen=True, eq=False)
class Posed:
    """What a plan is asked for, before anything is known of the units.

    Attributes:
        graph: The network.
        budget: The budget.
        groups: The groups that may shrink.
        free: Their indices among the graph's groups.
        costs: Cost polynomials, with measured latency where it counts.
        step: For each of these groups, the step its kept count moves in.
        minimum: For each, the least kept count.
        options: What was asked, for the plan's provenance.
        latency: Table of measured operators, if any.
    """

    graph: Graph
    budget: Budget
    groups: Sequence[Group]
    free: Sequence[int]
    costs: Costs
    step: Kept
    minimum: Kept
    options: Mapping[str, Any]
    latency: LatencyTable | None = None

    def problem(self, scores: Scores) -> Problem:
        """The problem of an allocator, with the scores, and curves if any, of units of at least these groups."""
        units = [scores.units[group.name] for group in self.groups]
        curves = None if scores.curves is None else [scores.curves[group.name] for group in self.groups]
        return Problem(self.costs, self.free, units, self.budget, self.step, self.minimum, self.options["seed"], curves)

    def plan(self, chosen: Choice, provenance: Mapping[str, Any]) -> Plan:
        """The plan of a choice; its provenance has the options too."""
        costs = self.costs
        counts = costs.sizes.copy()
        counts[list(self.free)] = chosen.kept
        reached = {
            c: _fraction(costs.evaluate(c, counts[None])[0], costs.evaluate(c, costs.sizes[None])[0])
            for c in costs.terms
        }
        about = {**provenance, **self.options}
        if self.latency is not None:
            whole, cut = self.latency.predictions(self.graph, [costs.sizes, counts])
            about["latency"] = {**self.latency.provenance(self.graph), "predicted": _fraction(cut, whole)}
        return Plan(chosen.keep(self.groups), self.graph.fingerprint, self.budget.text, reached, about)


def pose(
    graph: Graph,
    budget: str = "macs=0.5",
    round_to: int = 1,
    protect: Iterable[str] = (),
    only: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    latency: LatencyTable | None = None,
) -> Posed:
    """Reads the options of a plan; arguments and errors are those of `metaprune.plan`."""
    goal = Budget.parse(budget)
    check_seed(seed)
    protect, only = patterns("protect", protect), patterns("only", only)
    kinds = None if kinds is None else patterns("kinds", kinds)
    free, step, least = may_shrink(graph, round_to, protect, only, kinds)
    costs = graph.coupling.costs
    if latency is None and any(name == "latency" for name, _ in goal.limits):
        latency = LatencyTable()
    if latency is not None:
        costs = costs.extended({"latency": latency.terms(graph, _steps(graph, free, step), seed=seed)})
    options = {
        "round_to": round_to,
        "protect": list(protect),
        "only": list(only),
        "kinds": None if kinds is None else list(kinds),
        "seed": seed,
    }
    posed = Posed(graph, goal, [graph.groups[i] for i in free], free, costs, step, least, options, latency)
    _check_attainable(posed)
    return posed


def _check_attainable(posed: Posed) -> None:
    """Raises `BudgetInfeasible` where no legal plan is within the budget; options but for which one were are named."""
    asked = {name: posed.options[name] for name in _FREE if posed.options[name] != _FREE[name]}

    def check(options: Mapping[str, Any]) -> None:
        free, step, least = may_shrink(posed.graph, **{**_FREE, **options})
        check_feasible(Problem(posed.costs, free, [], posed.budget, step, least))

    def within(options: Mapping[str, Any]) -> bool:
        try:
            check(options)
        except BudgetInfeasible:
            return False
        return True

    try:
        if posed.budget.width is None:
            check(asked)
    except BudgetInfeasible as error:
        alone = [name for name in asked if within({other: asked[other] for other in asked if other != name})]
        named = " or ".join(alone) or (" and ".join(asked) if within({}) else "")
        hint = f", or less without {named}" if named else ""
        raise BudgetInfeasible(f"{error}{hint}", error.attainable) from None


def _steps(graph: Graph, free: Sequence[int], step: Kept) -> Kept:
    """The step of every group's kept count, shape [groups]; one that stays whole has its size for a step."""
    steps = np.array([group.size for group in graph.groups], dtype=np.int64)
    steps[free] = step
    return steps


def uses_data(criterion: str | Scores | Sensitivity | None, allocator: str | None) -> bool:
    """Whether a plan looks at data where there are any."""
    if allocator in JUDGED or criterion is None:
        return True
    return isinstance(criterion, str) and criteria.find(criterion).data


def _resolved(criterion: str | Scores | Sensitivity | None, allocator: str | None, data: Any) -> tuple[str, str]:
    """The allocator, and the one that goes with the criterion; raises `OptionError`."""
    if isinstance(criterion, Sensitivity):
        natural = "dp"
    else:
        name = criterion.criterion if isinstance(criterion, Scores) else default_criterion(criterion, data)
        natural = "cost" if criteria.find(name).additive else "global"
    if allocator is None:
        allocator = MEASURED if criterion is None and data is not None else natural
    if allocator != MEASURED:
        find_allocator(allocator)
    if isinstance(criterion, Sensitivity) and allocator in SCORED:
        raise OptionError(
            f"allocator: {allocator!r} adds up scores of single units, and curves have none; see {natural!r}"
        )
    if allocator in JUDGED and data is None:
        raise OptionError(f"data: allocator {allocator!r} needs calibration data")
    if isinstance(criterion, Sensitivity) and data is not None and allocator not in JUDGED:
        raise OptionError(f"data: with curves that are there already, allocator {allocator!r} does not use data")
    return allocator, natural


def _ranked(
    graph: Graph,
    groups: Sequence[Group],
    criterion: str | Scores | Sensitivity | None,
    allocator: str,
    data: Any,
    seed: int,
) -> Scores:
    """Scores of the units of some groups, with curves where an allocator works on those and none are there."""
    if isinstance(criterion, Sensitivity):
        criterion.check(graph)
        return Scores.of(criterion)
    if isinstance(criterion, Scores):
        return criterion
    name = default_criterion(criterion, data)
    if criterion is None and data is not None and allocator in CURVED:
        return Scores.of(sensitivity(graph, data, name, method=ANCHORED, compensate=True, seed=seed))
    looked_at = data if allocator not in JUDGED or criteria.find(name).data else None
    values, samples = unit_scores(graph, groups, name, looked_at, seed)
    return Scores(name, {group.name: value for group, value in zip(groups, values, strict=True)}, samples)


def _chosen(
    graph: Graph,
    groups: Sequence[Group],
    problem: Problem,
    criterion: str,
    allocator: str,
    natural: str,
    data: Any,
) -> Choice:
    """What the allocator keeps of the groups."""
    if not groups:
        check_feasible(problem)
        return Choice("", problem.scores, np.empty(0, dtype=np.int64))
    judge = Judge(graph, data, seed=problem.seed) if allocator in JUDGED else None
    if judge is not None:
        problem = replace(problem, measure=partial(_losses, judge, groups, problem.scores))
    kept = find_allocator(natural if allocator == MEASURED else allocator)(problem)
    if judge is None or allocator not in (MEASURED, REFINED):
        return Choice(allocator, problem.scores, kept)
    by_norm, _ = unit_scores(graph, groups, "magnitude")
    if allocator == REFINED:
        choice = Choice(REFINED, problem.scores, kept)
        if "loss" not in problem.record:  # the budget settles everything
            return choice
        chosen, losses = reranked(groups, choice, problem.record["loss"], criterion, by_norm, judge)
        problem.record.update({name: finite(loss) for name, loss in losses.items()})
        return chosen
    choices = around(problem, kept, natural, {criterion: problem.scores, "magnitude": by_norm})
    chosen, losses = nearest(groups, choices, judge)
    problem.record.clear()
    problem.record.update({name: finite(loss) for name, loss in losses.items()})
    return chosen


def _losses(judge: Judge, groups: Sequence[Group], scores: Sequence[NDArray[np.float64]], kept: Kept) -> Counts:
    """Distortion of each of several allocations, shape [plans, groups], with units ranked by their scores."""
    return np.array(judge.distortions([Choice("", scores, counts).keep(groups) for counts in kept]))


def may_shrink(
    graph: Graph,
    round_to: int = 1,
    protect: Sequence[str] = (),
    only: Sequence[str] = (),
    kinds: Sequence[str] | None = None,
) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the groups that may shrink, the step in which each may, and the least that each must keep.

    Raises:
        OptionError: An option has no meaning, or names nothing that there is.
    """
    if type(round_to) is not int or round_to < 1:
        raise OptionError(f"round_to: must be a positive whole number, not {round_to!r}")
    groups = graph.groups
    known = {group.kind for group in groups}
    if kinds is not None and not set(kinds) <= known:
        raise OptionError(f"kinds: {sorted(set(kinds) - known)[0]!r} is none of {', '.join(sorted(known))}")
    for option, globs in (("protect", protect), ("only", only)):
        for pattern in globs:
            if not any(_matches(group, (pattern,)) for group in groups):
                raise OptionError(f"{option}: {pattern!r} matches no group and no tensor")
    free = [
        i
        for i, group in enumerate(groups)
        if not group.pinned
        and group.size > group.minimum
        and not _matches(group, protect)
        and (not only or _matches(group, only))
        and (kinds is None or group.kind in kinds)
    ]
    step = [round_to if groups[i].kind in _COUNTED_IN_STEPS and groups[i].size >= round_to else 1 for i in free]
    least = [min(max(groups[i].minimum, s if s > 1 else 1), groups[i].size) for i, s in zip(free, step, strict=True)]
    return free, np.array(step, dtype=np.int64), np.array(least, dtype=np.int64)


def _fraction(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def patterns(option: str, value: Iterable[str]) -> tuple[str, ...]:
    """A name or several as a tuple; raises `OptionError` for anything else."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for item in found:
        if not isinstance(item, str):
            raise OptionError(f"{option}: names are needed, not {item!r}")
    return found


def _matches(group: Group, patterns: Sequence[str]) -> bool:
    names = [group.name, *(part.tensor for part in group.slices)]
    # names that the graph gives may have brackets, which a glob reads as a set of characters
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns for name in names)
