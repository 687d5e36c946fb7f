"""Sensitivity curves as data: what the outputs lose when one group alone is cut down, for every number of units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What the outputs lose when one group alone keeps its k best units, for every group that is not pinned.

    Attributes:
        curves: By kind of distance and group the loss at every k, shape [size + 1]: infinite below the group's
            minimum, non-increasing from there on, 0 at its size. The kinds are `"kl"`, the mean over samples of
            KL(dense || cut) of the softmax; `"mse"`, the mean over samples of the mean squared error of the outputs;
            `"worst"`, the greatest such error of a sample (Xu et al., ICCV 2023); and, without data, `"weights"`, the
            share of the group's squared weights that goes.
        order: Units of each group, the last to go first, shape [size]: to keep k is to keep the first k.
        levels: The k at which each group was measured, ascending; empty where nothing was.
        points: By kind and group what was measured at these k, before curves were made monotone.
        forwards: Multiply-adds spent, in forward passes of all samples: of ranking, gradients (a backward pass counts
            as two) and measurements, of these only what had to be computed again.
        samples: Number of samples; for curves of the weights alone those that the ranking looked at.
        graph: Fingerprint of the network's axis table.
        weights: Digest of the network's tensors.
        provenance: Method, criterion, options and seed.
    """

    curves: Mapping[str, Mapping[str, NDArray[np.float64]]]
    order: Mapping[str, NDArray[np.int64]]
    levels: Mapping[str, NDArray[np.int64]]
    points: Mapping[str, Mapping[str, NDArray[np.float64]]]
    forwards: float
    samples: int
    graph: str
    weights: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("order", "levels", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name in ("curves", "points"):
            frozen = {kind: MappingProxyType(dict(own)) for kind, own in getattr(self, name).items()}
            object.__setattr__(self, name, MappingProxyType(frozen))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of distance there are; the first is the one to take when none is named."""
        return tuple(self.curves)

    def of(self, kind: str | None = None) -> Mapping[str, NDArray[np.float64]]:
        """The curves of one kind, by group; raises `OptionError` for a kind that there is not."""
        kind = self.kinds[0] if kind is None else kind
        if kind not in self.curves:
            raise OptionError(f"kind: {kind!r} is none of {', '.join(self.kinds)}")
        return self.curves[kind]

    def keep(self, group: str, count: int) -> tuple[int, ...]:
        """The units that stay when a group keeps so many, ascending."""
        return tuple(sorted(self.order[group][:count].tolist()))

    def check(self, graph: Graph) -> None:
        """Raises `OptionError` when the curves are of another network, or of other weights."""
        if self.graph != graph.fingerprint:
            raise OptionError("sensitivity: it was found for another network: its axis table differs")
        if self.weights != weights_digest(graph):
            raise OptionError("sensitivity: it was found for other weights of the network")

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically; floating-point numbers are exact."""
        body = {
            "schema": SCHEMA,
            "graph": self.graph,
            "weights": self.weights,
            "forwards": self.forwards,
            "samples": self.samples,
            "provenance": dict(self.provenance),
            "order": {name: units.tolist() for name, units in self.order.items()},
            "levels": {name: kept.tolist() for name, kept in self.levels.items()},
            "curves": _written(self.curves),
            "points": _written(self.points),
        }
        write_atomically(Path(path), json.dumps(body).encode())

    @staticmethod
    def load(path: str | Path, graph: Graph | None = None) -> Sensitivity:
        """Reads what `save` wrote.

        Args:
            path: The file.
            graph: The network it must have been found for; None to take it as it is.

        Raises:
            LoadError: The file is damaged or something else.
            OptionError: See `check`.
        """
        try:
            found = _read(json.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"sensitivity {path} can not be read: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LoadError(f"sensitivity {path} is damaged: {type(error).__name__}: {error}") from None
        if graph is not None:
            found.check(graph)
        return found


def weights_digest(graph: Graph) -> str:
    """SHA-256 of the tensors that a network's forward pass reads, by name.

    Raises:
        OptionError: A network on the meta device.
    """
    text = hashlib.sha256()
    for name in sorted({node.args[0] for node in graph.nodes.values() if node.op == "tensor"}):
        value = graph.values[name].detach()
        if value.is_meta:
            raise OptionError("sensitivity: a network on the meta device has no weights")
        text.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        text.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return text.hexdigest()


def _written(curves: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, dict[str, list[float | None]]]:
    """Curves as lists; JSON has no infinity, so null stands for it."""
    return {
        kind: {name: [v if v < np.inf else None for v in curve.tolist()] for name, curve in own.items()}
        for kind, own in curves.items()
    }


def _read(body: Any) -> Sensitivity:
    if body["schema"] != SCHEMA:
        raise ValueError(f"schema {SCHEMA} is needed")
    order, levels = (_each(body[key], _numbers) for key in ("order", "levels"))
    curves, points = (_each(body[key], lambda own: _each(own, _values)) for key in ("curves", "points"))
    provenance, texts = body["provenance"], [body["graph"], body["weights"]]
    if not curves or not isinstance(provenance, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("curves, a map of provenance and two digests are needed")
    for name, units in order.items():
        if not np.array_equal(np.sort(units), np.arange(len(units))):
            raise ValueError(f"the order of group {name} is none")
    for own in curves.values():
        if {name: len(curve) - 1 for name, curve in own.items()} != {name: len(u) for name, u in order.items()}:
            raise ValueError("curves and orders do not fit one another")
    forwards, samples = float(body["forwards"]), int(body["samples"])
    return Sensitivity(curves, order, levels, points, forwards, samples, texts[0], texts[1], provenance)


def _each(body: Any, read: Callable[[Any], T]) -> dict[str, T]:
    return {str(key): read(value) for key, value in body.items()}


def _numbers(values: Any) -> NDArray[np.int64]:
    if not all(type(value) is int for value in values):
        raise ValueError("whole numbers are needed")
    return np.array(values, dtype=np.int64)


def _values(values: Any) -> NDArray[np.float64]:
    found = np.array([np.inf if value is None else value for value in values], dtype=np.float64)
    if found.ndim != 1 or np.isnan(found).any():
        raise ValueError("lists of numbers are needed")
    return found
