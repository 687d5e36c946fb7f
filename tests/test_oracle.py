"""The oracle itself: it must notice every kind of wrong cut."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import metaprune as mp
from tests.support import oracle
from tests.support.cases import Net, conv

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """A residual block, a group norm, a concatenation, a root-mean-square norm."""
    body = lambda m, x: m.out(m.rms(m.e(torch.cat([(h := m.n(m.a(x)).relu()) + m.b(h), m.c(h)], 1)).mean((2, 3))))  # noqa: E731
    layers = {"a": conv(3, 8), "n": nn.GroupNorm(1, 8), "b": conv(8, 8), "c": conv(8, 6), "e": conv(14, 10)}
    return oracle.alive(Net(body, **layers, rms=nn.RMSNorm(10, eps=1e-3), out=nn.Linear(10, 3)))


def pruned() -> tuple[nn.Module, nn.Module, dict[str, dict[int, Any]]]:
    torch.manual_seed(0)
    model = network()
    result = mp.prune(model, X, budget="width=0.5", allocator="uniform", certify=False)
    return model, copy.deepcopy(result.module), {name: dict(dims) for name, dims in result.kept.items()}


def test_a_right_cut_passes_and_the_allowance_for_statistics_matters() -> None:
    error, change = oracle.difference(*pruned(), X, aware=True)
    assert error <= 1e-12
    assert change > 0.01
    assert oracle.difference(*pruned(), X, aware=False)[0] > 1e-3


def other_index(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    missing = next(i for i in range(8) if i not in kept["b.weight"][1])
    kept["b.weight"][1] = [*kept["b.weight"][1][:-1].tolist(), missing]


def swapped(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.e.weight.copy_(module.e.weight.flip(1))


def consistent_lie(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    """Weights and statement agree, but the channels are not those that the layer before keeps."""
    order = kept["b.weight"][1][::-1].copy()
    kept["b.weight"][1] = order
    module.b.weight.copy_(module.b.weight.flip(1))


def rescaled_kernel(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.c.weight.mul_(1.0001)


def wrong_scale(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.rms.weight.mul_(1.01)


def altered_bias(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.out.bias[0] += 1e-3


def wrong_epsilon(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.rms.eps *= 1.5


def lost_residual(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.body = lambda m, x: m.out(m.rms(m.e(torch.cat([m.b(h := m.n(m.a(x)).relu()), m.c(h)], 1)).mean((2, 3))))


def extra_parameter(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.extra = nn.Parameter(torch.zeros(1))


def missing_tensor(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.c.bias = None


def other_dtype(module: nn.Module, kept: dict[str, dict[int, Any]]) -> None:
    module.double()


WRONG = [other_index, swapped, consistent_lie, rescaled_kernel, wrong_scale, altered_bias, wrong_epsilon, lost_residual]
WRONG += [extra_parameter, missing_tensor, other_dtype]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_cut_is_noticed(wrong: Callable[[nn.Module, dict[str, dict[int, Any]]], None]) -> None:
    model, module, kept = pruned()
    with torch.no_grad():
        wrong(module, kept)
    try:
        error, _ = oracle.difference(model, module, kept, X, aware=True)
    except AssertionError:
        return
    assert error > 1e-6


def test_live_weights_are_all_different() -> None:
    for name, tensor in oracle.tensors_of(network()).items():
        assert tensor.unique().numel() == tensor.numel() > 0, name
        assert bool((tensor != 0).all())


def test_distance_sees_shapes_dtypes_and_infinities() -> None:
    one = {"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.long)]}
    assert oracle.distance(one, copy.deepcopy(one)) == 0
    assert oracle.distance({**one, "a": torch.tensor([1.0, 1.5, 1.0])}, one) == pytest.approx(0.5)
    assert oracle.distance({**one, "b": [torch.zeros(2, dtype=torch.long)]}, one) == float("inf")
    assert oracle.distance({**one, "a": torch.tensor([1.0, float("nan"), 1.0])}, one) == float("inf")
    for wrong in ({**one, "a": torch.ones(4)}, {**one, "a": torch.ones(3).double()}, {"a": one["a"]}):
        with pytest.raises(AssertionError):
            oracle.distance(wrong, one)
