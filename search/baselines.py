"""Allocators that look at shapes or weights alone, for others to be compared with: ERK, LAMP, PreCrop, random.

The first three give each linear layer a density, the share of its weights that stays. What that means for a group of
units is said once: its density is that of all weights that write its units, taken together. So a residual stream, which
several layers write, goes by their mean, weighted by size. A group that no linear layer writes has the density of the
whole network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metaprune.criteria import lamp_scores
from metaprune.graphs.errors import OptionError
from metaprune.search.densities import Densities, erdos_renyi, leaving, left
from metaprune.search.layers import Layers
from metaprune.search.problem import FLOOR, Counts, Kept, Problem, allocator, least_kept, within_budget


@allocator
def erk(problem: Problem) -> Kept:
    """Each group keeps the Erdos-Renyi kernel density of the layers that write it: Evci et al. (ICML 2020)."""
    layers = Layers.of(problem)
    return _followed(problem, lambda density: layers.pooled(erdos_renyi(layers.shapes, density), density))


@allocator
def lamp(problem: Problem) -> Kept:
    """Each group keeps the share of its writers' weights that have the highest LAMP scores of the whole network.

    Lee et al. (ICLR 2021), eq. 2, weight by weight; the criterion of that name scores units instead.

    Raises:
        OptionError: The network is on the meta device, where weights have no values.
    """
    layers = Layers.of(problem)
    weights = [problem.costs.graph.values[layer.weight].detach() for layer in layers.all]
    if any(weight.is_meta for weight in weights):
        raise OptionError("allocator: 'lamp' looks at weights, and on the meta device they have no values")
    order = leaving([lamp_scores(weight.flatten().double().square()).cpu().numpy() for weight in weights])
    sizes = layers.sizes

    def fractions(density: float) -> Counts:
        return layers.pooled(left(order, sizes, round(density * len(order))) / sizes, density)

    return _followed(problem, fractions)


@allocator
def precrop(problem: Problem) -> Kept:
    """Widths under which each layer has the number of weights that its Erdos-Renyi kernel density leaves it.

    PreCrop, Cai et al., Structured Pruning is All You Need for Pruning CNNs at Initialization (arXiv 2203.02549): from
    the network's input on, `c_l * c_(l-1) * k^2 = p_l * original` gives the width c_l. Residual streams keep the root
    of their density, since they are both the inputs and the outputs of blocks.
    """
    layers = Layers.of(problem)
    crop = Crop(problem, layers)
    return _followed(problem, lambda density: crop.fractions(erdos_renyi(layers.shapes, density), density))


@allocator
def random(problem: Problem) -> Kept:
    """Fractions drawn evenly between the floor and 1, times a common factor that meets the budget: the control."""
    drawn = np.random.default_rng(problem.seed).uniform(FLOOR, 1.0, len(problem.free))
    return _followed(problem, lambda scale: scale * drawn, end=1.0 / float(drawn.min()))


class Crop:
    """Solves PreCrop's equations for the width of each group.

    Args:
        problem: The problem.
        layers: Its layers.
    """

    def __init__(self, problem: Problem, layers: Layers) -> None:
        groups = problem.costs.graph.groups
        self._problem, self._layers = problem, layers
        self._counts = layers.counts()
        self._residual = [i for i, group in enumerate(problem.free) if groups[group].kind == "residual"]
        first = [min(writers, default=len(layers.all)) for writers in layers.writers]
        self._others = [i for i in np.argsort(first, kind="stable").tolist() if i not in self._residual]
        self._least = least_kept(problem) / problem.sizes

    def fractions(self, densities: Densities, default: float) -> Counts:
        """Kept fraction of each free group, between its floor and 1, shape [free].

        Args:
            densities: Of the layers, shape [layers].
            default: Of groups that no layer writes.
        """
        pooled = self._layers.pooled(densities, default)
        found = np.ones(len(pooled))
        found[self._residual] = self._bounded(np.sqrt(pooled), self._residual)
        for i in self._others:
            found[i] = self._solved(found, i, pooled[i])
            found[i] = self._bounded(found, [i])[0]
        return found

    def _bounded(self, fractions: Counts, which: list[int]) -> Counts:
        return np.clip(fractions[which], self._least[which], 1.0)

    def _solved(self, fractions: Counts, i: int, density: float) -> float:
        """The fraction of group i at which its writers have `density` of their weights, all other groups as they are.

        Their number of weights is affine in the width of one axis.
        """
        if not self._layers.writers[i]:
            return density
        ends = np.tile(fractions * self._problem.sizes, (2, 1))
        ends[:, i] = 0.0, self._problem.sizes[i]
        none, whole = self._counts[i].at(self._problem.full(ends))
        full = self._counts[i].at(self._problem.costs.sizes[None])[0]
        return float((density * full - none) / (whole - none)) if whole > none else 1.0


def _followed(problem: Problem, fractions: Callable[[float], Counts], end: float = 1.0) -> Kept:
    """The furthest allocation within the budget on the way from nothing to `fractions(end)`, with the common floor.

    Args:
        problem: The problem.
        fractions: Kept fraction of each free group, shape [free], as a function of one number that it grows with.
        end: Where all stays.
    """
    least = least_kept(problem)

    def kept(density: float) -> Counts:
        counts: Counts = np.clip(fractions(density) * problem.sizes, least, problem.sizes)
        return counts

    return within_budget(problem, kept, within=0.0, beyond=end)
