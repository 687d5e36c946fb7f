"""trace, plan, apply, prune: budgets, options, plans, inputs of every kind, and clear errors for bad ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import metaprune as mp
from metaprune.graphs.errors import OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.test_constructs_attention import CASES as ATTENTION
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_norm import CASES as NORM
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *ATTENTION, *NORM, *SEQUENCE)}
GRAPHS: dict[str, Graph] = {}


def wide() -> nn.Module:
    """Large enough for fractions to mean something."""
    body = lambda m, x: m.e((h := m.b(m.a(x)).relu()) + m.d(m.c(h).relu())).mean((2, 3))  # noqa: E731
    return Net(body, a=conv(3, 24), b=nn.BatchNorm2d(24), c=conv(24, 40), d=conv(40, 24), e=conv(24, 10))


def graph(name: str) -> Graph:
    """The graph of a case, or of `wide`, traced once."""
    if name not in GRAPHS:
        torch.manual_seed(0)
        case = CASES.get(name)
        network = oracle.alive(case.build() if case else wide())
        GRAPHS[name] = mp.trace(network, case.inputs(2) if case else torch.randn(2, 3, 8, 8))
    return GRAPHS[name]


def spent(graph: Graph, plan: Plan) -> dict[str, float]:
    """Kept fraction of every cost; that costs are what is counted is shown further down."""
    counts = graph.coupling.costs.sizes.copy()
    for name, units in plan.keep.items():
        counts[graph.coupling.number(name)] = len(units)
    before, after = graph.cost(), graph.coupling.costs.cost(counts)
    return {name: getattr(after, name) / getattr(before, name) for name in ("macs", "params", "bytes")}


def with_one_more(graph: Graph, plan: Plan, step: int = 1) -> list[Plan]:
    """The plans that keep one step more of one group."""
    found = []
    for name, units in plan.keep.items():
        more = [u for u in range(graph.group(name).size) if u not in units][:step]
        found.append(Plan({**plan.keep, name: (*units, *more)}, plan.graph))
    return found


# ---- budgets

BUDGETS = [
    "macs=0.5",
    "params=0.4",
    "bytes=0.7",
    "macs=0.6,params=0.5",
    "macs=0.25,bytes=0.9",
    "params=1.0",
    "macs=0.97",
]
NETWORKS = [
    "wide",
    "resnet",
    "grouped",
    "vision_transformer",
    "llama_tied",
    "lstm_bidirectional",
    "stream_pre_layer_norm",
]


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_budget_is_met_and_not_wasted(name: str, budget: str, allocator: str) -> None:
    network = graph(name)
    limits = {part.split("=")[0]: float(part.split("=")[1]) for part in budget.split(",")}
    try:
        plan = mp.plan(network, budget, allocator=allocator)
    except mp.BudgetInfeasible:
        least = spent(network, mp.plan(network, "width=0.00001"))
        assert any(least[cost] > limit for cost, limit in limits.items())
        return
    found = spent(network, plan)
    assert all(found[cost] <= limit + 1e-12 for cost, limit in limits.items())
    assert dict(plan.reached) == pytest.approx(found)
    if all(found[cost] < 0.98 * limit for cost, limit in limits.items()):
        for more in with_one_more(network, plan):
            over = spent(network, more)
            assert any(over[cost] > limit for cost, limit in limits.items())


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cost", ["macs", "params", "bytes"])
def test_the_attainable_minimum_is_true(cost: str, name: str, allocator: str) -> None:
    network = graph(name)
    with pytest.raises(mp.BudgetInfeasible) as error:
        mp.plan(network, f"{cost}=0.001", allocator=allocator)
    least = error.value.attainable
    assert f"{cost}=0.001" in str(error.value)
    plan = mp.plan(network, f"{cost}={least + 1e-9}", allocator=allocator)
    assert spent(network, plan)[cost] == pytest.approx(least, rel=1e-6)
    assert all(len(units) == network.group(group).minimum for group, units in plan.keep.items())
    with pytest.raises(mp.BudgetInfeasible):
        mp.plan(network, f"{cost}={least * 0.999}", allocator=allocator)


def test_the_harder_of_two_limits_is_the_one_reported() -> None:
    with pytest.raises(mp.BudgetInfeasible, match=r"params=0\.0001") as error:
        mp.plan(graph("wide"), "macs=0.9,params=0.0001")
    assert error.value.attainable > 0.0001


@pytest.mark.parametrize("width", [0.01, 0.25, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("name", ["wide", "grouped", "llama_tied"])
def test_width_keeps_that_fraction_of_every_group(width: float, name: str) -> None:
    network = graph(name)
    for allocator in ("uniform", "global"):
        plan = mp.plan(network, f"width={width}", allocator=allocator)
        for group in network.groups:
            kept = len(plan.keep.get(group.name, range(group.size)))
            expected = max(group.minimum, math.floor(width * group.size + 0.5))
            assert kept == (group.size if group.pinned else expected)


def test_every_group_keeps_a_unit_under_the_smallest_budget() -> None:
    network = graph("wide")
    pruned = mp.prune(network, budget="width=0.0001")
    assert all(len(units) == 1 for units in pruned.plan.keep.values())
    assert pruned.certificate is not None
    assert pruned.certificate.ok


def test_global_takes_the_least_important_units_first() -> None:
    torch.manual_seed(0)
    model = oracle.alive(wide())
    with torch.no_grad():
        model.c.weight[::2] *= 1e-3
        model.c.bias[::2] *= 1e-3
        model.d.weight[:, ::2] *= 1e-3
    plan = mp.plan(mp.trace(model, torch.randn(2, 3, 8, 8)), "macs=0.6", allocator="global", criterion="magnitude")
    assert set(plan.keep) == {"c"}
    assert not [unit for unit in range(40) if unit % 2 and unit not in plan.keep["c"]]


def test_uniform_keeps_equal_fractions() -> None:
    network = graph("wide")
    plan = mp.plan(network, "params=0.5", allocator="uniform")
    fractions = [len(units) / network.group(name).size for name, units in plan.keep.items()]
    assert len(fractions) == 2
    assert max(fractions) - min(fractions) <= 1 / 24 + 1e-9


# ---- options


def test_protect_and_only_take_globs_of_groups_and_tensors() -> None:
    network = graph("vision_transformer")
    free = {g.name for g in network.groups if not g.pinned}
    assert set(mp.plan(network, "width=0.5").keep) == free
    assert set(mp.plan(network, "width=0.5", protect="blocks.0.*").keep) == {n for n in free if "blocks.0" not in n} - {
        "patch"
    }
    assert set(mp.plan(network, "width=0.5", protect=["*.qkv.heads"]).keep) == {
        n for n in free if not n.endswith("heads")
    }
    assert set(mp.plan(network, "width=0.5", only=["blocks.1.m.*"], protect=["patch"]).keep) == {"blocks.1.m.0"}
    assert set(mp.plan(network, "width=0.5", only=["patch"]).keep) == {"patch"}
    assert set(mp.plan(network, "width=0.5", only=["position"]).keep) == {"patch"}


def test_kinds_choose_what_shrinks() -> None:
    network = graph("llama_tied")
    for kind in ("ffn", "head_dim", "kv_group", "query_group", "residual"):
        keep = mp.plan(network, "width=0.5", kinds=[kind]).keep
        assert keep
        assert {network.group(name).kind for name in keep} == {kind}
    both = mp.plan(network, "width=0.5", kinds=("ffn", "residual")).keep
    assert {network.group(name).kind for name in both} == {"ffn", "residual"}
    assert not mp.plan(network, "width=0.5", kinds=()).keep


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("budget", ["macs=0.5", "width=0.5", "params=0.3"])
def test_round_to_gives_multiples(budget: str, allocator: str) -> None:
    network = graph("wide")
    plan = mp.plan(network, budget, allocator=allocator, round_to=8)
    assert plan.keep
    assert all(len(units) % 8 == 0 and len(units) > 0 for units in plan.keep.values())
    if "=" in budget and not budget.startswith("width"):
        cost, limit = budget.split("=")
        assert spent(network, plan)[cost] <= float(limit)
        if spent(network, plan)[cost] < 0.98 * float(limit):
            assert all(spent(network, more)[cost] > float(limit) for more in with_one_more(network, plan, 8))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("budget", {"budget": "macs"}),
    ("budget", {"budget": "macs=x"}),
    ("budget", {"budget": "speed=0.5"}),
    ("budget", {"budget": "macs=0"}),
    ("budget", {"budget": "macs=-1"}),
    ("budget", {"budget": "macs=1.5"}),
    ("budget", {"budget": "macs=nan"}),
    ("budget", {"budget": "macs=inf"}),
    ("budget", {"budget": ""}),
    ("budget", {"budget": "width=0.5,macs=0.5"}),
    ("budget", {"budget": "macs=0.5,,params=0.5"}),
    ("budget", {"budget": None}),
    ("budget", {"budget": 0.5}),
    ("criterion", {"criterion": "no_such"}),
    ("allocator", {"allocator": "no_such"}),
    ("criterion", {"criterion": 7}),
    ("round_to", {"round_to": 0}),
    ("round_to", {"round_to": 2.5}),
    ("round_to", {"round_to": "8"}),
    ("protect", {"protect": ["no.such.*"]}),
    ("only", {"only": "no_such"}),
    ("kinds", {"kinds": ["no_such"]}),
    ("data", {"data": [1]}),
]


@pytest.mark.parametrize(("option", "given"), OPTIONS, ids=[f"{o}_{i}" for i, (o, _) in enumerate(OPTIONS)])
def test_a_wrong_option_is_named(option: str, given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=option):
        mp.plan(graph("wide"), **given)


# ---- plans


def test_a_plan_survives_json_and_disk(tmp_path: Path) -> None:
    network = graph("vision_transformer")
    plan = mp.plan(network, "macs=0.5", protect=["patch"], round_to=2, seed=3)
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.budget == "macs=0.5"
    assert plan.provenance["seed"] == 3
    assert plan.provenance["protect"] == ["patch"]
    body = json.loads(plan.to_json())
    assert {edit["edit"] for edit in body["edits"]} == {"keep"}
    first, second = (mp.apply(network, p) for p in (plan, Plan.load(tmp_path / "plan.json")))
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True))


def test_a_plan_is_immutable() -> None:
    plan = mp.plan(graph("wide"), "width=0.5")
    with pytest.raises(TypeError):
        plan.keep["c"] = (0,)  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.budget = ""  # type: ignore[misc]


def test_a_plan_fits_the_same_network_traced_again_with_other_weights_and_batch() -> None:
    plan = mp.plan(graph("wide"), "width=0.5")
    again = mp.trace(oracle.alive(wide(), seed=4), torch.randn(3, 3, 8, 8))
    assert mp.apply(again, plan).certificate is not None


BAD: dict[str, tuple[Callable[[Graph], dict[str, Any]], str]] = {
    "unknown_group": (lambda g: {"no.such": (0,)}, "no.such"),
    "empty": (lambda g: {"c": ()}, "c must keep"),
    "twice": (lambda g: {"c": (1, 1)}, "at most once"),
    "negative": (lambda g: {"c": (-1, 2)}, "0 to 39"),
    "beyond": (lambda g: {"c": (0, 40)}, "0 to 39"),
    "pinned": (lambda g: {"e": (0, 1)}, "pinned"),
}


@pytest.mark.parametrize(("keep", "message"), BAD.values(), ids=BAD)
def test_a_plan_that_does_not_fit_is_refused(keep: Callable[[Graph], dict[str, Any]], message: str) -> None:
    network = graph("wide")
    with pytest.raises(PlanError, match=message):
        mp.apply(network, Plan(keep(network), network.fingerprint))


def test_a_plan_of_another_network_is_refused() -> None:
    plan = mp.plan(graph("wide"), "width=0.5")
    for name in ("resnet", "vision_transformer"):
        with pytest.raises(PlanError, match="another network"):
            mp.apply(graph(name), plan)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 7, "edits": []}', '{"schema": 1}', "[" * 99999])
def test_a_broken_plan_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="nowhere"):
        Plan.load(tmp_path / "nowhere.json")


# ---- cost


def flops(module: nn.Module, inputs: Any) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            oracle.call(module.eval(), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


COUNTED = """
    resnet depthwise_multiplier grouped transposed_grouped conv1d conv3d transposed_output_padding squeeze_excite
    gram_matrix fused chunked separate grouped_queries multihead_cross encoder_layer relative_bias shifted_windows
    vision_transformer cross_covariance mixer non_local einsum llama llama_tied experts stacked_experts
    shared_block stream_pre_rms_norm
""".split()


@pytest.mark.parametrize("name", [*COUNTED, "wide"])
def test_cost_is_what_is_counted_before_and_after(name: str) -> None:
    case = CASES.get(name)
    torch.manual_seed(0)
    network = oracle.alive(case.build() if case else wide())
    inputs = case.inputs(2) if case else torch.randn(2, 3, 8, 8)
    pruned = mp.prune(network, inputs, budget="width=0.5", certify=False)
    for module, cost in ((network, pruned.cost["before"]), (pruned.module, pruned.cost["after"])):
        assert 2 * cost.macs == flops(module, inputs)
        assert cost.params == sum(p.numel() for p in module.parameters())
    again = mp.trace(pruned.module, inputs).cost()
    assert (again.macs, again.params) == (pruned.cost["after"].macs, pruned.cost["after"].params)


def test_cost_is_that_of_the_callers_batch() -> None:
    one, four = (mp.trace(wide(), torch.randn(n, 3, 8, 8)).cost() for n in (1, 4))
    assert (4 * one.macs, 4 * one.bytes, one.params) == (four.macs, four.bytes, four.params)


def test_cost_of_many_plans_at_once() -> None:
    network = graph("llama_tied")
    costs = network.coupling.costs
    draw = np.random.default_rng(0)
    counts = np.array([[draw.integers(1, s + 1) for s in costs.sizes] for _ in range(5)], dtype=float)
    counts[:, [g.pinned for g in network.groups]] = costs.sizes[[g.pinned for g in network.groups]]
    for row, macs in zip(counts, costs.evaluate("macs", counts), strict=True):
        keep = {g.name: tuple(range(int(n))) for g, n in zip(network.groups, row, strict=True) if n < g.size}
        pruned = mp.apply(network, Plan(keep, network.fingerprint), certify=False)
        assert macs == flops(pruned.module, torch.zeros(2, 5, dtype=torch.long)) / 2
