"""Where a few random inputs would not show that a pruned network is wrong, and requests that make no sense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from tests.support import oracle
from tests.support.cases import Net

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NO, YES = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
COUNTS = torch.tensor([1, 2, 30, 4])


class Body(nn.Module):
    """Two linear layers and what is done with them, for any number of arguments."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body, self.a, self.b = body, nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.body(self, x) if t is None else self.body(self, x, t)


def counted(m: Any, h: Tensor, hits: Tensor) -> Tensor:
    return m.b(h) + hits.float().sum(1, keepdim=True)  # type: ignore[no-any-return]


def greatest(h: Tensor) -> Tensor:
    return h == h.max(1, keepdim=True).values


PITFALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]] = {
    "equal": (lambda m, x: counted(m, h := m.a(x), greatest(h)), (X,), (torch.randn(99, 6),)),
    "rounded": (lambda m, x, t: counted(m, h := m.a(x), h.round() == t[:, None]), (X, COUNTS), (X, 0 * COUNTS)),
    "exclusive": (lambda m, x, t: counted(m, h := m.a(x), (h > 0) ^ t[:, None]), (X, NO), (X, YES)),
    "unequal": (lambda m, x: counted(m, h := m.a(x), (h > 0) != (x[:, :1] > 30)), (X,), (99 * X,)),
    "bounds": (lambda m, x: m.b(F.hardtanh(h := m.a(x), -9.0 * h.shape[1], 9.0 * h.shape[1])), (X,), (99 * X,)),
    "divisor": (lambda m, x, t: m.b((h := m.a(x)) * (1 + t[:, None] / h.shape[1])), (X, 0 * COUNTS), (X, COUNTS)),
    "masked": (lambda m, x, t: m.b(h := m.a(x)) + (~t[:, None]).float() * h.shape[1], (X, YES), (X, NO)),
    "threshold": (lambda m, x: m.b(torch.where((h := m.a(x)).abs() > 5 * h.shape[1], 2 * h, h)), (X,), (99 * X,)),
    "offset": (lambda m, x: m.b(F.leaky_relu((h := m.a(x)) + 5 * h.shape[1])), (X,), (99 * X,)),
    "filled": (lambda m, x: m.b(h := m.a(x)) * torch.full((1,), float(h.shape[1])).clamp(max=50), (X,), (99 * X,)),
}


@pytest.mark.parametrize("name", PITFALLS)
def test_it_is_right_where_the_example_does_not_look(name: str) -> None:
    body, example, other = PITFALLS[name]
    torch.manual_seed(0)
    net = oracle.alive(Body(body)).eval()
    pruned = mp.prune(net, example, budget="width=0.5")
    for inputs in (example, other, tuple(-v if v.is_floating_point() else v for v in other)):
        error, _ = oracle.difference(net, pruned.module, pruned.kept, tuple(map(oracle.double, inputs)))
        assert error <= 1e-9


def test_a_size_that_changes_nothing_keeps_the_native_form() -> None:
    body = lambda m, x: m.b(m.a(x).view(x.shape[0], -1).relu() * 0.5)  # noqa: E731
    net = oracle.alive(Net(body, a=nn.Linear(6, 16), b=nn.Linear(16, 5)))
    assert mp.prune(net, X, budget="width=0.5").kind == "native"


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(6, 16, proj_size=4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


def test_a_projected_state_is_left_alone() -> None:
    pruned = mp.prune(oracle.alive(Projected()), torch.randn(3, 7, 6), budget="width=0.5")
    assert pruned.certificate is not None
    assert pruned.certificate.ok


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "only": (lambda net: mp.prune(net, X, only=3), "only: names"),
    "kinds": (lambda net: mp.prune(net, X, kinds=3), "kinds: names"),
    "protect": (lambda net: mp.prune(net, X, protect=(3,)), "protect: names"),
    "round_to": (lambda net: mp.prune(net, X, round_to=True), "round_to"),
    "seed": (lambda net: mp.prune(net, X, seed="a"), "seed"),
    "twice": (lambda net: mp.prune(net, X, budget="macs=0.5,macs=0.3"), "twice"),
    "dynamic": (lambda net: mp.trace(net, X, dynamic=3), "dynamic"),
    "dynamic dims": (lambda net: mp.trace(net, X, dynamic={0: 1}), "dynamic"),
    "plan": (lambda net: mp.apply(mp.trace(net, X), None), "plan: a Plan"),
    "graph": (lambda net: mp.plan(net), "graph: a Graph"),
    "units": (lambda net: mp.apply(mp.trace(net, X), mp.Plan({"a": None}, "")), "group a"),
    "a unit": (lambda net: mp.apply(mp.trace(net, X), mp.Plan({"a": (0.5, 1)}, "")), "group a"),
    "load": (lambda net: mp.load(3), "directory"),
    "save": (lambda net: mp.prune(net, X, budget="width=0.5").save("/proc/none"), "/proc/none"),
    "not a number": (lambda net: mp.prune(net, X * float("nan")), "not a number"),
    "meta": (lambda net: mp.prune(net.to("meta"), X.to("meta"), budget="width=0.5"), "certify=False"),
    "no output": (lambda net: mp.prune(Net(lambda m, x: None, a=nn.Linear(6, 4)), X), "no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_named(name: str) -> None:
    call, said = BAD[name]
    with pytest.raises(mp.MetapruneError, match=said):
        call(Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(6, 16), b=nn.Linear(16, 5)))


def test_a_network_without_weights_stays_as_it_is() -> None:
    pruned = mp.prune(nn.ReLU(), X)
    assert torch.equal(pruned.module(X), X.relu())
