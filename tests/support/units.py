"""Networks whose units are looked at one by one, and what it means to put the units of a network in another order."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

import metaprune as mp
from metaprune.graphs.ir import Graph
from metaprune.metanet.weight_graph import WeightGraph
from tests.support import oracle
from tests.test_constructs_attention import CASES as ATTENTION
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_movement import CASES as MOVEMENT
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *NORM, *ATTENTION, *SEQUENCE, *MOVEMENT)}
NAMES = """
    resnet inverted_residual depthwise_multiplier grouped_chain transposed_grouped ghost dense_block cat_nested
    flatten_batch_norm squeeze_excite weight_standardisation vision_transformer grouped_queries einsum
    relative_bias llama_tied stacked_experts lstm shared_block
""".split()


@cache
def weights(name: str) -> tuple[WeightGraph, Any]:
    """The weight graph of a construct with live weights in float64, and inputs of the network."""
    case = CASES[name]
    torch.manual_seed(0)
    network = oracle.alive(case.build()).double().eval()
    inputs = oracle.double(case.inputs(2))
    return WeightGraph.of(mp.trace(network, inputs)), inputs


def orders(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """A random order of the units of each prunable group."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randperm(g.size, generator=generator) for g in graph.groups if not g.pinned}


def reordered(graph: WeightGraph, order: Mapping[str, Tensor]) -> WeightGraph:
    """The network whose unit i is the unit `order[group][i]` of the given one, group by group, slice by slice."""
    tensors = graph.tensors()
    for name, units in order.items():
        for part in graph.graph.group(name).slices:
            index, tensor = torch.from_numpy(part.index), tensors[part.tensor]
            moved = tensor.index_select(part.dim, index[units].flatten())
            tensors[part.tensor] = tensor.index_copy(part.dim, index.flatten(), moved)
    return graph.with_tensors(tensors)
