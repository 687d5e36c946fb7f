"""What a search tries to make small: a network is cut, repaired in closed form and judged, without any training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaprune.calibration import Leaves, leaves_of, tensors_in
from metaprune.evaluation import evaluate, named
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.replay import peak_bytes
from metaprune.latency import LatencyTable
from metaprune.search.evaluate import Fidelity
from metaprune.search.ledger import Result
from metaprune.task import Task
from metaprune.training import seeded
from metaprune.trials import Bench, Keep, Trial

FAULTS = (MetapruneError, RuntimeError, ArithmeticError, ValueError, LookupError)
"""What a network that can not be judged may raise, in its operators, in the repair or in a task's own metric."""


class Objectives:
    """Objectives of networks that are cut from one graph, all on the same samples.

    Attributes:
        names: Names in `OBJECTIVES`.
        bench: What the networks are tried on.
        latency: Table that latencies are looked up in.
        dense: Objectives of the dense network, by name.
        forwards: What was spent before the first network, as forward passes of one sample through the dense one.
        validated: Number of the task's held-out samples, where they are looked at.
        weights: SHA-256 of the network's tensors.
        data: SHA-256 of all samples that are looked at.
    """

    def __init__(
        self,
        graph: Graph,
        names: Sequence[str],
        data: Any = None,
        task: Task | None = None,
        samples: int = Fidelity.samples,
        seed: int = 0,
        latency: LatencyTable | None = None,
    ) -> None:
        """Takes in the samples, and runs the dense network on those that judge.

        Args:
            graph: The dense network.
            names: Names in `OBJECTIVES`.
            data: Calibration data: of the first 2 * `samples`, one half repairs and the other judges. With a task
                all repair, and its `val` judges.
            task: Whose metric on `val` is the error.
            samples: At most this many samples repair, and as many judge the distortion.
            seed: Of the repair, of noise, and of loaders that shuffle.
            latency: Table of timed operators, for `"latency_ms"`; those that it lacks are timed.

        Raises:
            OptionError: An unknown objective, one that needs data, a task or a table where there are none, or too few
                samples.
            GraphError: A weight is not finite.
            MetapruneError: An output of the dense network is not finite.
        """
        self.names = tuple(names)
        self._graph, self._task, self._seed = graph, task, seed
        rows = [named_objective(name) for name in self.names]
        for name, row in zip(self.names, rows, strict=True):
            if row.task and task is None:
                raise OptionError(f"objectives: {name!r} needs labels, so a Task; 'distortion' does without")
            if row.data and data is None:
                raise OptionError(f"data: objective {name!r} needs calibration data")
            if row.timed and latency is None:
                raise OptionError(f"latency: objective {name!r} needs a LatencyTable")
        self.latency = latency
        self.dense: dict[str, float] = {}
        graph.check_finite()
        self.forwards = 0.0
        self.validated = 0
        self._seen = hashlib.sha256()
        self.bench = self._benched(data, samples) if any(row.data for row in rows) else Bench(graph)
        if any(row.task for row in rows):
            self._validate()
        whole = Trial(self.bench, {}, "none")
        for name, row in zip(self.names, rows, strict=True):
            self.dense.setdefault(name, 0.0 if row.data else float(row.value(self, whole)))
        self.weights = _add(hashlib.sha256(), sorted(graph.values.items())).hexdigest()
        self.data = self._seen.hexdigest()

    def __call__(self, keep: Keep, fidelity: Fidelity) -> Result:
        """The objectives of the network that keeps these units; no values where it does not run."""
        trial = Trial(self.bench, keep, fidelity.repair, fidelity.samples)
        try:
            with torch.no_grad():
                values = tuple(float(OBJECTIVES[name].value(self, trial)) for name in self.names)
        except (OptionError, torch.OutOfMemoryError):  # not the fault of this network
            raise
        except FAULTS as error:
            return Result(None, trial.forwards, " ".join(str(error).split()))
        return Result(values, trial.forwards)

    def _benched(self, data: Any, samples: int) -> Bench:
        """Samples that repair and samples that judge, with the dense network run on these where they are compared."""
        if any(value.is_meta for value in self._graph.values.values()):
            raise OptionError("target: a network on the meta device can not be judged")
        if self._task is None:
            leaves = self._leaves(data, 2 * samples)
            if len(leaves) < 2:
                raise OptionError("data: two samples are needed at least, one to repair with and one to judge by")
            repairing, judging = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
        else:
            repairing, judging = self._leaves(data, samples), self._leaves(self._task.val, samples)
        bench = Bench(self._graph, repairing, judging, self._seed)
        if "distortion" in self.names:
            bench.check_finite()  # what is wrong with the samples shows here
            self.forwards += len(judging)
        return bench

    def _leaves(self, data: Any, samples: int) -> list[Leaves]:
        with seeded(PortableModule(self._graph, shared=True), data, self._seed):
            leaves = leaves_of(self._graph, data, samples, self._seed)
        for leaf in leaves:
            _add(self._seen, sorted(leaf.items()))
        return leaves

    def _validate(self) -> None:
        """Counts the held-out samples, and lets the dense network show what is wrong with them or with the metric."""
        if self._task is None:
            return
        with seeded(PortableModule(self._graph, shared=True), self._task.val, self._seed):
            for batch in self._task.val:
                self.validated += len(tensors_in(batch)[-1])
                _add(self._seen, enumerate(tensors_in(batch)))
        self.dense["error"] = self.error(self._graph, self._graph.values)
        self.forwards += self.validated

    def error(self, graph: Graph, values: Mapping[str, Tensor]) -> float:
        """1 - the task's metric over `val`."""
        if self._task is None:
            raise OptionError("objectives: 'error' needs labels, so a Task")
        module = PortableModule(dataclasses.replace(graph, values=dict(values)), shared=True)
        with seeded(module, self._task.val, self._seed):
            return 1.0 - evaluate(module, self._task.val, self._task.metric)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective; less is better.

    Attributes:
        value: Its value for a trial on the bench of those objectives.
        data: Whether it needs calibration data.
        task: Whether it needs a task.
        timed: Whether it needs a table of timed operators.
    """

    value: Callable[[Objectives, Trial], float]
    data: bool = False
    task: bool = False
    timed: bool = False


def _error(objectives: Objectives, trial: Trial) -> float:
    graph, values = trial.graph, trial.values
    trial.passed(objectives.validated)
    return objectives.error(graph, values)


def _distortion(_: Objectives, trial: Trial) -> float:
    return trial.distortion()


def _fraction(cost: str) -> Objective:
    """The kept fraction of a cost, counted on the cut graph."""

    def value(_: Objectives, trial: Trial) -> float:
        whole = getattr(trial.bench.cost, cost)
        return float(getattr(trial.cost, cost) / whole) if whole else 1.0

    return Objective(value)


def _memory(_: Objectives, trial: Trial) -> float:
    """The kept fraction of the bytes of activations that are alive at once."""
    return peak_bytes(trial.graph) / peak_bytes(trial.bench.graph)


def _latency(objectives: Objectives, trial: Trial) -> float:
    """Milliseconds of one call, as the table predicts them."""
    if objectives.latency is None:
        raise OptionError("latency: objective 'latency_ms' needs a LatencyTable")
    return 1000 * objectives.latency.predict(trial.bench.graph, Plan(dict(trial.keep), ""))


OBJECTIVES: dict[str, Objective] = {
    "error": Objective(_error, data=True, task=True),
    "distortion": Objective(_distortion, data=True),
    "macs": _fraction("macs"),
    "params": _fraction("params"),
    "bytes": _fraction("bytes"),
    "memory": Objective(_memory),
    "latency_ms": Objective(_latency, timed=True),
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
