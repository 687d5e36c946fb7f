"""Makes the members of a zoo: one architecture is trained, kept from early on, or pruned, and each is measured."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import save as serialise
from torch import nn

from metaprune.api import prune
from metaprune.evaluation import single_thread
from metaprune.graphs.errors import LoadError, MetapruneError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.trace import trace
from metaprune.losses import cross_entropy
from metaprune.metanet import families
from metaprune.metanet.labels import measure
from metaprune.metanet.sources import Source, source
from metaprune.metanet.zoo import (
    FACTS,
    LABELS,
    MEMBERS,
    NETWORK,
    SCHEMA,
    WEIGHTS,
    are_facts,
    check_files,
    network,
    sha256,
)
from metaprune.recovery import recover
from metaprune.training import Settings, train

Facts: TypeAlias = dict[str, Any]

TRAINED, EARLY, PRUNED = "trained", "early", "pruned"
PART = ".part-"
"""What the folder of a member that is not finished is called first."""

_SETTINGS = Settings(lr=3e-3, weight_decay=0.01, optimizer="adamw")
_AFTERWARDS = Settings(epochs=1, lr=1e-3, weight_decay=0.01, optimizer="adamw")  # of a pruned member
_EARLY = (0.1, 0.4)  # share of the training after which an early member is taken
_KEPT = (0.6, 0.8)  # share of the multiply-adds that a pruned member keeps


@dataclass(frozen=True)
class Line:
    """One architecture and the members that come of it.

    Attributes:
        number: Of the architecture.
        family: Its family.
        data: Name of what it learns.
        seed: Of all that is drawn for it.
        kinds: `trained`, and of some `early` or `pruned`.
    """

    number: int
    family: str
    data: str
    seed: int
    kinds: tuple[str, ...]

    def name(self, kind: str) -> str:
        """The name of a member."""
        return f"{self.number:04d}-{self.family}" + ("" if kind == TRAINED else f"-{kind}")

    @property
    def names(self) -> list[str]:
        """The names of its members."""
        return [self.name(kind) for kind in self.kinds]


@dataclass(frozen=True)
class Maker:
    """Makes the members of lines; what a process of the builder is given.

    Attributes:
        folder: The zoo.
        directory: Folder of Fashion-MNIST's files, None for that of the Debian package.
        plans: Random allocations that are measured for each member.
        epochs: Passes over the training data; None for what suits each data set.
    """

    folder: Path
    directory: str | None
    plans: int
    epochs: int | None

    def __call__(self, line: Line) -> dict[str, str]:
        """Makes the members of a line that are not there; the reasons of those that can not be made, by name."""
        failed: dict[str, str] = {}
        with single_thread():
            for make, kinds in ((self._train, (TRAINED, EARLY)), (self._prune, (PRUNED,))):
                missing = [kind for kind in kinds if kind in line.kinds and not self._is_whole(line, kind)]
                if not missing:
                    continue
                try:
                    make(line, missing)
                except MetapruneError as error:
                    reason = " ".join(str(error).split())
                    failed |= {line.name(kind): reason for kind in missing if not self._is_whole(line, kind)}
        return failed

    def _train(self, line: Line, missing: list[str]) -> None:
        """Trains a network; what it is on the way is the early member."""
        clock, given, own = _Clock(), source(line.data, self.directory), random.Random(line.seed)
        model, recipe = families.draw(line.family, own, given.shape, given.classes, line.seed)
        settings = replace(_SETTINGS, epochs=given.epochs if self.epochs is None else self.epochs)
        share = own.uniform(*_EARLY)
        made: dict[str, tuple[float, nn.Module]] = {TRAINED: (1.0, model)}

        def watch(done: int, total: int) -> None:
            if done == max(1, round(share * total)):
                made[EARLY] = share, copy.deepcopy(model)

        batches = given.task(model).train
        train(model, batches, lambda logits, _, labels: cross_entropy(logits, labels), settings, line.seed, None, watch)
        for kind in missing:
            about = {"kind": kind, "recipe": recipe, "settings": asdict(settings), "share": made[kind][0]}
            self._add(line, about, given, _weights_of(made[kind][1]), clock)

    def _prune(self, line: Line, missing: list[str]) -> None:
        """Prunes the trained member a little and trains it on."""
        clock, given = _Clock(), source(line.data, self.directory)
        base = self.folder / MEMBERS / line.name(TRAINED)
        if not is_whole(base):
            raise MetapruneError(f"{base.name}, which it is pruned from, could not be made")
        share = random.Random(f"{line.seed}:{PRUNED}").uniform(*_KEPT)
        task = given.task(network(base, read_facts(base)))
        budget = f"macs={share!r}"
        cut = prune(task.model, task.inputs, budget, "fisher_block", "cost", given.calibration, seed=line.seed)
        pruned = recover(cut, task, recipe="finetune", settings=_AFTERWARDS, seed=line.seed)
        for kind in missing:
            about = {"kind": kind, "recipe": None, "settings": asdict(_AFTERWARDS), "share": share}
            self._add(line, about, given, lambda part: pruned.save(part / NETWORK), clock)

    def _add(self, line: Line, about: Facts, given: Source, put: Callable[[Path], None], clock: _Clock) -> None:
        """Writes a member's files to a folder of another name, measures what they hold, and renames the folder."""
        name = line.name(about["kind"])
        part = self.folder / MEMBERS / f"{PART}{name}-{os.getpid()}"
        part.mkdir(parents=True)
        put(part)
        making = clock.lap()
        facts = {"schema": SCHEMA, "family": line.family, "data": line.data, "seed": line.seed, **about}
        task = given.task(network(part, facts))
        graph = trace(task.model, task.inputs)
        labels = measure(graph, given.calibration, plans=self.plans, seed=line.seed)
        labels.save(part / LABELS)
        cost = graph.cost()
        files = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        facts |= {
            "accuracy": task.score(),
            "macs": cost.macs,
            "params": cost.params,
            "units": sum(labels.sizes.values()),
            "files": {file: sha256(part / file) for file in files},
            "seconds": {"making": making, "labels": clock.lap()},
        }
        write_atomically(part / FACTS, json.dumps(facts, indent=1).encode())
        _rename(part, part.parent / name)

    def _is_whole(self, line: Line, kind: str) -> bool:
        return is_whole(self.folder / MEMBERS / line.name(kind))


def _weights_of(model: nn.Module) -> Callable[[Path], None]:
    """Writes a network's tensors into a folder."""
    content = serialise({name: value.contiguous() for name, value in model.state_dict().items()})
    return lambda folder: write_atomically(folder / WEIGHTS, content)


@dataclass
class _Clock:
    """Processor time from lap to lap."""

    last: float = field(default_factory=time.process_time)

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.last = self.last, time.process_time()
        return round(self.last - before, 2)


def _rename(part: Path, final: Path) -> None:
    """Puts a finished folder in its place, which a broken member may still have."""
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def read_facts(folder: Path) -> Facts:
    """What is known about a member; raises `LoadError` where that is damaged."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{FACTS}: {error}") from None
    if not are_facts(facts) or facts.get("schema") != SCHEMA or not isinstance(facts.get("seconds"), dict):
        raise LoadError(f"{FACTS}: it is damaged or of another schema")
    return dict(facts)


def is_whole(folder: Path) -> bool:
    """Whether a member is there, with all of its files."""
    try:
        check_files(folder, read_facts(folder)["files"])
    except LoadError:
        return False
    return True
