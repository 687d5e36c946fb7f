"""Elementwise operators with broadcasting, recognised by torch's own `pointwise` tag rather than by a list."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch

from metaprune.graphs import operators
from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node, substitute
from metaprune.graphs.rules.rule import Bound, Rule, signature
from metaprune.graphs.structure import Ref


def _flow(state: Flow, node: Node, bound: Bound) -> Axes:
    refs = [value for value in bound.values() if state.is_tensor(value)]
    operands = [state.of(ref) for ref in refs]
    op = node.base
    call = _Call(node.op, _frozen(bound, state), tuple(state.meta(ref).dtype for ref in refs))
    sums = op in _SUMS and all(map(state.is_activation, refs))
    out: list[Axis] = []
    for position, size in enumerate(node.shape):
        here = [_at(axes, position, len(node.shape), size) for axes in operands]
        tracked = [axis for axis in here if axis is not None]
        if not any(axis.ids is not None for axis in tracked):
            out.append(tracked[0] if tracked else state.fixed(size, "a single position"))
            continue
        state.use(tracked)
        if sums and len(tracked) > 1 and tracked[0].ids is not None:
            state.atoms.role(tracked[0].ids, "residual")
        tied = state.tie(tracked, op)
        out.append(
            tied.with_zero(_silence(state, tied, [a.zero if a is not None else np.False_ for a in here], call, op))
        )
    return tuple(out)


def _at(axes: Axes, position: int, rank: int, size: int) -> Axis | None:
    """An operand's axis at a position of the result, None where it broadcasts."""
    at = position - rank + len(axes)
    return axes[at] if at >= 0 and axes[at].size == size and size > 1 else None


def _silence(state: Flow, axis: Axis, zeros: list[Any], call: _Call, op: str) -> Any:
    """Zero flags of the result, by trying the operator on zeros; a result that is not finite pins its positions."""
    if all(np.ndim(z) == 0 for z in zeros):
        verdict = _try(call, tuple(bool(z) for z in zeros))
        if verdict is None:
            state.pin(axis, f"{op} is not finite where its operands vanish")
        return bool(verdict)
    full = np.stack([np.broadcast_to(z, axis.size) for z in zeros])
    result = np.zeros(axis.size, dtype=bool)
    for pattern in np.unique(full, axis=1).T:
        where = (full == pattern[:, None]).all(0)
        verdict = _try(call, tuple(bool(z) for z in pattern))
        if verdict is None and axis.ids is not None:
            state.atoms.pin(axis.ids[where], f"{op} is not finite where its operands vanish")
        result[where] = bool(verdict)
    return result


class _Call(tuple[Any, ...]):
    """Operator, arguments with the tensors left out, dtypes of the tensors: what the verdict depends on."""

    def __new__(cls, op: str, arguments: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> _Call:
        """A hashable record."""
        return super().__new__(cls, (op, arguments, dtypes))


def _frozen(bound: Bound, state: Flow) -> tuple[Any, ...]:
    """Arguments by name, tensors as `Ref("")`, symbolic numbers by their example."""

    def leaf(ref: Ref) -> Any:
        return Ref("") if state.is_tensor(ref) else state.number(ref)

    return tuple((name, substitute(value, leaf)) for name, value in bound.items())


_DRAWS = (0.75, 1.5, 2.25, -0.6, -1.75, 0.0)  # zero by chance, too: x == max(x) holds of a silenced x then


@lru_cache(maxsize=65536)
def _try(call: _Call, zero: tuple[bool, ...]) -> bool | None:
    """Whether the operator gives zero wherever the flagged operands are zero; None if it gives no finite number."""
    if not any(zero):
        return False
    op, arguments, dtypes = call
    function = operators.resolve(op)
    silent = True
    booleans = sum(dtype is torch.bool for dtype in dtypes)
    for draw, truths in product(_DRAWS, product((True, False), repeat=booleans)):
        given = iter(truths)
        tensors = iter(
            _operand(flag, draw + 0.1 * i * (draw != 0), dtype is not torch.bool or next(given), dtype)
            for i, (flag, dtype) in enumerate(zip(zero, dtypes, strict=True))
        )
        named = {name: next(tensors) if isinstance(value, Ref) else value for name, value in arguments}
        with torch.no_grad():
            result = function(**named)
        if result.is_floating_point() and not bool(torch.isfinite(result).all()):
            if draw > 0:
                return None
            continue  # such operands make no sense for the operator
        silent = silent and not bool(result.ne(0).any())
    return silent


def _operand(zero: bool, draw: float, truth: bool, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.tensor(truth and not zero)
    if zero:
        return torch.zeros((), dtype=dtype)
    return torch.tensor(draw if dtype.is_floating_point or not draw else int(draw) or 3, dtype=dtype)


def _prelu(state: Flow, node: Node, bound: Bound) -> Axes:
    """One slope per channel, or one for all."""
    if state.of(bound["weight"])[0].size == 1:
        return state.of(bound["self"])
    axes: Axes = signature("n c *s, c -> n c *s", "self weight", zero="0").flow(state, node, bound)
    return axes


def _glu(state: Flow, node: Node, bound: Bound) -> Axes:
    """A * sigmoid(b), a and b the halves of one axis."""
    axes = list(state.of(bound["self"]))
    state.use(axes)
    d = bound["dim"] % len(axes)
    half = axes[d].size // 2
    first, second = axes[d].take(np.arange(half)), axes[d].take(np.arange(half, 2 * half))
    axes[d] = state.tie([first, second], "glu").with_zero(first.zero)
    return tuple(axes)


def _as_complex(state: Flow, node: Node, bound: Bound) -> Axes:
    *axes, parts = state.of(bound["self"])
    state.pin(parts, "real and imaginary parts")
    return tuple(axes)


def _as_real(state: Flow, node: Node, bound: Bound) -> Axes:
    return (*state.of(bound["self"]), state.fixed(2, "real and imaginary parts"))


_SUMS = frozenset(("add", "sub", "rsub", "subtract"))

RULE = Rule(_flow)

ROWS: dict[str, Rule] = {
    **{
        f"aten.{name}": RULE
        for name in (
            "hardswish fill.Tensor rsub floor_divide masked_fill copy log1p isnan isinf where max.other min.other "
            "clamp_min clamp_max square reciprocal selu relu6 hardswish hardsigmoid hardtanh true_divide "
            "multiply divide subtract polar complex real imag conj conj_physical angle"
        ).split()
    },
    "aten.prelu": Rule(_prelu),
    "aten.glu": Rule(_glu),
    "aten.view_as_complex": Rule(_as_complex),
    "aten.view_as_real": Rule(_as_real),
}
