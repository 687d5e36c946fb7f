"""`graph.run`: with hard gates it is the cut network, without it is the module, and it can be differentiated."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import OptionError, PlanError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph
from metaprune.graphs.surgery import cut
from tests.support import oracle
from tests.test_constructs_attention import CASES as ATTENTION
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_movement import CASES as MOVEMENT
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *NORM, *ATTENTION, *SEQUENCE, *MOVEMENT)}
GATED = """
    resnet depthwise_multiplier grouped grouped_chain transposed_grouped squeeze_excite efficient_channels
    block_attention channel_softmax weight_norm
    spectral_norm normalize weight_standardisation prelu batch_norm_without_affine instance_norm
    group_norm
    group_norm_of_one_group layer_norm layer_norm_permuted rms_norm rms_norm_by_hand stream_post_layer_norm
    layer_norm_2d layer_norm_by_hand stream_layer_norm_by_hand
    stream_pre_rms_norm group_norm_residual fused grouped_queries multihead_cross encoder_layer shifted_windows
    vision_transformer mixer llama_tied experts lstm gru_bidirectional shared_block tied_convolutions cat_nested
    chunk_uneven channel_shuffle pixel_shuffle unfold flatten_permuted write_slice pad_channels repeat_interleave
""".split()


@cache
def traced(name: str) -> tuple[nn.Module, Graph, Any]:
    """A case's network in float64 with live weights, its graph, another input; made once."""
    case = CASES[name]
    torch.manual_seed(0)
    network = oracle.alive(case.build()).double().eval()
    return network, mp.trace(network, oracle.double(case.inputs(2))), oracle.double(case.inputs(3))


def hard(graph: Graph, keep: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    gates = {}
    for name, units in keep.items():
        gates[name] = torch.zeros(graph.group(name).size, dtype=torch.float64)
        gates[name][list(units)] = 1
    return gates


@pytest.mark.parametrize("name", GATED)
def test_hard_gates_are_the_cut(name: str) -> None:
    _, graph, inputs = traced(name)
    keep = dict(mp.plan(graph, "width=0.5", allocator="uniform").keep)
    assert keep
    incision = cut(graph, keep)
    with torch.no_grad():
        gated = graph.run(None, inputs, hard(graph, keep))
        assert oracle.distance(gated, incision.graph.run(None, inputs)) <= 1e-9
        assert oracle.distance(gated, graph.run(None, inputs)) > 1e-4
        open_ = {name: torch.ones(graph.group(name).size, dtype=torch.float64) for name in keep}
        assert oracle.distance(graph.run(None, inputs, open_), graph.run(None, inputs)) <= 1e-9


@pytest.mark.parametrize(
    "name", ["resnet", "grouped", "layer_norm", "vision_transformer", "grouped_queries", "llama_tied"]
)
def test_gates_of_one_group_alone(name: str) -> None:
    _, graph, inputs = traced(name)
    for group in graph.groups:
        if group.pinned or group.size < 2:
            continue
        keep = {group.name: tuple(range(1, group.size))}
        with torch.no_grad():
            gated = graph.run(None, inputs, hard(graph, keep))
            assert oracle.distance(gated, cut(graph, keep).graph.run(None, inputs)) <= 1e-9, group


@pytest.mark.parametrize("name", GATED)
def test_without_gates_it_is_the_module_bit_for_bit(name: str) -> None:
    network, graph, inputs = traced(name)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = oracle.flat(oracle.call(network, inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    with torch.no_grad():
        for gates in (None, {}):
            found = oracle.flat(graph.run(None, inputs, gates))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        whole = mp.prune(graph, budget="width=1.0", allocator="uniform")
        assert not whole.plan.keep
        assert not whole.kept
        found = oracle.flat(oracle.call(whole.module, inputs))
        if whole.kind == "portable":
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name", ["resnet", "group_norm", "layer_norm", "rms_norm", "fused", "grouped_queries", "lstm", "experts"]
)
def test_gradients_of_gates_agree_with_finite_differences(name: str) -> None:
    _, graph, inputs = traced(name)
    generator = torch.Generator().manual_seed(0)
    free = [group for group in graph.groups if not group.pinned and group.size > 1]
    gates = {g.name: 0.5 + 0.5 * torch.rand(g.size, generator=generator, dtype=torch.float64) for g in free}
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in oracle.flat(graph.run(None, inputs))
    ]

    def loss(**given: Tensor) -> Tensor:
        outputs = oracle.flat(graph.run(None, inputs, {**gates, **{k.replace("/", "."): v for k, v in given.items()}}))
        return sum(((t * w).sum() for t, w in zip(outputs, weights, strict=True)), torch.zeros((), dtype=torch.float64))

    leaves = {name: gate.clone().requires_grad_() for name, gate in gates.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss(**leaves), list(leaves.values())), strict=True))
    step = 1e-6
    for group in free:
        direction = torch.randn(group.size, generator=generator, dtype=torch.float64)
        up, down = (loss(**{group.name: gates[group.name] + s * step * direction}) for s in (1, -1))
        slope = float((up - down).detach() / (2 * step))
        exact = float(gradients[group.name] @ direction)
        assert abs(slope - exact) <= 1e-5 * max(1.0, abs(exact)), group
        assert int((gradients[group.name] != 0).sum()) > group.size / 2, group


def test_parameters_given_override_those_of_the_graph() -> None:
    network, graph, inputs = traced("resnet")
    other = oracle.alive(CASES["resnet"].build(), seed=7).double().eval()
    given = oracle.tensors_of(other)
    with torch.no_grad():
        assert oracle.distance(graph.run(given, inputs), other(inputs)) == 0
        assert oracle.distance(graph.run(None, inputs), network(inputs)) == 0
        one = {"7.bias": graph.values["7.bias"] + 1}
        assert oracle.distance(graph.run(one, inputs), network(inputs) + 1) <= 1e-12


def test_parameters_receive_gradients_and_tied_ones_the_sum() -> None:
    network, graph, inputs = traced("llama_tied")
    tied = graph.values["embed.weight"].detach().clone().requires_grad_()
    found = torch.autograd.grad(graph.run({"embed.weight": tied}, inputs).square().sum(), tied)[0]
    expected = torch.autograd.grad(network(inputs).square().sum(), network.embed.weight)[0]
    assert oracle.distance(found, expected) <= 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_that_of_the_module(training: bool) -> None:
    network, graph, inputs = traced("resnet")
    network = copy.deepcopy(network)
    values = {name: tensor.clone() for name, tensor in graph.values.items()}
    found = graph.run(values, inputs, training=training)
    assert oracle.distance(found, network.train(training)(inputs)) <= 1e-12
    assert torch.equal(values["1.running_mean"], network.state_dict()["1.running_mean"])


def test_gates_must_fit() -> None:
    _, graph, inputs = traced("layer_norm")
    with pytest.raises(OptionError, match="8 units"):
        graph.run(None, inputs, {"a": torch.ones(7)})
    with pytest.raises(PlanError, match="no_such_group"):
        graph.run(None, inputs, {"no_such_group": torch.ones(7)})


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        (lambda: (), "missing"),
        (lambda: (torch.ones(2, 4, 6), torch.ones(2)), "argument"),
        (lambda: ("text",), "tensor"),
    ],
    ids=["none", "too_many", "no_tensor"],
)
def test_inputs_must_fit(inputs: Callable[[], Any], part: str) -> None:
    _, graph, _ = traced("layer_norm")
    with pytest.raises(OptionError, match=part):
        graph.run(None, inputs())


def test_every_value_can_be_watched() -> None:
    _, graph, inputs = traced("resnet")
    seen = {}
    execute(graph, graph.values, {"in0": inputs}, watch=lambda node, value: seen.setdefault(node.name, value))
    assert list(seen) == list(graph.nodes)
    for name, node in graph.nodes.items():
        if node.op == "tensor":
            assert torch.equal(seen[name], graph.values[node.args[0]])
