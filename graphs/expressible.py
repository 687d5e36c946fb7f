"""Whether the user's own code means the same as the cut graph where an operator runs on filled-up axes.

The cut graph gives `amax` zeros where units are gone; the user's module gives it only what is kept. The two agree on
an input whose maximum is positive and differ on another, which a few random inputs may not show. So each such operator
is tried by itself, on operands of every sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch

from metaprune.graphs.dye import Call
from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.structure import Ref

_RANGES = ((0.5, 1.5), (-1.5, -0.5), (-1.0, 1.0))
_LIMIT = 10_000_000


def runs_on_kept(graph: Graph, incision: Incision) -> bool:
    """Whether every operator that the cut filled up gives the same on the kept positions alone."""
    return all(_indifferent(graph, graph.nodes[name], masks) for name, masks in incision.widened.items())


def _indifferent(graph: Graph, node: Node, masks: Mapping[tuple[str, int], torch.Tensor]) -> bool:
    flow = graph.coupling.flow
    if any((node.name, name, dim) in flow.recomputed for name, dim in masks):
        return False
    names = [n for n in dict.fromkeys(node.refs()) if flow.is_tensor(Ref(n)) and flow.meta(Ref(n)).is_float]
    shapes = {name: flow.meta(Ref(name)).shape for name in names}
    values = flow.example_values()
    if values is None or not isinstance(node.meta, Meta) or sum(map(prod, shapes.values())) > _LIMIT:
        return False
    call = Call(node, values, names)
    generator = torch.Generator().manual_seed(0)
    for low, high in _RANGES:
        full = {n: low + (high - low) * torch.rand(s, generator=generator) for n, s in shapes.items()}
        for (name, dim), mask in masks.items():
            full[name] = full[name] * mask.reshape([-1 if d == dim else 1 for d in range(full[name].ndim)])
        kept = {name: _select(value, masks, name) for name, value in full.items()}
        try:
            whole, part = call(full), call(kept)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        if not _equal(whole, part, flow.restricted.get(node.name, ()), masks.values()):
            return False
    return True


def _select(value: torch.Tensor, masks: Mapping[tuple[str, int], torch.Tensor], name: str) -> torch.Tensor:
    for (operand, dim), mask in masks.items():
        if operand == name:
            value = value.index_select(dim, mask.nonzero().flatten())
    return value


def _equal(
    whole: Iterable[torch.Tensor],
    part: Iterable[torch.Tensor],
    restricted: Iterable[int],
    masks: Iterable[torch.Tensor],
) -> bool:
    for a, b in zip(whole, part, strict=True):
        for dim in restricted:
            mask = next((m for m in masks if a.shape[dim] == len(m)), None)
            a = a if mask is None else a.index_select(dim, mask.nonzero().flatten())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            return False
    return True
