"""Labels of a network: what losing units costs it, measured, for a metanetwork to learn to predict.

All of them are divergences KL(dense || changed) of the softmax of the outputs, in nats, the mean over samples. The
first half of the samples is fitted on wherever something is fitted, the second half is measured on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from metaprune.calibration import Leaves, leaves_of, samples_of
from metaprune.distances import LOGITS, kinds_of
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph
from metaprune.masking import Change, silenced
from metaprune.masking import measure as distances
from metaprune.planning import may_shrink
from metaprune.ranking import score
from metaprune.refits import consumers
from metaprune.search.budget import Budget
from metaprune.search.cost_aware import cost_aware
from metaprune.search.problem import Kept, Problem
from metaprune.statistics import open_gates
from metaprune.tables import MEASURED, tabulate
from metaprune.trials import Bench, Trial

SCHEMA = 1
SAMPLES = 512
LEVELS = 8
CRITERION = "fisher_block"
LEAST, MOST = 0.1, 0.5
"""Kept multiply-adds of random allocations, where the network can be cut that far."""
SPREADS = (0.0, 0.4, 0.8, 1.2)
"""Standard deviations of the logarithms that groups' scores are multiplied by, in turn."""

_BY_GROUP = ("order", "ablation", "levels", "plain", "compensated")
_WHOLE = ("joint_kept", "joint")
_HEADER = "labels"
_LARGEST = 1 << 16  # units of a group in a file

_Order: TypeAlias = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Labels:
    """What was measured on one network. Whole numbers are int64, divergences float64 and in nats.

    Attributes:
        sizes: Units of each group that can shrink, in the graph's order of groups.
        order: By group its units, the first to go first, shape [size]: the ranking of all that follows.
        ablation: By group the divergence when a unit alone is silenced, by number of the unit, shape [size].
        levels: By group the numbers of units that were kept, falling, shape [levels].
        plain: By group the divergence when it alone is cut to a level and nothing makes up for that, shape [levels].
        compensated: The same with the layers that read the group fitted by least squares, see `metaprune.refits`.
        joint_kept: Kept units of random allocations, groups as in `sizes`, shape [plans, groups].
        joint: Divergence of the networks cut to them and fitted, see `metaprune.reconstruct`, shape [plans]; infinite
            where such a network gives a value that is not finite.
    """

    sizes: dict[str, int]
    order: dict[str, Tensor]
    ablation: dict[str, Tensor]
    levels: dict[str, Tensor]
    plain: dict[str, Tensor]
    compensated: dict[str, Tensor]
    joint_kept: Tensor
    joint: Tensor

    def __post_init__(self) -> None:
        _check(self)

    def keep(self, counts: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The units that stay when groups keep so many, in the order of `sizes`; for the groups that lose any."""
        pairs = zip(self.sizes.items(), counts, strict=True)
        return {
            name: tuple(sorted(self.order[name][size - count :].tolist()))
            for (name, size), count in pairs
            if count < size
        }

    def save(self, path: str | Path) -> None:
        """Writes safetensors, atomically, with the names and sizes of the groups as JSON in the header."""
        tensors = {name: getattr(self, name) for name in _WHOLE}
        for field in _BY_GROUP:
            tensors |= {f"{field}.{i}": value for i, value in enumerate(getattr(self, field).values())}
        header = json.dumps({"schema": SCHEMA, "sizes": list(self.sizes.items())})
        content = serialise({name: value.contiguous() for name, value in tensors.items()}, {_HEADER: header})
        write_atomically(Path(path), content)

    @staticmethod
    def load(path: str | Path) -> Labels:
        """Reads what `save` wrote; raises `LoadError` for a file that is damaged or something else."""
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                if header["schema"] != SCHEMA:
                    raise LoadError(f"labels {path}: they are not of schema {SCHEMA}")
                sizes = {str(name): int(size) for name, size in header["sizes"]}
                order, ablation, levels, plain, compensated = (
                    {name: file.get_tensor(f"{field}.{i}") for i, name in enumerate(sizes)} for field in _BY_GROUP
                )
                kept, joint = (file.get_tensor(name) for name in _WHOLE)
            return Labels(sizes, order, ablation, levels, plain, compensated, kept, joint)
        except OSError as error:
            raise LoadError(f"labels {path} can not be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, LookupError, TypeError, OptionError) as error:
            raise LoadError(f"labels {path} are damaged: {type(error).__name__}: {error}") from None


def measure(graph: Graph, data: Any, *, plans: int = 40, seed: int = 0) -> Labels:
    """Measures the labels of a network.

    Random allocations are those of the allocator `"cost"` at kept multiply-adds that are log-uniform from `LEAST` to
    `MOST`, with every group's scores multiplied by the exponential of a normal number (see `SPREADS`).

    Args:
        graph: The network; its output is one row of logits per sample.
        data: Batches of inputs or of (inputs, labels), labels are not looked at; or `"noise"`. At most `SAMPLES`
            samples are used, two at least are needed.
        plans: How many random allocations; 0 for none.
        seed: Of the allocations, of criteria and fits that draw, and of noise.

    Raises:
        OptionError: No logits, no group that can shrink, too few samples, or a negative number of plans.
        MetapruneError: The network gives values that are not finite.
    """
    if type(plans) is not int or plans < 0:
        raise OptionError(f"plans: zero or more are measured, not {plans!r}")
    kinds_of(graph, (LOGITS,))
    free, step, least = may_shrink(graph)
    if not free:
        raise OptionError("graph: no group can lose a unit")
    samples = list(islice(samples_of(graph, data, seed), SAMPLES))
    if len(samples) < 2:
        raise OptionError("data: two samples are needed at least, one to fit on and one to measure on")
    fitting, judging = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    leaves = leaves_of(graph, judging, len(judging), seed)
    scores = score(graph, CRITERION, fitting, seed)
    names = [graph.groups[i].name for i in free]
    last_first = {name: np.lexsort((np.arange(len(scores.units[name])), -scores.units[name])) for name in names}
    layers = consumers(graph, fitting, len(fitting), seed)
    plain = tabulate(graph, last_first, leaves, MEASURED, LEVELS, (LOGITS,))
    compensated = tabulate(graph, last_first, leaves, MEASURED, LEVELS, (LOGITS,), layers, seed)
    values = [scores.units[name] for name in names]
    problem = Problem(graph.coupling.costs, free, values, Budget.parse("macs=1.0"), step, least, seed)
    kept = random_allocations(problem, plans, seed)
    bench = Bench(graph, leaves_of(graph, fitting, len(fitting), seed), leaves, seed)
    return Labels(
        {name: len(last_first[name]) for name in names},
        {name: _falling(last_first[name]) for name in names},
        _ablation(graph, names, leaves),
        {name: _falling(plain.levels[name]) for name in names},
        {name: _falling(plain.points[LOGITS][name]) for name in names},
        {name: _falling(compensated.points[LOGITS][name]) for name in names},
        torch.from_numpy(kept),
        torch.tensor([_joint(bench, last_first, names, counts) for counts in kept.tolist()], dtype=torch.float64),
    )


def _ablation(graph: Graph, names: Sequence[str], leaves: Sequence[Leaves]) -> dict[str, Tensor]:
    """By group the divergence when each of its units alone is silenced, shape [size]."""
    ones = open_gates(graph)
    changes = [
        Change({name: silenced(ones[name], np.array([unit]))}) for name in names for unit in range(len(ones[name]))
    ]
    found = torch.from_numpy(distances(graph, changes, leaves).total(LOGITS))
    return dict(zip(names, torch.split(found, [len(ones[name]) for name in names]), strict=True))


def random_allocations(problem: Problem, plans: int, seed: int, least: float = LEAST, most: float = MOST) -> Kept:
    """Random allocations, shape [plans, groups]; see `measure`.

    Args:
        problem: The problem, of a budget that is the whole network.
        plans: How many.
        seed: Of them.
        least: Least kept multiply-adds, where the network can be cut that far.
        most: Most.
    """
    source = np.random.default_rng(seed)
    lowest = min(1.0, max(least, problem.excess(problem.minimum)))
    highest = max(most, lowest**0.5)
    found = np.empty((plans, len(problem.free)), dtype=np.int64)
    for number in range(plans):
        fraction = float(np.exp(source.uniform(np.log(lowest), np.log(highest))))
        factors = np.exp(SPREADS[number % len(SPREADS)] * source.standard_normal(len(problem.free)))
        scores = [values * factor for values, factor in zip(problem.scores, factors, strict=True)]
        budget = Budget.parse(f"macs={fraction!r}")
        found[number] = cost_aware(replace(problem, scores=scores, budget=budget))
    return found


def _joint(bench: Bench, last_first: _Order, names: Sequence[str], counts: Sequence[int]) -> float:
    keep = {
        name: tuple(sorted(last_first[name][:count].tolist()))
        for name, count in zip(names, counts, strict=True)
        if count < len(last_first[name])
    }
    with torch.no_grad():
        found = Trial(bench, keep).distortion()
    return found if found == found else float("inf")


def _falling(values: NDArray[Any]) -> Tensor:
    """Values in the opposite order, as a tensor."""
    return torch.from_numpy(values[::-1].copy())


def _check(labels: Labels) -> None:
    """Raises `OptionError` where shapes, types and values do not fit one another; a file may hold anything."""
    sizes, levels = labels.sizes, labels.levels
    for field in _BY_GROUP:
        if list(getattr(labels, field)) != list(sizes):
            raise OptionError(f"{field}: it is not of the groups of sizes")
    for name, size in sizes.items():
        if not 1 <= size <= _LARGEST or sorted(labels.order[name].tolist()) != list(range(size)):
            raise OptionError(f"order: it is none of the units of group {name}")
        kept = levels[name].tolist()
        if kept != sorted(set(kept), reverse=True) or not all(type(k) is int and 1 <= k < size for k in kept):
            raise OptionError(f"levels: those of group {name} do not fall from below {size} to 1 at least")
        for field, length in (("ablation", size), ("plain", len(kept)), ("compensated", len(kept))):
            _check_losses(f"{field}: those of group {name}", getattr(labels, field)[name], length)
    plans = len(labels.joint)
    _check_losses("joint", labels.joint, plans)
    counts = labels.joint_kept
    if counts.shape != (plans, len(sizes)) or counts.dtype != torch.int64:
        raise OptionError(f"joint_kept: shape {(plans, len(sizes))} of int64 is needed, not {tuple(counts.shape)}")
    if bool((counts < 1).any() or (counts > torch.tensor(list(sizes.values()))).any()):
        raise OptionError("joint_kept: a group keeps none of its units, or more than it has")


def _check_losses(where: str, values: Tensor, length: int) -> None:
    if values.shape != (length,) or values.dtype != torch.float64:
        raise OptionError(f"{where}: {length} numbers of float64 are needed, not {tuple(values.shape)}")
    if not bool((values >= 0).all()):
        raise OptionError(f"{where}: a divergence is below 0 or none")
