"""The portable form is a module like any other: it trains, switches modes, copies, moves its state, is traced again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.portable import PortableModule
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *NORM, *SEQUENCE)}
BOTH = [
    "resnet",
    "batch_norm_1d",
    "stream_pre_layer_norm",
    "lstm_bidirectional",
    "stream_pre_rms_norm",
    "instance_norm",
]


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.AlphaDropout(0.2), nn.Linear(8, 3)
    )


def both(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """The native and the portable form of one cut, and an input."""
    case = CASES[name]
    torch.manual_seed(0)
    network = oracle.alive(case.build())
    pruned = mp.prune(network, case.inputs(2), budget="width=0.5", allocator="uniform", certify=False)
    assert pruned.kind == "native"
    return copy.deepcopy(pruned.module), copy.deepcopy(PortableModule(pruned.graph)), case.inputs(4)


def alike(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    left, right = oracle.tensors_of(one), oracle.tensors_of(other)
    assert set(left) <= set(right)
    for name, tensor in left.items():
        assert oracle.distance(right[name].double(), tensor.double()) <= tolerance, name


@pytest.mark.parametrize("name", BOTH)
def test_portable_and_native_form_train_alike(name: str) -> None:
    native, portable, inputs = both(name)
    alike(native, portable, 0)
    for module in (native, portable):
        module.train()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
        for step in range(3):
            torch.manual_seed(step)  # both draw the same dropout masks
            optimiser.zero_grad()
            oracle.flat(oracle.call(module, inputs))[0].square().mean().backward()
            optimiser.step()
        module.eval()
    alike(native, portable, 1e-4)
    with torch.no_grad():
        found, expected = (oracle.call(m, inputs) for m in (portable, native))
    assert oracle.distance(found, expected) <= 1e-4


def test_batch_statistics_are_counted_and_followed() -> None:
    native, portable, inputs = both("resnet")
    for module in (native, portable):
        module.train()
        for _ in range(2):
            module(inputs)
        assert int(module.get_buffer("1.num_batches_tracked")) == 2
    alike(native, portable)
    for module in (native, portable):
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.eval()(inputs)
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_a_cumulative_average_stays_one() -> None:
    torch.manual_seed(0)
    network = oracle.alive(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), conv(8, 2)))
    network[1].reset_running_stats()
    pruned = mp.prune(network, torch.randn(2, 3, 6, 6), budget="width=0.5", certify=False)
    native, portable = copy.deepcopy(pruned.module), PortableModule(pruned.graph)
    assert pruned.kind == "native"
    for module in (native, portable):
        module.train()
        for seed in range(3):
            torch.manual_seed(seed)
            module(torch.randn(4, 3, 6, 6))
    alike(native, portable)


def test_dropout_drops_in_training_and_nowhere_else() -> None:
    torch.manual_seed(0)
    pruned = mp.prune(oracle.alive(dropping()), torch.randn(2, 6), budget="width=0.5")
    x = torch.randn(64, 6)
    for module in (pruned.module, PortableModule(pruned.graph)):
        module.train()
        assert not torch.equal(module(x), module(x))
        torch.manual_seed(3)
        first = module(x)
        torch.manual_seed(3)
        assert torch.equal(module(x), first)
        module.eval()
        assert torch.equal(module(x), module(x))


def test_copies_share_nothing() -> None:
    _, portable, inputs = both("resnet")
    other = copy.deepcopy(portable)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        assert not torch.equal(other.eval()(inputs), portable.eval()(inputs))
    pointers = {p.data_ptr() for p in portable.parameters()}
    assert not pointers & {p.data_ptr() for p in other.parameters()}


def test_the_state_moves_between_the_two_forms() -> None:
    native, portable, inputs = both("resnet")
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.mul_(1.5)
    state = native.state_dict()
    portable.load_state_dict(state)
    with torch.no_grad():
        assert oracle.distance(portable.eval()(inputs), native.eval()(inputs)) <= 1e-5
    assert list(portable.state_dict()) == list(state)


def test_dtype_and_mode_follow_the_usual_calls() -> None:
    native, portable, inputs = both("stream_pre_layer_norm")
    with torch.no_grad():
        found, expected = portable.double()(inputs.double()), native.double()(inputs.double())
    assert found.dtype is torch.float64
    assert oracle.distance(found, expected) <= 1e-12
    assert not portable.eval().training
    assert all(not m.training for m in portable.modules())
    portable.requires_grad_(False)
    assert not portable(inputs.double()).requires_grad


def test_frozen_parameters_stay_frozen() -> None:
    network = oracle.alive(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    network[0].weight.requires_grad_(False)
    pruned = mp.prune(network, torch.randn(2, 6), budget="width=0.5")
    for module in (pruned.module, PortableModule(pruned.graph)):
        assert {n for n, p in module.named_parameters() if not p.requires_grad} == {"0.weight"}


@pytest.mark.parametrize("name", ["resnet", "grouped", "llama_tied", "stream_pre_rms_norm"])
def test_the_portable_form_is_traced_and_pruned_again(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    pruned = mp.prune(
        oracle.alive(case.build()), case.inputs(2), budget="width=0.8", allocator="uniform", certify=False
    )
    portable = PortableModule(pruned.graph)
    again = mp.prune(portable, case.inputs(2), budget="width=0.5", allocator="uniform")
    assert again.certificate is not None
    assert again.kept
    assert oracle.difference(portable, again.module, again.kept, case.inputs(3))[0] <= 1e-9


def passing(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu())


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(x=x)], ids=["positional", "keyword"])
def test_it_is_called_as_the_original(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = oracle.alive(Net(passing, a=nn.Linear(6, 8), b=nn.Linear(8, 3)))
    pruned = mp.prune(network, torch.randn(2, 6), budget="width=0.5")
    x = torch.randn(4, 6)
    portable = PortableModule(pruned.graph)
    with torch.no_grad():
        assert torch.allclose(call(portable, x), call(pruned.module, x), atol=1e-6)
