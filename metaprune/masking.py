"""Distortions as they are when units are silenced or weights are masked.

Each change is computed only as far as it differs from the network as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves, joined, outputs_in
from metaprune.distances import LOGITS, distortion, is_logits, over_samples, squared_error
from metaprune.graphs.cost import macs_by_node
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph
from metaprune.graphs.rerun import Rerun, affected
from metaprune.statistics import chunk_size

_CHUNK = 256


@dataclass(frozen=True)
class Change:
    """A change to the network.

    Attributes:
        gates: For some groups 1 for each unit that stays and 0 for each that is silenced, shape [size].
        tensors: Tensors that are not the network's own, by name.
    """

    gates: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Distances:
    """What changes do to the outputs.

    Attributes:
        divergence: KL(dense || changed) by change and sample, shape [changes, samples]; None without logits.
        squared: Mean squared error of the outputs by change and sample, shape [changes, samples].
        forwards: Multiply-adds that were computed, over those of one forward pass of all samples.
    """

    divergence: NDArray[np.float64] | None
    squared: NDArray[np.float64]
    forwards: float

    def of(self, kind: str) -> NDArray[np.float64]:
        """One kind of distance by change and sample: the divergence, or for all other kinds the squared error."""
        if kind != LOGITS:
            return self.squared
        assert self.divergence is not None
        return self.divergence

    def total(self, kind: str) -> NDArray[np.float64]:
        """One kind of distance by change, over all samples, shape [changes]."""
        return over_samples(self.of(kind), kind)


def silenced(one: Tensor, units: NDArray[np.int64]) -> Tensor:
    """A group's open gate with some units silenced, shape [size]."""
    gate = one.clone()
    gate[torch.from_numpy(units).to(gate.device)] = 0
    return gate


def measure(graph: Graph, changes: Iterable[Change], leaves: Sequence[Leaves]) -> Distances:
    """Distances of the outputs of changed networks to those of the network as it is.

    The network runs once on each chunk of samples, of a size that keeps all activations within bounds; of each change
    only the nodes are computed that its gates and tensors reach. Values that are not finite count as infinitely far.

    Args:
        graph: The network.
        changes: The changes, gone through once for each chunk of samples: many large tensors need not be there at once.
        leaves: The samples, one at a time.

    Raises:
        OptionError: A network on the meta device, or changes that can be gone through only once.
        MetapruneError: The network's own output is not finite.
    """
    if isinstance(changes, Iterator):
        raise OptionError("changes: an iterator can not be gone through again")
    if any(value.is_meta for value in graph.values.values()):
        raise OptionError("data: a network on the meta device can not be measured")
    macs = macs_by_node(graph)
    reach: dict[tuple[frozenset[str], frozenset[str]], frozenset[str]] = {}
    forwards = 1.0
    divergences: list[Tensor] = []
    squares: list[Tensor] = []
    with torch.no_grad():
        for number, batch in enumerate(joined(graph, leaves, chunk_size(graph, _CHUNK))):
            run = Rerun(graph, batch)
            dense = outputs_in(run.output)
            if not all(bool(torch.isfinite(output).all()) for output in dense):
                raise MetapruneError("data: the network's output is not finite")
            rows: list[tuple[Tensor | None, Tensor]] = []
            for change in changes:
                gates = Gates(graph.coupling, change.gates) if change.gates else None
                key = frozenset(change.gates), frozenset(change.tensors)
                if key not in reach:
                    reach[key] = affected(graph, gates, change.tensors)
                outputs = outputs_in(run(reach[key], gates, change.tensors))
                rows.append(_distances(graph, outputs, dense))
                forwards += 0.0 if number else share(macs, reach[key])
            squares.append(torch.stack([square for _, square in rows]))
            divergences += [torch.stack([kl for kl, _ in rows if kl is not None])] if is_logits(dense[0]) else []
    divergence = _finite(torch.cat(divergences, 1)) if divergences else None
    return Distances(divergence, _finite(torch.cat(squares, 1)), forwards)


def share(macs: Mapping[str, float], nodes: frozenset[str]) -> float:
    """The part of a network's multiply-adds that some nodes have; all of it where there are none to be shared."""
    total = sum(macs.values())
    return sum(macs.get(name, 0.0) for name in nodes) / total if total else 1.0


def _distances(graph: Graph, outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
    divergence = distortion(outputs, dense).cpu() if is_logits(dense[0]) else None
    return divergence, squared_error(graph, outputs, dense)


def _finite(values: Tensor) -> NDArray[np.float64]:
    """At least 0, which rounding may miss, and infinite where there is no number."""
    found: NDArray[np.float64] = values.double().nan_to_num(torch.inf, torch.inf).clamp_min(0).numpy()
    return found
