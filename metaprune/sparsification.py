"""Unstructured pruning: how many weights each layer keeps, and a copy of the network without the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaprune.calibration import Leaves, leaves_of
from metaprune.criteria import lamp_scores
from metaprune.graphs.errors import OptionError, check_seed
from metaprune.graphs.ir import Graph
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.trace import trace
from metaprune.graphs.weights import linear_weights
from metaprune.rate_distortion import Magnitudes, distortion_curves, joint_distortion
from metaprune.search.densities import erdos_renyi, leaving, left, spread
from metaprune.search.instance import Instance, Limit, Solution
from metaprune.sparse import Sparse, write_zeros

SAMPLES = 256
Kept = NDArray[np.int64]


def sparsify(
    model: Any,
    inputs: Any = None,
    sparsity: float = 0.95,
    method: str = "dp",
    data: Any = None,
    levels: int = 101,
    worst_case: bool = True,
    seed: int = 0,
) -> Sparse:
    """Sets the weights of least absolute value to zero, so many in each layer as a method says.

    Weights are the parameters of two dimensions or more that serve operators which multiply and sum (see
    `metaprune.graphs.weights.linear_weights`). Biases, norms and embeddings stay.

    The method "dp" is layer-adaptive pruning: Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning
    (ICCV 2023, arXiv 2308.10438). The error that each layer's pruning makes in the network's outputs is measured at
    equal steps of its sparsity, by itself. To first order the errors of layers add up, so what each layer keeps is a
    knapsack problem, which is solved exactly here, or with a stated gap. The sum holds while errors are small; where
    it does not, `provenance["predicted"]` and the measured distortion part, and rankings by magnitude can be better.
    The paper prunes a fifth of the weights at a time for that reason, and trains in between (see `Sparse.held`).

    Args:
        model: The network, as for `metaprune.trace`, or a `Graph`; it is not changed.
        inputs: An example input, as for `metaprune.trace`.
        sparsity: Share of the weights that go, from 0 to below 1; never less go.
        method: `"dp"`; or one share of all layers, `"uniform"`; Erdos-Renyi kernel densities, `"erk"` (Evci et al.
            2020); the greatest absolute values of all layers, `"global"`; the greatest LAMP scores of all layers,
            `"lamp"` (Lee et al. 2021).
        data: Batches of inputs or of (inputs, labels), or `"noise"`; at most 256 samples are looked at, no labels.
            "dp" needs them; for the others they serve to measure the distortion only.
        levels: Of "dp": numbers of kept weights that are tried for each layer, from all to none.
        worst_case: Whether the error is that of the sample with the greatest, else the mean over samples.
        seed: Of noise.

    Raises:
        OptionError: An option has no meaning, "dp" has no data, the network has no weights or is on the meta device.
        MetapruneError: A weight, or an output on the data, is not finite.
    """
    _check(sparsity, method, levels, data)
    check_seed(seed)
    if type(worst_case) is not bool:
        raise OptionError(f"worst_case: must be True or False, not {worst_case!r}")
    graph = model if isinstance(model, Graph) else trace(model, inputs)
    names = linear_weights(graph)
    if not names:
        raise OptionError("model: the network has no weights that it multiplies and sums with")
    weights = [graph.values[name].detach() for name in names]
    if any(weight.is_meta for weight in weights):
        raise OptionError("model: on the meta device weights have no values")
    graph.check_finite()
    leaves = None if data is None else leaves_of(graph, data, SAMPLES, seed)
    capacity = int((1.0 - sparsity) * sum(weight.numel() for weight in weights) + 1e-6)
    about: dict[str, Any] = {"method": method, "sparsity": sparsity, "samples": len(leaves or ()), "seed": seed}
    about |= {"worst_case": worst_case}
    if method == "dp":
        assert leaves is not None
        kept, solved = _by_distortion(graph, names, capacity, leaves, levels, worst_case)
        about |= {"levels": levels, "predicted": solved.harm, "gap": solved.gap, "optimal": solved.gap == 0}
    else:
        kept = METHODS[method](weights, capacity)
    masks = {name: Magnitudes(weight).mask(k) for name, weight, k in zip(names, weights, kept.tolist(), strict=True)}
    distortion = None
    if leaves is not None:
        with torch.no_grad():
            distortion = joint_distortion(graph, masks, leaves, worst_case)
    return Sparse(_masked(graph, masks), masks, distortion, about)


def _check(sparsity: float, method: str, levels: int, data: Any) -> None:
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise OptionError(f"sparsity: a share from 0 to below 1, not {sparsity!r}")
    if method not in ("dp", *METHODS):
        raise OptionError(f"method: {method!r} is none of {', '.join(sorted(['dp', *METHODS]))}")
    if type(levels) is not int or levels < 2:
        raise OptionError(f"levels: two or more, not {levels!r}")
    if method == "dp" and data is None:
        raise OptionError("data: method 'dp' measures outputs; give it batches of inputs, or 'noise'")


def _by_distortion(
    graph: Graph, names: Sequence[str], capacity: int, leaves: Sequence[Leaves], levels: int, worst_case: bool
) -> tuple[Kept, Solution]:
    from metaprune.search.dynamic import dynamic  # needs scipy, which importing this module does not

    counts = {}
    for name in names:
        size = graph.values[name].numel()
        counts[name] = np.unique(size - np.round(np.linspace(0, 1, levels) * size).astype(np.int64))
    with torch.no_grad():
        curves = distortion_curves(graph, {n: c.tolist() for n, c in counts.items()}, leaves, worst_case)
    finite = [np.isfinite(curves[name]) for name in names]  # where an output is not a number, no plan may be
    options = [counts[name][mask] for name, mask in zip(names, finite, strict=True)]
    harms = [curves[name][mask] for name, mask in zip(names, finite, strict=True)]
    weights = Limit("weights", {(number,): 1.0 for number in range(len(names))}, max(float(capacity), 1e-30))
    solved = dynamic(Instance(options, harms, [weights]))
    return np.array([option[j] for option, j in zip(options, solved.choice, strict=True)]), solved


def _sizes(weights: Sequence[Tensor]) -> Kept:
    return np.array([weight.numel() for weight in weights], dtype=np.int64)


def _uniform(weights: Sequence[Tensor], capacity: int) -> Kept:
    sizes = _sizes(weights)
    return spread(np.full(len(sizes), capacity / sizes.sum()), sizes, capacity)


def _erk(weights: Sequence[Tensor], capacity: int) -> Kept:
    sizes = _sizes(weights)
    return spread(erdos_renyi([tuple(w.shape) for w in weights], capacity / sizes.sum()), sizes, capacity)


def _global(weights: Sequence[Tensor], capacity: int) -> Kept:
    return left(leaving([_numbers(w.abs()) for w in weights]), _sizes(weights), capacity)


def _lamp(weights: Sequence[Tensor], capacity: int) -> Kept:
    return left(
        leaving([_numbers(lamp_scores(w.flatten().double().square())) for w in weights]), _sizes(weights), capacity
    )


METHODS: dict[str, Callable[[Sequence[Tensor], int], Kept]] = {
    "uniform": _uniform,
    "erk": _erk,
    "global": _global,
    "lamp": _lamp,
}
"""How many weights of each tensor stay when so many of all do, from the weights alone."""


def _numbers(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.flatten().double().cpu().numpy()
    return found


def _masked(graph: Graph, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network that was traced, with the graph's weights and the zeros; without one, the graph's own."""
    if graph.source is None:
        module: nn.Module = PortableModule(graph).eval()
    else:
        module = copy.deepcopy(graph.source)
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name in tensors.keys() & graph.values.keys():
                tensors[name].copy_(graph.values[name])
    write_zeros(module, masks)
    return module
