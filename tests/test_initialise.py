"""Fresh weights: drawn anew by every layer's own rule or by shape and use, whatever the form of the network."""

import math

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.portable import PortableModule
from metaprune.initialise import reinitialised


class Mixed(nn.Module):
    """Layers with and without an initialisation of their own, scales, shifts, tied weights and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, bias=True)
        self.norm = nn.BatchNorm2d(24, momentum=None)
        self.row_norm = nn.LayerNorm(24)
        self.slope = nn.PReLU(24)
        self.gain = nn.Parameter(torch.rand(24))
        self.offset = nn.Parameter(torch.rand(24))
        self.mixing = nn.Parameter(torch.rand(24, 30))
        self.head = nn.Linear(30, 30)
        self.tail = nn.Linear(30, 30)
        self.tail.weight = self.head.weight
        self.register_buffer("table", torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        y = self.row_norm(self.slope(self.norm(self.conv(x))).mean((2, 3)))
        y = self.gain * y * self.table + self.offset
        out: Tensor = self.tail(self.head(y @ self.mixing).relu())
        return out


def trained() -> nn.Module:
    """A network all of whose tensors are far from any initialisation."""
    torch.manual_seed(0)
    net = Mixed()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(7)
        net.table.uniform_()
    return net.eval()


@pytest.mark.parametrize("form", ["native", "portable"])
def test_nothing_trained_is_left(form: str) -> None:
    net = trained()
    graph = mp.trace(net, torch.randn(2, 3, 8, 8))
    module = net if form == "native" else PortableModule(graph).eval()
    fresh = reinitialised(module, graph)
    assert not any((parameter == 7).any() for parameter in fresh.parameters())
    assert all((parameter == 7).all() for parameter in module.parameters())
    tensors = {**dict(fresh.named_parameters(remove_duplicate=False)), **dict(fresh.named_buffers())}
    for name in ("norm.weight", "row_norm.weight", "gain", "norm.running_var"):
        assert torch.equal(tensors[name], torch.ones(24)), name
    for name in ("norm.bias", "row_norm.bias", "offset", "norm.running_mean"):
        assert torch.equal(tensors[name], torch.zeros(24)), name
    assert int(tensors["norm.num_batches_tracked"]) == 0
    assert torch.equal(tensors["table"], net.table)
    assert tensors["tail.weight"] is tensors["head.weight"]
    by_fan_in = {"mixing": 30} if form == "native" else {"mixing": 30, "conv.weight": 27, "head.weight": 30}
    for name, fan_in in by_fan_in.items():
        values = tensors[name].detach()
        assert float(values.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.1), name
        assert abs(float(values.mean())) < 0.05


def test_layers_follow_their_own_rule() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    fresh = reinitialised(net, mp.trace(net, torch.randn(2, 5)), seed=4)
    torch.manual_seed(4)
    expected = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), expected.parameters(), strict=True))


def test_the_seed_decides_and_the_callers_random_state_is_left_alone() -> None:
    net = trained()
    graph = mp.trace(net, torch.randn(2, 3, 8, 8))
    state = torch.get_rng_state()
    one, same, other = (reinitialised(net, graph, seed).mixing for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_cut_network_gets_weights_of_its_own_shapes() -> None:
    net = trained()
    pruned = mp.prune(net, torch.randn(2, 3, 8, 8), budget="width=0.5")
    fresh = reinitialised(pruned.module, pruned.graph)
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in pruned.module.state_dict().items()}
    assert not any((parameter == 7).any() for parameter in fresh.parameters())
