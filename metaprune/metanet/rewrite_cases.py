"""What the rewriting head is trained on: networks with units masked, opened one after the other and a few held."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from metaprune.calibration import Leaves, joined, leaves_of, outputs_in, samples_of
from metaprune.dataless import refit_without_data
from metaprune.distances import LOGITS, distortion, kinds_of
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.files import write_atomically
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.trace import trace
from metaprune.losses import Loss
from metaprune.metanet.labels import random_allocations
from metaprune.metanet.rewrite_head import gates_of
from metaprune.metanet.weight_graph import WeightGraph
from metaprune.planning import may_shrink
from metaprune.ranking import score
from metaprune.search.budget import Budget
from metaprune.search.problem import Problem
from metaprune.task import Task

CRITERIA = ("magnitude", "fisher_block")
"""What units are ranked by, in turn: as without data and as with data."""
LEAST, MOST = 0.1, 1 / 1.5
"""Kept multiply-adds of the masks, where the network can be cut that far."""
_SCORED = 128  # samples that rankings look at


@dataclass(frozen=True)
class Making:
    """How cases are made.

    Attributes:
        masks: Masks for each network.
        batches: Batches of samples.
        size: Samples in each of these.
        refit: Whether the weights to start from are those of `metaprune.dataless.refit_without_data`.
        seed: Of masks and of drawn inputs.
        whole: Whether nothing is masked and labels are looked at; there is one case for each batch then.
    """

    masks: int
    batches: int
    size: int
    refit: bool
    seed: int
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Cases:
    """One network, samples, and what may be cut from it.

    Attributes:
        graph: The network.
        batches: Samples.
        dense: The network's logits for each batch.
        kept: For each mask by group whether units stay, shape [size].
        starts: For each mask the tensors that rewriting starts from.
        before: For each mask the loss with these, in nats, shape [masks].
        labels: Of each batch, where they are looked at.
        criterion: The task's loss of logits and labels.
    """

    graph: WeightGraph
    batches: Sequence[Leaves]
    dense: Sequence[Tensor]
    kept: Sequence[Mapping[str, Tensor]]
    starts: Sequence[Mapping[str, Tensor]]
    before: Tensor
    labels: Sequence[Tensor]
    criterion: Loss

    def task_loss(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        """The task's loss of the whole network with these tensors on a batch."""
        network = self.graph.graph
        found = execute(network, {**network.values, **tensors}, self.batches[batch])
        return self.criterion(outputs_in(found)[0], self.labels[batch])

    def loss(self, tensors: Mapping[str, Tensor], mask: int, batch: int) -> Tensor:
        """KL(dense || masked network with these tensors), the mean over a batch, in nats."""
        network = self.graph.graph
        gates = Gates(network.coupling, self.kept[mask]) if self.kept[mask] else None
        found = execute(network, {**network.values, **tensors}, self.batches[batch], gates)
        return distortion(outputs_in(found), [self.dense[batch]]).mean()


class Shelf:
    """The cases of a zoo's networks by number; those used last are held, the others made or read again.

    Args:
        names: Of the networks.
        tasks: What gives their tasks.
        making: How cases are made.
        folder: Where masks and starts are kept.
        held: So many networks are held at most.
    """

    def __init__(
        self, names: Sequence[str], tasks: Sequence[Callable[[], Task]], making: Making, folder: Path, held: int
    ) -> None:
        self._names, self._tasks, self._making, self._folder, self._held = names, tasks, making, folder, held
        self._open: OrderedDict[int, Cases] = OrderedDict()

    def __call__(self, number: int) -> Cases:
        """The cases of a network; for errors see `cases_of`."""
        if number not in self._open:
            path = self._folder / f"{hashlib.sha256(self._names[number].encode()).hexdigest()[:24]}.safetensors"
            self._open[number] = cases_of(self._tasks[number](), self._making, path)
            if len(self._open) > self._held:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def cases_of(task: Task, making: Making, path: Path) -> Cases:
    """The cases of one network; masks and starts are read from a file where it is of this network and making.

    Raises:
        OptionError: The network gives no logits, no group of it can shrink, or there are too few samples.
        MetapruneError: The network gives values that are not finite.
    """
    graph = trace(task.model, task.inputs)
    kinds_of(graph, (LOGITS,))
    batches = _batches(graph, task, making)
    with torch.no_grad():
        dense = [outputs_in(execute(graph, graph.values, batch))[0] for batch in batches]
    labels = _labels(task, making) if making.whole else ()
    unmasked = Cases(WeightGraph.of(graph), batches, dense, [{}], [{}], torch.zeros(1), labels, task.criterion)
    if making.whole:
        return unmasked
    key = _key(graph, making)
    stored = _read(path, key)
    if stored is None:
        stored = {"key": key, **_masked(unmasked, _keeps(graph, task, making), making)}
        write_atomically(path, save_tensors(stored))
    if not bool(stored["before"].isfinite().all()):
        raise MetapruneError("a masked network gives values that are not finite")
    kept, starts = ([_under(f"{what}/{mask}/", stored) for mask in range(making.masks)] for what in ("kept", "start"))
    return replace(unmasked, kept=kept, starts=starts, before=stored["before"])


def _batches(graph: Graph, task: Task, making: Making) -> list[Leaves]:
    """The first training samples, in the order that the seed gives; raises `OptionError` where there are too few."""
    _seed_loader(task, making.seed)
    leaves = leaves_of(graph, task.train, making.batches * making.size, making.seed)
    batches = joined(graph, leaves, making.size)
    if len(batches) < making.batches:
        raise OptionError(f"samples: {making.batches * making.size} are needed, there are {len(leaves)}")
    return batches


def _seed_loader(task: Task, seed: int) -> None:
    generator = getattr(task.train, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


def _masked(unmasked: Cases, keeps: Sequence[Mapping[str, tuple[int, ...]]], making: Making) -> dict[str, Tensor]:
    """By name the gates and the starts of all masks, and the losses with these."""
    graph = unmasked.graph.graph
    kept = [gates_of(graph, keep) for keep in keeps]
    starts = [refit_without_data(graph, Plan(keep, ""), seed=making.seed) if making.refit else {} for keep in keeps]
    cases = replace(unmasked, kept=kept, starts=starts)
    with torch.no_grad():
        losses = [[cases.loss(start, i, batch) for batch in range(making.batches)] for i, start in enumerate(starts)]
    found = {"before": torch.tensor(losses, dtype=torch.float64).mean(1)}
    for mask, (gates, start) in enumerate(zip(kept, starts, strict=True)):
        found |= {f"kept/{mask}/{name}": gate for name, gate in gates.items()}
        found |= {f"start/{mask}/{name}": value.contiguous() for name, value in start.items()}
    return found


def _labels(task: Task, making: Making) -> Sequence[Tensor]:
    """The labels of the samples, in batches.

    Raises:
        OptionError: The training data have no labels.
    """
    _seed_loader(task, making.seed)  # the order in which the samples came
    found: list[Tensor] = []
    for batch in task.train:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise OptionError("zoo: the training data have no labels")
        found.append(batch[1])
        if sum(map(len, found)) >= making.batches * making.size:
            break
    return torch.split(torch.cat(found)[: making.batches * making.size], making.size)


def _key(graph: Graph, making: Making) -> Tensor:
    """SHA-256 of the network's tensors and the making, shape [32]."""
    text = hashlib.sha256(repr((graph.fingerprint, making)).encode())
    for name in sorted(graph.tensors):
        value = graph.values[name].detach().cpu().contiguous()
        text.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(text.digest()), dtype=torch.uint8)


def _read(path: Path, key: Tensor) -> dict[str, Tensor] | None:
    """What is in a file; None when it is missing, damaged or of something else."""
    try:
        found = load_tensors(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return found if "key" in found and torch.equal(found["key"], key) else None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _keeps(graph: Graph, task: Task, making: Making) -> list[dict[str, tuple[int, ...]]]:
    """Units that stay in random allocations of a log-uniform size, ranked by each of the criteria in turn."""
    free, step, least = may_shrink(graph)
    if not free:
        raise OptionError("graph: no group can lose a unit")
    names = [graph.groups[i].name for i in free]
    samples = list(islice(samples_of(graph, task.train, making.seed), _SCORED))
    ranked, counts = [], []
    for criterion in CRITERIA:
        scores = score(graph, criterion, None if criterion == "magnitude" else samples, making.seed)
        values = [scores.units[name] for name in names]
        problem = Problem(graph.coupling.costs, free, values, Budget.parse("macs=1.0"), step, least, making.seed)
        ranked.append([np.argsort(-own, kind="stable") for own in values])
        counts.append(random_allocations(problem, making.masks, making.seed, LEAST, MOST).tolist())
    return [
        {
            name: tuple(sorted(order[:count].tolist()))
            for name, order, count in zip(
                names, ranked[mask % len(CRITERIA)], counts[mask % len(CRITERIA)][mask], strict=True
            )
            if count < len(order)
        }
        for mask in range(making.masks)
    ]
