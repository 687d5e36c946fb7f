"""What an operator does to axes, found by running it on dyed values: for operators without a rule, and to test rules.

Every position of an operand's axis gets a number. *Forward*, positions are set to NaN by the bits of their number: a
result that is NaN in exactly one run of each pair depends on one position, and the bits spell which. *Partners*:
where results mix all positions (a contraction), only positions with a given bit are left non-zero, and the gradient
of the other operands shows which of their positions is multiplied with which. What is found is then checked: the
operator on a random selection must equal the selection of the operator on values that vanish outside it. An axis that
fails the check is pinned; nothing is taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs import operators
from metaprune.graphs.ir import Node, substitute
from metaprune.graphs.structure import Ref

Slot = tuple[str, int]
Field = NDArray[np.int64]


@dataclass
class Description:
    """What an operator does to the axes of its operands.

    Attributes: links: Operand axis to result axis: for each position of result `k`'s axis, the operand's position (-1
        for none). products: Operand axis spread over several axes of result `k`: the operand's position at each
        place, row-major. partners: Axes of two operands that are multiplied and summed: for each position of the
        second, that of the first. mixed: Operand axes whose positions enter each other. vanishing: Result axes whose
        positions vanish when the operand's do.
    """

    links: dict[Slot, list[tuple[int, int, Field]]] = field(default_factory=dict)
    products: dict[Slot, list[tuple[int, tuple[int, ...], Field]]] = field(default_factory=dict)
    partners: dict[Slot, list[tuple[Slot, Field]]] = field(default_factory=dict)
    mixed: set[Slot] = field(default_factory=set)
    vanishing: set[tuple[int, int]] = field(default_factory=set)


class Call:
    """One operator with its static arguments, as a function of its floating-point operands by name."""

    def __init__(self, node: Node, values: Mapping[str, Any], floating: Sequence[str]) -> None:
        self._node = node
        self._values = values
        self.names = tuple(floating)
        self._function: Callable[..., Any] = operators.resolve(node.op)

    def __call__(self, operands: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Results that are tensors, in order."""

        def find(ref: Ref) -> Any:
            return operands[ref.name] if ref.name in operands else self._values[ref.name]

        def plain(value: Any) -> Any:
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        args = [plain(substitute(a, find)) for a in self._node.args]
        result = self._function(*args, **{k: plain(substitute(v, find)) for k, v in self._node.kwargs.items()})
        return [result] if isinstance(result, torch.Tensor) else [r for r in result if isinstance(r, torch.Tensor)]


def describe(call: Call, shapes: Mapping[str, tuple[int, ...]], slots: Sequence[Slot], seed: int = 0) -> Description:
    """Finds what the operator does to the given operand axes.

    Args:
        call: The operator.
        shapes: Shape of each floating-point operand.
        slots: Operand axes to follow, as (operand, dimension).
        seed: Seed of the random operands.
    """
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes.items()}
    found = Description()
    for slot in slots:
        _follow(call, base, slot, found, generator)
    _pair_up(found)
    return found


def _pair_up(found: Description) -> None:
    """Two axes that are multiplied and summed are so for both of them: one found, the other follows or neither."""
    for slot, partners in list(found.partners.items()):
        for other, at in partners:
            if other not in found.mixed:
                continue
            if (np.sort(at) == np.arange(len(at))).all():
                found.mixed.discard(other)
                found.partners.setdefault(other, []).append((slot, np.argsort(at)))
            else:
                found.mixed.add(slot)
                del found.partners[slot]
                break


def _follow(
    call: Call, base: dict[str, torch.Tensor], slot: Slot, found: Description, generator: torch.Generator
) -> None:
    name, dim = slot
    x = base[name]
    labels = _along(torch.arange(1, x.shape[dim] + 1), x, dim)
    bits = max(1, math.ceil(math.log2(x.shape[dim] + 1)))
    hits: list[list[list[torch.Tensor]]] = []
    with torch.no_grad():
        for bit in range(bits):
            pair = []
            for value in (0, 1):
                dyed = torch.where(((labels >> bit) & 1) == value, math.nan, x)
                results = call({**base, name: dyed})
                pair.append(
                    [
                        torch.isnan(r) if r.is_floating_point() or r.is_complex() else torch.zeros(r.shape).bool()
                        for r in results
                    ]
                )
            hits.append(pair)
    mixed = False
    for k in range(len(hits[0][0])):
        label, mixing = _decode([(pair[0][k], pair[1][k]) for pair in hits])
        if mixing.any():
            mixed = True
        elif (label > 0).any():
            mixed |= not _place(label, k, slot, found)
    if mixed:
        partners = _partners(call, base, slot, labels, bits, generator)
        if partners:
            found.partners[slot] = partners
        else:
            found.mixed.add(slot)


def _decode(hits: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Label of each element (0 for none), and where several labels enter."""
    label = torch.zeros(hits[0][0].shape, dtype=torch.int64)
    mixing = torch.zeros(hits[0][0].shape, dtype=torch.bool)
    for bit, (zero, one) in enumerate(hits):
        mixing |= zero & one
        label += one.long() << bit
    return label, mixing


def _place(label: torch.Tensor, k: int, slot: Slot, found: Description) -> bool:
    """Notes along which axes of result `k` the labels lie; False if they do not lie on axes."""
    varying = [d for d in range(label.ndim) if label.shape[d] > 1 and bool((label != label.narrow(d, 0, 1)).any())]
    field_ = label
    for d in range(label.ndim):
        if d not in varying:
            field_ = field_.narrow(d, 0, 1)
    grid = field_.reshape([label.shape[d] for d in varying] or [1])
    if not varying:
        return False
    if len(varying) == 1:
        found.links.setdefault(slot, []).append((k, varying[0], grid.numpy() - 1))
        return True
    if bool((grid > 0).all()) and len(np.unique(grid.numpy())) == grid.numel():
        found.products.setdefault(slot, []).append((k, tuple(varying), grid.flatten().numpy() - 1))
        return True
    return False


def _partners(
    call: Call, base: dict[str, torch.Tensor], slot: Slot, labels: torch.Tensor, bits: int, generator: torch.Generator
) -> list[tuple[Slot, Field]]:
    """Axes of other operands that are multiplied with this one and summed over."""
    name, _ = slot
    others = [other for other in base if other != name]
    hits: dict[str, list[list[torch.Tensor]]] = {other: [] for other in others}
    for bit in range(bits):
        pairs: dict[str, list[torch.Tensor]] = {other: [] for other in others}
        for value in (0, 1):
            kept = torch.where(((labels >> bit) & 1) == value, base[name], 0.0)
            operands = {**base, name: kept, **{o: base[o].clone().requires_grad_() for o in others}}
            with torch.enable_grad():
                try:
                    results = [r for r in call(operands) if r.is_floating_point() and r.requires_grad]
                    total = torch.stack(
                        [(r * (torch.rand(r.shape, generator=generator) + 0.5)).sum() for r in results]
                    ).sum()
                    grads = (
                        torch.autograd.grad(total, [operands[o] for o in others], allow_unused=True) if results else []
                    )
                except (RuntimeError, NotImplementedError):
                    return []
            for other, grad in zip(others, grads, strict=True):
                pairs[other].append(torch.zeros(base[other].shape, dtype=torch.bool) if grad is None else grad != 0)
        for other in others:
            hits[other].append(pairs[other])
    found: list[tuple[Slot, Field]] = []
    for other in others:
        if any(len(pair) != 2 for pair in hits[other]):
            continue
        label, mixing = _decode([(pair[0], pair[1]) for pair in hits[other]])
        aligned = Description()
        if not mixing.any() and (label > 0).any() and _place(label, 0, (other, 0), aligned):
            for _, dim, at in aligned.links.get((other, 0), []):
                found.append(((other, dim), at))
    return found


def _along(vector: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    return vector.reshape([-1 if d == dim else 1 for d in range(like.ndim)])


def check(
    call: Call, shapes: Mapping[str, tuple[int, ...]], slots: Mapping[Slot, bool], found: Description, seed: int = 1
) -> set[Slot]:
    """Operand axes for which selecting before and after the operator differ, and marks result axes that vanish.

    Args:
        call: The operator.
        shapes: Shape of each floating-point operand.
        slots: Operand axes to try, and whether the operand vanishes with its unit.
        found: What is to be checked; `vanishing` is filled in.
        seed: Seed of the selections and operands.
    """
    generator = torch.Generator().manual_seed(seed)
    failed: set[Slot] = set()
    for slot, silent in slots.items():
        if slot in found.mixed or slot in failed:
            continue
        size = shapes[slot[0]][slot[1]]
        keep = torch.rand(size, generator=generator) < 0.6
        keep[int(torch.randint(size, (1,), generator=generator))] = True
        selected: dict[Slot, torch.Tensor] = {slot: keep}
        results: dict[tuple[int, int], torch.Tensor] = {}
        _spread(found, slot, keep, selected, results)
        full = {name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes.items()}
        small = dict(full)
        for (name, dim), mask in selected.items():
            if slots.get((name, dim), silent):
                full[name] = full[name] * _along(mask.float(), full[name], dim)
            small[name] = small[name].index_select(dim, mask.nonzero().flatten())
        try:
            expected, got = call(full), call(small)
        except (RuntimeError, ValueError, IndexError, TypeError):
            failed |= set(selected)
            continue
        if not _agrees(expected, got, results, found):
            failed |= set(selected)
    return failed


def _spread(
    found: Description,
    slot: Slot,
    keep: torch.Tensor,
    selected: dict[Slot, torch.Tensor],
    results: dict[tuple[int, int], torch.Tensor],
) -> None:
    """What is selected on the other axes when `keep` is on this one: through shared results and through partners."""
    for k, dim, at in found.links.get(slot, []):
        mask = torch.from_numpy(at < 0) | keep[torch.from_numpy(np.maximum(at, 0))]
        results[(k, dim)] = mask
        for other, links in found.links.items():
            for k2, dim2, at2 in links:
                if other not in selected and (k2, dim2) == (k, dim) and (np.sort(at2) == np.arange(len(at2))).all():
                    back = torch.empty_like(mask)
                    back[torch.from_numpy(at2)] = mask
                    selected[other] = back
                    _spread(found, other, back, selected, results)
    for other, at in found.partners.get(slot, []):
        if other not in selected:
            selected[other] = torch.from_numpy(at < 0) | keep[torch.from_numpy(np.maximum(at, 0))]
            _spread(found, other, selected[other], selected, results)


def _agrees(
    expected: Sequence[torch.Tensor],
    got: Sequence[torch.Tensor],
    results: Mapping[tuple[int, int], torch.Tensor],
    found: Description,
) -> bool:
    for k, (whole, part) in enumerate(zip(expected, got, strict=True)):
        kept = whole
        for (number, dim), mask in results.items():
            if number == k:
                gone = whole.index_select(dim, (~mask).nonzero().flatten())
                if gone.numel() and bool((gone == 0).all()):
                    found.vanishing.add((k, dim))
                kept = kept.index_select(dim, mask.nonzero().flatten())
        if kept.shape != part.shape or not torch.allclose(
            kept, part, rtol=1e-4, atol=1e-5 * float(whole.abs().max().clamp_min(1e-9))
        ):
            return False
    return True
