"""Cost as polynomials in the group sizes: multiply-adds, parameters, activation bytes, and what else is measured.

The size of an axis is a sum of products of kept counts (a concatenation adds, heads times head dimensions multiply);
an operator's multiply-adds are products of axis sizes. So cost is a polynomial of the degree the network asks for,
evaluated for a whole population of plans at once. Nothing is ever added up per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs import operators
from metaprune.graphs.flow import Axis
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.polynomial import Counts, Monomials, Polynomial, Size, Term, expanded
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.coupling import Coupling


@dataclass(frozen=True)
class Cost:
    """Cost of a network on the caller's example batch: multiply-adds, parameters, bytes of computed activations."""

    macs: int
    params: int
    bytes: int


class Costs:
    """The cost polynomials of a coupled graph."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._cache: dict[int, tuple[Axis, Size]] = {}
        self._polynomials: dict[bytes, Size] = {}
        self._further: dict[str, list[Term]] = {}

    def extended(self, further: Mapping[str, Sequence[Term]]) -> Costs:
        """These costs and further ones, such as a measured latency, as sums of products of axis sizes by name."""
        result = Costs(self._coupling)
        result._cache, result._polynomials = self._cache, self._polynomials
        result._further = self._further | {what: list(terms) for what, terms in further.items()}
        return result

    @property
    def graph(self) -> Graph:
        """The graph whose cost it is."""
        return self._coupling.graph

    @cached_property
    def sizes(self) -> Counts:
        """Full size of every group, shape [groups]."""
        return np.array([group.size for group in self._coupling.groups], dtype=float)

    @cached_property
    def _free(self) -> NDArray[np.bool_]:
        """Whether each group may shrink, shape [groups + 1]: the last stands for units of no group (-1)."""
        return np.array([*(not group.pinned for group in self._coupling.groups), False])

    @cached_property
    def full(self) -> Cost:
        """Cost of the unpruned network."""
        return self.cost(self.sizes)

    def cost(self, kept: Counts) -> Cost:
        """Cost for one vector of kept counts, shape [groups]."""
        row = kept[None]
        return Cost(*(round(float(self.evaluate(what, row)[0])) for what in ("macs", "params", "bytes")))

    def evaluate(self, what: str, kept: Counts) -> Counts:
        """`macs`, `params`, `bytes` or a further cost for kept counts of shape [plans, groups]; shape [plans]."""
        return self._compiled[what].at(kept)

    def monomials(self, what: str, place: Mapping[int, int]) -> Monomials:
        """A cost as a polynomial in some groups' kept counts, multiplied out.

        Args:
            what: `macs`, `params` or `bytes`.
            place: Number of each variable by its group; all other groups are whole.
        """
        return expanded(self.terms[what], self.sizes, place)

    @cached_property
    def _compiled(self) -> dict[str, Polynomial]:
        return {what: Polynomial(terms) for what, terms in self.terms.items()}

    @cached_property
    def terms(self) -> dict[str, list[Term]]:
        """The polynomials: each a sum of products of axis sizes."""
        graph = self.graph
        found: dict[str, list[Term]] = {"macs": [], "params": [], "bytes": []}
        for node in graph.nodes.values():
            if node.op == "tensor":
                if graph.tensors[node.args[0]].kind == "parameter":
                    found["params"].append(tuple(self.shape(node)))
            elif node.op != "input" and isinstance(node.meta, (Meta, tuple)):
                found["macs"] += self.macs(node)
                if not _moves(node.op):
                    found["bytes"] += self._bytes(node)
        read = {node.args[0] for node in graph.nodes.values() if node.op == "tensor"}
        for info in graph.tensors.values():
            if info.kind == "parameter" and info.name not in read:
                found["params"].append(tuple(Size(n) for n in info.shape))
        return found | self._further

    def operator(self, node: Node) -> dict[str, list[Term]]:
        """What one operator does: its multiply-adds `macs`, the bytes it `read`s and those it has `written`."""
        sources = [self.graph.nodes[name] for name in node.refs()]
        read = [term for source in sources for term in self._bytes(source)]
        return {"macs": self.macs(node), "read": read, "written": self._bytes(node)}

    def shape(self, node: Node, inside: bool = False, number: int = 0) -> list[Size]:
        """Sizes of the axes of one of a node's values, batched dimensions scaled to the caller's batch.

        An operator that runs on filled-up axes has them whole `inside`; what it hands on is cut again.
        """
        axes, meta = self._coupling.values(node)[number], _values(node)[number]
        batched = meta.batched or (False,) * len(axes)
        restricted = self._coupling.flow.restricted.get(node.name, set()) if inside else set()
        return [
            self._size(axis, self._coupling.graph.batch if grows else 1.0) if d not in restricted else Size(axis.size)
            for d, (axis, grows) in enumerate(zip(axes, batched, strict=True))
        ]

    def _bytes(self, node: Node) -> list[Term]:
        """Bytes of the values that a node computes."""
        return [
            (*self.shape(node, number=number), Size(meta.dtype.itemsize))
            for number, meta in enumerate(_values(node))
            if isinstance(meta, Meta)
        ]

    def _operand(self, node: Node, ref: Ref) -> list[Size]:
        source = self._coupling.graph.nodes[ref.name]
        sizes = self.shape(source)
        for name, dim in self._coupling.flow.filled.get(node.name, ()):
            if name == ref.name:
                sizes[dim] = Size(self._coupling.flow.axes[name][dim].size)
        return sizes

    def _size(self, axis: Axis, scale: float) -> Size:
        if axis.ids is None:
            return Size(axis.size * scale)
        if scale != 1.0:
            return self._size(axis, 1.0).times(scale)
        key = id(axis.ids)
        if key not in self._cache:
            content = self._coupling.root[axis.ids].tobytes()
            if content not in self._polynomials:
                self._polynomials[content] = self._polynomial(axis)
            self._cache[key] = (axis, self._polynomials[content])
        return self._cache[key][1]

    def _polynomial(self, axis: Axis) -> Size:
        owners = []
        for units in self._coupling.units(axis):
            owner = np.where(units >= 0, self._coupling.owner[units], -1)
            owners.append(np.where(self._free[owner], owner, -1))
        if not owners:
            return Size(axis.size)
        if len(owners) == 1:
            counts = np.bincount(owners[0] + 1)
            groups = np.flatnonzero(counts[1:])
            return Size(float(counts[0]), groups, counts[groups + 1] / self.sizes[groups])
        table, numbers = np.unique(np.stack(owners), axis=1, return_counts=True)
        constant, products = 0.0, []
        for combination, count in zip(table.T, numbers.tolist(), strict=True):
            together = tuple(g for g in combination.tolist() if g >= 0)
            if together:
                products.append((count / float(self.sizes[list(together)].prod()), together))
            else:
                constant += count
        return Size(constant, products=tuple(products))

    def macs(self, node: Node) -> list[Term]:
        """Multiply-adds of one operator."""
        from metaprune.graphs.rules import lookup

        rule = lookup(node.op)
        if rule is None or not rule.macs:
            return []
        bound = operators.bind(node.op, node.args, dict(node.kwargs))
        if rule.macs == "einsum":
            return self._einsum(node, bound)
        if rule.macs == "recurrent":
            return self._recurrent(node, bound)
        return [self._product(node, bound, term.split(), rule.operands) for term in rule.macs.split("+")]

    def _product(self, node: Node, bound: dict[str, Any], factors: list[str], operands: tuple[str, ...]) -> Term:
        sizes: list[Size] = []
        for factor in factors:
            name, _, part = factor.partition("[")
            shape = self.shape(node, inside=True) if name == "out" else self._operand(node, bound[operands[int(name)]])
            if part:
                start, colon, _ = part.rstrip("]").partition(":")
                shape = shape[int(start) :] if colon else [shape[int(start)]]
            sizes += shape
        return tuple(sizes)

    def _einsum(self, node: Node, bound: dict[str, Any]) -> list[Term]:
        """Contraction from left to right, pair by pair, as torch does it."""
        inputs, _, output = bound["equation"].replace(" ", "").partition("->")
        operands = [
            self._letters(t, self._operand(node, r)) for t, r in zip(inputs.split(","), bound["tensors"], strict=True)
        ]
        terms: list[Term] = []
        left = operands[0]
        for number, right in enumerate(operands[1:], 1):
            both = {**left, **{k: v for k, v in right.items() if k not in left or _is_one(left[k])}}
            terms.append(tuple(both.values()))
            later = set(output).union(*operands[number + 1 :])
            left = {k: v for k, v in both.items() if k in later or k.startswith(".")}
        return terms

    def _letters(self, term: str, sizes: list[Size]) -> dict[str, Size]:
        head, dots, tail = term.partition("...")
        count = len(sizes) - len(head) - len(tail) if dots else 0
        names = [*head, *(f".{count - 1 - i}" for i in range(count)), *tail]
        return dict(zip(names, sizes, strict=True))

    def _recurrent(self, node: Node, bound: dict[str, Any]) -> list[Term]:
        steps = self._operand(node, bound["input"])[:-1]
        weights = [self._operand(node, ref) for ref in bound.get("params") or (bound["w_ih"], bound["w_hh"])]
        return [(*steps, *shape) for shape in weights if len(shape) == 2]


class _Counted(Costs):
    """The same sums over the shapes a graph has, without any coupling."""

    def __init__(self, graph: Graph) -> None:
        self._plain = graph
        self._further: dict[str, list[Term]] = {}

    @property
    def graph(self) -> Graph:
        """The graph that is counted."""
        return self._plain

    def shape(self, node: Node, inside: bool = False, number: int = 0) -> list[Size]:
        """Sizes of one of a node's values as they are."""
        meta = _values(node)[number]
        batched = meta.batched or (False,) * len(meta.shape)
        return [Size(n * (self._plain.batch if b else 1.0)) for n, b in zip(meta.shape, batched, strict=True)]

    def _operand(self, node: Node, ref: Ref) -> list[Size]:
        return self.shape(self._plain.nodes[ref.name])


def _is_one(size: Size) -> bool:
    return size.constant == 1 and size.is_constant


def counted(graph: Graph) -> Cost:
    """Cost of a graph as it stands, exact for every cut."""
    costs = _Counted(graph)
    nothing = np.zeros((1, 0))
    return Cost(*(round(float(costs.evaluate(what, nothing)[0])) for what in ("macs", "params", "bytes")))


def macs_by_node(graph: Graph) -> dict[str, float]:
    """Multiply-adds of each operator of a graph as it stands, on the caller's example batch, by node."""
    costs, nothing = _Counted(graph), np.zeros((1, 0))
    return {
        node.name: float(Polynomial(costs.macs(node)).at(nothing)[0])
        for node in graph.nodes.values()
        if node.op not in ("input", "tensor") and isinstance(node.meta, (Meta, tuple))
    }


def _values(node: Node) -> list[Any]:
    """Shape and dtype of each value a node computes."""
    return list(node.meta) if isinstance(node.meta, tuple) else [node.meta]


def _moves(op: str) -> bool:
    """Whether the operator only views its operand, so that no bytes are written."""
    from metaprune.graphs.functionalise import is_view

    return (
        op.startswith("operator.") or is_view(op) or op.split(".")[1] in ("reshape", "flatten", "contiguous", "dropout")
    )
