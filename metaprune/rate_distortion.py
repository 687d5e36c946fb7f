"""How far a network's outputs move when weights of one layer go: curves over the number of weights that stay.

Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning (ICCV 2023, arXiv 2308.10438), section 3: all
other layers stay dense, and the weights of the layer leave in the order of their absolute values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves
from metaprune.distances import SQUARED, WORST
from metaprune.graphs.ir import Graph
from metaprune.masking import Change, measure


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
        OptionError: A network on the meta device.
        MetapruneError: An output of the dense network is not finite.
    """
    found = measure(graph, _Levels(graph, kept), leaves).total(WORST if worst_case else SQUARED)
    ends = np.cumsum([len(counts) for counts in kept.values()])[:-1]
    return dict(zip(kept, np.split(found, ends), strict=True))


def joint_distortion(graph: Graph, masks: Mapping[str, Tensor], leaves: Sequence[Leaves], worst_case: bool) -> float:
    """Squared error of the outputs when all masks are applied at once; see `distortion_curves`."""
    change = Change(tensors={name: graph.values[name] * mask for name, mask in masks.items()})
    return float(measure(graph, [change], leaves).total(WORST if worst_case else SQUARED)[0])


@dataclass(frozen=True)
class _Levels:
    """One change for each tensor and number of weights; the masked tensors are made as they are asked for."""

    graph: Graph
    kept: Mapping[str, Sequence[int]]

    def __iter__(self) -> Iterator[Change]:
        for name, counts in self.kept.items():
            weight = self.graph.values[name].detach()
            ranked = Magnitudes(weight)
            for count in counts:
                yield Change(tensors={name: weight * ranked.mask(count)})
