"""Which positions of which axes live and die together: from atoms to units and groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from metaprune.graphs import operators, structure
from metaprune.graphs.atoms import Ids
from metaprune.graphs.cost import Costs
from metaprune.graphs.errors import GraphError, PlanError
from metaprune.graphs.families import solve
from metaprune.graphs.flow import Axis, Flow
from metaprune.graphs.groups import Group, Slice
from metaprune.graphs.ir import Graph, Meta, Node
from metaprune.graphs.rules import lookup
from metaprune.graphs.rules.rule import Unmatched

ROLES = (
    "other",
    "ffn",
    "channels",
    "hidden",
    "residual",
    "conv_group",
    "head_dim",
    "heads",
    "query_group",
    "kv_group",
)  # weakest first: a stronger role wins
_NAMED = ROLES.index("conv_group")
_UNUSED = "not used by the forward pass"
_SINGLE = "a single unit"
_MIXED = "reshaped in a way that no rectangular cut survives"


@dataclass(eq=False)
class Coupling:
    """Result of the analysis.

    Attributes:
        graph: The graph.
        flow: Axes of every value, gate sites, filled axes.
        root: Class of each atom.
        columns: Units of each class, one array per column, -1 for none; an element stays when all its units stay.
        owner: Group of each unit as index into `groups`, -1 for units that always stay.
        rank: Position of each unit inside its group.
        groups: The groups.
    """

    graph: Graph
    flow: Flow
    root: Ids
    columns: list[Ids]
    owner: Ids
    rank: Ids
    groups: list[Group] = field(default_factory=list)

    def __deepcopy__(self, memo: object) -> Coupling:
        return self  # it says how a network is built, whatever its weights, and never changes

    def by_name(self, name: str) -> Group:
        """The group called `name`."""
        try:
            return self.groups[self._names[name]]
        except KeyError:
            raise PlanError(f"the network has no group {name!r}") from None

    def number(self, name: str) -> int:
        """Index of the group called `name`."""
        self.by_name(name)
        return self._names[name]

    @cached_property
    def _names(self) -> dict[str, int]:
        return {group.name: i for i, group in enumerate(self.groups)}

    @cached_property
    def costs(self) -> Costs:
        """Cost as polynomials in the group sizes."""
        return Costs(self)

    def units(self, axis: Axis) -> list[Ids]:
        """Units at each position of an axis, one array per column in use, -1 for none."""
        if axis.ids is None:
            return []
        roots = self.root[axis.ids]
        found = [column[roots] for column in self.columns]
        return [units for units in found if (units >= 0).any()]

    def values(self, node: Node) -> list[tuple[Axis, ...]]:
        """Axes of a node's tensor values."""
        axes = self.flow.axes.get(node.name)
        if axes is None:
            return []
        return [axes] if isinstance(axes, tuple) else list(axes)


def couple(graph: Graph) -> Coupling:
    """Analyses a graph: one pass over its nodes, then one solution of all ties and products."""
    flow = Flow(graph)
    for node in graph.nodes.values():
        _visit(flow, node)
    for name in structure.refs(graph.signature.output):
        for axis in flow.axes[name]:
            flow.pin(axis, "the network's output")
    atoms = flow.atoms
    root = atoms.roots()
    strength = atoms.roles(root, ROLES)
    for (
        made
    ) in atoms.products:  # heads that are themselves a product: shared keys and values, and the queries that share them
        if len(made.factors) == 2 and (strength[root[made.whole]] == ROLES.index("heads")).all():
            for factor, name in zip(made.factors, ("kv_group", "query_group"), strict=True):
                strength[root[factor]] = ROLES.index(name)
    used = atoms.used(root)
    families, involved = solve(atoms.products, root, used | (strength >= _NAMED))
    reasons = atoms.pins(root)
    labelled = np.zeros(atoms.count, dtype=bool)
    for family in families:
        labelled[family.roots] = True
    for r in involved[~labelled[involved]].tolist():
        reasons.setdefault(r, _MIXED)
    single = np.unique(root)
    single = single[~labelled[single]]
    first = np.full(atoms.count, -1, dtype=np.int64)
    first[single] = np.arange(len(single))
    columns = [first]
    why: list[str | None] = [
        reasons.get(r) if r in reasons else (None if used[r] else _UNUSED) for r in single.tolist()
    ]
    role = [strength[single]]
    total = len(single)
    for family in families:
        column = next((c for c in columns if (c[family.roots] < 0).all()), None)
        if column is None:
            column = np.full(atoms.count, -1, dtype=np.int64)
            columns.append(column)
        column[family.roots] = total + family.labels
        count = int(family.labels.max()) + 1
        own: list[str | None] = [None] * count
        for r, label in zip(family.roots.tolist(), family.labels.tolist(), strict=True):
            if r in reasons and own[label] is None:
                own[label] = reasons[r]
        why += own
        strongest = np.zeros(count, dtype=np.int8)
        np.maximum.at(strongest, family.labels, strength[family.roots])
        role.append(strongest)
        total += count
    coupling = Coupling(graph, flow, root, columns, np.full(total, -1), np.zeros(total, dtype=np.int64))
    _group(coupling, why, np.concatenate(role))
    return coupling


def _visit(flow: Flow, node: Node) -> None:
    if node.op == "input":
        flow.axes[node.name] = tuple(flow.fixed(n, "the network's input") for n in node.shape)
        return
    if node.op == "tensor":
        info = flow.graph.tensors[node.args[0]]
        floating = info.dtype.is_floating_point
        flow.axes[node.name] = tuple(
            flow.fresh(n, True) if floating else flow.fixed(n, "a table of integers") for n in node.shape
        )
        return
    if not isinstance(node.meta, (Meta, tuple)):
        return
    if node.name in flow.skipped:
        flow.axes[node.name] = tuple(flow.fixed(n, "inside a reordering") for n in node.shape)
        return
    if node.name in flow.reorderings:
        chain = flow.reorderings[node.name]
        source = flow.of(chain.source)
        flow.axes[node.name] = tuple(a.take(chain.index) if d == chain.dim else a for d, a in enumerate(source))
        return
    bound = operators.bind(node.op, node.args, dict(node.kwargs))
    rule = lookup(node.op)
    axes = None
    if rule is not None:
        try:
            axes = rule.flow(flow, node, bound)
        except Unmatched:
            axes = None
    if axes is None:
        from metaprune.graphs.inference import infer

        axes = infer(flow, node)
    metas = [node.meta] if isinstance(node.meta, Meta) else list(node.meta)
    found = [axes] if isinstance(axes, tuple) else list(axes)
    for value, meta in zip(found, metas, strict=True):
        if isinstance(meta, Meta) and tuple(axis.size for axis in value) != meta.shape:
            raise GraphError(
                f"the rule of {node.op} gives axes {[a.size for a in value]} for a value of shape {meta.shape}"
            )
    flow.axes[node.name] = axes


def _group(coupling: Coupling, why: list[str | None], role: NDArray[np.int8]) -> None:
    """Sorts units into groups by the set of axes they stand on, and lists their parameter slices."""
    total = len(coupling.owner)
    places: dict[int, tuple[Axis, int]] = {}
    owned = np.zeros(total, dtype=bool)
    tensors: list[tuple[str, int, Axis]] = []
    for node in coupling.graph.nodes.values():
        for value in coupling.values(node):
            for dim, axis in enumerate(value):
                if axis.ids is None:
                    continue
                code = crc32(f"{node.name}/{dim}".encode()) * 0x9E3779B97F4A7C15
                kept = places.get(id(axis.ids))
                places[id(axis.ids)] = (axis, (kept[1] if kept else 0) + code & 0xFFFFFFFFFFFFFFFF)
                if node.op == "tensor":
                    tensors.append((node.args[0], dim, axis))
    marks = np.zeros(total, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for axis, code in places.values():
            for units in coupling.units(axis):
                np.add.at(marks, units[units >= 0], np.uint64(code))
    for _, _, axis in tensors:
        for units in coupling.units(axis):
            owned[units[units >= 0]] = True
    keys: dict[tuple[int, str | None, int], int] = {}
    members: list[list[int]] = []
    for unit in np.flatnonzero(owned).tolist():
        reason = why[unit]
        if reason == "":
            continue
        key = (int(marks[unit]), reason, int(role[unit]))
        if key not in keys:
            keys[key] = len(members)
            members.append([])
        coupling.rank[unit] = len(members[keys[key]])
        coupling.owner[unit] = keys[key]
        members[keys[key]].append(unit)
    slices: list[list[Slice]] = [[] for _ in members]
    for tensor, dim, axis in tensors:
        for units in coupling.units(axis):
            owner = np.where(units >= 0, coupling.owner[units], -1)
            for number in np.unique(owner[owner >= 0]).tolist():
                at = np.flatnonzero(owner == number)
                at = at[np.argsort(coupling.rank[units[at]], kind="stable")]
                slices[number].append(Slice(tensor, dim, at.reshape(len(members[number]), -1)))
    taken: dict[str, int] = {}
    for (_, reason, kind), own in zip(keys, slices, strict=True):
        number = len(coupling.groups)
        name = _name(coupling.graph, own, ROLES[kind], taken)
        size = len(members[number])
        coupling.groups.append(Group(name, ROLES[kind], size, tuple(own), reason or ("" if size > 1 else _SINGLE)))


def _name(graph: Graph, slices: list[Slice], kind: str, taken: dict[str, int]) -> str:
    """After the first tensor that writes the units: its module, and the kind where the module has several groups."""
    first = next((s for s in slices if s.dim == 0 and len(graph.tensors[s.tensor].shape) > 1), slices[0])
    base = first.tensor.removesuffix(".weight").removesuffix(".bias")
    if first.dim:
        base = f"{base}[{first.dim}]"
    plain = [] if kind in ROLES[_NAMED:] else [base]
    for name in (*plain, f"{base}.{kind}"):
        if name not in taken:
            taken[name] = 1
            return name
    taken[name] += 1
    return f"{name}.{taken[name]}"
