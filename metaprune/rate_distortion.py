"""How far a network's outputs move when weights of one layer go: curves over the number of weights that stay.

Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning (ICCV 2023, arXiv 2308.10438), section 3: all
other layers stay dense, and the weights of the layer leave in the order of their absolute values. The dense values are
computed once for a batch of samples; for a change of one weight only the nodes that depend on it are run again.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves, batch_size, joined, outputs_in
from metaprune.graphs import structure
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.execute import call
from metaprune.graphs.ir import Graph, Meta

MEMORY = 1 << 30
_CHUNK = 256


class Magnitudes:
    """The weights of one tensor in the order of their absolute values; of equal ones the earlier stays longer.

    Args:
        weight: The tensor.
    """

    def __init__(self, weight: Tensor) -> None:
        flat = weight.detach().abs().flatten()
        place = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
        place[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), device=flat.device)
        self._place = place.reshape(weight.shape)

    def mask(self, count: int) -> Tensor:
        """Whether each weight is among the `count` greatest, shaped like the tensor."""
        return self._place < count


def distortion_curves(
    graph: Graph, kept: Mapping[str, Sequence[int]], leaves: Sequence[Leaves], worst_case: bool
) -> dict[str, NDArray[np.float64]]:
    """Squared error of the outputs when so many weights of one tensor stay and all else is dense.

    Args:
        graph: The network.
        kept: For each tensor, the numbers of weights to try.
        leaves: The samples.
        worst_case: Whether the greatest error of a sample counts, else the mean.

    Returns:
        By tensor, the errors in the order of `kept`; infinite where an output is not a number. The error of a sample
        is the mean over the elements of all floating-point outputs.

    Raises:
        MetapruneError: An output of the dense network is not finite.
    """
    ranked = {name: Magnitudes(graph.values[name]) for name in kept}
    found = {name: [_Error(worst_case) for _ in counts] for name, counts in kept.items()}
    for batch in joined(graph, leaves, _batch(graph)):
        dense = _Dense(graph, batch)
        for name, counts in kept.items():
            for error, count in zip(found[name], counts, strict=True):
                error.add(dense.errors({name: graph.values[name] * ranked[name].mask(count)}))
    return {name: np.array([error.value for error in errors]) for name, errors in found.items()}


def joint_distortion(graph: Graph, masks: Mapping[str, Tensor], leaves: Sequence[Leaves], worst_case: bool) -> float:
    """Squared error of the outputs when all masks are applied at once; see `distortion_curves`."""
    found = _Error(worst_case)
    for batch in joined(graph, leaves, _batch(graph)):
        found.add(_Dense(graph, batch).errors({name: graph.values[name] * mask for name, mask in masks.items()}))
    return found.value


class _Error:
    """Errors of samples, summed up or the greatest of them."""

    def __init__(self, worst_case: bool) -> None:
        self._worst_case = worst_case
        self._sum, self._count, self._most = 0.0, 0, 0.0

    def add(self, errors: Tensor) -> None:
        """Takes in errors of shape [samples]."""
        errors = errors.nan_to_num(nan=torch.inf, posinf=torch.inf)
        self._sum += float(errors.sum())
        self._count += len(errors)
        self._most = max(self._most, float(errors.max()))

    @property
    def value(self) -> float:
        """The greatest or the mean."""
        return self._most if self._worst_case else self._sum / max(1, self._count)


class _Dense:
    """A network's values on one batch, from which those of a changed network are computed.

    Args:
        graph: The network.
        batch: Values of its input nodes.
    """

    def __init__(self, graph: Graph, batch: Leaves) -> None:
        self._graph = graph
        self._sources: dict[str, list[str]] = {}
        self._behind: dict[frozenset[str], list[str]] = {}
        self._values: dict[str, Any] = {}
        for node in graph.nodes.values():
            if node.op == "tensor":
                self._sources.setdefault(node.args[0], []).append(node.name)
                self._values[node.name] = graph.values[node.args[0]].detach()
            else:
                self._values[node.name] = batch[node.name] if node.op == "input" else self._called(node.name, {})
        self._outputs = self._outputs_of(self._values)
        if not all(bool(output.isfinite().all()) for output in self._outputs):
            raise MetapruneError("data: an output of the dense network is not finite")
        sizes = {len(output) if output.ndim else 0 for output in self._outputs}
        self._samples = sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1  # else the batch counts as one

    def errors(self, changed: Mapping[str, Tensor]) -> Tensor:
        """Squared error of each sample with other values of some tensors, shape [samples], float64."""
        values: dict[str, Any] = {node: new for name, new in changed.items() for node in self._sources[name]}
        for name in self._dependents(changed):
            values[name] = self._called(name, values)
        apart = [
            (new.double() - old.double()).square().reshape(self._samples, -1)
            for new, old in zip(self._outputs_of(values), self._outputs, strict=True)
        ]
        return torch.cat(apart, dim=1).mean(1)

    def _called(self, name: str, changed: dict[str, Any]) -> Any:
        return call(self._graph.nodes[name], ChainMap(changed, self._values), self._graph.values)

    def _outputs_of(self, changed: dict[str, Any]) -> list[Tensor]:
        values = ChainMap(changed, self._values)
        return outputs_in(structure.put_together(self._graph.signature.output, lambda ref: values[ref.name]))

    def _dependents(self, tensors: Iterable[str]) -> list[str]:
        """The nodes whose values depend on some tensors, in order."""
        key = frozenset(tensors)
        if key not in self._behind:
            self._behind[key] = list(_behind(self._graph, [node for name in key for node in self._sources[name]]))
        return self._behind[key]


def _behind(graph: Graph, nodes: Iterable[str]) -> Iterator[str]:
    reached = set(nodes)
    for node in graph.nodes.values():
        if node.name not in reached and not reached.isdisjoint(node.refs()):
            reached.add(node.name)
            yield node.name


def _batch(graph: Graph) -> int:
    """Samples at a time: the values of all nodes are held, twice where all depend on what changes."""
    total = 0
    for node in graph.nodes.values():
        if isinstance(node.meta, Meta) and node.op != "tensor":
            rows = node.meta.shape[0] if any(node.meta.batched) else 1
            total += torch.Size(node.meta.shape).numel() * node.meta.dtype.itemsize // max(1, rows)
    return batch_size(graph) or max(1, min(_CHUNK, MEMORY // max(1, 2 * total)))
