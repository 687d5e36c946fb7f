"""What can be traced, what is refused and how, and that the result is one and the same."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import metaprune as mp
from metaprune.graphs.errors import OptionError, TraceError
from metaprune.graphs.ir import verify
from metaprune.graphs.plan import Plan
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.test_api import wide
from tests.test_constructs_attention import Chunked, Decoder, VisionTransformer
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import Llama


def network() -> nn.Module:
    torch.manual_seed(0)
    return oracle.alive(wide()).eval()


def checked(model: Any, inputs: Any, original: nn.Module, other: Any) -> mp.Pruned:
    """Prunes and holds the result against the oracle."""
    pruned = mp.prune(model, inputs, budget="width=0.5", allocator="uniform")
    assert pruned.certificate is not None
    assert pruned.kept
    error, change = oracle.difference(original, pruned.module, pruned.kept, other)
    assert error <= 1e-9
    assert change > 1e-4
    return pruned


# ---- kinds of networks and inputs


def test_an_fx_graph_module() -> None:
    model = network()
    traced = fx.symbolic_trace(model)
    pruned = checked(traced, torch.randn(2, 3, 8, 8), model, torch.randn(3, 3, 8, 8))
    reference = mp.prune(model, torch.randn(2, 3, 8, 8), budget="width=0.5", allocator="uniform")
    assert {n: {d: i.tolist() for d, i in k.items()} for n, k in pruned.kept.items()} == {
        n: {d: i.tolist() for d, i in k.items()} for n, k in reference.kept.items()
    }


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program(dynamic: bool) -> None:
    model = network()
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    pruned = mp.prune(program, budget="width=0.5", allocator="uniform")
    assert pruned.certificate is not None
    x = torch.randn(5 if dynamic else 2, 3, 8, 8)
    error, change = oracle.difference(model, pruned.module, pruned.kept, x)
    assert error <= 1e-9
    assert change > 1e-4


def test_an_exported_program_with_keywords_and_a_dict() -> None:
    model = oracle.alive(
        Net(lambda m, x: {"y": m.b(m.a(x).relu()), "twice": 2 * m.b(m.a(x))}, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    )
    program = torch.export.export(model.eval(), (), {"x": torch.randn(2, 6)})
    pruned = mp.prune(program, budget="width=0.5")
    x = torch.randn(2, 6)
    found = pruned.module(x=x)
    assert set(found) == {"y", "twice"}
    assert found["y"].shape == (2, 3)


def test_inputs_as_tensor_tuple_list_and_dict_are_the_same() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    graphs = [mp.trace(model, given) for given in (x, (x,), [x], {"x": x})]
    assert len({graph.fingerprint for graph in graphs}) == 1
    outputs = [graph.run(None, given) for graph, given in zip(graphs, (x, (x,), [x], {"x": x}), strict=True)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_gives_the_same_groups_and_runs_on_any_other(batch: int) -> None:
    model = network()
    graph = mp.trace(model, torch.randn(batch, 3, 8, 8))
    assert graph.fingerprint == mp.trace(model, torch.randn(4, 3, 8, 8)).fingerprint
    module = mp.prune(graph, budget="width=0.5").module
    for size in (1, 2, 7):
        assert module(torch.randn(size, 3, 8, 8)).shape == (size, 10)


@pytest.mark.parametrize(("build", "make"), [
    (lambda: Llama(True), lambda n: torch.randint(11, (2, n))),
    (lambda: nn.Sequential(nn.Linear(6, 8), Chunked(8, 2), nn.Linear(8, 3)), lambda n: torch.randn(2, n, 6)),
], ids=["llama", "chunked"])  # fmt: skip
def test_a_dynamic_sequence_length(build: Callable[[], nn.Module], make: Callable[[int], Tensor]) -> None:
    torch.manual_seed(0)
    model = oracle.alive(build()).eval()
    name = "ids" if isinstance(model, Llama) else 0
    graph = mp.trace(model, {"ids": make(5)} if name else make(5), dynamic={name: (1,)})
    pruned = mp.prune(graph, budget="width=0.5", allocator="uniform")
    for length in (3, 9):
        inputs = {"ids": make(length)} if name else make(length)
        assert oracle.difference(model, pruned.module, pruned.kept, inputs)[0] <= 1e-9
        with torch.no_grad():
            assert torch.allclose(graph.run(None, inputs), oracle.call(model, inputs), atol=1e-5)


def test_a_decoder_with_two_inputs_of_different_lengths() -> None:
    torch.manual_seed(0)
    model = oracle.alive(Decoder())
    checked(model, (torch.randn(2, 4, 8), torch.randn(2, 3, 8)), model, (torch.randn(3, 4, 8), torch.randn(3, 3, 8)))


class Cache:
    """Something that is no tensor."""


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.b(self.a(x).relu()), "cache": Cache(), "step": 3, "states": [Cache(), x.sum()]}


def test_outputs_that_are_no_tensors_are_dropped_by_name() -> None:
    torch.manual_seed(0)
    model = oracle.alive(WithCache())
    graph = mp.trace(model, torch.randn(2, 6))
    assert graph.signature.dropped == ("cache", "states[0]")
    pruned = mp.prune(graph, budget="width=0.5")
    assert [note for note in pruned.notes if "cache" in note]
    assert [note for note in pruned.notes if "states[0]" in note]
    found = graph.run(None, torch.randn(2, 6))
    assert found["step"] == 3
    assert found["cache"] is None
    assert found["logits"].shape == (2, 3)


# ---- the graph


@pytest.mark.parametrize("build", [wide, VisionTransformer], ids=["wide", "vision_transformer"])
def test_the_graph_can_be_printed_viewed_and_verified(build: Callable[[], nn.Module]) -> None:
    graph = mp.trace(build(), torch.randn(2, 3, 6, 6))
    verify(graph)
    view = graph.networkx()
    assert set(view) == set(graph.nodes)
    assert view.number_of_edges() == sum(len(set(node.refs())) for node in graph.nodes.values())
    assert all(f"%{name}:" in str(graph) for name in graph.nodes)
    assert {info.name for info in graph.tensors.values()} == set(
        dict(build().named_parameters()) | dict(build().named_buffers())
    )


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    graph = mp.trace(Llama(True), torch.randint(11, (2, 5)))
    assert set(graph.tensors["embed.weight"].aliases) == {"embed.weight", "head.weight"}
    assert "head.weight" not in graph.tensors
    pruned = mp.prune(graph, budget="width=0.5")
    assert pruned.module.get_parameter("head.weight") is pruned.module.get_parameter("embed.weight")
    assert set(pruned.kept["head.weight"]) == set(pruned.kept["embed.weight"]) == {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    pruned = mp.prune(model, torch.randn(2, 3, 8, 8, dtype=dtype), budget="width=0.5")
    assert {p.dtype for p in pruned.module.parameters()} == {dtype}
    assert pruned.module(torch.randn(3, 3, 8, 8, dtype=dtype)).dtype is dtype
    assert pruned.certificate is not None
    assert pruned.certificate.ok


def test_the_meta_device_is_planned_and_cut_without_values() -> None:
    with torch.device("meta"):
        model, x = wide(), torch.zeros(2, 3, 8, 8)
    graph = mp.trace(model, x)
    assert graph.fingerprint == mp.trace(network(), torch.randn(2, 3, 8, 8)).fingerprint
    pruned = mp.prune(graph, budget="macs=0.5", certify=False)
    assert all(p.is_meta for p in pruned.module.parameters())
    assert pruned.cost["after"].macs <= 0.5 * pruned.cost["before"].macs


# ---- the same again


@pytest.mark.parametrize("build", [wide, VisionTransformer], ids=["wide", "vision_transformer"])
def test_pruning_is_deterministic(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = oracle.alive(build()), torch.randn(2, 3, 6, 6)
    first, second = (mp.prune(copy.deepcopy(model), x.clone(), budget="macs=0.5", seed=1) for _ in range(2))
    assert first.plan == second.plan
    assert first.certificate == second.certificate
    assert first.notes == second.notes
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))


PROGRAM = """
import torch, metaprune as mp
from tests.test_trace import VisionTransformer, oracle
torch.set_num_threads(1)
torch.manual_seed(0)
graph = mp.trace(oracle.alive(VisionTransformer()), torch.zeros(2, 3, 6, 6))
print(mp.plan(graph, "macs=0.5").to_json())
"""


def test_another_process_makes_the_same_plan() -> None:
    torch.manual_seed(0)
    graph = mp.trace(oracle.alive(VisionTransformer()), torch.zeros(2, 3, 6, 6))
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    assert Plan.from_json(found) == mp.plan(graph, "macs=0.5")


def test_pruning_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    mp.prune(oracle.alive(wide()).eval(), torch.zeros(2, 3, 8, 8), budget="width=0.5")
    torch.random.set_rng_state(state)
    model = wide()
    before = torch.random.get_rng_state()
    mp.prune(model, torch.zeros(2, 3, 8, 8), budget="width=0.5")
    assert torch.equal(before, torch.random.get_rng_state())


def test_pruning_twice_is_pruning_a_pruned_network() -> None:
    model = network()
    once = mp.prune(model, torch.randn(2, 3, 8, 8), budget="width=0.5")
    twice = checked(once.module, torch.randn(2, 3, 8, 8), once.module, torch.randn(3, 3, 8, 8))
    assert twice.cost["before"] == once.cost["after"]
    portable = mp.prune(mp.trace(model, torch.randn(2, 3, 8, 8)), budget="width=0.5").module
    assert isinstance(copy.deepcopy(portable), nn.Module)


def test_a_graph_already_traced_is_not_affected_by_later_changes_of_options() -> None:
    graph = mp.trace(network(), torch.randn(2, 3, 8, 8))
    values = {name: tensor.clone() for name, tensor in graph.values.items()}
    first = mp.prune(graph, budget="width=0.5")
    mp.prune(graph, budget="macs=0.3")
    assert mp.prune(graph, budget="width=0.5").plan == first.plan
    assert all(torch.equal(tensor, values[name]) for name, tensor in graph.values.items())


# ---- what is refused


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.sum()) > 0 else self.a(-x)


def raising() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        raise KeyError("no such thing")

    return Net(body)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "data_dependent": (DataDependent, torch.randn(2, 6), "test_trace.py"),
    "raises": (raising, torch.randn(2, 6), "no such thing"),
    "wrong_channels": (wide, torch.randn(2, 4, 8, 8), "exported"),
    "wrong_dtype": (wide, torch.zeros(2, 3, 8, 8, dtype=torch.long), "exported"),
    "too_many_inputs": (wide, (torch.randn(2, 3, 8, 8), torch.randn(2)), "exported"),
    "unknown_keyword": (wide, {"picture": torch.randn(2, 3, 8, 8)}, "exported"),
    "no_inputs": (wide, None, "inputs"),
    "no_tensor": (wide, (), "inputs"),
    "text": (wide, "picture", "inputs"),
    "no_network": (lambda: torch.relu, torch.randn(2, 3), "nn.Module"),
    "a_class": (lambda: nn.ReLU, torch.randn(2, 3), "nn.Module"),
}


@pytest.mark.parametrize(("build", "inputs", "part"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_traced_is_one_clear_error(build: Callable[[], Any], inputs: Any, part: str) -> None:
    model = build()
    flags = (
        [m.training for m in model.modules()] if isinstance(model, nn.Module) and not isinstance(model, type) else []
    )
    with pytest.raises(TraceError, match=part) as error:
        mp.trace(model, inputs)
    assert "\n" not in str(error.value)
    if flags:
        assert flags == [m.training for m in model.modules()]


def test_a_dynamic_argument_must_exist() -> None:
    with pytest.raises(TraceError, match="no_such"):
        mp.trace(network(), torch.randn(2, 3, 8, 8), dynamic={"no_such": (1,)})
    with pytest.raises(mp.MetapruneError):
        mp.trace(network(), torch.randn(2, 3, 8, 8), dynamic={0: (9,)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = network()
    with torch.no_grad():
        model.c.weight[3, 2, 1, 1] = value
    with pytest.raises(mp.MetapruneError, match=r"c\.weight"):
        mp.prune(model, torch.randn(2, 3, 8, 8), budget="width=0.5")


def test_a_weight_that_is_not_finite_is_named_even_where_nothing_is_scored() -> None:
    model = network()
    with torch.no_grad():
        model.b.running_mean[0] = float("nan")
    with pytest.raises(mp.MetapruneError, match=r"b\.running_mean"):
        mp.prune(model, torch.randn(2, 3, 8, 8), budget="width=0.5")


def test_the_pruned_module_refuses_calls_that_do_not_fit() -> None:
    norm = next(case for case in NORM if case.name == "layer_norm_2d")
    torch.manual_seed(0)
    portable = mp.prune(norm.build(), norm.inputs(2), budget="width=1.0")
    module = portable.module
    assert module(torch.randn(2, 3, 6, 6)).shape == (2, 4)
    with pytest.raises((OptionError, TypeError)):
        module()
    with pytest.raises((OptionError, TypeError)):
        module(torch.randn(2, 3, 6, 6), torch.randn(2))


def test_a_model_that_needs_no_pruning_is_returned_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    pruned = mp.prune(model, torch.randn(2, 6), budget="width=0.5")
    assert not pruned.plan.keep
    assert pruned.cost["before"] == pruned.cost["after"]
    with pytest.raises(mp.BudgetInfeasible) as error:
        mp.prune(model, torch.randn(2, 6), budget="macs=0.5")
    assert error.value.attainable == 1.0


def test_functional_weights_of_the_caller_stay_the_callers() -> None:
    weight = nn.Parameter(torch.randn(8, 6))
    model = Net(lambda m, x: m.b(F.linear(x, m.w)), b=nn.Linear(8, 3), w=weight)
    before = weight.detach().clone()
    pruned = mp.prune(model, torch.randn(2, 6), budget="width=0.5")
    assert pruned.module.w.shape == (4, 6)
    assert model.w is weight
    assert torch.equal(weight, before)
    with torch.no_grad():
        pruned.module.w.add_(1)
    assert torch.equal(weight, before)
    assert conv(3, 4).weight.shape == (4, 3, 3, 3)
