"""A zoo: trained networks in a folder, each with what is known and what was measured of it.

`manifest.json` lists the members, which lie in `members/NAME/`: `weights.safetensors` where a recipe describes the
network, else `network/` as `Pruned.save` writes it; `labels.safetensors`; and `member.json` with the facts of the
member, the hashes of its files among them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from metaprune.api import load as load_pruned
from metaprune.data import Batches
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.metanet.families import blank
from metaprune.metanet.labels import Labels
from metaprune.metanet.sources import source
from metaprune.task import Task

SCHEMA = 1
MANIFEST, MEMBERS = "manifest.json", "members"
FACTS, WEIGHTS, NETWORK, LABELS = "member.json", "weights.safetensors", "network", "labels.safetensors"
_NAME = re.compile(r"[0-9]{4,6}-[a-z_]{1,40}(-[a-z]{1,20})?")
_FILE = re.compile(r"(network/)?[a-z0-9-]{1,60}\.(safetensors|json)")
Read = TypeVar("Read")
_TEXTS = ("family", "kind", "data")
_NUMBERS = ("macs", "units", "accuracy")


@dataclass(frozen=True, eq=False)
class Member:
    """A network of a zoo.

    Attributes:
        name: Unique in the zoo.
        family: Its family, see `metaprune.metanet.architectures.FAMILIES`.
        task: The network, in eval mode, with the data it was trained and is judged on.
        calibration: The samples that its labels were measured with.
        facts: What the manifest says about it.
    """

    name: str
    family: str
    task: Task
    calibration: Batches
    facts: Mapping[str, Any]


class Zoo:
    """The members of a zoo, one in memory at a time.

    Iteration goes through the members in the order of their names and leaves out those that are broken: a file is
    missing or is not the one that was written, or a weight is not finite.

    Attributes:
        folder: Where it is.
        settings: What it was built with.
        facts: What is known about each member, by name: family, kind (`trained`, `early`, `pruned`), recipe, data,
            accuracy, macs, params, units, sha256 of each file.
        failed: Members that could not be made, and why.
        skipped: Members that turned out to be broken so far, and why.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], directory: str | None) -> None:
        """Takes the folder, the content of its manifest, and where Fashion-MNIST is; see `open`."""
        self.folder = folder
        self.settings: Mapping[str, Any] = MappingProxyType(manifest["settings"])
        self.facts: Mapping[str, Mapping[str, Any]] = MappingProxyType(dict(sorted(manifest["members"].items())))
        self.failed: Mapping[str, str] = MappingProxyType(manifest["failed"])
        self.skipped: dict[str, str] = {}
        self._directory = directory

    @staticmethod
    def open(folder: str | Path, data: str | Path | None = None) -> Zoo:
        """Reads the manifest of a zoo that `metaprune.metanet.building.build` wrote, finished or not.

        Args:
            folder: The zoo.
            data: Folder of Fashion-MNIST's files where it is not that of the Debian package.

        Raises:
            LoadError: There is no zoo, or its manifest is damaged.
            MetapruneError: The zoo has no members.
        """
        manifest = read_manifest(Path(folder))
        if not manifest["members"]:
            raise MetapruneError(f"zoo {folder}: it has no members")
        return Zoo(Path(folder), manifest, None if data is None else str(data))

    def __len__(self) -> int:
        """Number of members in the manifest, broken ones included."""
        return len(self.facts)

    def __iter__(self) -> Iterator[Member]:
        """Goes through the members that are whole; raises `MetapruneError` in the end if none is."""
        whole = 0
        for name in self.facts:
            member = self._or_skipped(name, self.member)
            if member is not None:
                whole += 1
                yield member
        if not whole:
            name, reason = next(iter(self.skipped.items()))
            raise MetapruneError(f"zoo {self.folder}: none of its {len(self)} members is whole; {name}: {reason}")

    def member(self, name: str) -> Member:
        """One member by name.

        Raises:
            OptionError: There is none of that name, or the data it was trained on are not there.
            LoadError: It is broken; the message says how.
        """
        model, facts = self._network(name), self.facts[name]
        given = source(facts["data"], self._directory)
        return Member(name, facts["family"], given.task(model), given.calibration, facts)

    def labels(self, name: str) -> Labels | None:
        """What was measured on a member; None where nothing was; for errors see `member`."""
        facts = self._facts(name)
        if LABELS not in facts["files"]:
            return None
        folder = self.folder / MEMBERS / name
        check_files(folder, {LABELS: facts["files"][LABELS]})
        return Labels.load(folder / LABELS)

    def check(self) -> None:
        """Looks at every member, as iteration does but without the data, and notes the broken ones in `skipped`."""
        for name in self.facts:
            self._or_skipped(name, self._network)

    def by_family(self) -> dict[str, dict[str, Any]]:
        """By family, without the members known to be broken: how many there are, of them early and pruned ones.

        Further the means of multiply-adds, units and accuracy, and the worst and the best accuracy.
        """
        found: dict[str, list[Mapping[str, Any]]] = {}
        for name, facts in self.facts.items():
            if name not in self.skipped:
                found.setdefault(facts["family"], []).append(facts)
        return {family: _summary(found[family]) for family in sorted(found)}

    def _or_skipped(self, name: str, read: Callable[[str], Read]) -> Read | None:
        """What is read of a member, or None and a note of why it is broken."""
        try:
            return read(name)
        except LoadError as error:
            self.skipped[name] = str(error)
            return None

    def _network(self, name: str) -> nn.Module:
        """The network of a member; for errors see `member`."""
        facts = self._facts(name)
        folder = self.folder / MEMBERS / name
        check_files(folder, facts["files"])
        return network(folder, facts)

    def _facts(self, name: str) -> Mapping[str, Any]:
        if name not in self.facts:
            raise OptionError(f"name: the zoo has no member {name!r}")
        return self.facts[name]


def _summary(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [each["accuracy"] for each in facts]
    kinds = [each["kind"] for each in facts]
    return {
        "members": len(facts),
        "early": kinds.count("early"),
        "pruned": kinds.count("pruned"),
        **{key: fmean(each[key] for each in facts) for key in _NUMBERS},
        "worst": min(accuracies),
        "best": max(accuracies),
    }


def network(folder: Path, facts: Mapping[str, Any]) -> nn.Module:
    """The network of a member, in eval mode.

    Raises:
        LoadError: It is damaged, not the network of the recipe, or holds a value that is not finite.
    """
    model = load_pruned(folder / NETWORK) if facts["recipe"] is None else _from_recipe(folder / WEIGHTS, facts)
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise LoadError(f"tensor {name} holds a value that is not finite")
    return model.eval()


def _from_recipe(path: Path, facts: Mapping[str, Any]) -> nn.Module:
    try:
        model = blank(facts["family"], facts["recipe"])
        tensors = load_tensors(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path.name}: {error.strerror or error}") from None
    except (MetapruneError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path.name} or the recipe is damaged: {error}") from None
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != expected:
        raise LoadError(f"{path.name}: the tensors are not those of the recipe's network")
    model.load_state_dict(tensors, assign=True)
    return model


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compares files with their hashes; raises `LoadError` naming the one that is missing or another."""
    for name, digest in files.items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise LoadError(f"{name}: {error.strerror or error}") from None
        if found != digest:
            raise LoadError(f"{name}: it is not the file that was written, its hash differs")


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a zoo; raises `LoadError` where there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(f"{folder}: there is no zoo, {MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} can not be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise LoadError(f"{path}: a manifest of schema {SCHEMA} is needed")
    if not all(isinstance(manifest.get(key), dict) for key in ("settings", "members", "failed")):
        raise LoadError(f"{path} is damaged: settings, members and failed are maps")
    for name, facts in manifest["members"].items():
        if not is_name(name) or not are_facts(facts):
            raise LoadError(f"{path} is damaged: {name[:80]!r} is no member")
    return manifest


def is_name(name: str) -> bool:
    """Whether a member may be called so, and its folder; a manifest may come from anywhere."""
    return _NAME.fullmatch(name) is not None


def are_facts(facts: object) -> bool:
    """Whether a value is what is known about a member."""
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), str) for key in _TEXTS):
        return False
    if not all(isinstance(facts.get(key), int | float) for key in _NUMBERS):
        return False
    files, recipe = facts.get("files"), facts.get("recipe", 0)
    return (
        (recipe is None or isinstance(recipe, dict))
        and isinstance(files, dict)
        and all(_FILE.fullmatch(name) and isinstance(digest, str) for name, digest in files.items())
    )
