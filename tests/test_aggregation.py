"""Several aggregators: the dense engine gives what the list of edges gives, and units in any order alike."""

import pytest
import torch

from metaprune.graphs.errors import OptionError
from metaprune.metanet import aggregation
from metaprune.metanet.edge_list import EdgeListExchange
from metaprune.metanet.engine import Metanetwork
from tests.support.units import orders, reordered, weights


def metanetwork() -> Metanetwork:
    return Metanetwork(hidden=6, layers=2, seed=1, aggregation="pna").double()


@pytest.mark.parametrize("name", ["resnet", "grouped_chain", "dense_block", "vision_transformer", "grouped_queries"])
def test_states_and_gradients_equal_those_of_the_edge_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = weights(name)
    net = metanetwork()
    monkeypatch.setattr(aggregation, "_MESSAGES", 4000)  # in several chunks
    found, gradients = [], []
    for exchange in (None, EdgeListExchange(graph, many=True)):
        states = torch.cat(list(net(graph, exchange=exchange).values()))
        found.append(states.detach())
        own = [p for n, p in net.named_parameters() if "layers" in n]
        gradients.append(torch.autograd.grad((states.square() * torch.arange(6.0)).sum(), own))
    assert float((found[0] - found[1]).abs().max()) <= 1e-10
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-8)
    plain = torch.cat(list(Metanetwork(hidden=6, layers=2, seed=1).double()(graph).values())).detach()
    assert float((found[0] - plain).abs().max()) > 1e-3


def test_the_order_of_units_does_not_matter() -> None:
    graph, _ = weights("resnet")
    order = orders(graph.graph)
    with torch.no_grad():
        one, other = metanetwork()(graph), metanetwork()(reordered(graph, order))
    for name, state in one.items():
        moved = state[order[name]] if name in order else state
        assert float((moved - other[name]).abs().max()) <= 1e-10


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(OptionError, match="aggregation: 'median' is none of mean, pna"):
        Metanetwork(aggregation="median")
