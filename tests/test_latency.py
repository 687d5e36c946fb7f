"""Measured latency: fits against closed forms, tables that are priced by hand, files, and a few real clocks."""

import json
import time
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import metaprune as mp
from metaprune.cli import app
from metaprune.engines import engine_called
from metaprune.graphs.calls import OperatorCall, calls
from metaprune.graphs.errors import BudgetInfeasible, LoadError, MetapruneError, OptionError, PlanError
from metaprune.graphs.ir import Graph
from metaprune.graphs.onnx_export import export_onnx
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.structure import Ref
from metaprune.graphs.surgery import cut
from metaprune.latency import network_key, random_counts
from metaprune.latency_fit import Correction, nonnegative, operator_terms
from metaprune.timing import Timing, timings
from tests.support import oracle
from tests.support.cases import Net, conv


def digits(count: int) -> Tensor:
    return next(iter(mp.digits(size=count)[1]))[0][:count]


def network() -> nn.Module:
    """A residual stream, an inner width, a depthwise convolution and an operator without multiply-adds."""
    body = lambda m, x: m.head(m.pool((h := m.norm(m.a(x)).relu()) + m.d(m.deep(m.c(h)).relu())).flatten(1))  # noqa: E731
    parts = {"a": conv(1, 16), "norm": nn.BatchNorm2d(16), "c": conv(16, 24), "d": conv(24, 16)}
    deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    return Net(body, **parts, deep=deep, pool=nn.AvgPool2d(4), head=nn.Linear(64, 10))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return mp.trace(oracle.alive(network()), digits(1))


def attention() -> Graph:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attention = nn.Embedding(17, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(16, 10)

        def forward(self, pixels: Tensor) -> Tensor:
            x = self.table(pixels.flatten(1).clamp(0, 16))
            y, _ = self.attention(x, x, x, need_weights=False)
            return self.out(torch.cat((y.mean(1), x.amax(1)), dim=-1))

    torch.manual_seed(0)
    return mp.trace(Reader(), digits(2).mul(4).abs().long())


def price(call: OperatorCall) -> float:
    """Seconds made up for a call: exactly linear in its work, so that every fit can be judged."""
    moved = sum(t.numel() for t in call.operands), sum(t.numel() for t in call.results)
    work = prod(call.results[0].shape) * prod(call.operands[1].shape[1:]) if "conv2d" in call.op else 0
    return 1e-6 + 2e-9 * work + 1e-9 * moved[0] + 3e-9 * moved[1]


def add_prices(table: mp.LatencyTable, graph: Graph) -> None:
    table.times |= {call.key: Timing(price(call), 0.0) for call in calls(graph)}


def first_units(graph: Graph, counts: np.ndarray) -> mp.Plan:
    rows = zip(graph.groups, counts.astype(int).tolist(), strict=True)
    return mp.Plan({g.name: tuple(range(n)) for g, n in rows if n < g.size}, graph.fingerprint)


@pytest.fixture
def table(graph: Graph) -> mp.LatencyTable:
    """A table that holds a price for every operator at the widths that `terms` looks at."""
    table = mp.LatencyTable()
    for counts in random_counts(graph, 9, seed=0):
        add_prices(table, cut(graph, first_units(graph, counts).keep).graph)
    return table


# ---- fits


def test_nonnegative_coefficients_are_found_again() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(0, 1, (20, 4)) * [1, 1e6, 1e3, 1]
    truth = np.array([1e-5, 2e-11, 0.0, 3e-4])
    np.testing.assert_allclose(nonnegative(columns, columns @ truth), truth, rtol=1e-9, atol=1e-15)


def test_no_coefficient_is_negative() -> None:
    columns = np.stack([np.ones(5), np.arange(5.0)], axis=1)
    assert nonnegative(columns, 5.0 - np.arange(5.0))[1] == 0


def test_an_operators_polynomial_is_its_closed_form(graph: Graph) -> None:
    costs = graph.coupling.costs
    weighted = (call for call in calls(graph) if "conv2d" in call.op)
    node = graph.nodes[next(call.node for call in weighted if call.operands[1].shape[:2] == (24, 16))]
    wide, stream = (graph.coupling.number(g.name) for g in graph.groups if not g.pinned and g.size in (24, 16))
    if graph.groups[wide].size == 16:
        wide, stream = stream, wide

    def closed(kept: np.ndarray) -> np.ndarray:
        outputs, inputs = kept[:, wide], kept[:, stream]
        work = 64 * 9 * outputs * inputs  # 8 x 8 positions, 3 x 3 taps, a batch of one
        read = 4 * (64 * inputs + 9 * inputs * outputs + outputs)
        return 2e-6 + 1e-11 * work + 2e-10 * read + 5e-10 * 4 * 64 * outputs

    fitted_on, other = random_counts(graph, 9, 0), random_counts(graph, 9, 1)
    fitted = costs.extended({"latency": operator_terms(costs, node, fitted_on, closed(fitted_on))})
    np.testing.assert_allclose(fitted.evaluate("latency", other), closed(other), rtol=1e-6)
    assert "latency" not in costs.terms


def test_the_correction_is_found_again() -> None:
    generator = np.random.default_rng(0)
    truth = Correction(3e-5, {"contractions": 1.1, "others": 0.25})
    sums = [{"contractions": a, "others": b} for a, b in generator.uniform(1e-5, 1e-3, (10, 2)).tolist()]
    found = Correction.fitted(sums, [truth.total(row) for row in sums])
    assert found.intercept == pytest.approx(3e-5)
    assert dict(found.slopes) == pytest.approx(truth.slopes)


def test_without_calibration_the_sum_stays_as_it_is() -> None:
    assert Correction().total({"contractions": 2.0, "others": 3.0}) == 5.0


# ---- operator calls


@pytest.mark.parametrize("name", ["network", "attention"])
def test_every_call_run_alone_gives_what_it_gave(name: str, graph: Graph) -> None:
    found = calls(graph if name == "network" else attention())
    assert len(found) > 8
    for call in found:
        result = call.bound()()
        results = [result] if isinstance(result, Tensor) else [t for t in result if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(results, call.results, strict=True)), call.op


def test_calls_have_the_callers_batch_and_know_what_is_fixed(graph: Graph) -> None:
    first = next(call for call in calls(graph) if "conv2d" in call.op)
    assert first.operands[0].shape == (1, 1, 8, 8)  # the trace has a batch of two
    assert first.fixed[:2] == (False, True)
    assert "float32[1, 1, 8, 8], fixed float32[16, 1, 3, 3]" in first.key


def test_calls_of_equal_work_are_one_entry() -> None:
    torch.manual_seed(0)
    same = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))
    assert len({call.key for call in calls(mp.trace(same, torch.randn(2, 8)))}) == 2


def test_what_is_free_in_onnxruntime() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(-1, 2, 3).transpose(1, 2).flatten(1) @ self.weight.t().exp()).relu()

    engine = engine_called("onnxruntime")
    paid = [call.op.split(".")[1] for call in calls(mp.trace(Moves(), torch.randn(2, 6))) if not engine.is_free(call)]
    assert paid[0] == "transpose"
    assert paid[-2:] == ["matmul", "relu"]
    assert not {"reshape", "t", "exp"} & set(paid)


def test_single_operators_in_onnxruntime_give_what_torch_gives(graph: Graph) -> None:
    import onnxruntime

    from metaprune.graphs.onnx_calls import onnx_models

    engine = engine_called("onnxruntime")
    every = {call.key: call for call in [*calls(graph), *calls(attention())]}.values()
    paid = [call for call in every if not engine.is_free(call)]
    for call, model in zip(paid, onnx_models(paid), strict=True):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        varying = [t.contiguous().numpy() for t, fixed in zip(call.operands, call.fixed, strict=True) if not fixed]
        names = [argument.name for argument in session.get_inputs()]
        for mine, theirs in zip(call.results, session.run(None, dict(zip(names, varying, strict=True))), strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-4, atol=1e-5, err_msg=call.op)


def test_an_operator_without_an_onnx_form_is_named() -> None:
    from metaprune.graphs.onnx_calls import onnx_models

    x = torch.randn(3, 3)
    call = OperatorCall("", "aten.special_airy_ai.default", (Ref("0"),), {}, (x,), (False,), (x,))
    with pytest.raises(MetapruneError, match=r"operator aten\.special_airy_ai\.default"):
        onnx_models([call])


# ---- tables priced by hand


def test_a_prediction_is_the_sum_over_the_operators_of_the_cut(graph: Graph, table: mp.LatencyTable) -> None:
    counts = random_counts(graph, 9, seed=0)
    before = len(table.times)
    predicted = table.predictions(graph, counts)
    by_plan = table.predictions(graph, [first_units(graph, row) for row in counts])
    expected = [sum(map(price, calls(cut(graph, first_units(graph, row).keep).graph))) for row in counts]
    assert predicted == pytest.approx(expected)
    assert by_plan == predicted
    assert len(table.times) == before
    assert table.predict(graph) == predicted[0]


def test_the_polynomial_is_the_sum_at_widths_it_has_not_seen(graph: Graph, table: mp.LatencyTable) -> None:
    costs = graph.coupling.costs.extended({"latency": table.terms(graph)})
    other = random_counts(graph, 20, seed=5)
    expected = [sum(map(price, calls(cut(graph, first_units(graph, row).keep).graph))) for row in other]
    np.testing.assert_allclose(costs.evaluate("latency", other), expected, rtol=1e-6)


def test_a_correction_enters_prediction_and_polynomial_alike(graph: Graph, table: mp.LatencyTable) -> None:
    table.corrections[network_key(graph)] = Correction(1e-4, {"contractions": 0.5, "others": 2.0})
    counts = random_counts(graph, 9, seed=0)
    costs = graph.coupling.costs.extended({"latency": table.terms(graph)})
    np.testing.assert_allclose(costs.evaluate("latency", counts), table.predictions(graph, counts), rtol=1e-6)


def test_a_correction_is_of_one_network_at_one_batch_size(graph: Graph, table: mp.LatencyTable) -> None:
    table.corrections[network_key(graph)] = Correction(1.0, {"contractions": 1.0, "others": 1.0})
    assert table.predict(graph) > 1
    assert table.correction(mp.trace(graph.source, digits(3))) == Correction()
    with pytest.raises(PlanError, match="another network"):
        table.predict(graph, mp.Plan({}, "0" * 64))


def test_random_counts_are_legal_seeded_and_start_whole(graph: Graph) -> None:
    step = np.array([group.size if group.pinned else 4 for group in graph.groups])
    counts = random_counts(graph, 12, seed=3, step=step)
    sizes = graph.coupling.costs.sizes
    assert (counts[0] == sizes).all()
    assert (counts % step == 0).all()
    assert ((counts >= 1) & (counts <= sizes)).all()
    assert (counts == random_counts(graph, 12, seed=3, step=step)).all()
    assert (counts[1:] != random_counts(graph, 12, seed=4, step=step)[1:]).any()
    assert (counts[:, step == sizes] == sizes[step == sizes]).all()


@pytest.mark.parametrize("counts", [[1.0], "first", "half"])
def test_counts_that_do_not_fit_are_refused(graph: Graph, table: mp.LatencyTable, counts: object) -> None:
    sizes = graph.coupling.costs.sizes
    given = {"first": sizes * 0, "half": sizes - 0.5}.get(str(counts), counts)
    with pytest.raises(OptionError, match="kept: "):
        table.predict(graph, given)


@pytest.mark.parametrize("allocator", ["uniform", "global", "cost", "sap"])
@pytest.mark.parametrize("budget", ["latency=0.6", "latency=0.7,macs=0.4"])
def test_allocators_hold_a_latency_budget(graph: Graph, table: mp.LatencyTable, allocator: str, budget: str) -> None:
    plan = mp.plan(graph, budget, allocator=allocator, latency=table)
    limits = {name: float(value) for name, value in (part.split("=") for part in budget.split(","))}
    for name, limit in limits.items():
        assert plan.reached[name] <= limit + 1e-9
    assert max(plan.reached[name] / limit for name, limit in limits.items()) > 0.93
    add_prices(table, cut(graph, plan.keep).graph)
    assert table.predict(graph, plan) / table.predict(graph) == pytest.approx(plan.reached["latency"], rel=1e-6)


def test_a_table_says_what_another_budget_comes_to(graph: Graph, table: mp.LatencyTable) -> None:
    assert "latency" not in mp.plan(graph, "macs=0.5").reached
    assert 0 < mp.plan(graph, "macs=0.5", latency=table).reached["latency"] < 1


def test_everything_stays_when_all_of_the_latency_may(graph: Graph, table: mp.LatencyTable) -> None:
    plan = mp.plan(graph, "latency=1.0", latency=table)
    assert not plan.keep
    assert plan.reached["latency"] == 1


def test_the_attainable_latency_is_said(graph: Graph, table: mp.LatencyTable) -> None:
    with pytest.raises(BudgetInfeasible, match="latency") as error:
        mp.plan(graph, "latency=0.001", latency=table)
    assert 0.001 < error.value.attainable < 0.5
    plan = mp.plan(graph, f"latency={error.value.attainable + 1e-6}", latency=table)
    assert all(len(units) == 1 for units in plan.keep.values())


def test_protected_groups_are_not_varied(graph: Graph) -> None:
    table = mp.LatencyTable()
    name = next(group.name for group in graph.groups if group.size == 24)
    plan = mp.plan(graph, "macs=0.9", protect=name, latency=table)
    assert name not in plan.keep
    assert any("float32[24, " in key for key in table.times)
    assert not any(f"fixed float32[{n}, 1, 3, 3]" in key for key in table.times for n in range(17, 24))


# ---- files


def test_a_table_survives_its_file(graph: Graph, table: mp.LatencyTable, tmp_path: Path) -> None:
    table.corrections[network_key(graph)] = Correction(1e-4, {"contractions": 0.5, "others": 2.0})
    table.save(tmp_path / "table.json")
    for again in (mp.LatencyTable.load(tmp_path / "table.json"), mp.LatencyTable(path=tmp_path / "table.json")):
        assert again.times == table.times
        assert again.corrections == table.corrections
        assert again.machine == table.machine
        assert again.predict(graph) == table.predict(graph)


@pytest.mark.parametrize(
    ("field", "other"),
    [("cpu", "abacus"), ("cores", 4096), ("torch", "0.1"), ("threads", 2), ("engine", "onnxruntime")],
)
def test_a_table_of_another_machine_is_refused(
    graph: Graph, table: mp.LatencyTable, tmp_path: Path, field: str, other: object
) -> None:
    path = tmp_path / "table.json"
    table.machine = replace(table.machine, **{field: other})
    table.save(path)
    with pytest.raises(OptionError, match=rf"{field} .* instead of"):
        mp.LatencyTable(path=path)
    if field in ("cpu", "cores", "torch"):
        with pytest.raises(OptionError, match="another machine"):
            mp.LatencyTable.load(path)
    taken = mp.LatencyTable.load(path, force=True)
    assert taken.machine == table.machine
    assert taken.times == table.times


@pytest.mark.parametrize(
    "change",
    [
        lambda body: "{",
        lambda body: "[]",
        lambda body: json.dumps({**body, "schema": 99}),
        lambda body: json.dumps({**body, "machine": {}}),
        lambda body: json.dumps({**body, "machine": {**body["machine"], "engine": "steam"}}),
        lambda body: json.dumps({**body, "times": {"x": {"seconds": -1.0, "spread": 0.0}}}),
        lambda body: json.dumps({**body, "times": {"x": {"seconds": "1", "spread": 0.0}}}),
        lambda body: json.dumps({**body, "corrections": {"x": {"intercept": 0.0, "slopes": {}}}}),
    ],
)
def test_a_damaged_file_is_an_error(table: mp.LatencyTable, tmp_path: Path, change: object) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(LoadError, match="latency table"):
        mp.LatencyTable.load(path)


def test_options_that_mean_nothing(graph: Graph, table: mp.LatencyTable) -> None:
    with pytest.raises(OptionError, match="engine: 'steam'"):
        mp.LatencyTable(engine="steam")
    with pytest.raises(OptionError, match="threads"):
        mp.LatencyTable(threads=0)
    with pytest.raises(OptionError, match="path"):
        mp.LatencyTable().save()
    with pytest.raises(OptionError, match="latency: a LatencyTable"):
        mp.plan(graph, "latency=0.5", latency="table.json")
    with pytest.raises(OptionError, match="latency must be a kept fraction"):
        mp.plan(graph, "latency=2")
    with pytest.raises(OptionError, match="plans"):
        table.calibrate(graph, plans=0)


def test_only_the_cpu_is_measured() -> None:
    with torch.device("meta"):
        graph = mp.trace(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(MetapruneError, match="on device meta"):
        mp.LatencyTable().predict(graph)


# ---- real clocks, with bounds no busy machine breaks


def test_time_that_a_thread_waits_does_not_count_on_one_thread() -> None:
    waiting = timings([lambda: time.sleep(0.01)], rounds=1)[0]
    assert waiting.seconds < 0.003
    assert timings([lambda: time.sleep(0.01)], threads=2, rounds=1)[0].seconds >= 0.01


def test_more_work_takes_longer() -> None:
    small, large = (torch.randn(n, n) for n in (32, 512))  # 4096 times the work
    first, second = timings([lambda: small @ small, lambda: large @ large])
    assert second.seconds > 3 * first.seconds
    assert min(first.spread, second.spread) >= 0


def test_a_measured_table_orders_networks_by_their_size(graph: Graph) -> None:
    torch.manual_seed(0)
    wide = mp.trace(nn.Sequential(conv(1, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 8)), digits(16))
    table = mp.LatencyTable()
    sizes = wide.coupling.costs.sizes
    narrow = np.where([group.pinned for group in wide.groups], sizes, 4)
    whole, little = table.predictions(wide, [sizes, narrow])
    assert whole > 3 * little > 0
    counted = len(table.times)
    assert table.predict(wide) == whole
    assert len(table.times) == counted
    found = table.calibrate(wide, plans=3)
    assert found.total({"contractions": 1.0, "others": 1.0}) > 0
    assert table.predict(wide) != whole


def test_a_latency_budget_without_a_table_is_measured_in_torch(graph: Graph) -> None:
    plan = mp.plan(graph, "latency=0.97")
    assert plan.reached["latency"] <= 0.97
    told = plan.provenance["latency"]
    assert (told["engine"], told["threads"], told["calibrated"]) == ("torch", 1, False)
    assert told["predicted"] > 0


def test_networks_are_measured_end_to_end_in_both_engines(graph: Graph, tmp_path: Path) -> None:
    small, large = (nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10)) for n in (4, 8192))
    path = tmp_path / "small.onnx"
    mp.apply(mp.trace(small, digits(1)), mp.Plan({}, ""), certify=False).export_onnx(path)
    for few in (mp.measure_latency(small.train(), digits(1)), mp.measure_latency(path, digits(1), "onnxruntime")):
        assert mp.measure_latency(large, (digits(1),)).seconds > 3 * few.seconds > 0
    assert small.training
    with pytest.raises(OptionError, match="takes 1 tensors, not 2"):
        mp.measure_latency(path, (digits(1), digits(1)), "onnxruntime")
    with pytest.raises(OptionError, match="engine"):
        mp.measure_latency(path, digits(1))
    with pytest.raises(MetapruneError, match="onnxruntime does not run"):
        mp.measure_latency(tmp_path / "none.onnx", digits(1), "onnxruntime")


def test_the_portable_form_is_exported_too(graph: Graph, tmp_path: Path) -> None:
    import onnxruntime

    export_onnx(tmp_path / "portable.onnx", graph, PortableModule(graph).eval())
    session = onnxruntime.InferenceSession(tmp_path / "portable.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: digits(5).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, graph.run(None, digits(5)).numpy(), rtol=1e-4, atol=1e-5)


def test_the_command_line_keeps_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timed_networks.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 4)), torch.randn(8, 512)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "table.json"
    command = ["prune", "timed_networks:small", "--out", str(tmp_path / "out"), "--latency", str(path), "--budget"]
    done = CliRunner().invoke(app, [*command, "latency=0.9"])
    assert done.exit_code == 0, done.output
    first = path.read_text()
    other = ["--latency", str(tmp_path / "other.json")]
    assert CliRunner().invoke(app, [*command, "latency=0.0001", *other]).exit_code == 2
    assert len(mp.LatencyTable.load(tmp_path / "other.json").times) > 1  # an infeasible budget wastes no times
    assert CliRunner().invoke(app, [*command, "latency=0.9"]).exit_code == 0
    assert path.read_text() == first
    refused = CliRunner().invoke(app, [*command, "latency=0.9", "--engine", "onnxruntime"])
    assert refused.exit_code == 2
    assert "engine" in refused.stderr
