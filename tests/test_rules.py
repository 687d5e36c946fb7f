"""Every rule against dye tracing: what an operator does to its axes, said by its row and seen on its values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metaprune.graphs import operators
from metaprune.graphs.dye import Call, Slot, describe
from metaprune.graphs.flow import Axis, Flow
from metaprune.graphs.ir import Graph, Meta, Node, Signature, TensorInfo
from metaprune.graphs.rules import TABLE, lookup
from metaprune.graphs.structure import Ref
from tests.support.operator_calls import CALLS, T

# Rows that no call with plain tensors can reach, or that have no axes to speak of.
UNCOVERED = {
    "makes values from nothing": """
        zeros new_zeros ones new_ones full new_full empty new_empty empty_like arange linspace logspace eye
        scalar_tensor rand randn randint randperm tril_indices triu_indices meshgrid one_hot
    """,
    "needs another device or data type": "cudnn_batch_norm cpu cuda requires_grad_ _grouped_mm",
    "an alias of another row or not called by the exporter": "_reshape_alias _weight_norm_interface",
    "has no operand of its own": "operator.getitem",
    "takes complex numbers": "view_as_real real imag conj conj_physical angle",
    "registered by another library": "transformers.grouped_mm_fallback",
}
# Dye is swallowed by these: their results depend on values that NaN does not pass through, or are whole numbers.
SWALLOWED = set(
    "argmax argmin any all isnan isinf count_nonzero zeros_like ones_like full_like nansum hardtanh type_as".split()
)
SWALLOWED |= set(
    "clamp clamp_min clamp_max view_as reshape_as expand_as fill copy floor_divide copysign median".split()
)
# The rule is more careful than a single call demands: what it pins could be followed, and the reason why it is not.
CAREFUL = {
    "unbind": "taken apart into separate values",
    "unfold": "windows may overlap",
    "tril": "a triangle",
    "triu": "a triangle",
    "gather": "positions are read at run time",
    "take_along_dim": "positions are read at run time",
    "scatter": "positions are written at run time",
    "scatter_add": "positions are written at run time",
    "select_scatter": "one position is written",
    "index": "several indices at once",
    "stack": "pieces are separate values",
    "embedding": "a vocabulary is addressed by numbers",
    "pixel_unshuffle": "positions in space",
    "im2col": "positions in space",
    "col2im": "positions in space",
    "pixel_shuffle": "positions in space",
    "pad": "positions in space",
    **{f"{mode}_pad{d}d": "positions in space" for mode in ("reflection", "replication") for d in (1, 2, 3)},
    "conv_transpose2d": "kernel extents",
    "select": "a position is addressed by its number",
    "where": "a constant mask has a fixed size",
    "masked_fill": "a constant mask has a fixed size",
}


@dataclass
class Seen:
    """One call, as its rule describes it and as dyed values show it.

    Attributes:
        flow: What the rule recorded.
        node: The call.
        out: Axes of each result.
        floats: Which results hold floats.
        reached: For each operand axis and position, the elements of each result that the position enters.
        finite: Whether the results are finite when any position is zero.
    """

    flow: Flow
    node: Node
    out: list[tuple[Axis, ...]]
    floats: list[bool]
    reached: dict[Slot, list[list[Any]]]
    finite: bool


def built(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Graph, Node, dict[str, Any]]:
    """A graph of one call whose operands are parameters, the call, and the values of all nodes."""
    nodes: dict[str, Node] = {}
    infos: dict[str, TensorInfo] = {}
    values: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)

    def operand(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(operand(v) for v in value)
        if isinstance(value, T):
            tensor, kind = torch.rand(value.shape, generator=generator) + 0.5, "parameter"
        elif isinstance(value, Tensor):
            tensor, kind = value, "constant"
        else:
            return value
        name, shape = f"t{len(nodes)}", tuple(tensor.shape)
        nodes[name] = Node(name, "tensor", (name,), meta=Meta(shape, tensor.dtype, (False,) * tensor.ndim))
        infos[name] = TensorInfo(name, kind, shape, tensor.dtype, (name,))
        values[name] = tensor
        return Ref(name)

    node = Node("call", op, operand(args), {k: operand(v) for k, v in kwargs.items()})
    metas = tuple(Meta(tuple(r.shape), r.dtype, (False,) * r.ndim) for r in Call(node, values, [])({}))
    schema = operators.schema_of(op)
    assert schema is not None
    many = len(schema.returns) > 1 or "List" in str(schema.returns[0].type)
    node = replace(node, meta=metas if many else metas[0])
    return Graph({**nodes, "call": node}, infos, Signature((), ((), {}), None), dict(values)), node, values


def seen(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
    graph, node, values = built(op, args, kwargs)
    flow = Flow(graph)
    for name, info in graph.tensors.items():
        floating = info.dtype.is_floating_point
        flow.axes[name] = tuple(flow.fresh(n, True) if floating else flow.fixed(n, "constant") for n in info.shape)
    rule = lookup(op)
    assert rule is not None
    axes = rule.flow(flow, node, operators.bind(op, node.args, dict(node.kwargs)))
    out = [axes] if isinstance(axes, tuple) else list(axes)
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    assert [tuple(axis.size for axis in value) for value in out] == [m.shape for m in metas]  # type: ignore[union-attr]
    floating = [n for n, info in graph.tensors.items() if info.dtype.is_floating_point]
    call = Call(node, values, floating)
    reached: dict[Slot, list[list[Any]]] = {}
    finite = True
    for name in floating:
        for d, size in enumerate(graph.tensors[name].shape):
            if size > 1:
                reached[name, d] = [elements(call, values, name, d, p, math.nan) for p in range(size)]
                silent = [elements(call, values, name, d, p, 0.0) for p in range(size)]
                finite = finite and not any(bad.any() for results in silent for bad in results)
    floats = [m.dtype.is_floating_point for m in metas]  # type: ignore[union-attr]
    return Seen(flow, node, out, floats, reached, finite)


def elements(call: Call, values: Mapping[str, Any], name: str, dim: int, position: int, dye: float) -> list[Any]:
    """Elements of each result that are not finite once one position of an operand holds the dye."""
    x = values[name].clone()
    x.select(dim, position).fill_(dye)
    with torch.no_grad():
        results = call({n: x if n == name else values[n] for n in call.names})
    real = [r.is_floating_point() or r.is_complex() for r in results]
    found = [~torch.isfinite(r) if f else torch.zeros(r.shape).bool() for f, r in zip(real, results, strict=True)]
    return [f.numpy() for f in found]


class Claims:
    """What the rule says: for each element of the results, the classes of positions it goes with."""

    def __init__(self, found: Seen) -> None:
        self.found, flow = found, found.flow
        self.root = flow.atoms.roots()
        self.pinned = set(flow.atoms.pins(self.root))
        self.more: dict[int, set[int]] = {}
        for product in flow.atoms.products:
            for factor, where in zip(product.factors, product.where, strict=True):
                for whole, part in zip(self.root[product.whole], self.root[factor][where], strict=True):
                    self.more.setdefault(int(whole), set()).add(int(part))
        handled = {c for slot in found.reached for c in self.classes(slot) if self._handled(slot)}
        self.handled = handled.union(*(self.more.get(c, set()) for c in handled))

    def _handled(self, slot: Slot) -> bool:
        """Whether the axis is filled up, or summed over as one that vanishes."""
        flow, name = self.found.flow, self.found.node.name
        return slot in flow.filled.get(name, ()) or any((s.arg, s.dim) == slot for s in flow.sites.get(name, ()))

    def classes(self, slot: Slot) -> list[int]:
        """Class of each position of an operand's axis, -1 where it can not go."""
        axis = self.found.flow.axes[slot[0]][slot[1]]
        if axis.ids is None:
            return [-1] * axis.size
        return [-1 if c in self.pinned else c for c in self.root[axis.ids].tolist()]

    def along(self, axis: Axis, position: int) -> set[int]:
        """Classes that go with a position of a result's axis, through products in both directions."""
        if axis.ids is None:
            return set()
        own = int(self.root[axis.ids][position])
        return {own} | self.more.get(own, set())

    def covers(self, k: int, element: tuple[int, ...], wanted: int) -> bool:
        """Whether an element of result `k` goes when the units of class `wanted` go."""
        here = set().union(*(self.along(axis, at) for axis, at in zip(self.found.out[k], element, strict=True)))
        return wanted in here or (bool(self.more.get(wanted)) and self.more[wanted] <= here)


SAMPLES = [(op, number) for op, samples in CALLS.items() for number in range(len(samples))]
IDS = [f"{op.removeprefix('aten.')}-{number}" for op, number in SAMPLES]


@pytest.mark.filterwarnings("ignore:The use of `x.T`", "ignore:LSTM with projections")
@pytest.mark.parametrize(("op", "number"), SAMPLES, ids=IDS)
def test_the_rule_says_what_dye_shows(op: str, number: int) -> None:
    found = seen(op, *CALLS[op][number])
    claims = Claims(found)
    base = op.split(".")[1]
    for slot, positions in found.reached.items():
        for position, wanted in enumerate(claims.classes(slot)):
            if wanted < 0 or wanted in claims.handled or claims.more.get(wanted, {-1}) <= claims.handled:
                continue
            for k, elements in enumerate(positions[position]):
                for element in np.argwhere(elements).tolist():
                    assert claims.covers(k, element, wanted), f"{slot} enters {element} of result {k} and may go alone"
        if followed(positions) and found.finite and base not in CAREFUL:
            assert -1 not in claims.classes(slot), f"{slot} is pinned although it is only passed on"
    assert base in SWALLOWED or not invented(claims)


def followed(positions: list[list[Any]]) -> bool:
    """Whether every position is a set of whole slices of some axis of every result, and of nothing else."""
    if not any(elements.any() for results in positions for elements in results):
        return False
    for k in range(len(positions[0])):
        total = sum(results[k].astype(int) for results in positions)
        if total.max(initial=0) > 1 or not slices([results[k] for results in positions]):
            return False
    return True


def slices(masks: list[Any]) -> bool:
    for d in range(masks[0].ndim):
        spread = [
            np.broadcast_to(m.any(tuple(e for e in range(m.ndim) if e != d), keepdims=True), m.shape) for m in masks
        ]
        if all(np.array_equal(s, m) for s, m in zip(spread, masks, strict=True)):
            return True
    return False


def invented(claims: Claims) -> list[str]:
    """Slices of results that are said to go with a class of which no position enters them."""
    entering: dict[int, list[Any]] = {}
    for slot, positions in claims.found.reached.items():
        for wanted, results in zip(claims.classes(slot), positions, strict=True):
            before = entering.get(wanted)
            entering[wanted] = results if before is None else [a | b for a, b in zip(before, results, strict=True)]
    return [
        f"position {at} of dimension {d} of result {k}"
        for k, axes in enumerate(claims.found.out)
        if claims.found.floats[k]
        for d, axis in enumerate(axes)
        for at in range(axis.size)
        for wanted in claims.along(axis, at) & set(entering)
        if wanted >= 0 and not entering[wanted][k].take(at, d).any()
    ]


@pytest.mark.filterwarnings("ignore:The use of `x.T`", "ignore:LSTM with projections")
@pytest.mark.parametrize(("op", "number"), SAMPLES, ids=IDS)
def test_dye_tracing_describes_what_single_positions_show(op: str, number: int) -> None:
    """`describe` finds labels bit by bit; one position at a time must show the same."""
    graph, node, values = built(op, *CALLS[op][number])
    floating = [n for n, info in graph.tensors.items() if info.dtype.is_floating_point]
    shapes = {n: graph.tensors[n].shape for n in floating}
    slots = [(n, d) for n in floating for d, size in enumerate(shapes[n]) if size > 1]
    call = Call(node, values, floating)
    found = describe(call, shapes, slots)
    for slot in slots:
        single = [elements(call, values, *slot, position, math.nan) for position in range(shapes[slot[0]][slot[1]])]
        for position, results in enumerate(single):
            for k, dim, at in found.links.get(slot, []):
                shape = [-1 if d == dim else 1 for d in range(results[k].ndim)]
                assert np.array_equal(results[k], np.broadcast_to((at == position).reshape(shape), results[k].shape))
            for k, dims, at in found.products.get(slot, []):
                shape = [n if d in dims else 1 for d, n in enumerate(results[k].shape)]
                assert np.array_equal(results[k], np.broadcast_to((at == position).reshape(shape), results[k].shape))
        told = slot in found.links or slot in found.products or slot in found.mixed or slot in found.partners
        assert told == any(elements.any() for results in single for elements in results)
        several = all(sum(bool(results[k].any()) for results in single) > 1 for k in range(len(single[0])))
        if slot in found.mixed and several:
            assert not followed(single)


def test_every_row_is_covered_or_named() -> None:
    covered = {row for op in CALLS for row in (op, op.rpartition(".")[0]) if row in TABLE}
    excused = {row if "." in row else f"aten.{row}" for rows in UNCOVERED.values() for row in rows.split()}
    assert excused <= set(TABLE)
    assert not covered & excused
    assert set(TABLE) - covered - excused == set()
    assert len({op.split(".")[1] for op in CALLS}) > 150


@pytest.mark.parametrize("row", [row for row in TABLE if row.startswith("aten.")])
def test_every_row_is_an_operator_of_torch(row: str) -> None:
    parts = row.split(".")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    assert packet is not None
    assert len(parts) == 2 or parts[2] in packet.overloads()


def test_operators_without_a_rule_are_traced() -> None:
    assert lookup("aten.max_unpool2d.default") is None
    assert lookup("aten.cdist.default") is None
    assert lookup("aten.add.Tensor") is lookup("aten.tanh.default")
