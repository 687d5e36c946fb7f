"""Heads fitted on a tiny zoo on digits: features, predictions, resuming, and pruning in one pass."""

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import metaprune as mp
from metaprune.calibration import leaves_of
from metaprune.curvature import RIDGE, collect_columns
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.judge import Judge
from metaprune.masking import Change, silenced
from metaprune.masking import measure as masked
from metaprune.metanet import ensembles
from metaprune.metanet.crossfit import folds
from metaprune.metanet.describe import describe, observe, reader_errors
from metaprune.metanet.encoded import CLOSED
from metaprune.metanet.ensembles import Course
from metaprune.metanet.examples import DATA, WEIGHTS, orders
from metaprune.metanet.fitting import fit
from metaprune.metanet.pruner import MetaPruner
from metaprune.metanet.schema import Schema
from metaprune.metanet.structure import structure
from metaprune.reconstruction import COARSE
from metaprune.search.budget import Budget
from metaprune.search.exchange import exchanged
from metaprune.search.problem import Kept, Problem
from metaprune.statistics import open_gates
from metaprune.trials import Bench, Trial

COURSE = Course(steps=60, every=20, batch=64)
SAMPLES = 128  # all there are


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def _plain(widths: tuple[int, ...], norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, (inputs, width) in enumerate(zip((1, *widths), widths, strict=False)):
        layers.append(nn.Conv2d(inputs, width, 3, stride=2 if number == 1 else 1, padding=1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
    return layers


NETWORKS = {
    "plain-0": lambda: (_plain((6, 8), False), 8),
    "plain-1": lambda: (_plain((8, 6, 8), False), 8),
    "chain-0": lambda: (_plain((6, 10), True), 10),
    "chain-1": lambda: (_plain((8, 8, 6), True), 6),
    "residual-0": lambda: ([*_plain((8, 8), True), _Block(8, 6)], 8),
    "residual-1": lambda: ([*_plain((6, 6), True), _Block(6, 8)], 6),
    "unseen": lambda: ([*_plain((7, 9), True), _Block(9, 7), nn.Conv2d(9, 8, 1), nn.ReLU()], 8),
}
ZOO = tuple(name for name in NETWORKS if name != "unseen")


@cache
def _data() -> tuple[mp.Batches, mp.Batches]:
    train, test = mp.digits(size=64, seed=0)
    return train, test


@cache
def _task(name: str) -> mp.Task:
    torch.manual_seed(list(NETWORKS).index(name))
    body, width = NETWORKS[name]()
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    train, test = _data()

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    mp.train(model, train, objective, mp.Settings(epochs=2, lr=0.05), 0)
    return mp.Task(model.eval(), test.images[:1], [next(iter(train)), next(iter(train))], test)


@cache
def _graph(name: str) -> Graph:
    task = _task(name)
    return mp.trace(task.model, task.inputs)


@dataclass(frozen=True)
class _Labels:
    """What a zoo's labels hold, measured here by the same probes at few levels."""

    sizes: Mapping[str, int]
    order: Mapping[str, Tensor]
    ablation: Mapping[str, Tensor]
    levels: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    compensated: Mapping[str, Tensor]
    joint_kept: Tensor
    joint: Tensor


def _measure(graph: Graph, data: Any, plans: int = 10) -> _Labels:
    groups = [group for group in graph.groups if not group.pinned]
    plain, fitted = (
        mp.sensitivity(graph, data, "fisher_block", 4, "measured", compensate, SAMPLES, 0, ("kl",))
        for compensate in (False, True)
    )
    ones, leaves = open_gates(graph), leaves_of(graph, data, SAMPLES)
    ablation = {}
    for group in groups:
        changes = [Change({group.name: silenced(ones[group.name], np.array([u]))}) for u in range(group.size)]
        ablation[group.name] = torch.from_numpy(masked(graph, changes, leaves).total("kl"))
    draw = np.random.default_rng(0)
    sizes = np.array([group.size for group in groups])
    kept = np.clip(np.round(sizes * draw.uniform(0.2, 1.0, (plans, len(groups)))), 1, sizes).astype(int)
    bench = Bench(graph, leaves[:50], leaves[-50:], 0, COARSE)
    keeps = [{g.name: plain.keep(g.name, k) for g, k in zip(groups, row, strict=True)} for row in kept.tolist()]
    with torch.no_grad():
        joint = [Trial(bench, keep).distortion() for keep in keeps]
    reverse = {name: torch.from_numpy(order[::-1].copy()) for name, order in plain.order.items()}
    levels, losses, mended = (
        {name: torch.from_numpy(values[::-1].copy()) for name, values in found.items()}
        for found in (plain.levels, plain.points["kl"], fitted.points["kl"])
    )
    counts = torch.from_numpy(kept)
    return _Labels(dict(zip(ablation, sizes.tolist(), strict=True)), reverse, ablation, levels, losses, mended,
                   counts, torch.tensor(joint, dtype=torch.float64))  # fmt: skip


@cache
def _labels(name: str) -> _Labels:
    return _measure(_graph(name), _task(name).train)


@dataclass(frozen=True)
class _Member:
    name: str
    family: str
    task: mp.Task


class _Zoo:
    def __init__(self, names: tuple[str, ...] = ZOO) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[_Member]:
        return (_Member(name, name.split("-")[0], _task(name)) for name in self.names)

    def labels(self, name: str) -> _Labels:
        return _labels(name)


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _pruner() -> MetaPruner:
    return fit(_Zoo(), out=_folder(), course=COURSE, members=2, samples=SAMPLES)


def _encoded(data: bool = True) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six networks span no wide range
        return _pruner().encode(_graph("unseen"), data=_task("unseen").train if data else None)


def _tensors(pruner: MetaPruner) -> dict[str, Tensor]:
    return {f"{sight}.{k}": v for sight, own in pruner.predictors.items() for k, v in own.tensors().items()}


def _same(one: MetaPruner, other: MetaPruner) -> bool:
    mine, theirs = _tensors(one), _tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# Features


@pytest.mark.parametrize("name", ["plain-1", "residual-0"])
def test_errors_of_readers_are_those_of_least_squares(name: str) -> None:
    graph, data = _graph(name), _task(name).train
    draw = torch.Generator().manual_seed(0)
    for columns in collect_columns(graph, data, 50).values():
        layer, size = columns.layer, 5
        places = torch.randint(0, size + 1, (layer.groups, layer.width), generator=draw)  # some columns always stay
        weight = graph.values[layer.weight].detach()
        plain, fitted = reader_errors(columns, weight, places, size)
        matrix = layer.matrix(weight.double())[0]
        raw, hessian = columns.moment[0, :-1, :-1], columns.hessian(RIDGE)[0]
        energy = (matrix * (hessian @ matrix)).sum()
        for kept in range(size + 1):
            gone = places[0] < size - kept
            lost = matrix[gone]
            assert plain[kept] == pytest.approx(float((lost * (raw[gone][:, gone] @ lost)).sum() / energy), abs=1e-9)
            stay = torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ lost)
            change = torch.zeros_like(matrix)
            change[gone], change[~gone] = lost, -stay
            assert fitted[kept] == pytest.approx(float((change * (hessian @ change)).sum() / energy), abs=1e-9)
        assert plain[size] == fitted[size] == 0


def test_block_fisher_is_the_mean_square_of_the_summed_gradients() -> None:
    graph, order = _graph("chain-0"), _labels("chain-0").order
    statistics = observe(graph, _task("chain-0").train, 40)
    found = describe(graph, order, statistics)
    at = found.schema.cut.index("log block Fisher gone")
    for name, units in order.items():
        for kept in range(found.sizes[name]):
            gone = units[: found.sizes[name] - kept]
            pull = statistics.rows[name][:, gone].double().sum(1)
            assert torch.allclose(found.pulls[name][kept].double(), pull, atol=1e-5)
            assert float(found.cuts[name][kept, at]) == pytest.approx(
                float((0.5 * pull.square().mean()).log()), abs=1e-4
            )


def test_features_do_not_depend_on_the_numbering_of_units() -> None:
    model = _task("chain-1").model
    graph = _graph("chain-1")
    name = next(group.name for group in graph.groups if not group.pinned)
    turn = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    values = {key: value.clone() for key, value in model.state_dict().items()}
    for part in graph.group(name).slices:
        values[part.tensor] = values[part.tensor].index_select(part.dim, turn)
    moved = _Zoo(("chain-1",))
    other = mp.trace(next(iter(moved)).task.model, _task("chain-1").inputs)
    other.values = {key: values.get(key, value) for key, value in other.values.items()}
    data = _task("chain-1").train
    order = _labels("chain-1").order
    renamed = {**order, name: torch.argsort(turn)[order[name]]}
    for sight in (False, True):
        statistics = [observe(g, data, 40) if sight else None for g in (graph, other)]
        one, two = describe(graph, order, statistics[0]), describe(other, renamed, statistics[1])
        for group in order:
            assert torch.allclose(one.cuts[group], two.cuts[group], atol=2e-3)
        assert torch.allclose(one.units[name][turn], two.units[name], atol=2e-3)


def test_costs_and_names_of_features() -> None:
    graph = _graph("residual-0")
    found = describe(graph, orders(graph, "magnitude"))
    assert found.schema == Schema.of(False)
    costs = graph.coupling.costs
    for name, table in found.cuts.items():
        number, size = graph.coupling.number(name), found.sizes[name]
        assert table.shape == (size + 1, len(found.schema.cut))
        assert found.units[name].shape == (size, len(found.schema.unit))
        counts = costs.sizes.copy()
        counts[number] = size // 2
        expected = np.log(costs.evaluate("macs", counts[None])[0] / costs.full.macs)
        assert float(table[size // 2, found.schema.cut.index("log kept macs")]) == pytest.approx(expected, abs=1e-5)
    layout = structure(graph)
    stream = max(layout.features, key=lambda name: layout.features[name][5])  # read by most
    assert graph.group(stream).kind == "residual"
    with pytest.raises(OptionError, match="each of its"):
        describe(graph, {name: torch.zeros(size) for name, size in found.sizes.items()})


def test_an_encoder_adds_states_and_another_schema() -> None:
    graph, order = _graph("plain-0"), orders(_graph("plain-0"), "magnitude")
    states = {name: torch.randn(len(units), 3) for name, units in order.items()}
    found = describe(graph, order, None, lambda graph: states)
    assert found.schema.digest == Schema.of(False, 3).digest != Schema.of(False).digest
    for name, units in order.items():
        kept, gone = found.cuts[name][2, -6:-3], found.cuts[name][2, -3:]
        assert torch.allclose(kept, states[name][units[-2:]].mean(0), atol=1e-5)
        assert torch.allclose(gone, states[name][units[:-2]].mean(0), atol=1e-5)
        assert torch.allclose(found.units[name][:, -3:], states[name], atol=1e-6)
    with pytest.raises(OptionError, match="encoder: it gives no state"):
        describe(graph, order, None, lambda graph: {})


# Exchange


def test_exchange_finds_the_optimum_of_two_groups_and_never_loses() -> None:
    graph = _graph("plain-0")
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    ones = np.ones(len(free), dtype=np.int64)
    scores = [np.ones(graph.groups[i].size) for i in free]
    problem = Problem(graph.coupling.costs, free, scores, Budget.parse("macs=0.5"), ones, ones)
    harm = np.random.default_rng(0).gamma(1.0, size=(len(free), 20)).cumsum(1)[:, ::-1]

    def losses(kept: Kept) -> Any:
        return harm[np.arange(len(free)), kept].sum(1)

    every = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in problem.sizes), indexing="ij"), -1).reshape(-1, 2)
    within = problem.budget.excess(problem.costs, problem.full(every)) <= 1
    best = losses(every[within]).min()
    for start in every[within][::7]:
        found, loss = exchanged(problem, losses, start)
        assert problem.excess(found) <= 1
        assert loss == losses(found[None])[0] <= losses(start[None])[0]
        assert loss == pytest.approx(best)


# Fit


def test_the_loss_falls_and_families_held_out_are_reported() -> None:
    card = _pruner().card
    assert [name for name, _ in card["zoo"]["networks"]] == list(ZOO)
    for sight, heads in ((DATA, {"curves", "ablation", "joint"}), (WEIGHTS, {"curves", "ablation"})):
        assert set(card["validation"][sight]) == heads
        for found in card["validation"][sight].values():
            seen = [row[1] for row in found["history"]]
            assert seen[-1] < seen[0]
            assert found["steps"] in [row[0] for row in found["history"]]
    curves = card["validation"][DATA]["curves"]["compensated"]
    assert set(curves["r2 by family"]) == {"plain", "chain", "residual"}
    assert curves["networks"] == 6
    assert curves["r2"] > 0  # on families that the heads have never seen, from four networks in sixty steps
    assert card["validation"][DATA]["joint"]["spearman within networks"] > 0.6


def test_families_are_held_out_whole() -> None:
    parts = [_Member(f"n{i}", family, None) for i, family in enumerate("abcab")]  # type: ignore[arg-type]
    assert folds(parts) == (frozenset({0, 3}), frozenset({1, 4}), frozenset({2}), frozenset())  # type: ignore[arg-type]
    alone = [replace(part, family="") for part in parts[:3]]
    assert folds(alone) == (frozenset({0}), frozenset({1}), frozenset({2}), frozenset())  # type: ignore[arg-type]
    assert folds(alone[:1]) == (frozenset(),)  # type: ignore[arg-type]


class _Stopped(Exception):
    pass


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"labels": 0, "writes": 0}
    undisturbed = _pruner()
    shutil.copytree(_folder() / "examples", tmp_path / "examples")
    next((tmp_path / "examples").iterdir()).write_bytes(b"damaged")

    class Counted(_Zoo):
        def labels(self, name: str) -> _Labels:
            calls["labels"] += 1
            return _labels(name)

    def write(path: Path, content: bytes) -> None:
        calls["writes"] += 1
        if calls["writes"] == 5:  # in the second head
            raise _Stopped
        whole(path, content)

    whole = ensembles.write_atomically
    monkeypatch.setattr(ensembles, "write_atomically", write)
    with pytest.raises(_Stopped):
        fit(Counted(), out=tmp_path, course=COURSE, members=2, samples=SAMPLES)
    resumed = fit(Counted(), out=tmp_path, course=COURSE, members=2, samples=SAMPLES)
    assert calls["labels"] == 1  # all other networks, and what had been trained, were found in the folder
    assert _same(resumed, undisturbed)
    assert resumed.card["validation"] == undisturbed.card["validation"]
    with pytest.raises(OptionError, match="written by another fit"):
        fit(Counted(), out=tmp_path, course=replace(COURSE, rate=1e-3), members=2, samples=SAMPLES)


def test_a_broken_member_is_skipped_and_an_empty_zoo_refused() -> None:
    broken = _task("plain-0")
    model = nn.Sequential(*_plain((6, 8), False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    model[0].weight.data[0, 0, 0, 0] = float("nan")

    class Broken(_Zoo):
        def __iter__(self) -> Iterator[_Member]:
            yield _Member("bad", "plain", replace(broken, model=model))
            yield from super().__iter__()

        def labels(self, name: str) -> _Labels:
            return replace(_labels(name), joint=torch.full((10,), torch.nan)) if name == ZOO[1] else _labels(name)

    short = Course(steps=2, every=1, batch=8)
    with pytest.warns(UserWarning, match="is skipped") as seen:
        pruner = fit(Broken(ZOO[:3]), course=short, members=1, samples=SAMPLES)
    assert [str(w.message).split()[1] for w in seen] == ["bad", ZOO[1]]
    assert set(pruner.card["zoo"]["skipped"]) == {"bad", ZOO[1]}
    assert "not finite" in pruner.card["zoo"]["skipped"]["bad"]
    assert [name for name, _ in pruner.card["zoo"]["networks"]] == [ZOO[0], ZOO[2]]
    with pytest.raises(MetapruneError, match="no network to fit on"):
        fit([])
    with pytest.raises(OptionError, match="a Task or an object"):
        fit([3])
    with pytest.raises(OptionError, match="two networks are called"):
        fit(_Zoo((ZOO[0], ZOO[0])), course=short, samples=SAMPLES)
    for options in ({"heads": ("rewrite",)}, {"heads": ("joint",)}, {"members": 0}, {"states": 4}, {"seed": "x"}):
        with pytest.raises(OptionError):
            fit(_Zoo(), **options)  # type: ignore[arg-type]


def test_tasks_alone_are_a_zoo_and_are_measured() -> None:
    measured = []

    def measure(graph: Graph, data: Any) -> _Labels:
        measured.append(graph)
        return _labels(ZOO[0])

    pruner = fit([_task(ZOO[0])], ("curves",), course=Course(2, 1, 8), members=1, samples=SAMPLES, measure=measure)
    assert len(measured) == 1
    assert pruner.card["zoo"]["networks"] == [["network-0", ""]]
    assert pruner.predictors[DATA].joint is None
    assert pruner.card["validation"][DATA]["curves"]["plain"]["r2"] is None  # nothing could be held out


# Pruning


def test_save_and_load_give_the_same_predictions(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    _pruner().save(path)
    again = MetaPruner.load(path)
    assert _same(again, _pruner())
    assert again.card["validation"] == _pruner().card["validation"]
    described = _encoded().description
    minima = dict.fromkeys(described.sizes, 1)
    for one, two in zip(
        _pruner().predictors[DATA].losses(described, minima), again.predictors[DATA].losses(described, minima),
        strict=True,
    ):  # fmt: skip
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    _pruner().save(path)
    monkeypatch.setattr("metaprune.metanet.schema.DATA_CUT", ("something else",))
    with pytest.raises(LoadError, match="other features"):
        MetaPruner.load(path)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="without one"):
        MetaPruner.load(path, encoder=lambda graph: {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoadError, match="no checkpoint"):
        MetaPruner.load(path)
    save_file({"a": torch.ones(1)}, tmp_path / "y")
    for wrong in (tmp_path / "y", tmp_path / "z"):
        with pytest.raises(LoadError, match="no checkpoint"):
            MetaPruner.load(wrong)
    for package in ("metaprune.nothing", "metaprune.search"):  # none there, and one without the file
        monkeypatch.setattr("metaprune.metanet.pruner.CHECKPOINTS", package)
        with pytest.raises(LoadError, match="without a checkpoint"):
            MetaPruner.load("default")


def test_one_pass_serves_several_budgets_and_the_guard_never_loses() -> None:
    encoded, pruner = _encoded(), _pruner()
    pruner.guard.clear()
    graph, data = encoded.graph, _task("unseen").train
    judge = Judge(graph, data)
    for budget in (0.6, 0.3):
        pruned = pruner.prune(encoded, budget=f"macs={budget}")
        assert pruned.certificate is not None
        assert pruned.certificate.ok
        assert budget - 0.12 < pruned.cost["after"].macs / pruned.cost["before"].macs <= budget
        assert "least squares" in pruned.notes[-1]
        about = pruned.plan.provenance["guard"]
        closed = mp.plan(graph, f"macs={budget}", "fisher_block", "cost", data)
        mine, floor = judge.distortions([pruned.plan.keep, closed.keep])
        assert mine <= floor * (1 + 1e-9)
        assert about["measured"][about["kept"]] == pytest.approx(mine)
        assert about["measured"][CLOSED] == pytest.approx(floor)
        assert mp.Plan.from_json(pruned.plan.to_json()) == pruned.plan
    assert pruner.guard.total() == 2


def test_the_weights_alone_are_enough_to_plan() -> None:
    encoded = _encoded(data=False)
    pruned = _pruner().prune(encoded, budget="macs=0.5")
    assert pruned.plan.provenance["features"] == WEIGHTS
    assert pruned.plan.reached["macs"] <= 0.5
    assert not any("least squares" in note for note in pruned.notes)
    kept = {group.name: group.size for group in encoded.graph.groups}
    assert _pruner().prune(encoded, budget="width=1.0").plan.keep == {}
    protected = next(name for name in encoded.plain)
    plan = _pruner().plan(encoded, "macs=0.7", protect=(protected,))
    assert protected not in plan.keep
    assert all(len(units) < kept[name] for name, units in plan.keep.items())


def test_the_front_is_a_start_for_a_search() -> None:
    encoded = _encoded()
    front = _pruner().front(encoded, points=5)
    assert front.objectives == ("distortion", "macs")
    assert len(front) >= 3
    assert (np.diff(front.values[:, 1]) < 0).all()  # ascending in the first, so falling in the second
    assert mp.Front.from_json(front.to_json()) == front
    found = mp.explore(
        encoded.graph, evaluations=len(front) + 1, init=front, data=_task("unseen").train, samples=40, levels=8
    )
    assert len(found) >= 1
    with pytest.raises(OptionError, match="points"):
        _pruner().front(encoded, points=0)


def test_a_network_outside_the_range_is_warned_of() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(*_plain((6, 200), True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 10)).eval()
    with pytest.warns(UserWarning, match="outside the range of the zoo.*log size") as seen:
        encoded = _pruner().encode(wide, _task("unseen").inputs)
    assert len(seen) == 1
    assert all(np.isfinite(curve[1:]).all() for curve in encoded.plain.values())
