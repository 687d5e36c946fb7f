"""The rewriting head: from a network and the units that go to other weights for those that stay, without data."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.dataless import refit_without_data
from metaprune.graphs.coupling import ROLES
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.metanet.encoding import POSITION, SET, TENSOR
from metaprune.metanet.engine import MEAN, Metanetwork
from metaprune.metanet.exchange import MOMENTS
from metaprune.metanet.reading import ARGUMENTS, FAMILIES
from metaprune.metanet.rewrite import Rewriter
from metaprune.metanet.weight_graph import WeightGraph

COMPENSATION, SPARSITY = "compensation", "group_sparsity"
OBJECTIVES = (COMPENSATION, SPARSITY)
FEATURES = hashlib.sha256(repr((SET, TENSOR, POSITION, ROLES, FAMILIES, ARGUMENTS, MOMENTS)).encode()).hexdigest()
"""Digest of all that a metanetwork reads of a network, by name and in order."""


class RewriteHead(nn.Module):
    """A metanetwork that reads the network, and a rewriter that changes what the closed form has found.

    Args:
        hidden: Width of the units' states.
        layers: Rounds of messages before it is known which units go.
        further: Rounds after that.
        rank: See `metaprune.metanet.rewrite.Rewriter`.
        ratio: See there.
        vector_ratio: See there.
        refit: Whether the weights it starts from are those of `metaprune.dataless.refit_without_data`.
        aggregation: See `metaprune.metanet.engine.Metanetwork`.
        objective: What it is trained for: `"compensation"` for units that go, or `"group_sparsity"` of the whole
            network, before it is known which units go.
        seed: Of the initial weights; the caller's random state is left alone.

    Attributes:
        config: The arguments that build it again, but for the seed.
    """

    def __init__(
        self,
        hidden: int = 24,
        layers: int = 3,
        further: int = 1,
        rank: int = 4,
        ratio: float = 0.1,
        vector_ratio: float = 0.1,
        refit: bool = True,
        objective: str = COMPENSATION,
        aggregation: str = MEAN,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise OptionError(f"objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
        self.config: dict[str, Any] = {
            "hidden": hidden,
            "layers": layers,
            "further": further,
            "rank": rank,
            "ratio": ratio,
            "vector_ratio": vector_ratio,
            "refit": refit,
            "objective": objective,
            "aggregation": aggregation,
        }
        self.encoder = Metanetwork(hidden, layers, seed=seed, aggregation=aggregation)
        self.encoder.of_budget.requires_grad_(False)  # the mask says more than a budget would
        self.rewriter = Rewriter(hidden, rank, ratio, further, seed, vector_ratio)

    def forward(
        self, graph: WeightGraph, kept: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of the network with some units silenced, in their full shapes; see `Rewriter.forward`.

        What lies outside the range that was learnt is taken as at its edge, without a word.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states = self.encoder(graph)
        found: dict[str, Tensor] = self.rewriter(graph, states, kept, start)
        return found

    @torch.no_grad()
    def rewritten(self, graph: Graph, plan: Plan, seed: int = 0) -> dict[str, Tensor]:
        """Tensors that make up for the units that a plan removes, by name, in full shapes for `Graph.with_values`.

        Args:
            graph: The network; it is not changed.
            plan: What stays; everything does for a head that is trained for group sparsity.
            seed: Of the inputs that the closed form draws.

        Raises:
            OptionError: The closed form can not draw the network's inputs.
            MetapruneError: The network gives values that are not finite.
        """
        start = refit_without_data(graph, plan, seed=seed) if self.config["refit"] else {}
        found: dict[str, Tensor] = self(WeightGraph.of(graph), gates_of(graph, plan.keep), start)
        return found

    @staticmethod
    def of(features: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RewriteHead:
        """A head from the digest of what it reads, its config and its tensors.

        Raises:
            LoadError: They do not fit one another, or it reads something else than this version computes.
        """
        if features != FEATURES:
            raise LoadError("the rewriting head reads other features than this version of metaprune computes")
        try:
            head = RewriteHead(**config)
            head.load_state_dict(dict(tensors))
        except (KeyError, TypeError, RuntimeError, OptionError) as error:
            raise LoadError(f"the rewriting head is damaged: {' '.join(str(error).split())}") from None
        return head.requires_grad_(False)


def gates_of(graph: Graph, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """For each group that shrinks 1 for units that stay and 0 for those that go, shape [size]."""
    found = {}
    for name, units in keep.items():
        found[name] = torch.zeros(graph.group(name).size)
        found[name][list(units)] = 1
    return found
