"""Nested inputs and outputs of a network, taken apart into tensors and put together again."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metaprune.graphs.errors import LoadError


@dataclass(frozen=True)
class Ref:
    """The value of another node."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Record:
    """A dict, dataclass or output class: `cls` as `module:name`, fields by name."""

    cls: str
    items: Mapping[Any, Any]


@dataclass(frozen=True)
class Sequence:
    """A list, tuple or named tuple: `cls` as `module:name`."""

    cls: str
    items: tuple[Any, ...]


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def take_apart(
    value: Any, leaf: Callable[[torch.Tensor], Any], other: Callable[[str, Any], Any], path: str = ""
) -> Any:
    """Structure of a nested value.

    Args:
        value: Tensors in lists, tuples, mappings and dataclasses (output classes of transformers included).
        leaf: Called on every tensor; its result stands in the structure.
        other: Called with path and value of everything else (`None` excepted); its result stands in the structure.
        path: Where `value` stands, for `other`.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return leaf(value)
    if isinstance(value, Mapping):
        return Record(_path(type(value)), {k: take_apart(v, leaf, other, f"{path}.{k}") for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return Sequence(
            _path(type(value)), tuple(take_apart(v, leaf, other, f"{path}[{i}]") for i, v in enumerate(value))
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return Record(_path(type(value)), {k: take_apart(v, leaf, other, f"{path}.{k}") for k, v in fields.items()})
    return other(path, value)


def put_together(structure: Any, leaf: Callable[[Ref], Any]) -> Any:
    """The nested value of a structure; `leaf` gives the value of each `Ref`."""
    if isinstance(structure, Ref):
        return leaf(structure)
    if isinstance(structure, Record):
        items = {key: put_together(item, leaf) for key, item in structure.items.items()}
        kind = _class(structure.cls)
        return items if kind is dict else kind(**items)
    if isinstance(structure, Sequence):
        values = [put_together(item, leaf) for item in structure.items]
        kind = _class(structure.cls)
        if kind is list:
            return values
        return kind(*values) if hasattr(kind, "_fields") else tuple(values)
    return structure


def refs(structure: Any) -> Iterator[str]:
    """Names referred to, in order."""
    if isinstance(structure, Ref):
        yield structure.name
    elif isinstance(structure, (Record, Sequence)):
        items = structure.items.values() if isinstance(structure, Record) else structure.items
        for item in items:
            yield from refs(item)


def _class(path: str) -> Any:
    """The class of an output structure. Only mappings, dataclasses and tuples can be reached."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not (
        issubclass(found, (Mapping, list, tuple)) or dataclasses.is_dataclass(found)
    ):
        raise LoadError(f"{path} is not an output class")
    return found


def exchange(structure: Any, leaf: Callable[[Ref], Any]) -> Any:
    """The same structure with other leaves."""
    if isinstance(structure, Ref):
        return leaf(structure)
    if isinstance(structure, Record):
        return Record(structure.cls, {k: exchange(v, leaf) for k, v in structure.items.items()})
    if isinstance(structure, Sequence):
        return Sequence(structure.cls, tuple(exchange(v, leaf) for v in structure.items))
    return structure
