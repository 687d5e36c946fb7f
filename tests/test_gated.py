"""The masked module is the cut network on dense storage, and masks can be taken back."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.portable import GatedModule
from tests.support import oracle
from tests.support.cases import conv
from tests.test_values import CASES

NAMES = ["resnet", "group_norm", "layer_norm", "rms_norm", "vision_transformer", "grouped_queries", "lstm", "grouped"]


def gated(name: str, straight_through: bool = False) -> tuple[Graph, GatedModule, Any]:
    """A case's graph in float64, its masked module in eval mode, an input."""
    case = CASES[name]
    torch.manual_seed(0)
    network = oracle.alive(case.build()).double().eval()
    graph = mp.trace(network, oracle.double(case.inputs(2)))
    return graph, GatedModule(graph, straight_through).eval(), oracle.double(case.inputs(3))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_masked_is_cut_and_opening_is_undoing(name: str) -> None:
    graph, module, inputs = gated(name)
    dense = oracle.call(module, inputs)
    assert oracle.distance(dense, graph.run(None, inputs)) <= 1e-12
    for allocator in ("uniform", "global"):
        plan = mp.plan(graph, "macs=0.5", allocator=allocator)
        module.mask(plan.keep)
        masked = oracle.call(module, inputs)
        assert oracle.distance(masked, oracle.call(mp.apply(graph, plan).module, inputs)) <= 1e-9
        assert oracle.distance(masked, dense) > 1e-4
    module.mask({})
    assert oracle.distance(oracle.call(module, inputs), dense) == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)]
    return oracle.alive(nn.Sequential(*layers))


def test_a_step_of_training_is_that_of_the_cut_network() -> None:
    torch.manual_seed(1)
    graph, x = mp.trace(network().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)), torch.randn(8, 3, 6, 6)
    plan = mp.plan(graph, "width=0.5")
    module, pruned = GatedModule(graph), mp.apply(graph, plan)
    module.mask(plan.keep)
    for one in (module, pruned.module):
        one.train()
        one(x.double()).square().sum().backward()
    for name, parameter in pruned.module.named_parameters():
        dense = oracle.selection(module.values[name].grad, pruned.kept.get(name, {}))
        torch.testing.assert_close(dense, parameter.grad, rtol=1e-9, atol=1e-9)
    for name, buffer in pruned.module.named_buffers():
        assert oracle.distance(oracle.selection(module.values[name], pruned.kept.get(name, {})), buffer) <= 1e-9, name
    gone = torch.tensor(sorted({*range(8)} - {*plan.keep["0"]}))
    assert not module.values["0.weight"].grad[gone].any()
    assert not module.values["3.weight"].grad[:, gone].any()


def test_straight_through_changes_the_gradient_of_masked_units_only_forwards_nothing() -> None:
    torch.manual_seed(1)
    graph, x = mp.trace(network().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)), torch.randn(8, 3, 6, 6)
    keep = {"3": (0, 1, 2)}
    plain, through = GatedModule(graph).eval(), GatedModule(graph, straight_through=True).eval()
    outputs = []
    for module in (plain, through):
        module.mask(keep)
        outputs.append(module(x.double()))
        outputs[-1].square().sum().backward()
    assert oracle.distance(outputs[1], outputs[0]) <= 1e-12
    ours, reference = through.values["3.weight"].grad, plain.values["3.weight"].grad
    assert torch.allclose(ours[:3], reference[:3], rtol=1e-9)
    assert not reference[3:].any()
    # what the gradient must be: that at the masked network's output, sent back through the open network
    values = {name: tensor.detach().clone().requires_grad_(name == "3.weight") for name, tensor in graph.values.items()
              if tensor.is_floating_point()}  # fmt: skip
    given = 2 * outputs[0].detach()
    (expected,) = torch.autograd.grad(graph.run(values, x.double()), values["3.weight"], given)
    assert oracle.distance(ours, expected) <= 1e-9


def test_what_a_module_of_torch_can_do() -> None:
    graph = mp.trace(network(), torch.randn(2, 3, 6, 6))
    module, x = GatedModule(graph).eval(), torch.randn(4, 3, 6, 6)
    module.mask({"0": (1, 2), "3": (0,)})
    other = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(other(x), module(x))
        other.mask({})
        assert not torch.equal(other(x), module(x))
        assert oracle.distance(copy.deepcopy(module).double()(x.double()), module(x).double()) <= 1e-5
    assert not {t.data_ptr() for t in other.parameters()} & {t.data_ptr() for t in module.parameters()}
    assert list(module.network.state_dict()) == list(network().state_dict())
    assert all(name.startswith("network.") for name in module.state_dict())
    assert dict(module.values.items()).keys() == graph.tensors.keys()


def test_the_masks_must_be_legal() -> None:
    module = GatedModule(mp.trace(network(), torch.randn(2, 3, 6, 6)))
    for keep, said in (({"0": ()}, "at least 1"), ({"0": (8,)}, "units 0 to 7"), ({"no": (1,)}, "no group 'no'")):
        with pytest.raises(PlanError, match=said):
            module.mask(keep)
