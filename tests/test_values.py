"""A graph with other weights: what is planned, cut and certified are the new ones, on the old analysis."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.certificate import Prover
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.surgery import cut
from tests.support import oracle
from tests.support.cases import conv
from tests.test_constructs_attention import CASES as ATTENTION
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_movement import CASES as MOVEMENT
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *NORM, *ATTENTION, *SEQUENCE, *MOVEMENT)}
NAMES = ["resnet", "grouped", "weight_norm", "stream_pre_rms_norm", "llama_tied", "shifted_windows", "lstm"]


@cache
def traced(name: str) -> tuple[nn.Module, nn.Module, Graph, Any]:
    """A case's network, one of the same kind with other weights, the graph of the first, an input."""
    case = CASES[name]
    torch.manual_seed(0)
    network = oracle.alive(case.build()).eval()
    other = oracle.alive(copy.deepcopy(network), seed=1)
    return network, other, mp.trace(network, case.inputs(2)), case.inputs(3)


def exchanged(graph: Graph, other: nn.Module) -> Graph:
    return graph.with_values({n: t for n, t in oracle.tensors_of(other).items() if n in graph.values})


@pytest.mark.parametrize("name", NAMES)
def test_plan_cut_and_certificate_are_those_of_the_new_weights(name: str) -> None:
    network, other, graph, inputs = traced(name)
    before = {n: t.clone() for n, t in oracle.tensors_of(network).items()}
    new, fresh = exchanged(graph, other), mp.trace(other, CASES[name].inputs(2))
    assert new.coupling is graph.coupling
    assert new.fingerprint == graph.fingerprint == fresh.fingerprint
    plan = mp.plan(new, "macs=0.5")
    assert plan.keep == mp.plan(fresh, "macs=0.5").keep
    pruned, expected = mp.apply(new, plan), mp.apply(fresh, plan)
    assert pruned.kind == expected.kind
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    assert oracle.difference(other, pruned.module, pruned.kept, inputs, aware=True)[0] <= 1e-9
    found, wanted = oracle.tensors_of(pruned.module), oracle.tensors_of(expected.module)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in found.items())
    assert all(torch.equal(t, before[n]) for n, t in oracle.tensors_of(network).items())
    assert all(torch.equal(graph.values[n], t) for n, t in before.items() if n in graph.values)


@pytest.mark.parametrize("name", ["resnet", "llama_tied"])
def test_the_certificate_sees_old_and_altered_weights(name: str) -> None:
    _, other, graph, _ = traced(name)
    plan = mp.plan(graph, "width=0.5")
    old = mp.apply(graph, plan).module
    new = exchanged(graph, other)
    prover = Prover(new, cut(new, plan.keep))
    certificate = prover.certify(old)
    assert not certificate.ok
    assert certificate.altered
    right = mp.apply(new, plan).module
    assert prover.certify(right).ok
    for tensor in {n.removesuffix(".bias"): n for n, _ in right.named_parameters()}.values():
        wrong = copy.deepcopy(right)
        with torch.no_grad():
            wrong.get_parameter(tensor).flatten()[-1].add_(1e-3)
        assert prover.certify(wrong).altered == tensor


def test_one_tensor_may_be_given_and_uncut_ones_count() -> None:
    network, _, graph, inputs = traced("resnet")
    (last,) = (n for n, t in network.named_parameters() if n.endswith("bias") and n not in mp_kept(graph))
    new = graph.with_values({last: graph.values[last] + 1})
    with torch.no_grad():
        found = mp.prune(new, budget="width=0.5").module(inputs)
        assert oracle.distance(found, mp.prune(graph, budget="width=0.5").module(inputs) + 1) <= 1e-5
        assert oracle.distance(new.run(None, inputs), network(inputs) + 1) <= 1e-5


def mp_kept(graph: Graph) -> set[str]:
    return set(mp.prune(graph, budget="width=0.5").kept)


def test_nothing_that_is_returned_shares_memory_with_the_weights() -> None:
    for name, kind in (("resnet", "native"), ("llama_tied", "portable")):
        network, other, graph, _ = traced(name)
        new = exchanged(graph, other)
        pruned = mp.prune(new, budget="width=0.5", certify=False)
        assert pruned.kind == kind
        pointers = {t.data_ptr() for m in (network, other) for t in oracle.tensors_of(m).values()}
        for module in (pruned.module, PortableModule(pruned.graph), PortableModule(graph)):
            assert not pointers & {t.data_ptr() for t in oracle.tensors_of(module).values()}, name


@pytest.mark.parametrize("name", ["llama_tied", "tied_convolutions"])
def test_tied_weights_stay_tied_and_have_one_value(name: str) -> None:
    network, _, graph, _ = traced(name)
    info = next(info for info in graph.tensors.values() if len(info.aliases) > 1)
    assert network.get_parameter(info.aliases[0]) is network.get_parameter(info.aliases[1])
    new = graph.with_values({info.aliases[1]: 2 * graph.values[info.name]})
    assert all(torch.equal(new.values[alias], 2 * graph.values[info.name]) for alias in info.aliases)
    module = mp.prune(new, budget="width=0.5").module
    assert module.get_parameter(info.aliases[0]) is module.get_parameter(info.aliases[1])
    with pytest.raises(OptionError, match="one tensor"):
        graph.with_values({info.aliases[0]: graph.values[info.name], info.aliases[1]: new.values[info.name]})


class Picking(nn.Module):
    """Reads its channels in an order that an integer buffer gives; counts in another that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 8), conv(8, 2)
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu()[:, self.order])
        return out


def test_integers_that_are_read_must_stay() -> None:
    torch.manual_seed(0)
    graph = mp.trace(oracle.alive(Picking()), torch.randn(2, 3, 6, 6))
    same = graph.with_values({"order": graph.values["order"].clone(), "steps": torch.tensor(7)})
    assert int(same.values["steps"]) == 7
    with pytest.raises(OptionError, match="order must stay"):
        graph.with_values({"order": graph.values["order"].flip(0)})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nowhere.weight": torch.zeros(3)}, "no tensor nowhere.weight"),
        ({"0.weight": torch.zeros(3)}, r"0.weight must be \[8, 5\] of torch.float32, not \[3\]"),
        ({"0.weight": torch.zeros(8, 5, dtype=torch.float64)}, "float64"),
        ({"0.weight": None}, "0.weight must be a tensor, not NoneType"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], said: str) -> None:
    graph = mp.trace(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5))
    with pytest.raises(OptionError, match=f"values: .*{said}"):
        graph.with_values(values)


def test_a_submodule_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.values, self.mask = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.mask(self.values(self.graph(x).relu()).relu())
            return out

    torch.manual_seed(0)
    pruned = mp.prune(oracle.alive(Named()), torch.randn(2, 5), budget="width=0.5")
    x = torch.randn(4, 5)
    with torch.no_grad():
        assert oracle.distance(PortableModule(pruned.graph)(x), pruned.module(x)) <= 1e-6
