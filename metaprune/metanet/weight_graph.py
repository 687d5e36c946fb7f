"""A network's weights as a graph over its units: the metanetwork's input, and the way back to the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.metanet.layout import Layout, Part, UnitSet, lay_out

if TYPE_CHECKING:
    import networkx as nx
    from torch_geometric.data import HeteroData

    from metaprune.metanet.encoding import Encoding


@dataclass(frozen=True, eq=False)
class WeightGraph:
    """All tensors of a network, each in exactly one place, with the units that own their positions.

    It is in bijection with the network: `WeightGraph.of(graph).to_graph()` has the same tensors bit for bit.

    Attributes:
        graph: The network it is made of.
        layout: Units and parts (see `metaprune.metanet.layout`).
        values: The tensors by name, as blocks [C_out, C_in, K], vectors [C, K] or rest [K]; views where strides allow.
    """

    graph: Graph
    layout: Layout
    values: Mapping[str, Tensor]

    @staticmethod
    def of(graph: Graph) -> WeightGraph:
        """The weight graph of a traced network, by its groups alone: any architecture, no code for it."""
        layout = lay_out(graph)
        values = {name: part.view(graph.values[name].detach()) for name, part in layout.parts.items()}
        return WeightGraph(graph, layout, values)

    @property
    def units(self) -> tuple[UnitSet, ...]:
        """The unit sets, in the order of the graph's groups."""
        return self.layout.units

    @property
    def blocks(self) -> tuple[Part, ...]:
        """Tensors with units on two sides."""
        return self.layout.blocks

    @property
    def vectors(self) -> tuple[Part, ...]:
        """Tensors with units on one side."""
        return self.layout.vectors

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, buffer and constant of the network by name, in its own shape."""
        return {name: part.restore(self.values[name]) for name, part in self.layout.parts.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> WeightGraph:
        """The same network with other tensors; those that are not named stay.

        Args:
            tensors: By name, in the network's own shapes. Gradients flow through.

        Raises:
            OptionError: A tensor is unknown or of another shape.
        """
        parts = self.layout.parts
        for name, tensor in tensors.items():
            if name not in parts:
                raise OptionError(f"tensors: the network has no tensor {name}")
            if tuple(tensor.shape) != parts[name].shape:
                raise OptionError(f"tensors: {name} must be {list(parts[name].shape)}, not {list(tensor.shape)}")
        changed = {name: parts[name].view(tensor) for name, tensor in tensors.items()}
        return WeightGraph(self.graph, self.layout, {**self.values, **changed})

    def to_graph(self) -> Graph:
        """The network with these tensors; groups, costs and fingerprint are shared with the one it was made of."""
        return self.graph.with_values(self.tensors())

    @cached_property
    def encoding(self) -> Encoding:
        """What the metanetwork reads of it; worked out once, see `metaprune.metanet.encoding.encode`."""
        from metaprune.metanet.encoding import encode

        return encode(self)

    def split(self, states: Tensor) -> dict[str, Tensor]:
        """Rows of a table over all units, shape [units, ...], by group, each of shape [size, ...]."""
        return {units.name: states[units.start : units.start + units.size] for units in self.units}

    def to_hetero(self) -> HeteroData:
        """As a `torch_geometric.data.HeteroData`; see `metaprune.metanet.views.to_hetero`."""
        from metaprune.metanet.views import to_hetero

        return to_hetero(self)

    def to_networkx(self) -> nx.MultiDiGraph:
        """As a `networkx.MultiDiGraph` over unit sets; see `metaprune.metanet.views.to_networkx`."""
        from metaprune.metanet.views import to_networkx

        return to_networkx(self)
