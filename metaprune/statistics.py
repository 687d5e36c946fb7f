"""What calibration data say about every unit, collected in one pass for all criteria that ask.

A gate multiplies its unit wherever the network sums over it. The gradient of the loss by the gate at 1 is therefore
what the loss loses, to first order, when the unit goes; its square per sample is the diagonal of the Fisher matrix in
the gate, and half of it the loss to second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.calibration import Leaves, leaves_of, outputs_in
from metaprune.curvature import Columns, collect_columns
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.execute import execute
from metaprune.graphs.gates import Gates
from metaprune.graphs.ir import Graph, Meta

SAMPLES = 256
TEMPERATURE = 4.0
_CHUNK = 32
_MEMORY = 256 << 20  # bytes of activations of the samples that are looked at together


@dataclass(frozen=True)
class Moments:
    """Moments over samples of the gradient by each unit's gate, shape [size] each.

    Attributes:
        mean: Of the gradient.
        absolute: Of its absolute value.
        square: Of its square: the diagonal Fisher information of the gate.
    """

    mean: Tensor
    absolute: Tensor
    square: Tensor


@dataclass(frozen=True)
class Statistics:
    """What was collected.

    Attributes:
        gates: Moments of the gate gradients by group.
        samples: Number of samples they are means over.
        columns: Second moments of what linear layers read, by weight; empty unless asked for.
        rows: The gate gradients themselves, one row per sample and draw, by group, shape [rows, size] each, float32;
            empty unless they were asked for.
        sharp: The same of another temperature, where somebody wants both.
    """

    gates: Mapping[str, Moments]
    samples: int
    columns: Mapping[str, Columns] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    sharp: Statistics | None = None


def collect(
    graph: Graph,
    data: Any,
    samples: int = SAMPLES,
    seed: int = 0,
    per_sample: bool = False,
    temperature: float = TEMPERATURE,
    draws: int = 1,
) -> Statistics:
    """One forward and one backward pass per sample and draw.

    Args:
        graph: The network.
        data: Batches of inputs, or of (inputs, labels), or `"noise"`; no label is looked at. Where the network gives
            one row of logits per sample, labels are drawn from its own predictions at a temperature, by default 4, as
            distillation softens them: a network that is sure of itself has no gradient by its true labels. Any other
            output is taken for the mean of a Gaussian of variance 1.
        samples: At most this many samples.
        seed: Of the labels that are drawn.
        per_sample: Whether to keep the gradients of every sample as well, four bytes for each row and unit.
        temperature: Of the predictions. At 1 the mean square is that of the divergence's second-order term.
        draws: Labels for each sample; more of them are for less noise.

    Raises:
        OptionError: No data, or data that do not fit the network.
        MetapruneError: The loss or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    ones = open_gates(graph)
    totals = {name: torch.zeros(3, len(one), dtype=torch.float64) for name, one in ones.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in ones}
    leaves, size = leaves_of(graph, data, samples, seed), chunk_size(graph)
    count = len(leaves)
    for first in range(0, count, size):
        chunk = leaves[first : first + size]
        for _ in range(draws):
            for name, found in _gate_gradients(graph, chunk, ones, generator, first, temperature).items():
                g = found.double().cpu()
                totals[name] += torch.stack([g, g.abs(), g.square()]).sum(1)
                if per_sample:
                    rows[name].append(g.float())
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise MetapruneError(f"data: the gradients of group {name} are not finite")
    moments = {name: Moments(*(total / (count * draws))) for name, total in totals.items()}
    return Statistics(moments, count, rows={name: torch.cat(g) for name, g in rows.items()} if per_sample else {})


def collect_second_moments(graph: Graph, data: Any, samples: int = SAMPLES, seed: int = 0) -> Statistics:
    """One forward pass per sample for criteria that look at second moments alone; no gradient is taken.

    Only layers that read units of a prunable group are looked at. Arguments and errors are those of
    `metaprune.curvature.collect_columns`.
    """
    weights = {part.tensor for group in graph.groups if not group.pinned for part in group.slices}
    columns = collect_columns(graph, data, samples, seed, weights)
    return Statistics({}, next((found.samples for found in columns.values()), 0), columns)


def open_gates(graph: Graph) -> dict[str, Tensor]:
    """Ones for the units of all groups that are not pinned, shape [size] by group, as the network's tensors are."""
    reference = next((v for v in graph.values.values() if v.is_floating_point()), torch.zeros(()))
    free = [group for group in graph.groups if not group.pinned]
    return {group.name: reference.new_ones(group.size) for group in free}


def gated_outputs(graph: Graph, chunk: Sequence[Leaves], gates: Mapping[str, Tensor], first: int) -> list[list[Tensor]]:
    """The floating-point outputs of each sample under gates of its own.

    Args:
        graph: The network.
        chunk: Samples of batch one.
        gates: Shape [samples, size] by group.
        first: Number of the first sample, for messages.

    Raises:
        MetapruneError: An output is not finite.
    """
    results = _run_together(graph, chunk, gates)
    if results is None:
        results = [_run_one(graph, leaves, {k: g[i] for k, g in gates.items()}) for i, leaves in enumerate(chunk)]
    for number, outputs in enumerate(results, first):
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise MetapruneError(f"data: the network's output for sample {number} is not finite")
    return results


def chunk_size(graph: Graph, most: int = _CHUNK) -> int:
    """Samples that are looked at together: at most so many, and as many as keep their activations within bounds."""
    metas = [node.meta for node in graph.nodes.values() if node.op != "tensor" and isinstance(node.meta, Meta)]
    traced = max((meta.shape[0] for meta in metas if meta.batched[:1] == (True,)), default=1)
    size = sum(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in metas) // traced
    return max(1, min(most, _MEMORY // max(1, size)))


def _gate_gradients(
    graph: Graph,
    chunk: Sequence[Leaves],
    ones: Mapping[str, Tensor],
    generator: torch.Generator,
    first: int,
    temperature: float,
) -> dict[str, Tensor]:
    """The gradient of each sample's loss by each gate, shape [samples, size] by group."""
    gates = {name: one.expand(len(chunk), -1).clone().requires_grad_() for name, one in ones.items()}
    losses = [_loss(outputs, generator, temperature) for outputs in gated_outputs(graph, chunk, gates, first)]
    if not gates:
        return {}
    with _unbatched_in_silence():
        found = torch.autograd.grad(torch.stack(losses).sum(), list(gates.values()), allow_unused=True)
    return {
        name: torch.zeros_like(gate) if gradient is None else gradient
        for (name, gate), gradient in zip(gates.items(), found, strict=True)
    }


def _run_one(graph: Graph, leaves: Leaves, gates: Mapping[str, Tensor]) -> list[Tensor]:
    return outputs_in(execute(graph, graph.values, leaves, Gates(graph.coupling, gates) if gates else None))


def _run_together(graph: Graph, chunk: Sequence[Leaves], gates: Mapping[str, Tensor]) -> list[list[Tensor]] | None:
    """The outputs of each sample, computed at once; None where shapes differ or an operator does not batch."""
    shapes = {tuple((name, value.shape) for name, value in leaves.items()) for leaves in chunk}
    if len(chunk) == 1 or len(shapes) > 1:
        return None
    stacked = {name: torch.stack([leaves[name] for leaves in chunk]) for name in chunk[0]}
    with _unbatched_in_silence():
        try:
            outputs = torch.vmap(lambda leaves, own: tuple(_run_one(graph, leaves, own)))(stacked, dict(gates))
        except RuntimeError:
            return None
    return [[output[i] for output in outputs] for i in range(len(chunk))]


@contextmanager
def _unbatched_in_silence() -> Iterator[None]:
    """Without a warning for each operator that `torch.vmap` runs sample by sample, which backward passes print."""
    show: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    show(False)
    try:
        yield
    finally:
        show(True)


def _loss(outputs: list[Tensor], generator: torch.Generator, temperature: float) -> Tensor:
    """Negative log likelihood of a draw from the network's own output distribution; see `collect`."""
    first = outputs[0].float() if outputs[0].dtype in (torch.float16, torch.bfloat16) else outputs[0]
    if first.ndim == 2 and first.shape[1] > 1:
        soft = first / temperature
        drawn = torch.multinomial(soft.detach().double().softmax(1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(soft, drawn.to(first.device), reduction="sum")
    total = first.new_zeros(())
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, first.dtype)
        total = total + (output.to(first.dtype) * noise).sum()
    return total
