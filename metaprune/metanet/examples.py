"""What heads are fitted on: the features of a zoo's networks and what was measured on them, kept in files."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph
from metaprune.graphs.trace import trace
from metaprune.metanet.describe import Description, Encoder, describe, observe
from metaprune.metanet.schema import Schema
from metaprune.ranking import unit_scores
from metaprune.task import Task
from metaprune.training import Progress

DATA, WEIGHTS = "data", "weights"
SIGHTS = (DATA, WEIGHTS)
"""With features of calibration data, and with those of the weights alone."""
_TABLES = ("cuts", "units", "pulls")
_BY_GROUP = ("ablation", "levels", "plain", "compensated")


class Measured(Protocol):
    """What was measured on one network; see `metaprune.metanet.labels.Labels`."""

    @property
    def sizes(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def order(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def ablation(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def levels(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def plain(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def compensated(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def joint_kept(self) -> Tensor: ...  # noqa: D102
    @property
    def joint(self) -> Tensor: ...  # noqa: D102


Measure = Callable[[Graph, Any], Measured]


@dataclass(frozen=True, eq=False)
class Example:
    """One network of a zoo, as heads are fitted on it.

    Attributes:
        name: Its name.
        family: Networks of one family are held out together.
        minima: The least count that each group may keep.
        described: Its features, by sight.
        order: By sight and group the units in the order of the features of cuts, from the first to go, shape [size].
        ablation: By group the loss of silencing each unit, shape [size].
        levels: By group the kept counts that were measured, shape [levels].
        plain: By group the loss there, shape [levels].
        compensated: The same after least squares.
        joint_kept: Kept counts of allocations, shape [allocations, groups].
        joint: Their losses, shape [allocations].
    """

    name: str
    family: str
    minima: Mapping[str, int]
    described: Mapping[str, Description]
    order: Mapping[str, Mapping[str, Tensor]]
    ablation: Mapping[str, Tensor]
    levels: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    compensated: Mapping[str, Tensor]
    joint_kept: Tensor
    joint: Tensor

    def save(self, path: Path, key: str) -> None:
        """Writes the example, atomically.

        Args:
            path: The file.
            key: Digest of all that it was made from.
        """
        names = list(self.minima)
        tensors = {"joint_kept": self.joint_kept, "joint": self.joint}
        for number, name in enumerate(names):
            tensors |= {f"{what}/{number}": getattr(self, what)[name] for what in _BY_GROUP}
            for sight, described in self.described.items():
                tensors |= {f"{sight}/{what}/{number}": getattr(described, what)[name] for what in _TABLES}
                tensors[f"{sight}/order/{number}"] = self.order[sight][name]
        about = {"key": key, "name": self.name, "family": self.family, "minima": dict(self.minima)}
        content = save_tensors({k: v.contiguous() for k, v in tensors.items()}, {"about": json.dumps(about)})
        write_atomically(path, content)

    @staticmethod
    def load(path: Path, key: str, schemas: Mapping[str, Schema]) -> Example | None:
        """Reads an example; None when it is damaged, or was made from something else."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                if about["key"] != key:
                    return None
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            names = list(about["minima"])
            described, order = {}, {}
            for sight, schema in schemas.items():
                order[sight] = {name: found[f"{sight}/order/{i}"] for i, name in enumerate(names)}
                cuts, units, pulls = (
                    {name: found[f"{sight}/{what}/{i}"] for i, name in enumerate(names)} for what in _TABLES
                )
                described[sight] = Description(schema, {n: len(u) for n, u in units.items()}, cuts, units, pulls)
            ablation, levels, plain, compensated = (
                {name: found[f"{what}/{i}"] for i, name in enumerate(names)} for what in _BY_GROUP
            )
            return Example(
                about["name"],
                about["family"],
                about["minima"],
                described,
                order,
                ablation,
                levels,
                plain,
                compensated,
                found["joint_kept"],
                found["joint"],
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class Making:
    """How examples are made.

    Attributes:
        measure: Measures a network for which the zoo has no labels.
        seed: Of what is drawn for features and labels.
        samples: Samples that features are of, at most.
        encoder: Of further unit states, if any.
        states: Width of these.
        sights: Which features.
    """

    measure: Measure
    seed: int
    samples: int
    encoder: Encoder | None = None
    states: int = 0
    sights: tuple[str, ...] = SIGHTS

    @property
    def schemas(self) -> dict[str, Schema]:
        """The features by sight."""
        return {sight: Schema.of(sight == DATA, self.states) for sight in self.sights}


def gather(
    zoo: Iterable[Any],
    making: Making,
    out: Path | None = None,
    progress: Progress | None = None,
    look: Callable[[str, Graph], None] | None = None,
) -> tuple[list[Example], dict[str, str]]:
    """Examples of all networks of a zoo, and by name why some have none.

    Args:
        zoo: Tasks, or objects with `name`, `family` and `task`; one is held at a time. Where the zoo has a method
            `labels(name)`, what that returns is used unless it is None.
        making: How.
        out: Folder of files that are read where they fit, and written.
        progress: Called after each network with the number done and that of all, 0 where it is not known.
        look: Called with the name and the graph of each network that gives an example.

    Raises:
        MetapruneError: The zoo is empty, or no network of it gives an example.
        OptionError: Two networks have one name, or something in it is no task.
    """
    examples: list[Example] = []
    skipped: dict[str, str] = {}
    labels = getattr(zoo, "labels", lambda name: None)
    total = len(zoo) if isinstance(zoo, Sized) else 0
    for number, (name, family, open_task) in enumerate(members(zoo), 1):
        if name in skipped or any(example.name == name for example in examples):
            raise OptionError(f"zoo: two networks are called {name!r}")
        try:
            examples.append(_example(name, family, open_task, labels, making, out, look))
        except OptionError as error:
            if str(error).startswith("zoo:"):
                raise
            skipped[name] = _reason(error)
        except (MetapruneError, OSError, RuntimeError, ValueError, LookupError) as error:
            skipped[name] = _reason(error)
        if name in skipped:
            warnings.warn(f"zoo: {name} is skipped: {skipped[name]}", stacklevel=3)
        if progress is not None:
            progress(number, total)
    if not examples:
        why = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise MetapruneError(f"zoo: there is no network to fit on{why}")
    return examples, skipped


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def members(zoo: Iterable[Any]) -> Iterator[tuple[str, str, Callable[[], Task]]]:
    """Name, family and what gives the task of each network."""
    for number, member in enumerate(zoo):
        if isinstance(member, Task):
            yield f"network-{number}", "", partial(_same, member)
        elif all(
            hasattr(type(member), key) or key in getattr(member, "__dict__", ()) for key in ("name", "family", "task")
        ):
            yield str(member.name), str(member.family), partial(getattr, member, "task")
        else:
            raise OptionError(f"zoo: a Task or an object with name, family and task is needed, not {member!r:.80}")


def _same(task: Task) -> Task:
    return task


def _example(
    name: str,
    family: str,
    open_task: Callable[[], Task],
    labels: Callable[[str], Measured | None],
    making: Making,
    out: Path | None,
    look: Callable[[str, Graph], None] | None,
) -> Example:
    task = open_task()
    schemas = making.schemas
    text = hashlib.sha256(repr((name, family, making.seed, making.samples)).encode())
    text.update(repr([schema.digest for schema in schemas.values()]).encode())
    for key, value in sorted(task.model.state_dict().items()):
        text.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path = None if out is None else out / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
    found = None
    if path is not None and path.exists():
        found = Example.load(path, text.hexdigest(), schemas)
        if found is not None and look is None:
            return found
    graph = trace(task.model, task.inputs)
    graph.check_finite()
    if found is None:
        measured = labels(name)
        found = made(name, family, graph, measured or making.measure(graph, task.train), task.train, making)
        if path is not None:
            found.save(path, text.hexdigest())
    if look is not None:
        look(name, graph)
    return found


def made(name: str, family: str, graph: Graph, measured: Measured, data: Any, making: Making) -> Example:
    """The example of one network.

    Raises:
        MetapruneError: The labels are of another network, or hold what is not a number.
    """
    groups = [group for group in graph.groups if not group.pinned]
    if dict(measured.sizes) != {group.name: group.size for group in groups} or not groups:
        raise MetapruneError(f"labels: those of {name} are not of its groups")
    described, order = {}, {}
    for sight in making.sights:
        seen = sight == DATA
        statistics = observe(graph, data, making.samples, making.seed) if seen else None
        found = measured.order if seen else orders(graph, "magnitude")
        order[sight] = {group.name: found[group.name].cpu() for group in groups}
        described[sight] = describe(graph, found, statistics, making.encoder)
    values = [*measured.ablation.values(), *measured.plain.values(), *measured.compensated.values(), measured.joint]
    if any(bool(value.isnan().any()) for value in values):
        raise MetapruneError(f"labels: a loss of {name} is not a number")
    names = [group.name for group in groups]
    ablation, levels, plain, compensated = (
        {key: getattr(measured, what)[key].detach().cpu() for key in names} for what in _BY_GROUP
    )
    minima = {group.name: group.minimum for group in groups}
    kept = measured.joint_kept.long().cpu()
    joint = measured.joint.cpu()
    return Example(name, family, minima, described, order, ablation, levels, plain, compensated, kept, joint)


def orders(graph: Graph, criterion: str, data: Any = None, seed: int = 0) -> dict[str, Tensor]:
    """Units of each group by a criterion, from the first to go to the last, shape [size] each."""
    groups = [group for group in graph.groups if not group.pinned]
    scores, _ = unit_scores(graph, groups, criterion, data, seed)
    return {
        group.name: torch.from_numpy(values.argsort(kind="stable"))
        for group, values in zip(groups, scores, strict=True)
    }
