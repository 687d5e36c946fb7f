"""One pass that gives every axis of every value its atoms; the vocabulary in which operator rules are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs import operators
from metaprune.graphs.atoms import Atoms, Ids, Product
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.permutations import Reordering, find_reorderings
from metaprune.graphs.recompute import Region, find_region
from metaprune.graphs.structure import Ref

Flags = NDArray[np.bool_]
_YES, _NO = np.True_, np.False_


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a value.

    Attributes:
        size: Number of positions.
        ids: Atoms, shape [size], or None when the axis is fixed: nothing of it can go.
        zero: Whether the slice at a position is exactly zero once all parameter slices of the position's unit are zero;
            scalar or shape [size].
        why: For a fixed axis, what fixes it.
    """

    size: int
    ids: Ids | None = None
    zero: Any = _NO
    why: str = ""

    def with_zero(self, zero: Any) -> Axis:
        """The same axis with other zero flags."""
        return Axis(self.size, self.ids, np.asarray(zero) if self.ids is not None else _NO, self.why)

    def take(self, index: NDArray[np.int64], why: str = "") -> Axis:
        """The axis at the given positions, in that order."""
        if self.ids is None:
            return Axis(len(index), None, _NO, self.why or why)
        zero = self.zero[index] if np.ndim(self.zero) else self.zero
        return Axis(len(index), self.ids[index], zero)

    @property
    def all_zero(self) -> bool:
        """Whether every position is zero when its unit is silenced."""
        return bool(np.all(self.zero))


Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Site:
    """A place where an operator sums over an axis: gates act there.

    Attributes:
        arg: Name of the operand's node.
        dim: Its axis.
        statistics: Whether the operator takes statistics over the kept positions of the axis (layer and group norm).
    """

    arg: str
    dim: int
    statistics: bool = False


@dataclass
class Flow:
    """State of the pass.

    Attributes:
        graph: The graph.
        atoms: Ties, pins and products found so far.
        axes: For each value its axes; for a list of values a list.
        sites: For each node, where it sums over axes that may shrink.
        filled: For each node, the operand axes that must be filled up with zeros again before it runs, by operand name.
        recomputed: For some of them, what is run again instead, by node, operand and axis.
        restricted: For each such node, the axes of its result that are cut down to their kept positions afterwards.
        reorderings: Chains of nodes that only reorder one axis, by the name of the last.
        described: What was inferred for operators without a rule, by call.
        described_names: Operand names in the call that was described.
    """

    graph: Graph
    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    filled: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    recomputed: dict[tuple[str, str, int], Region] = field(default_factory=dict)
    restricted: dict[str, set[int]] = field(default_factory=dict)
    reorderings: dict[str, Reordering] = field(default_factory=dict)
    described: dict[Any, Any] = field(default_factory=dict)
    described_names: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    _values: dict[str, Any] | None = None
    _splits: dict[tuple[int, tuple[int, ...]], tuple[Axis, tuple[Axis, ...]]] = field(default_factory=dict)
    _constants: dict[str, NDArray[np.int64] | None] = field(default_factory=dict)
    _activations: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.reorderings = find_reorderings(self.graph)
        self.skipped = {name for chain in self.reorderings.values() for name in chain.inside}

    # ---- values

    def of(self, value: Any) -> Axes:
        """Axes of an argument that is a tensor."""
        axes = self.axes[value.name]
        assert isinstance(axes, tuple)
        return axes

    def meta(self, value: Ref) -> Meta:
        """Shape and dtype of an argument that is a tensor."""
        meta = self.graph.nodes[value.name].meta
        assert isinstance(meta, Meta)
        return meta

    def is_tensor(self, value: Any) -> bool:
        """Whether an argument is a tensor value."""
        return isinstance(value, Ref) and isinstance(self.graph.nodes[value.name].meta, Meta)

    def number(self, value: Any) -> Any:
        """The example's value of an argument that is a number, symbolic sizes included."""
        if isinstance(value, Ref):
            return self.graph.nodes[value.name].meta
        if isinstance(value, tuple):
            return tuple(self.number(item) for item in value)
        return value

    def is_activation(self, value: Any) -> bool:
        """Whether an input of the network enters an argument."""
        if not self._activations:
            for node in self.graph.nodes.values():
                if node.op == "input" or any(name in self._activations for name in node.refs()):
                    self._activations.add(node.name)
        return isinstance(value, Ref) and value.name in self._activations

    def constant(self, value: Any) -> NDArray[np.int64] | None:
        """An integer tensor that no input and no parameter enters, else None."""
        name = value.name
        if name not in self._constants:
            self._constants[name] = self._fold(self.graph.nodes[name])
        return self._constants[name]

    def example_values(self) -> dict[str, Any] | None:
        """Integer tensors and numbers of every node on the traced example; None on the meta device."""
        if self._values is None:
            values: dict[str, Any] = {}
            if any(t.is_meta for t in (*self.graph.values.values(), *self.graph.example.values())):
                return None

            def watch(node: Node, value: Any) -> None:
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    values[node.name] = value

            with torch.no_grad():
                execute(self.graph, self.graph.values, self.graph.example, watch=watch)
            self._values = values
        return self._values

    def _fold(self, node: Node) -> NDArray[np.int64] | None:
        meta = node.meta
        if not isinstance(meta, Meta) or meta.is_float or any(meta.batched) or prod(meta.shape) > 10_000_000:
            return None
        values: dict[str, Any] = {}
        pending = [node.name]
        while pending:
            current = self.graph.nodes[pending[-1]]
            missing = [r for r in dict.fromkeys(current.refs()) if r not in values]
            if current.op == "input" or (isinstance(current.meta, Meta) and any(current.meta.batched)):
                return None
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if current.op == "tensor":
                info = self.graph.tensors[current.args[0]]
                tensor = self.graph.values[current.args[0]]
                if info.kind == "parameter" or tensor.is_floating_point() or tensor.device.type == "meta":
                    return None
                values[current.name] = tensor
            elif not isinstance(current.meta, (Meta, tuple)):
                return None
            else:
                values[current.name] = evaluate(current, values)
        return np.asarray(values[node.name].to("cpu").to(dtype=torch.int64).numpy())

    # ---- axes

    def fixed(self, size: int, why: str) -> Axis:
        """An axis of which nothing can go."""
        return Axis(int(size), None, _NO, why)

    def fresh(self, size: int, zero: Any = _NO) -> Axis:
        """An axis with atoms of its own; an axis of one position is fixed."""
        if size <= 1:
            return self.fixed(size, "a single position")
        return Axis(int(size), self.atoms.fresh(int(size)), np.asarray(zero))

    def pin(self, axis: Axis, why: str) -> None:
        """Fixes all positions of an axis."""
        if axis.ids is not None:
            self.atoms.pin(axis.ids, why)

    def use(self, axes: Iterable[Axis]) -> None:
        """Notes that an operator computes with these axes."""
        for axis in axes:
            if axis.ids is not None:
                self.atoms.use(axis.ids)

    def tie(self, axes: Sequence[Axis], op: str) -> Axis:
        """Makes axes of equal size one: their positions live and die together. Zero flags are left to the caller."""
        tracked = [axis for axis in axes if axis.ids is not None]
        for axis in axes:
            if axis.ids is None and tracked:
                for other in tracked:
                    self.pin(other, f"tied by {op} to an axis that is {axis.why}")
                return axis
        if not tracked:
            return axes[0]
        first = tracked[0]
        for other in tracked[1:]:
            assert first.ids is not None
            assert other.ids is not None
            self.atoms.tie(first.ids, other.ids)
        return first

    def product(self, whole: Axis, factors: Sequence[Axis], op: str) -> None:
        """States that `whole` is the row-major product of `factors`."""
        sizes = [axis.size for axis in factors]
        index = np.indices(sizes).reshape(len(sizes), -1)
        tracked = [(axis, index[i]) for i, axis in enumerate(factors) if axis.ids is not None]
        if whole.ids is None:
            for axis, _ in tracked:
                self.pin(axis, f"merged by {op} into an axis that is {whole.why}")
        elif not tracked:
            self.pin(whole, f"split by {op} into axes that are {factors[0].why}")
        elif len(tracked) == 1:
            axis, where = tracked[0]
            assert axis.ids is not None
            self.atoms.tie(whole.ids, axis.ids[where])
        else:
            ids = tuple(axis.ids for axis, _ in tracked if axis.ids is not None)
            self.atoms.products.append(Product(whole.ids, ids, tuple(where for _, where in tracked), op))

    def split(self, axis: Axis, sizes: Sequence[int], op: str) -> tuple[Axis, ...]:
        """Row-major factors of an axis; the same split of the same axis gives the same factors."""
        if len(sizes) == 1:
            return (axis,)
        if axis.ids is None:
            return tuple(self.fixed(size, axis.why) for size in sizes)
        key = (id(axis.ids), tuple(sizes))
        if key not in self._splits:
            zero = axis.all_zero
            table = axis.ids.reshape(sizes)
            real = [i for i, size in enumerate(sizes) if size > 1]
            along = [i for i in real if (table != table.take([0], i)).any()]
            if len(along) == 1:  # the others only repeat the same units
                row = np.moveaxis(table, along[0], 0).reshape(sizes[along[0]], -1)[:, 0]
                line = axis if len(real) == 1 else Axis(len(row), row, np.asarray(zero))
                factors = tuple(
                    line if i == along[0] else self.fixed(size, "repeats of the same units")
                    for i, size in enumerate(sizes)
                )
            else:
                factors = tuple(self.fresh(size, zero) for size in sizes)
                self.product(axis, factors, op)
            self._splits[key] = (axis, factors)
        factors = self._splits[key][1]
        return tuple(factor.with_zero(axis.all_zero if len(sizes) > 1 else axis.zero) for factor in factors)

    def is_split(self, axis: Axis, sizes: Sequence[int]) -> bool:
        """Whether this split of this axis has been made."""
        return (id(axis.ids), tuple(sizes)) in self._splits

    def merge(self, axes: Sequence[Axis], op: str) -> Axis:
        """The row-major product of axes as one axis."""
        if len(axes) == 1:
            return axes[0]
        real = [axis for axis in axes if axis.size > 1]
        if len(real) == 1:
            return real[0]
        tracked = [axis for axis in axes if axis.ids is not None]
        size = prod(axis.size for axis in axes)
        if not tracked:
            return self.fixed(size, axes[0].why if axes else "a single position")
        if len(tracked) == 1:
            at = next(i for i, axis in enumerate(axes) if axis is tracked[0])
            index = np.indices([axis.size for axis in axes])[at].ravel()
            return tracked[0].take(index)
        whole = self.fresh(size, all(axis.all_zero for axis in tracked))
        self.product(whole, axes, op)
        return whole

    def coarse(self, axis: Axis, where: NDArray[np.int64], size: int) -> Axis:
        """An axis of `size` positions such that position p of `axis` belongs to position `where[p]` of it."""
        if axis.ids is None:
            return self.fixed(size, axis.why)
        factor = self.fresh(size, axis.all_zero)
        if factor.ids is None:
            self.pin(axis, "all of it belongs to a single position")
        else:
            self.atoms.tie(axis.ids, factor.ids[where])
        return factor

    # ---- what operators do with an axis they do not simply pass on

    def contract(self, node: Node, operands: Sequence[tuple[Ref, int, Axis]], op: str) -> None:
        """The operator sums products over this axis: everywhere one of the operands must vanish with its unit."""
        axis = self.tie([axis for *_, axis in operands], op)
        if axis.ids is None:
            return
        zero: Any = _NO
        for _, _, operand in operands:
            zero = zero | np.asarray(operand.zero)
        if not np.all(zero):
            leak = axis.ids if np.ndim(zero) == 0 else axis.ids[~zero]
            self.atoms.pin(leak, f"{op} sums over values that do not vanish with the unit")
        ref, dim, _ = operands[0]
        self.sites.setdefault(node.name, []).append(Site(ref.name, dim))

    def statistics(self, node: Node, ref: Ref, dim: int) -> None:
        """The operator takes statistics over the kept positions of this axis."""
        if self.of(ref)[dim].ids is not None:
            self.sites.setdefault(node.name, []).append(Site(ref.name, dim, statistics=True))

    def fill(self, node: Node, ref: Ref, dim: int, op: str) -> bool:
        """The operator mixes positions of this axis: it runs on the axis filled up with zeros.

        That is exact when silenced positions are zero. Where they are not, but elementwise operators lead there from
        values that are, these run again at full width; otherwise the axis is pinned. Returns whether it may shrink.
        """
        axis = self.of(ref)[dim]
        if axis.ids is None:
            return False
        region = None if np.all(axis.zero) else find_region(self.graph, ref, dim, self._vanishes)
        if region is not None:
            self.recomputed[(node.name, ref.name, dim)] = region
            for name in region.nodes:
                reads = set(self.graph.nodes[name].refs())
                self.sites.setdefault(name, []).extend(Site(n, d) for n, d in region.frontier if n in reads)
            self.filled.setdefault(node.name, set()).add((ref.name, dim))
            return True
        if not np.all(axis.zero):
            leak = axis.ids if np.ndim(axis.zero) == 0 else axis.ids[~axis.zero]
            self.atoms.pin(leak, f"{op} mixes its positions, which do not vanish with the unit")
            if not np.any(axis.zero):
                return False
        if not self.meta(ref).is_float:
            self.pin(axis, f"{op} mixes its positions")
            return False
        self.filled.setdefault(node.name, set()).add((ref.name, dim))
        self.sites.setdefault(node.name, []).append(Site(ref.name, dim))
        return True

    def _vanishes(self, name: str, dim: int) -> bool | None:
        axis = self.of(Ref(name))[dim]
        return None if axis.ids is None else axis.all_zero


def evaluate(node: Node, values: dict[str, Any]) -> Any:
    """Runs one node on values of the nodes it reads."""
    from metaprune.graphs.ir import Momentum, Training, substitute

    def find(ref: Ref) -> Any:
        return values[ref.name]

    def plain(value: Any) -> Any:
        if isinstance(value, Training):
            return False
        if isinstance(value, Momentum):
            return 0.0
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    function: Callable[..., Any] = operators.resolve(node.op)
    args = [plain(substitute(a, find)) for a in node.args]
    return function(*args, **{k: plain(substitute(v, find)) for k, v in node.kwargs.items()})
