"""Plans: what stays, as plain data. Every method ends in one; only `surgery.cut` carries one out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from types import MappingProxyType
from typing import Any

from metaprune.graphs.errors import PlanError
from metaprune.graphs.files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """An immutable list of typed edits, and where it came from.

    Attributes:
        keep: For each group that shrinks, the units that stay, ascending.
        graph: Fingerprint of the graph's axis table it was made for.
        budget: The budget asked for, as given.
        reached: The kept fraction of each cost, such as `{"macs": 0.497, "params": 0.61}`.
        provenance: Method, criterion, allocator, seed and options.
        parent: Digest of the plan this one refines, if any.
    """

    keep: Mapping[str, tuple[int, ...]]
    graph: str
    budget: str = ""
    reached: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""

    def __post_init__(self) -> None:
        frozen = {name: _units(name, units) for name, units in self.keep.items()}
        object.__setattr__(self, "keep", MappingProxyType(frozen))
        object.__setattr__(self, "reached", MappingProxyType(dict(self.reached)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def to_json(self) -> str:
        """The plan as JSON text."""
        edits = [{"edit": "keep", "group": name, "units": list(units)} for name, units in self.keep.items()]
        body = {
            "schema": SCHEMA,
            "graph": self.graph,
            "budget": self.budget,
            "reached": dict(self.reached),
            "provenance": dict(self.provenance),
            "parent": self.parent,
            "edits": edits,
        }
        return json.dumps(body, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan in a JSON text; raises `PlanError` naming what is wrong with it."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON: {error}") from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise PlanError(f"a plan needs schema {SCHEMA}")
        keep: dict[str, tuple[int, ...]] = {}
        edits = body.get("edits")
        if not isinstance(edits, list):
            raise PlanError("a plan needs a list of edits")
        for edit in edits:
            if not isinstance(edit, dict) or edit.get("edit") != "keep":
                raise PlanError(f"edit {str(edit)[:80]} is of an unknown type")
            name, units = edit.get("group"), edit.get("units")
            if not isinstance(name, str) or not isinstance(units, list) or not all(type(u) is int for u in units):
                raise PlanError(f"edit of group {str(name)[:80]!r} needs a list of unit numbers")
            keep[name] = tuple(units)
        texts = [body.get(key, "") for key in ("graph", "budget", "parent")]
        maps = [body.get(key, {}) for key in ("reached", "provenance")]
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(m, dict) for m in maps):
            raise PlanError("a plan's graph, budget and parent are texts, reached and provenance are maps")
        return Plan(keep, texts[0], texts[1], maps[0], maps[1], texts[2])

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically."""
        write_atomically(Path(path), self.to_json().encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan; raises `PlanError`."""
        try:
            return Plan.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} can not be read: {error}") from None


def _units(group: str, units: Any) -> tuple[int, ...]:
    """Numbers of units, ascending; raises `PlanError` for anything else."""
    try:
        if any(isinstance(unit, bool) for unit in units):
            raise TypeError
        return tuple(sorted(index(unit) for unit in units))
    except TypeError:
        raise PlanError(f"group {group}: a plan lists the numbers of the units that stay, not {units!r}") from None
