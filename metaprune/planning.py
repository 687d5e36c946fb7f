"""From a graph and a budget to a plan: which groups may shrink, what their units are worth, how many stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune import criteria
from metaprune.graphs.errors import OptionError
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.latency import LatencyTable
from metaprune.search.allocate import MEASURED
from metaprune.search.allocate import find as find_allocator
from metaprune.search.budget import Budget
from metaprune.search.problem import Problem, check_feasible
from metaprune.selection import Choice, around, nearest
from metaprune.statistics import collect, collect_second_moments

_COUNTED_IN_STEPS = ("channels", "residual", "ffn", "hidden", "other")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a criterion makes of the units of all groups that are not pinned.

    Attributes:
        criterion: Its name.
        units: Scores by group, shape [size] each.
        samples: Number of samples that were looked at.
    """

    criterion: str
    units: Mapping[str, NDArray[np.float64]]
    samples: int


def score(graph: Graph, criterion: str | None = None, data: Any = None, seed: int = 0) -> Scores:
    """Scores for plans at several budgets; arguments and errors are those of `unit_scores` and `metaprune.plan`."""
    name = default_criterion(criterion, data)
    free = [group for group in graph.groups if not group.pinned]
    values, samples = unit_scores(graph, free, name, data, seed)
    return Scores(name, {group.name: value for group, value in zip(free, values, strict=True)}, samples)


def make_plan(
    graph: Graph,
    budget: str = "macs=0.5",
    criterion: str | Scores | None = None,
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
    goal = Budget.parse(budget)
    scored = criterion if isinstance(criterion, Scores) else None
    named = criterion.criterion if isinstance(criterion, Scores) else criterion
    criterion, allocator, natural = _resolved(named, allocator, data)
    if type(round_to) is not int or round_to < 1:
        raise OptionError(f"round_to: must be a positive whole number, not {round_to!r}")
    if type(seed) is not int:
        raise OptionError(f"seed: must be a whole number, not {seed!r}")
    protect, only = _patterns("protect", protect), _patterns("only", only)
    kinds = None if kinds is None else _patterns("kinds", kinds)
    groups = graph.groups
    known = {group.kind for group in groups}
    if kinds is not None and not set(kinds) <= known:
        raise OptionError(f"kinds: {sorted(set(kinds) - known)[0]!r} is none of {', '.join(sorted(known))}")
    for option, patterns in (("protect", protect), ("only", only)):
        for pattern in patterns:
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
    if scored is None:
        looked_at = data if allocator != MEASURED or criteria.find(criterion).data else None
        scores, samples = unit_scores(graph, [groups[i] for i in free], criterion, looked_at, seed)
    else:
        scores, samples = [scored.units[groups[i].name] for i in free], scored.samples
    step = [round_to if groups[i].kind in _COUNTED_IN_STEPS and groups[i].size >= round_to else 1 for i in free]
    least = [min(max(groups[i].minimum, s if s > 1 else 1), groups[i].size) for i, s in zip(free, step, strict=True)]
    costs = graph.coupling.costs
    if latency is None and any(name == "latency" for name, _ in goal.limits):
        latency = LatencyTable()
    if latency is not None:
        costs = costs.extended({"latency": latency.terms(graph, _steps(groups, free, step), seed=seed)})
    problem = Problem(costs, free, scores, goal, np.array(step, dtype=np.int64), np.array(least, dtype=np.int64))
    if not free:
        check_feasible(problem)
    chosen = Choice("", scores, np.empty(0, dtype=np.int64))
    losses: dict[str, float] = {}
    if free:
        kept = find_allocator(natural if allocator == MEASURED else allocator)(problem)
        chosen = Choice(allocator, scores, kept)
    if free and allocator == MEASURED:
        by_norm, _ = unit_scores(graph, [groups[i] for i in free], "magnitude")
        choices = around(problem, kept, natural, {criterion: scores, "magnitude": by_norm})
        chosen, losses = nearest(graph, [groups[i] for i in free], choices, data, seed)
    keep = chosen.keep([groups[i] for i in free])
    counts = costs.sizes.copy()
    counts[free] = chosen.kept
    reached = {
        c: _fraction(costs.evaluate(c, counts[None])[0], costs.evaluate(c, costs.sizes[None])[0]) for c in costs.terms
    }
    provenance: dict[str, Any] = {
        "criterion": criterion,
        "allocator": allocator,
        "samples": samples,
        "round_to": round_to,
        "protect": list(protect),
        "only": list(only),
        "kinds": None if kinds is None else list(kinds),
        "seed": seed,
    }
    if losses:
        provenance["measured"] = losses
    if latency is not None:
        whole, cut = latency.predictions(graph, [costs.sizes, counts])
        provenance["latency"] = {**latency.provenance(graph), "predicted": _fraction(cut, whole)}
    return Plan(keep, graph.fingerprint, goal.text, reached, provenance)


def _steps(groups: Sequence[Group], free: Sequence[int], step: Sequence[int]) -> NDArray[np.int64]:
    """The step of every group's kept count, shape [groups]; one that stays whole has its size for a step."""
    steps = np.array([group.size for group in groups], dtype=np.int64)
    steps[free] = step
    return steps


def _resolved(criterion: str | None, allocator: str | None, data: Any) -> tuple[str, str, str]:
    """Criterion, allocator, and the allocator that goes with the criterion; raises `OptionError`."""
    chosen = default_criterion(criterion, data)
    natural = "cost" if criteria.find(chosen).additive else "global"
    allocator = allocator or (MEASURED if criterion is None and data is not None else natural)
    if allocator != MEASURED:
        find_allocator(allocator)
    elif data is None:
        raise OptionError(f"data: allocator {MEASURED!r} needs calibration data")
    return chosen, allocator, natural


def unit_scores(
    graph: Graph, groups: Sequence[Group], criterion: str, data: Any = None, seed: int = 0
) -> tuple[list[NDArray[np.float64]], int]:
    """What a criterion makes of every unit.

    Args:
        graph: The network.
        groups: Those of its groups that are scored.
        criterion: Name in `metaprune.criteria.CRITERIA`.
        data: Calibration data, for a criterion that needs them.
        seed: Of criteria that draw.

    Returns:
        The scores of each group's units, shape [size] each, and the number of samples that were looked at.

    Raises:
        OptionError: An unknown criterion, or data where there should be none, or none where there should be.
        GraphError: A tensor of the network is not finite.
    """
    row = criteria.find(criterion)
    if row.data and data is None:
        raise OptionError(f"data: criterion {criterion!r} needs calibration data")
    if data is not None and not row.data:
        raise OptionError(f"data: criterion {criterion!r} does not use data")
    graph.check_finite()
    weights = criteria.Weights({n: graph.values[n] for n, info in graph.tensors.items() if info.kind == "parameter"})
    statistics = None
    if row.data and row.columns:
        statistics = collect_second_moments(graph, data, seed=seed)
    elif row.data:
        statistics = collect(graph, data, seed=seed, per_sample=row.per_sample)
    evidence = criteria.Evidence(weights, statistics, seed)
    scores = [row.function(group, evidence).double().numpy() for group in groups]
    return scores, statistics.samples if statistics else 0


def default_criterion(criterion: str | None, data: Any) -> str:
    """The criterion that is named, or the default: one that looks at data where there are any."""
    return criterion or ("magnitude" if data is None else "fisher_block")


def _fraction(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def _patterns(option: str, value: Iterable[str]) -> tuple[str, ...]:
    """A name or several as a tuple; raises `OptionError` for anything else."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for item in found:
        if not isinstance(item, str):
            raise OptionError(f"{option}: names are needed, not {item!r}")
    return found


def _matches(group: Group, patterns: Sequence[str]) -> bool:
    names = [group.name, *(part.tensor for part in group.slices)]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
