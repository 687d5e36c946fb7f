"""Values inside a pruned network beside those of the network it was cut from: what feature distillation compares.

The two need no learned adaptor between them: a value of the pruned network stands for the kept part of the dense
network's value at the same node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaprune.evaluation import device_of
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.linear import linear_layers
from metaprune.graphs.portable import PortableModule, sharing, watch_with
from metaprune.graphs.responses import responses
from metaprune.graphs.structure import refs
from metaprune.graphs.survivors import Survivors
from metaprune.losses import feature_matching

if TYPE_CHECKING:
    from metaprune.api import Pruned

_MOST = 4


class Features:
    """A pruned network and the one it was cut from, side by side.

    Attributes:
        student: The pruned network on its own tensors: to train it trains the pruned module.
        dense: The network that was cut, in eval mode.
        names: The nodes that are compared; see `matched_nodes`.
    """

    def __init__(self, pruned: Pruned) -> None:
        self._survivors = Survivors(pruned.original, pruned.plan.keep)
        self.names = matched_nodes(pruned.graph, self._survivors)
        self.student = sharing(pruned.graph, pruned.module)
        self.dense = PortableModule(pruned.original).to(device_of(pruned.module)).eval()
        self._own, self._wanted = observe(self.student, self.names), observe(self.dense, self.names)

    def distance(self) -> Tensor:
        """Mean of `feature_matching` over the nodes, after both ran on the same inputs; 0 without nodes."""
        pairs = [(self._own[name], self._survivors.part(name, self._wanted[name])) for name in self.names]
        return torch.stack([feature_matching(*pair) for pair in pairs]).mean() if pairs else torch.zeros(())


def matched_nodes(cut: Graph, survivors: Survivors) -> tuple[str, ...]:
    """The nodes of a cut graph whose values are compared with those of the graph it was cut from, in order.

    Those are the sums that end residual blocks; in a network without any up to four layers, the last of each of four
    equal parts, behind their batch normalisation. What is an output already has a loss of its own and is left out.

    Args:
        cut: The cut graph.
        survivors: What stays of the graph that it was cut from.
    """
    outputs = frozenset(refs(cut.signature.output))
    found = responses(cut, linear_layers(cut)).values()
    joins = [r.target for r in found if r.other and r.target not in outputs and survivors.comparable(r.target, cut)]
    if joins:
        return tuple(name for name in cut.nodes if name in joins)
    ends = [r.start for r in found if r.start not in outputs and survivors.comparable(r.start, cut)]
    count = min(_MOST, len(ends))
    return tuple(ends[(i + 1) * len(ends) // count - 1] for i in range(count))


def observe(model: PortableModule, names: Iterable[str]) -> dict[str, Tensor]:
    """Makes a model write the values of nodes into the dictionary returned, anew in each forward pass."""
    wanted = frozenset(names)
    seen: dict[str, Tensor] = {}

    def watch(node: Node, value: Any) -> None:
        if node.name in wanted:
            seen[node.name] = value

    watch_with(model, watch)
    return seen
