"""What a search tries to make small: a network is cut, repaired in closed form and judged, without any training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metaprune.calibration import Leaves, batch_size, joined, leaves_of, outputs_in, tensors_in
from metaprune.distances import distortion
from metaprune.evaluation import evaluate, named
from metaprune.graphs.cost import Cost, counted
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Meta
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.surgery import cut
from metaprune.reconstruction import Fit
from metaprune.recovery import recalibrate_values
from metaprune.search.evaluate import Fidelity
from metaprune.search.ledger import Result
from metaprune.task import Task
from metaprune.training import seeded

_CHUNK = 50
_BATCH = 128  # samples that give one mean and variance when batch norms are recalibrated


class Judge:
    """Judges networks that are cut from one graph, all on the same samples.

    Attributes:
        graph: The dense network.
        objectives: Names in `OBJECTIVES`.
        dense: Its cost.
        forwards: What was spent before the first network, as forward passes of one sample through the dense one.
        weights: SHA-256 of the network's tensors.
        data: SHA-256 of all samples that are looked at.
    """

    def __init__(
        self,
        graph: Graph,
        objectives: Sequence[str],
        data: Any = None,
        task: Task | None = None,
        samples: int = Fidelity.samples,
        seed: int = 0,
    ) -> None:
        """Takes in the samples, and runs the dense network on those that judge.

        Args:
            graph: The dense network.
            objectives: Names in `OBJECTIVES`.
            data: Calibration data: of the first 2 * `samples`, one half repairs and the other judges. With a task
                all repair, and its `val` judges.
            task: Whose metric on `val` is the error.
            samples: At most this many samples repair, and as many judge the distortion.
            seed: Of the repair, of noise, and of loaders that shuffle.

        Raises:
            OptionError: An unknown objective, one that needs data or a task where there are none, or too few samples.
            GraphError: A weight is not finite.
        """
        self.graph, self.task, self.seed = graph, task, seed
        self.objectives = tuple(objectives)
        rows = [named_objective(name) for name in self.objectives]
        for name, row in zip(self.objectives, rows, strict=True):
            if row.task and task is None:
                raise OptionError(f"objectives: {name!r} needs labels, so a Task; 'distortion' does without")
            if row.data and data is None:
                raise OptionError(f"data: objective {name!r} needs calibration data")
        graph.check_finite()
        self.dense = counted(graph)
        self.forwards = 0.0
        self.repairing: list[Leaves] = []
        self.judging: list[Leaves] = []
        self.wanted: list[list[Tensor]] = []
        self.validated = 0
        self._seen = hashlib.sha256()
        if any(row.data for row in rows):
            self._collect(data, samples)
        if any(row.task for row in rows):
            self._validate()
        self.weights = _add(hashlib.sha256(), sorted(graph.values.items())).hexdigest()
        self.data = self._seen.hexdigest()

    @cached_property
    def macs(self) -> float:
        """Multiply-adds of one sample in the dense network."""
        return max(self.dense.macs, 1) / _example_batch(self.graph)

    def __call__(self, keep: Mapping[str, tuple[int, ...]], fidelity: Fidelity) -> Result:
        """The objectives of the network that keeps these units; no values where it does not run."""
        trial = Trial(self, keep, fidelity)
        try:
            with torch.no_grad():
                values = tuple(float(OBJECTIVES[name].value(trial)) for name in self.objectives)
        except (OptionError, torch.OutOfMemoryError):  # not the fault of this network
            raise
        except (MetapruneError, RuntimeError) as error:
            return Result(None, trial.forwards, " ".join(str(error).split()))
        return Result(values, trial.forwards)

    def _collect(self, data: Any, samples: int) -> None:
        """Samples that repair and samples that judge, and the dense network's outputs on these."""
        if any(value.is_meta for value in self.graph.values.values()):
            raise OptionError("target: a network on the meta device can not be judged")
        if self.task is None:
            leaves = self._leaves(data, 2 * samples)
            if len(leaves) < 2:
                raise OptionError("data: two samples are needed at least, one to repair with and one to judge by")
            self.repairing, self.judging = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
        else:
            self.repairing, self.judging = self._leaves(data, samples), self._leaves(self.task.val, samples)
        if "distortion" in self.objectives:
            with torch.no_grad():
                batches = joined(self.graph, self.judging, batch_size(self.graph) or _CHUNK)
                self.wanted = [outputs_in(execute(self.graph, self.graph.values, batch)) for batch in batches]
            self.forwards += len(self.judging)

    def _leaves(self, data: Any, samples: int) -> list[Leaves]:
        with seeded(PortableModule(self.graph, shared=True), data, self.seed):
            leaves = leaves_of(self.graph, data, samples, self.seed)
        for leaf in leaves:
            _add(self._seen, sorted(leaf.items()))
        return leaves

    def _validate(self) -> None:
        """Counts the held-out samples, and lets the dense network show what is wrong with them or with the metric."""
        if self.task is None:
            return
        with seeded(PortableModule(self.graph, shared=True), self.task.val, self.seed):
            for batch in self.task.val:
                self.validated += len(tensors_in(batch)[-1])
                _add(self._seen, enumerate(tensors_in(batch)))
        self.error(self.graph, self.graph.values)
        self.forwards += self.validated

    def error(self, graph: Graph, values: Mapping[str, Tensor]) -> float:
        """1 - the task's metric over `val`."""
        if self.task is None:
            raise OptionError("objectives: 'error' needs labels, so a Task")
        module = PortableModule(dataclasses.replace(graph, values=dict(values)), shared=True)
        with seeded(module, self.task.val, self.seed):
            return 1.0 - evaluate(module, self.task.val, self.task.metric)


class Trial:
    """One cut network, made as far as the objectives ask for it.

    Attributes:
        judge: Whose samples it is judged on.
        keep: The units that stay, by group, where any go.
        fidelity: How it is repaired.
        forwards: What was spent on it, as forward passes of one sample through the dense network: its passes by
            their multiply-adds, and the second moments of a fit; factorisations are not counted.
    """

    def __init__(self, judge: Judge, keep: Mapping[str, tuple[int, ...]], fidelity: Fidelity) -> None:
        self.judge = judge
        self.keep = keep
        self.fidelity = fidelity
        self.forwards = 0.0

    @cached_property
    def graph(self) -> Graph:
        """The cut graph."""
        return cut(self.judge.graph, self.keep).graph

    @cached_property
    def cost(self) -> Cost:
        """Its cost, counted on the shapes that it has."""
        return counted(self.graph)

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """Its tensors, repaired."""
        leaves = self.judge.repairing[: self.fidelity.samples]
        if self.fidelity.repair == "recalibrate":
            values = {name: value.clone() for name, value in self.graph.values.items()}
            size = batch_size(self.graph) or _BATCH
            if recalibrate_values(self.graph, values, joined(self.graph, leaves, size)):
                self.spend(len(leaves))
            return values
        if self.fidelity.repair == "none":
            return self.graph.values
        fit = Fit(self.judge.graph, self.graph, self.graph.values, self.keep, leaves, seed=self.judge.seed)
        fit.run()
        self.spend(fit.samples)
        self.forwards += fit.samples + fit.macs / self.judge.macs
        return fit.values

    def spend(self, samples: int) -> None:
        """Counts that many samples through the cut network."""
        self.forwards += samples * self.cost.macs / max(self.judge.dense.macs, 1)

    def error(self) -> float:
        """1 - the task's metric on `val`."""
        self.spend(self.judge.validated)
        return self.judge.error(self.graph, self.values)

    def distortion(self) -> float:
        """Mean of `metaprune.distances.distortion` over the samples that judge."""
        judge = self.judge
        batches = joined(judge.graph, judge.judging, batch_size(judge.graph) or _CHUNK)
        self.spend(len(judge.judging))
        found = [outputs_in(execute(self.graph, self.values, batch)) for batch in batches]
        apart = [distortion(mine, theirs) for mine, theirs in zip(found, judge.wanted, strict=True)]
        return float(torch.cat(apart).mean())


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective; less is better.

    Attributes:
        value: Its value for a trial.
        data: Whether it needs calibration data.
        task: Whether it needs a task.
    """

    value: Callable[[Trial], float]
    data: bool = False
    task: bool = False


def _fraction(cost: str) -> Objective:
    """The kept fraction of a cost, counted on the cut graph."""

    def value(trial: Trial) -> float:
        whole = getattr(trial.judge.dense, cost)
        return float(getattr(trial.cost, cost) / whole) if whole else 1.0

    return Objective(value)


OBJECTIVES: dict[str, Objective] = {
    "error": Objective(Trial.error, data=True, task=True),
    "distortion": Objective(Trial.distortion, data=True),
    "macs": _fraction("macs"),
    "params": _fraction("params"),
    "bytes": _fraction("bytes"),
}


def named_objective(name: str) -> Objective:
    """The objective called `name`; raises `OptionError`."""
    return named(name, OBJECTIVES, "objectives")


def _add(digest: Any, tensors: Iterable[tuple[object, Tensor]]) -> Any:
    """Takes named tensors into a digest, which is returned."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest


def _example_batch(graph: Graph) -> int:
    """Samples in the batch that costs are of."""
    for name, value in graph.example.items():
        meta = graph.nodes[name].meta
        if isinstance(meta, Meta) and meta.batched and meta.batched[0]:
            return max(1, round(len(value) * graph.batch))
    return max(1, batch_size(graph))
