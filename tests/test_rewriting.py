"""The rewriting head trained on a tiny zoo on digits: gradients, resuming, several processes, pruning with it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import metaprune as mp
from metaprune.cli_metanet import _rewriting
from metaprune.dataless import refit_without_data
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.metanet import ensembles
from metaprune.metanet.ensembles import Course
from metaprune.metanet.pruner import MetaPruner
from metaprune.metanet.rewrite_cases import Cases, Making, Shelf
from metaprune.metanet.rewrite_head import RewriteHead, gates_of
from metaprune.metanet.rewrite_training import RewriteCourse, Source, _error, trained_head
from metaprune.metanet.team import Team
from metaprune.metanet.weight_graph import WeightGraph
from tests.support import rewriting_team
from tests.support.little_zoo import LittleZoo, graph_of, images, pruner_of_zoo, task_of

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo is trained once

NAMES = ("plain-0", "chain-0", "residual-0")
COURSE = RewriteCourse(
    hidden=8, layers=1, masks=4, batches=2, size=64, steps=24, every=8, networks=2, memory=0.8, rate=1e-2,
    ratio=0.3, vector_ratio=0.3, refit=False,
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def sources(names: tuple[str, ...] = NAMES) -> list[Source]:
    return [Source(name, name.split("-")[0], lambda name=name: task_of(name)) for name in names]  # type: ignore[misc]


@cache
def fitted() -> tuple[RewriteHead, dict[str, Any]]:
    return trained_head(sources(), COURSE, 0, None)


def moved(head: RewriteHead, seed: int = 0) -> RewriteHead:
    """The head with weights at which it rewrites."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return head


def test_one_product_gives_the_gradient_of_the_loss(tmp_path: Path) -> None:
    making = Making(masks=2, batches=2, size=64, refit=True, seed=0)
    shelf = Shelf(["chain-0"], [lambda: task_of("chain-0")], making, tmp_path, 1)
    head, cases = moved(RewriteHead(8, 1)), shelf(0)
    parameters = [p for p in head.parameters() if p.requires_grad]
    mine = _error(head, RewriteCourse(), cases, 1, 1)
    plain = cases.loss(head(cases.graph, cases.kept[1], cases.starts[1]), 1, 1) / (float(cases.before[1]) + 0.1)
    assert float(mine.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    for one, two in zip(
        torch.autograd.grad(mine, parameters, allow_unused=True),
        torch.autograd.grad(plain, parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert float((one - two).abs().max()) <= 1e-5 * max(1.0, float(two.abs().max()))


def test_cases_are_what_they_say_and_few_are_held(tmp_path: Path) -> None:
    opened: list[str] = []

    def task(name: str) -> mp.Task:
        opened.append(name)
        return task_of(name)

    making = Making(masks=4, batches=2, size=64, refit=True, seed=0)
    shelf = Shelf(NAMES, [lambda name=name: task(name) for name in NAMES], making, tmp_path, 2)  # type: ignore[misc]
    first = [shelf(number) for number in range(3)]
    again = shelf(0)
    assert opened == [*NAMES, NAMES[0]]
    shelf(0)
    shelf(2)
    assert len(opened) == 4
    for one, two in zip(first[0].starts, again.starts, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert torch.equal(first[0].before, again.before)
    for cases in first:
        check(cases)


def check(cases: Cases) -> None:
    graph = cases.graph.graph
    cost = graph.coupling.costs
    fractions = []
    for mask, gates in enumerate(cases.kept):
        assert all(set(gate.unique().tolist()) <= {0.0, 1.0} and gate.sum() >= 1 for gate in gates.values())
        sizes = [float(gates[group.name].sum()) if group.name in gates else group.size for group in graph.groups]
        fractions.append(cost.evaluate("macs", torch.tensor([sizes]).double().numpy())[0] / cost.full.macs)
        keep = {name: tuple(gate.nonzero().flatten().tolist()) for name, gate in gates.items()}
        start = refit_without_data(graph, mp.Plan(keep, ""), seed=0)
        assert all(torch.equal(value, start[name]) for name, value in cases.starts[mask].items())
        with torch.no_grad():
            for batch, inputs in enumerate(cases.batches):
                assert torch.equal(cases.dense[batch], graph.run(None, next(iter(inputs.values()))))
            losses = [float(cases.loss(start, mask, batch)) for batch in range(2)]
            assert float(cases.before[mask]) == pytest.approx(sum(losses) / 2)
            assert float(cases.loss({}, mask, 0)) >= 0
    assert max(fractions) <= 0.7
    assert max(fractions) > 1.2 * min(fractions)


def test_the_loss_falls_and_the_best_step_on_families_held_out_is_kept() -> None:
    head, about = fitted()
    assert len(about["held out"]) == 1
    assert set(about["held out"]) | set(about["seen"]) == set(NAMES)
    history = about["history"]
    assert [row[0] for row in history] == [0, 8, 16, 24]
    assert history[-1][1] < 0.9 * history[0][1]
    assert about["step"] == min(history, key=lambda row: row[2])[0]
    assert _rewriting(about) == {"step": about["step"], "steps": 24, "loss": min(row[2] for row in history)}
    assert not any(parameter.requires_grad for parameter in head.parameters())


class _Stopped(Exception):
    pass


def test_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, whole = [0], ensembles.write_atomically

    def write(path: Path, content: bytes) -> None:
        writes[0] += 1
        if writes[0] == 2:
            raise _Stopped
        whole(path, content)

    monkeypatch.setattr(ensembles, "write_atomically", write)
    with pytest.raises(_Stopped):
        trained_head(sources(), COURSE, 0, tmp_path)
    head, about = trained_head(sources(), COURSE, 0, tmp_path)
    expected, told = fitted()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in expected.state_dict().items())
    assert about == told
    with pytest.raises(OptionError, match="written by another fit"):
        trained_head(sources(), replace(COURSE, rate=1e-3), 0, tmp_path)


def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    _, alone = trained_head(rewriting_team.sources(), rewriting_team.COURSE, 0, None)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.rewriting_team", str(tmp_path)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert [own["size"] for own in told] == [2, 2]
    assert told[0]["history"] == told[1]["history"]
    assert told[0]["weights"] == told[1]["weights"]
    for one, two in zip(alone["history"], told[0]["history"], strict=True):
        assert one == pytest.approx(two, abs=1e-5)


def test_rows_that_do_not_go_round_are_refused() -> None:
    assert Team(1, 2).share(torch.arange(5)).tolist() == [1, 3]
    with pytest.raises(OptionError, match="3 networks in a step can not be shared by 2 processes"):
        Team(0, 2).share_equally(torch.arange(3))


@cache
def pruner() -> MetaPruner:
    """The little zoo's pruner with a head that surely rewrites."""
    fitted_before = pruner_of_zoo()
    return MetaPruner(fitted_before.predictors, fitted_before.card, None, None, moved(RewriteHead(8, 1)))


@pytest.mark.filterwarnings("ignore:outside the range of the zoo")  # of weights alone little is in range here
def test_a_pruner_rewrites_before_the_cut_where_there_are_no_data(tmp_path: Path) -> None:
    path, graph, x = tmp_path / "x.safetensors", graph_of("unseen"), images()[1].images[:64]
    pruner().save(path)
    again = MetaPruner.load(path)
    assert again.card.items() >= pruner_of_zoo().card.items()
    one, two = (own.prune(graph, budget="macs=0.5") for own in (pruner(), again))
    assert one.plan == two.plan
    assert one.certificate is not None
    assert one.certificate.ok
    assert len(one.plan.provenance["rewritten"]) == 64
    head = pruner().rewriter
    assert head is not None
    with torch.no_grad():
        start = refit_without_data(graph, one.plan)
        expected = head(WeightGraph.of(graph), gates_of(graph, one.plan.keep), start)
        masked = graph.run(expected, x, gates_of(graph, one.plan.keep))
        assert float((one.module(x) - masked).abs().max()) < 1e-4
        assert torch.equal(one.module(x), two.module(x))
    off = pruner().prune(graph, budget="macs=0.5", rewrite=False)
    assert off.plan.keep == one.plan.keep
    assert "rewritten" not in off.plan.provenance
    data = task_of("unseen").train
    assert any("least squares" in note for note in pruner().prune(graph, budget="macs=0.5", data=data).notes)
    asked = pruner().prune(graph, budget="macs=0.5", data=data, rewrite=True)
    assert "rewritten" in asked.plan.provenance
    plain = pruner_of_zoo().prune(graph, budget="macs=0.5")  # no head: the closed form alone
    refit = mp.apply(graph.with_values(start), plain.plan).module
    assert plain.plan.keep == one.plan.keep
    with torch.no_grad():
        assert torch.equal(plain.module(x), refit(x))


def test_a_head_of_other_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    pruner().save(path)
    monkeypatch.setattr("metaprune.metanet.rewrite_head.FEATURES", "something else")
    with pytest.raises(LoadError, match="other features"):
        MetaPruner.load(path)
    monkeypatch.undo()
    with pytest.raises(LoadError, match="damaged"):
        RewriteHead.of(mp.metanet.rewrite_head.FEATURES, {"hidden": 9}, {})


def test_fit_makes_the_head_and_says_how_it_does() -> None:
    short = replace(COURSE, steps=2, every=1, masks=2)
    made = mp.fit(
        LittleZoo(NAMES[:2]), ("curves", "rewrite"), course=Course(2, 1, 8), members=1, samples=32, rewriting=short
    )
    assert made.rewriter is not None
    assert made.card["rewrite"]["seen"] + made.card["rewrite"]["held out"]
    assert len(made.card["rewrite"]["history"]) == 3
    for options in ({"rewriting": short}, {"heads": ("curves", "rewrite"), "zoo": iter([])}):
        arguments: dict[str, Any] = {"zoo": LittleZoo(), **options}
        with pytest.raises(OptionError):
            mp.fit(**arguments)
    with pytest.raises(OptionError, match="steps"):
        RewriteCourse(steps=0)
    broken = [Source("x", "x", lambda: task_of("nobody"))]
    with pytest.raises(MetapruneError, match="no network to learn rewriting on; x:"):
        trained_head(broken, short, 0, None)
