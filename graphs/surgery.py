"""The only surgeon: a graph and a plan give a smaller graph. Nothing that goes in is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metaprune.graphs import operators
from metaprune.graphs.flow import Axis
from metaprune.graphs.incision import Incision, Kept, Mask, alive_units, carried
from metaprune.graphs.ir import Graph, Meta, Node, TensorInfo, live_nodes, substitute, verify
from metaprune.graphs.recompute import Region
from metaprune.graphs.rms import RmsNorm, find_rms_norms
from metaprune.graphs.rules import lookup
from metaprune.graphs.rules.rule import Bound
from metaprune.graphs.structure import Ref, refs


def cut(graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> Incision:
    """Cuts all units that `keep` leaves out.

    Args:
        graph: The graph.
        keep: For each group that shrinks, the numbers of the units that stay.

    Raises:
        PlanError: A group is unknown or pinned, a unit does not exist, or a group would lose all its units.
    """
    return Cut(graph, keep).run()


class Cut:
    """One cut in progress; the vocabulary in which operators' rewrites are written."""

    def __init__(self, graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> None:
        self.graph = graph
        self.flow = graph.coupling.flow
        self._alive = alive_units(graph, keep)
        self._masks: dict[int, tuple[Axis, Mask | None]] = {}
        self._nodes: dict[str, Node] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._renamed: dict[str, Ref] = {}
        self._operands: dict[str, Ref] = {}
        self._kept: Kept = {}
        self._scales: dict[str, tuple[float, float]] = {}
        self._literals: list[tuple[str, Any, Any]] = []
        self._unfilled: set[str] = set()
        self._eps: dict[str, RmsNorm] = {}
        self._widenings: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
        self._count = 0

    # ---- questions rewrites ask, in terms of the old graph

    def axis_mask(self, axis: Axis) -> Mask | None:
        """Which positions of an axis stay; None when all do."""
        if axis.ids is None:
            return None
        key = id(axis.ids)
        if key not in self._masks:
            mask = np.ones(axis.size, dtype=bool)
            for units in self.graph.coupling.units(axis):
                mask &= (units < 0) | self._alive[units]
            self._masks[key] = (axis, None if mask.all() else mask)
        return self._masks[key][1]

    def mask(self, value: Ref | Node, dim: int) -> Mask | None:
        """Which positions of a value's axis stay; None when all do."""
        return self.axis_mask(self.flow.axes[value.name][dim])

    def old_size(self, value: Ref | Node, dim: int) -> int:
        """Size of an axis before the cut."""
        return int(self.flow.axes[value.name][dim].size)

    def size(self, value: Ref | Node, dim: int) -> int:
        """Size of an axis after the cut."""
        mask = self.mask(value, dim)
        return self.old_size(value, dim) if mask is None else int(mask.sum())

    def shape(self, value: Ref | Node) -> tuple[int, ...]:
        """Shape of a value before the cut."""
        return tuple(axis.size for axis in self.flow.axes[value.name])

    def factor(self, value: Ref, dim: int, sizes: tuple[int, ...], which: int) -> int:
        """Size after the cut of one factor of an axis that an operator splits."""
        if not self.flow.is_split(self.flow.of(value)[dim], sizes):
            return sizes[which]
        factor = self.flow.split(self.flow.of(value)[dim], sizes, "")[which]
        mask = self.axis_mask(factor)
        return factor.size if mask is None else int(mask.sum())

    def is_filled(self, node: Node) -> bool:
        """Whether the operator runs on axes filled up with zeros."""
        return bool(self._fills(node))

    def eps(self, value: Ref) -> float:
        """The default epsilon of root-mean-square norms for a value's dtype."""
        return float(torch.finfo(self.flow.meta(value).dtype).eps)

    # ---- what rewrites do

    def resize(self, size: Any, node: Node, dim: int) -> Any:
        """A size argument that describes axis `dim` of the result, after the cut. Symbolic sizes are scaled exactly."""
        if isinstance(size, int) and size == -1:
            return size
        old, new = self.old_size(node, dim), self.size(node, dim)
        if isinstance(size, int):
            return new
        if old == new:
            return size
        common = int(np.gcd(old, new))
        product = self._add("operator.mul", (self._use(size), new // common), {}, 0, node.module)
        return self._add("operator.floordiv", (product, old // common), {}, 0, node.module)

    def constant(self, tensor: torch.Tensor) -> Ref:
        """A new constant of the network."""
        self._count += 1
        name = f"metaprune_index_{self._count}"
        device = next((t.device for t in self.graph.values.values()), torch.device("cpu"))
        self._values[name] = tensor.to(device)
        meta = Meta(tuple(tensor.shape), tensor.dtype, (False,) * tensor.ndim)
        self._tensors[name] = TensorInfo(name, "constant", meta.shape, tensor.dtype, (name,))
        self._nodes[name] = Node(name, "tensor", (name,), meta=meta)
        return Ref(name)

    def pick(self, source: Ref, dim: int, index: NDArray[np.int64], node: Node) -> Ref:
        """The value of `node` as an index into `source`: the old positions `index`, as far as they are kept."""
        mask = self.mask(source, dim)
        if mask is not None:
            index = (np.cumsum(mask) - 1)[index[mask[index]]]
        constant = self.constant(torch.from_numpy(index.copy()))
        return self.emit("aten.index_select.default", (source, dim, constant), node)

    def emit(self, op: str, args: tuple[Any, ...], node: Node) -> Ref:
        """Adds the call that stands for `node` after the cut; references are to values of the old graph."""
        return self._add(op, tuple(self._use(a) for a in args), {}, self._meta(node), node.module)

    # ---- the cut itself

    def run(self) -> Incision:
        """Carries out the cut."""
        self._hold_rms_norms()
        self._cut_tensors()
        for node in self.graph.nodes.values():
            if node.op == "input":
                self._nodes[node.name] = node
            elif node.op == "tensor":
                self._nodes[node.name] = replace(node, meta=self._meta(node))
            else:
                self._call(node)
        signature = self.graph.signature
        signature = replace(signature, output=_renamed(signature.output, self._renamed))
        nodes = live_nodes(self._nodes, refs(signature.output))
        values = self.graph.values | self._values
        for info in self._tensors.values():
            for alias in info.aliases:
                values[alias] = self._values.get(info.name, values[info.name])
        result = Graph(
            nodes,
            self._tensors,
            signature,
            values,
            None,
            dict(self.graph.example),
            self.graph.batch,
            list(self.graph.notes),
        )
        verify(result)
        return Incision(result, self._kept, self._scales, tuple(dict.fromkeys(self._literals)), self._widenings)

    def _hold_rms_norms(self) -> None:
        for norm in find_rms_norms(self.graph):
            ref, dims = norm.source, norm.dims
            new = int(np.prod([self.size(ref, d) for d in dims]))
            old = int(np.prod([self.old_size(ref, d) for d in dims]))
            if new == old:
                continue
            self._scales[norm.weight] = norm.held((old / new) ** 0.5)
            self._unfilled.add(norm.statistic)
            if norm.epsilon:
                self._eps[norm.epsilon] = replace(norm, ratio=old / new)

    def _cut_tensors(self) -> None:
        for node in self.graph.nodes.values():
            if node.op != "tensor":
                continue
            info = self.graph.tensors[node.args[0]]
            dims = {d: np.flatnonzero(m) for d in range(len(info.shape)) if (m := self.mask(node, d)) is not None}
            if not dims and info.name not in self._scales:
                continue
            self._kept |= dict.fromkeys(info.aliases, dims)
            self._values[info.name] = carried(self.graph.values[info.name], dims, self._scales.get(info.name))
        for name, info in self.graph.tensors.items():
            value = self._values.get(name, self.graph.values[name])
            self._tensors[name] = replace(info, shape=tuple(value.shape))

    def _call(self, node: Node) -> None:
        fills, first = self._fills(node), len(self._nodes)
        self._operands = {}
        if fills:
            masks = {(name, d): self.mask(Ref(name), d) for name, d in fills}
            self._widenings[node.name] = {at: torch.from_numpy(m) for at, m in masks.items() if m is not None}
        for name in {name for name, _ in fills}:
            self._operands[name] = self._filled(Ref(name), [d for n, d in fills if n == name], node)
        rule = lookup(node.op)
        result: Any = self._reordered(node)
        if result is None and rule is not None and rule.rewrite is not None:
            bound = operators.bind(node.op, node.args, dict(node.kwargs))
            result = rule.rewrite(self, node, bound)
            if isinstance(result, dict):
                self.note(node, bound, result)
                result = self._rebuilt(node, bound, result)
        if result is None:
            result = self._plain(node)
        if fills and isinstance(node.meta, Meta):
            result = self._restricted(node, result)
        self._operands = {}
        self._name(node, result, first)

    def _restricted(self, node: Node, result: Ref) -> Ref:
        """What an operator on filled-up axes gives, cut back to the positions that are kept."""
        masks = {d: self.mask(node, d) for d in sorted(self.flow.restricted.get(node.name, ()))}
        cuts = {d: np.flatnonzero(mask) for d, mask in masks.items() if mask is not None}
        meta = self._meta(node)
        shape = [self.old_size(node, d) if d in cuts else n for d, n in enumerate(meta.shape)]
        for d, index in cuts.items():
            self._nodes[result.name] = replace(self._nodes[result.name], meta=replace(meta, shape=tuple(shape)))
            result = self._add(
                "aten.index_select.default",
                (result, d, self.constant(torch.from_numpy(index))),
                {},
                meta,
                node.module,
            )
            shape[d] = len(index)
        return result

    def _reordered(self, node: Node) -> Ref | None:
        """The index that a chain of reshapes and transposes becomes once positions of its source are gone."""
        chain = self.flow.reorderings.get(node.name)
        if chain is None or all(self.mask(chain.source, d) is None for d in range(len(node.shape))):
            return None
        return self.pick(chain.source, chain.dim, chain.index, node)

    def _fills(self, node: Node) -> list[tuple[str, int]]:
        """Operand axes that must be filled up again, because positions of them are gone."""
        if node.name in self._unfilled:
            return []
        return [(n, d) for n, d in sorted(self.flow.filled.get(node.name, ())) if self.mask(Ref(n), d) is not None]

    def _filled(self, ref: Ref, dims: list[int], node: Node) -> Ref:
        """The operand at full width: computed again where its cut positions are not zero, else with zeros there."""
        value: Ref | None = None
        for d in dims:
            region = self.flow.recomputed.get((node.name, ref.name, d))
            if region is not None:
                value = self._again(region, node, value)
            else:
                value = self._widened(value or self._use(ref), ref, d, node)
        assert value is not None
        return value

    def _widened(self, value: Ref, ref: Ref, d: int, node: Node) -> Ref:
        """A value with zeros where positions were cut: a padded zero, then an index that points there."""
        mask, meta = self.mask(ref, d), self._nodes[value.name].meta
        assert mask is not None
        assert isinstance(meta, Meta)
        index = np.where(mask, np.cumsum(mask) - 1, int(mask.sum()))
        pads = (*([0] * (2 * (len(meta.shape) - 1 - d))), 0, 1)
        padded = self._add("aten.constant_pad_nd.default", (value, pads, 0), {}, _sized(meta, d, 1), node.module)
        full = self.constant(torch.from_numpy(index))
        wide = _sized(meta, d, len(index) - meta.shape[d])
        return self._add("aten.index_select.default", (padded, d, full), {}, wide, node.module)

    def _again(self, region: Region, node: Node, value: Ref | None) -> Ref:
        """The last of a region's nodes, computed once more from values filled up with zeros."""
        outside, self._operands = self._operands, {}
        for name, d in region.frontier:
            self._operands[name] = self._widened(self._use(Ref(name)), Ref(name), d, node)
        for name in region.nodes:
            inner = self.graph.nodes[name]
            args, kwargs = self._use(inner.args), {k: self._use(v) for k, v in inner.kwargs.items()}
            self._operands[name] = value = self._add(inner.op, args, kwargs, inner.meta, node.module)
        self._operands = outside
        assert value is not None
        return value

    def _plain(self, node: Node) -> Ref:
        args = tuple(self._use(a) for a in node.args)
        kwargs = {k: self._use(v) for k, v in node.kwargs.items()}
        if node.name in self._eps:
            norm = self._eps[node.name]
            args = tuple(a * norm.ratio if isinstance(a, float) else a for a in args)
            self._literals.append((node.module, norm.value, norm.value * norm.ratio))
        return self._add(node.op, args, kwargs, self._meta(node), node.module)

    def _rebuilt(self, node: Node, old: Bound, new: Bound) -> Ref:
        schema = operators.schema_of(node.op)
        assert schema is not None
        given = set(list(old)[: len(node.args)]) | set(node.kwargs)
        changed = {name for name in new if name in given or new[name] != old.get(name)}
        last = max((i for i, a in enumerate(schema.arguments) if a.name in changed and not a.kwarg_only), default=-1)
        args = tuple(self._use(new[a.name]) for a in schema.arguments[: last + 1] if not a.kwarg_only)
        kwargs = {a.name: self._use(new[a.name]) for a in schema.arguments if a.kwarg_only and a.name in changed}
        return self._add(node.op, args, kwargs, self._meta(node), node.module)

    def note(self, node: Node, old: Bound, new: Bound) -> None:
        """Remembers numbers of the call that changed, for the attributes of the module that wrote them."""
        for name, value in new.items():
            before = old.get(name)
            if before == value:
                continue
            if before is None:
                self._literals.append((node.module, (None, name), value))
                continue
            pairs = (
                zip(before, value, strict=True)
                if isinstance(value, tuple) and isinstance(before, tuple)
                else [(before, value)]
            )
            self._literals += [
                (node.module, a, b)
                for a, b in pairs
                if isinstance(a, (int, float)) and a != b and not isinstance(b, Ref)
            ]

    def _name(self, node: Node, result: Ref, first: int) -> None:
        """Gives the final value the old node's name where that is free."""
        if result.name == node.name or node.name in self._nodes or len(self._nodes) == first:
            self._renamed[node.name] = result
            return
        last = self._nodes.pop(result.name)
        self._nodes[node.name] = replace(last, name=node.name)
        self._renamed[node.name] = Ref(node.name)

    def _use(self, value: Any) -> Any:
        def change(ref: Ref) -> Ref:
            return self._operands.get(ref.name) or self._renamed.get(ref.name, ref)

        return substitute(value, change)

    def _add(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any, module: str) -> Ref:
        self._count += 1
        name = f"cut_{self._count}"
        self._nodes[name] = Node(name, op, args, kwargs, meta, module)
        return Ref(name)

    def _meta(self, node: Node) -> Any:
        if not isinstance(node.meta, (Meta, tuple)):
            return node.meta
        values = self.graph.coupling.values(node)
        metas = [node.meta] if isinstance(node.meta, Meta) else list(node.meta)
        new: list[Any] = []
        for axes, meta in zip(values, metas, strict=True):
            if not isinstance(meta, Meta):
                new.append(meta)
                continue
            masks = [self.axis_mask(axis) for axis in axes]
            shape = tuple(n if m is None else int(m.sum()) for n, m in zip(meta.shape, masks, strict=True))
            new.append(replace(meta, shape=shape))
        return new[0] if isinstance(node.meta, Meta) else tuple(new)


def _renamed(output: Any, names: Mapping[str, Ref]) -> Any:
    from metaprune.graphs.structure import exchange

    return exchange(output, lambda ref: names.get(ref.name, ref))


def _sized(meta: Meta, dim: int, more: int) -> Meta:
    return replace(meta, shape=tuple(n + more * (d == dim) for d, n in enumerate(meta.shape)))
