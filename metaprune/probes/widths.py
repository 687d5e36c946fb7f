"""What smaller widths do: to the score, group by group, and to the distribution of what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from metaprune.api import apply, plan
from metaprune.data import Loader
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.surgery import cut
from metaprune.ranking import unit_scores
from metaprune.recovery import recalibrate
from metaprune.search.pqi import pq_index
from metaprune.task import Task

SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Ablated:
    """One group pruned alone.

    Attributes:
        group: Its name.
        kind: Its kind.
        fraction: Kept fraction asked for.
        size: Its number of units.
        kept: Units that stayed.
        score: Of the network, batch norm recalibrated.
        macs: Multiply-adds of the network on the example batch.
    """

    group: str
    kind: str
    fraction: float
    size: int
    kept: int
    score: float
    macs: int


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What losing part of each group costs in score.

    Attributes:
        score: Of the network as it is.
        macs: Its multiply-adds on the example batch.
        trials: One for each group and fraction.
        untouched: Prunable groups too small to lose a unit at any of the fractions: nothing is known of them.
    """

    score: float
    macs: int
    trials: tuple[Ablated, ...]
    untouched: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial; `drop` is the score that was lost."""
        return [{**dataclasses.asdict(trial), "drop": self.score - trial.score} for trial in self.trials]


def ablation(
    graph: Graph,
    task: Task,
    fractions: Sequence[float] = (0.5,),
    criterion: str | None = None,
    data: Any = None,
    certify: bool = True,
    seed: int = 0,
) -> Ablation:
    """Prunes each group alone, recalibrates batch norm and scores: nothing is masked, every trial is a real cut.

    All trials recalibrate on the same batches. Where the outputs' distance is enough, without labels, the curves of
    `metaprune.sensitivity` cost far less.

    Args:
        graph: The network.
        task: Its data and metric; batch norm is recalibrated on `task.train`.
        fractions: Kept fractions of a group to try, each between 0 and 1.
        criterion: Which units go; as for `metaprune.plan`.
        data: Calibration data for a criterion that needs them; gone through once per fraction.
        certify: Whether every cut is proved, as `metaprune.apply` does.
        seed: Of criteria that draw, and of the order of the batches.

    Raises:
        OptionError: No fraction, or one that is not between 0 and 1.
        CertificateError: A cut is not equal to the masked network.
    """
    _check_fractions("fractions", fractions)
    batches = _drawn(task.train, seed)
    trials: list[Ablated] = []
    for fraction in fractions:
        whole = plan(graph, f"width={fraction}", criterion, data=data, seed=seed)
        for name, units in whole.keep.items():
            alone = Plan({name: units}, whole.graph, whole.budget, {}, {**whole.provenance, "only": [name]})
            pruned, group = apply(graph, alone, certify), graph.group(name)
            recalibrate(pruned.module, batches)
            score, macs = task.score(pruned.module), pruned.cost["after"].macs
            trials.append(Ablated(name, group.kind, fraction, group.size, len(units), score, macs))
    touched = {trial.group for trial in trials}
    untouched = tuple(group.name for group in graph.groups if not group.pinned and group.name not in touched)
    return Ablation(task.score(), graph.cost().macs, tuple(trials), untouched)


def _drawn(loader: Loader, seed: int) -> list[Any]:
    """The first batches of a loader, `SAMPLES` examples or a few more; all random states are left as they were."""
    own = getattr(loader, "generator", None)
    sources = [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]
    states = [source.get_state() for source in sources]
    batches: list[Any] = []
    examples = 0
    try:
        for source in sources:
            source.manual_seed(seed)
        for inputs, labels in loader:
            batches.append((inputs, labels))
            examples += len(labels)
            if examples >= SAMPLES:
                break
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)
    return batches


def _check_fractions(option: str, values: Sequence[float]) -> None:
    if not len(values) or not all(0 < value < 1 for value in values):
        raise OptionError(f"{option}: numbers between 0 and 1 are needed, not {list(values)}")


@dataclasses.dataclass(frozen=True)
class PqiPoint:
    """PQ index at one width.

    Attributes:
        width: Kept fraction of every group.
        group: The group whose unit scores are looked at; None for all weights of the network.
        count: How many scores or weights there are.
        index: Their PQ index.
    """

    width: float
    group: str | None
    count: int
    index: float


@dataclasses.dataclass(frozen=True)
class PqiCurve:
    """PQ index of unit scores and weights along a sequence of widths."""

    points: tuple[PqiPoint, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per point."""
        return [dataclasses.asdict(point) for point in self.points]


def pqi_curve(
    graph: Graph,
    widths: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    criterion: str = "magnitude",
    data: Any = None,
    p: float = 0.5,
    q: float = 1.0,
    seed: int = 0,
) -> PqiCurve:
    """How unevenly what stays is distributed, at ever smaller widths: much inequality says that more could go.

    Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective (ICLR 2023, arXiv 2302.05601). For each
    group the index of the scores, as given for the whole network, of those units that stay; for the network the index
    of all entries of its parameters of two and more dimensions after the cut. Nothing is trained in between.

    Args:
        graph: The network.
        widths: Kept fractions of every group, above 0 and at most 1.
        criterion: How units are scored; see `metaprune.criteria.CRITERIA`.
        data: Calibration data for a criterion that needs them; gone through once more for each width.
        p: Exponent of the first norm.
        q: Exponent of the second norm, greater than p.
        seed: Of criteria that draw.

    Raises:
        OptionError: No width or one out of range, or exponents that are not 0 < p < q.
    """
    if not 0 < p < q:
        raise OptionError(f"p, q: exponents with 0 < p < q are needed, not {p} and {q}")
    if not len(widths):
        raise OptionError("widths: at least one is needed")
    free = [group for group in graph.groups if not group.pinned]
    scores, _ = unit_scores(graph, free, criterion, data, seed)
    points: list[PqiPoint] = []
    for width in widths:
        keep = plan(graph, f"width={width}", criterion, data=data, seed=seed).keep
        for group, values in zip(free, scores, strict=True):
            alive = values[list(keep.get(group.name, range(group.size)))]
            points.append(PqiPoint(width, group.name, len(alive), pq_index(alive, p, q)))
        smaller = cut(graph, keep).graph
        matrices = [info.name for info in smaller.tensors.values() if info.kind == "parameter" and len(info.shape) > 1]
        weights = torch.cat([smaller.values[name].detach().flatten().double().cpu() for name in matrices])
        points.append(PqiPoint(width, None, len(weights), pq_index(weights.numpy(), p, q)))
    return PqiCurve(tuple(points))
