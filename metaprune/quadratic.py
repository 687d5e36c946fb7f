"""What silencing units does to the outputs to second order, for all numbers of kept units, from a few gradients.

With J_s the derivative of a sample's outputs by the gates of a group and d the indicator of the units that go, the
outputs move by -J_s d. Their squared error is |J_s d|^2, and KL(dense || pruned) of a softmax p is half of
(J_s d)^T F (J_s d) with F = diag(p) - p p^T, its Fisher matrix: the Gauss-Newton form, Martens (JMLR 2020), section 8.
F is B B^T for B = diag(sqrt(p)) - p sqrt(p)^T, and for directions z with E[z z^T] = 1 the gradients g of (B z)^T output
by the gates give E[(sum of g over the units that go)^2]: one cumulative sum along the order in which units go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves
from metaprune.distances import LOGITS, SQUARED, WORST, over_samples
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.statistics import chunk_size, gated_outputs, open_gates

DIRECTIONS = 2
Curves = dict[str, NDArray[np.float64]]


def quadratic_curves(
    graph: Graph,
    orders: Mapping[str, NDArray[np.int64]],
    leaves: Sequence[Leaves],
    kinds: Sequence[str],
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> tuple[dict[str, Curves], float]:
    """Second-order curves of all groups.

    Args:
        graph: The network.
        orders: Units of each group that is not pinned, the last to go first, shape [size].
        leaves: The samples, one at a time.
        kinds: Kinds of distance, of `metaprune.distances.KINDS`. For the worst case the greatest estimate counts.
        directions: Random orthogonal directions in the outputs for each sample and quadratic form. Where the outputs
            have no more elements than that, all of them are taken, and the curves are exact to second order.
        seed: Of the directions.

    Returns:
        By kind and group the distance when k units are kept, shape [size + 1], and the cost in forward passes of all
        samples, a backward pass counted as two.

    Raises:
        OptionError: A network on the meta device.
        MetapruneError: An output or a gradient is not finite.
    """
    if any(value.is_meta for value in graph.values.values()):
        raise OptionError("data: a network on the meta device has no gradients")
    generator = torch.Generator().manual_seed(seed)
    ones, size = open_gates(graph), chunk_size(graph)
    forms = [form for form in (LOGITS, SQUARED) if form in kinds or (form == SQUARED and WORST in kinds)]
    found: dict[str, dict[str, list[Tensor]]] = {form: {name: [] for name in ones} for form in forms}
    passes = 0
    for first in range(0, len(leaves) if ones else 0, size):
        chunk = leaves[first : first + size]
        gates = {name: one.expand(len(chunk), -1).clone().requires_grad_() for name, one in ones.items()}
        outputs = [_flat(sample, forms) for sample in gated_outputs(graph, chunk, gates, first)]
        for form in forms:
            probes = [_probes(sample, form, directions, generator) for sample in outputs]
            passes += len(chunk) * len(probes[0])
            sums = _squares(outputs, probes, gates, orders, form)
            for name, values in sums.items():
                found[form][name].append(values)
    curves = {kind: {name: _over_samples(kind, name, found) for name in ones} for kind in kinds}
    return curves, 1.0 + 2.0 * passes / len(leaves)


def _flat(outputs: Sequence[Tensor], forms: Sequence[str]) -> dict[str, Tensor]:
    """What each form looks at of one sample's outputs: the logits, shape [1, classes], or all elements in a row."""
    found = {form: outputs[0] for form in forms if form == LOGITS}
    if SQUARED in forms:
        found[SQUARED] = torch.cat([output.flatten() for output in outputs])
    return found


def _probes(sample: Mapping[str, Tensor], form: str, directions: int, generator: torch.Generator) -> Tensor:
    """Vectors v with the form's quadratic as the expected sum of (v^T change)^2, shape [directions, *outputs]."""
    output = sample[form].detach().double()
    count = output.numel()
    basis = torch.eye(count, dtype=torch.float64)
    if count > directions:
        drawn = torch.randn(count, directions, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.T * math.sqrt(count / directions)
    basis = basis.to(output.device).reshape(-1, *output.shape)
    if form == SQUARED:
        return basis / math.sqrt(count)
    p = output.softmax(-1)
    rooted = basis * p.sqrt()
    return (rooted - rooted.sum(-1, keepdim=True) * p) * math.sqrt(0.5 / len(output))


def _squares(
    outputs: Sequence[Mapping[str, Tensor]],
    probes: Sequence[Tensor],
    gates: Mapping[str, Tensor],
    orders: Mapping[str, NDArray[np.int64]],
    form: str,
) -> dict[str, Tensor]:
    """The quadratic of each sample when k units of a group are kept, shape [samples, size + 1] by group."""
    totals = {name: torch.zeros(len(gate), gate.shape[1] + 1, dtype=torch.float64) for name, gate in gates.items()}
    for number in range(len(probes[0])):
        weighed = [(s[form] * v[number].to(s[form].dtype)).sum() for s, v in zip(outputs, probes, strict=True)]
        gradients = torch.autograd.grad(
            torch.stack(weighed).sum(), list(gates.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(gates, gradients, strict=True):
            if gradient is not None:
                inverted = gradient.double().cpu()[:, torch.from_numpy(orders[name])].flip(1)  # the first to go first
                totals[name][:, :-1] += inverted.cumsum(1).flip(1).square()
    return totals


def _over_samples(kind: str, name: str, found: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> NDArray[np.float64]:
    values = torch.cat(list(found[LOGITS if kind == LOGITS else SQUARED][name])).T  # [size + 1, samples]
    if not bool(torch.isfinite(values).all()):
        raise MetapruneError(f"data: the gradients of group {name} are not finite")
    return over_samples(values.numpy(), kind)
