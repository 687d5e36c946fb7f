"""Whether losses of single groups add up: they are measured together and compared with their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune.calibration import leaves_of, repeatable
from metaprune.curves import Sensitivity
from metaprune.distances import KINDS, kinds_of, over_samples
from metaprune.graphs.errors import MetapruneError, OptionError, check_seed
from metaprune.graphs.ir import Graph
from metaprune.masking import Change, measure, silenced
from metaprune.probes.fidelity import rank_fidelity
from metaprune.refits import consumers, refits
from metaprune.statistics import SAMPLES, open_gates

_LEAST_PLANS = 3
_LEAST_SAMPLES = 2
_RESAMPLES = 200  # of the bootstrap: its interval is a coarse one


@dataclass(frozen=True, eq=False)
class Additivity:
    """How far a sum over groups can be trusted in place of a joint measurement.

    Attributes:
        kind: Kind of distance that was measured jointly.
        ratio: Mean over plans of joint over summed loss: below 1 where losses overlap, above where they compound.
        tau: Kendall's tau-b of summed losses with joint ones on half of the samples, the mean of both halves, with its
            90 % bootstrap interval `low` to `high`.
        ceiling: Tau-b of the joint losses on one half of the samples with those on the other: what a perfect proxy
            could reach.
        summed: By plan, shape [plans].
        joint: By plan, on all samples, shape [plans].
        samples: Number of samples they were measured on.
    """

    kind: str
    ratio: float
    tau: float
    low: float
    high: float
    ceiling: float
    summed: NDArray[np.float64]
    joint: NDArray[np.float64]
    samples: int


def additivity(
    graph: Graph,
    sensitivity: Sensitivity,
    data: Any,
    plans: int = 20,
    seed: int = 0,
    kind: str | None = None,
    samples: int = SAMPLES,
) -> Additivity:
    """Measures random plans as a whole and compares them with the sums of their groups' curves.

    For each plan a greatest share is drawn between 0 and 1, and every group loses a share of its removable units drawn
    between 0 and that. Where the curves are of compensated groups, the layers of the plans are fitted too.

    Args:
        graph: The network.
        sensitivity: Its curves.
        data: Batches of inputs or of (inputs, labels), labels are not looked at; or `"noise"`.
        plans: How many, at least 3.
        seed: Of the plans, of positions for the fit and of noise.
        kind: Kind of distance, by default the first there is. Curves of the weights alone are compared with the first
            kind that the network has: their ratio has a unit.
        samples: At most this many samples, at least 2.

    Raises:
        OptionError: Curves of another network or other weights, an unknown kind, too few plans or samples, or no group
            that can lose a unit; or plans that all lose the same.
        MetapruneError: The network, as it is or under a plan, gives values that are not finite.
    """
    if not isinstance(graph, Graph) or not isinstance(sensitivity, Sensitivity):
        raise OptionError("graph, sensitivity: a Graph and its curves, as of metaprune.sensitivity, are needed")
    sensitivity.check(graph)
    check_seed(seed)
    if type(plans) is not int or plans < _LEAST_PLANS:
        raise OptionError(f"plans: at least {_LEAST_PLANS} are needed, not {plans!r}")
    curves = sensitivity.of(kind)
    kind = kind or sensitivity.kinds[0]
    kind = kind if kind in KINDS else kinds_of(graph)[0]
    data = repeatable(data)
    leaves = leaves_of(graph, data, samples, seed)
    if len(leaves) < _LEAST_SAMPLES:
        raise OptionError(f"data: at least {_LEAST_SAMPLES} samples are needed, not {len(leaves)}")
    counts = _random_counts(graph, plans, seed)
    fitted = sensitivity.provenance.get("compensate") is True
    changes = _changes(graph, sensitivity, counts, data if fitted else None, samples, seed)
    apart = measure(graph, changes, leaves).of(kind)  # [plans, samples]
    summed = np.array([sum(float(curves[name][k]) for name, k in each.items()) for each in counts])
    joint = over_samples(apart, kind)
    if not np.isfinite(joint).all() or not np.isfinite(summed).all():
        raise MetapruneError("data: the distortion of a random plan is not finite")
    if np.ptp(summed) == 0:
        raise OptionError("sensitivity: its curves have the same sum for all plans, so there is no order to compare")
    halves = [over_samples(apart[:, half::2], kind).tolist() for half in range(2)]
    if any(len(set(half)) == 1 for half in halves):
        raise OptionError("data: all plans lose the same on half of the samples, so there is no order to compare")
    trust = rank_fidelity(summed.tolist(), halves[0], halves[1], resamples=_RESAMPLES, seed=seed)
    assert trust.ceiling is not None  # two results are given
    alive = summed > 0
    ratio = float((joint[alive] / summed[alive]).mean()) if alive.any() else float("nan")
    return Additivity(kind, ratio, trust.tau, trust.low, trust.high, trust.ceiling, summed, joint, len(leaves))


def _random_counts(graph: Graph, plans: int, seed: int) -> list[dict[str, int]]:
    """Kept units of each group that can lose any, for each plan."""
    groups = [group for group in graph.groups if not group.pinned and group.size > group.minimum]
    if not groups:
        raise OptionError("graph: no group can lose a unit")
    draw = np.random.default_rng(seed)
    found = []
    for most in draw.uniform(size=plans):
        shares = draw.uniform(0, most, size=len(groups))
        found.append({g.name: g.size - round(s * (g.size - g.minimum)) for g, s in zip(groups, shares, strict=True)})
    return found


def _changes(
    graph: Graph, sensitivity: Sensitivity, counts: Sequence[dict[str, int]], data: Any, samples: int, seed: int
) -> list[Change]:
    """The plans as gates, with fitted layers where there are data."""
    ones = open_gates(graph)
    layers = [] if data is None else consumers(graph, data, samples, seed)
    changes = []
    for each in counts:
        gates, places = {}, {}
        for name, count in each.items():
            gone = sensitivity.order[name][count:]
            gates[name] = silenced(ones[name], gone)
            places[name] = np.full(len(gates[name]), -1, dtype=np.int64)
            places[name][gone] = 0
        tensors = {key: value for fit in refits(graph, layers, places) for key, value in fit.at(0).items()}
        changes.append(Change(gates, tensors))
    return changes
