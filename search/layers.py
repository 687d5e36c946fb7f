"""The linear layers of a network as allocators see them: their weights, and which of them write a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs.linear import linear_layers
from metaprune.graphs.polynomial import Polynomial, Size, Term
from metaprune.search.problem import Counts, Problem


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that is linear in one weight.

    Attributes:
        weight: Name of the weight.
        shape: Its shape.
        writes: Numbers of the groups that stand on its outputs.
        grouped: Whether it is a grouped convolution, whose outputs belong to the groups of its inputs.
        parameters: Number of its weights as a product of axis sizes.
    """

    weight: str
    shape: tuple[int, ...]
    writes: frozenset[int]
    grouped: bool
    parameters: Term


@dataclass(frozen=True, eq=False)
class Layers:
    """The linear layers of a problem's network, in order of execution.

    Attributes:
        all: The layers.
        writers: For each free group, the numbers of the layers that write it: several for a residual stream, or for
            the gate and the values of a gated unit. Grouped convolutions, which hand on the units they read, count
            only where nothing else writes the group.
    """

    all: Sequence[Layer]
    writers: Sequence[Sequence[int]]

    @staticmethod
    def of(problem: Problem) -> Layers:
        """Reads them off the graph."""
        costs = problem.costs
        nodes = {node.args[0]: node for node in costs.graph.nodes.values() if node.op == "tensor"}
        found = []
        for linear in linear_layers(costs.graph).values():
            sizes = costs.shape(nodes[linear.weight])
            writes = _groups(sizes[1 if linear.transposed else 0])
            found.append(Layer(linear.weight, linear.shape, writes, linear.groups > 1, tuple(sizes)))
        writers = []
        for group in problem.free:
            touching = [i for i, layer in enumerate(found) if group in layer.writes]
            writers.append([i for i in touching if not found[i].grouped] or touching)
        return Layers(found, writers)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the weights."""
        return [layer.shape for layer in self.all]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Numbers of weights, shape [layers]."""
        return np.array([prod(layer.shape) for layer in self.all], dtype=np.int64)

    def pooled(self, densities: Counts, default: float) -> Counts:
        """Density of the weights that write each free group, shape [free]; `default` where no linear layer does."""
        sizes = self.sizes
        return np.array([np.average(densities[w], weights=sizes[w]) if len(w) else default for w in self.writers])

    def counts(self) -> list[Polynomial]:
        """Number of weights that write each free group, as polynomials in the kept counts of all groups."""
        return [Polynomial([self.all[i].parameters for i in writers]) for writers in self.writers]


def _groups(size: Size) -> frozenset[int]:
    return frozenset([*map(int, size.groups), *(group for _, groups in size.products for group in groups)])
