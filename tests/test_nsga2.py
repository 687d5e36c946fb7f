"""NSGA-II over levels: what it breeds, what it makes of failures and of kills, and that processes change nothing."""

import copy
import dataclasses
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import metaprune as mp
from metaprune.graphs.errors import MetapruneError, NothingFound, OptionError
from metaprune.graphs.plan import Plan
from metaprune.objectives import OBJECTIVES, Objectives
from metaprune.search.backends import find
from metaprune.search.evaluate import Evaluator, Fidelity
from metaprune.search.evolution import Evolution
from metaprune.search.front import Front
from metaprune.search.ledger import Ledger, Result
from metaprune.search.regression import Regression
from metaprune.search.space import Configs
from metaprune.search.workers import Workers
from tests.support import digits_search
from tests.support.toy import INTERACTING, SEPARABLE, Toy

QUICK: dict[str, Any] = {"samples": 32, "criterion": "magnitude", "repair": "none"}


def _search(toy: Toy, evaluations: int, seed: int = 0, init: Configs | None = None) -> Front:
    start = toy.space.checked([]) if init is None else init
    return find("nsga2")(toy.space, toy.evaluator(evaluations), None, seed, start)


def _unknown(configs: Configs) -> NDArray[np.float64]:
    return np.full((len(configs), 2), np.nan)


# What is bred


def test_a_regression_knows_sums_of_squares_once_it_has_seen_enough() -> None:
    draw = np.random.default_rng(0)
    levels = draw.integers(2, 9, 6)
    weights = draw.lognormal(size=(6, 2))

    def values(configs: Configs) -> NDArray[np.float64]:
        gone = 1 - configs / (levels - 1)
        return gone**2 @ weights + gone @ weights[::-1] + 3.0

    seen, other = (draw.integers(0, levels, (n, 6)) for n in (2000, 50))
    exact = values(other)
    assert Regression(levels, seen, values(seen))(other) == pytest.approx(exact, abs=0.02 * np.ptp(exact))
    few = Regression(levels, seen[:1], values(seen[:1]))(other)
    assert np.isfinite(few).all()
    alike = np.stack([values(np.full((1, 6), level))[0] for level in (0, 1)])  # of the diagonal alone, with few levels
    guess = Regression(np.full(6, 2), np.array([[0] * 6, [1] * 6]), alike)(np.array([[0] * 6, [1] * 6]))
    assert guess == pytest.approx(alike, abs=1e-6)


def test_nothing_is_asked_for_twice_and_what_fails_is_let_go() -> None:
    levels = np.full(4, 4)

    def grown(seed: int) -> NDArray[np.int64]:
        engine = Evolution(levels, _unknown, seed, np.array([[3, 3, 3, 3], [0, 0, 0, 0]]))
        asked: list[Configs] = []
        while len(rows := engine.ask(1000)):
            asked.append(rows)
            values = np.stack([((3 - rows) ** 2).sum(1), rows.sum(1)], axis=1).astype(float)
            values[rows[:, 0] == 2] = np.inf, 0.0
            engine.tell(rows, values)
        return np.concatenate(asked)

    rows = grown(0)
    assert rows[:2].tolist() == [[3] * 4, [0] * 4]
    assert len(np.unique(rows, axis=0)) == len(rows) <= 4**4
    assert (rows >= 0).all()
    assert (rows < levels).all()
    assert (rows[60:, 0] == 2).mean() < (rows[2:18, 0] == 2).mean()
    assert (grown(0) == rows).all()
    assert not np.array_equal(grown(1), rows)


def test_a_population_begins_along_the_diagonal_and_again_when_nothing_runs() -> None:
    engine = Evolution(np.full(40, 8), _unknown, 0, np.empty((0, 40), dtype=np.int64))
    first = engine.ask(1000)
    means = np.sort(first.mean(axis=1))
    assert len(first) == engine.size == 40
    assert means[0] == 0
    assert means[-1] == 7
    assert np.diff(means).max() < 0.6
    assert (np.ptp(first, axis=1) <= 1).all()
    assert np.sort(first[:8].mean(axis=1)) == pytest.approx(np.arange(8) * 0.9, abs=0.6)  # any first part is spread
    engine.tell(first, np.full((40, 2), np.inf))
    again = engine.ask(1000)
    assert len(again) > 20
    assert not {row.tobytes() for row in again} & {row.tobytes() for row in first}


def test_exact_fronts_are_approached() -> None:
    for toy, least in ((SEPARABLE, 0.96), (INTERACTING, 0.97)):
        best = float(moocore.hypervolume(toy.exact, ref=[1, 1]))
        assert _search(toy, 1000).hypervolume() >= least * best
        start = find("dp")(toy.space, toy.evaluator(300), None, 0, toy.space.checked([]))
        init = toy.space.checked([point.config for point in start.points])
        seeded = _search(toy, 400, init=init)
        assert seeded.hypervolume() >= max(start.hypervolume(), 0.97 * best)
    assert seeded.hypervolume() > start.hypervolume() + 0.002 * best  # the twin in which harms do not add up


def test_small_spaces_are_searched_to_the_end() -> None:
    toy = Toy(2.0, 1, 3)
    evaluate = toy.evaluator(1000)
    front = find("nsga2")(toy.space, evaluate, None, 0, toy.space.checked([]))
    assert np.sort(front.values, axis=0) == pytest.approx(np.sort(toy.exact, axis=0), abs=1e-12)
    assert evaluate.evaluations <= 8**3


# Failures


def test_networks_that_fail_are_counted_and_written_down_but_never_ranked(tmp_path: Path) -> None:
    toy = SEPARABLE

    def measure(config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        if config[0] == 3:
            return Result((float("nan"), 0.0), 1.0)
        return Result(None, 1.0, "singular") if config[1] > 5 else toy.measure(config, fidelity)

    with Ledger(tmp_path / "ledger.jsonl", {}) as ledger:
        evaluate = Evaluator(toy.space, ("error", "macs"), measure, 200, ledger=ledger)
        front = find("nsga2")(toy.space, evaluate, None, 0, toy.space.checked([]))
        failed = [result for result in ledger.results.values() if result.values is None]
    assert 0 < len(failed) == evaluate.failed == front.failed < 150
    assert {result.note for result in failed} == {"singular", "a value is not finite"}
    assert all(point.config[0] != 3 and point.config[1] <= 5 for point in front.points)
    assert Front.from_json(front.to_json()) == front


def test_a_metric_that_raises_fails_the_network_and_a_search_of_failures_has_a_name(tmp_path: Path) -> None:
    task = digits_search.task()
    calls = [0]

    def fussy(logits: torch.Tensor, labels: torch.Tensor) -> float:
        calls[0] += 1
        if calls[0] > batches:  # the dense network comes first
            raise ZeroDivisionError("no true positives")
        return 0.5

    batches = len(list(task.val))
    lame = dataclasses.replace(task, metric=fussy)
    with pytest.raises(NothingFound, match="none of 5 networks could be judged; no true positives"):
        mp.explore(lame, "nsga2", evaluations=5, out=tmp_path, **QUICK)
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"no true positives") == 5


# Kills


def _toy_search(path: Path) -> str:
    with Ledger(path, {"seed": 0}) as ledger:
        evaluate = INTERACTING.evaluator(160, ledger)
        return find("nsga2")(INTERACTING.space, evaluate, None, 0, INTERACTING.space.checked([])).to_json()


def test_fifteen_kills_change_nothing(tmp_path: Path) -> None:
    path, draw = tmp_path / "killed.jsonl", random.SystemRandom()
    context = multiprocessing.get_context("fork")
    undisturbed = _toy_search(tmp_path / "whole.jsonl")
    for _ in range(15):
        before = path.read_bytes() if path.exists() else b""
        process = context.Process(target=_toy_search, args=(path,))
        process.start()
        lines = before.count(b"\n") + draw.randint(0, 9)
        while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.003)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the search ended before it was killed"
        assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert _toy_search(path) == undisturbed
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# Processes


def test_two_processes_make_the_same_evaluations_and_the_same_front(tmp_path: Path) -> None:
    task = digits_search.task()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options: dict[str, Any] = {**QUICK, "repair": "least_squares", "evaluations": 24}
        fronts = [mp.explore(task, "nsga2", out=tmp_path / str(n), workers=n, **options) for n in (1, 2)]
    finally:
        torch.set_num_threads(threads)
    assert fronts[0].to_json() == fronts[1].to_json()
    alone, together = ((tmp_path / str(n) / "ledger.jsonl").read_bytes() for n in (1, 2))
    assert alone == together


def test_workers_answer_in_order_raise_what_is_raised_and_end_with_their_parent() -> None:
    def slow(config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        time.sleep(0.05 if config[0] % 2 else 0.0)
        if config[0] == 98:
            os._exit(1)
        if config[0] == 99:
            raise OptionError("ninety-nine")
        return Result((float(config[0]), float(os.getpid())), 1.0)

    rows = np.arange(12)[:, None]
    with Workers(slow, 3) as pool:
        values = [result.values or () for result in pool(rows, Fidelity())]
        pids = {int(pid) for _, pid in values}
        assert [value for value, _ in values] == list(range(12))
        assert 1 < len(pids) <= 3
        assert os.getpid() not in pids
        with pytest.raises(OptionError, match="ninety-nine"):
            list(pool(np.array([[99]]), Fidelity()))
    with pytest.raises(MetapruneError, match="a process ended before it was done"), Workers(slow, 2) as pool:
        list(pool(np.array([[98]]), Fidelity()))
    line, other = multiprocessing.Pipe()

    def parent() -> None:
        with Workers(slow, 2) as workers:
            other.send([process.pid for process in workers._processes])
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    orphans = line.recv()
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in orphans)
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(OptionError, match="workers: at least 1 is needed"):
            Workers(slow, wrong)  # type: ignore[arg-type]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Objectives


def test_memory_and_latency_are_those_of_the_cut_network() -> None:
    task = digits_search.task()
    graph = mp.trace(task.model, task.inputs)
    keep = {group.name: tuple(range(0, group.size, 2)) for group in graph.groups if not group.pinned}
    table = mp.LatencyTable()
    names = ("memory", "latency_ms")
    judge = Objectives(graph, names, latency=table)
    found = judge(keep, Fidelity()).values
    pruned = mp.apply(graph, Plan(keep, graph.fingerprint), certify=False)
    assert found is not None
    assert found[0] == pytest.approx(_peak(pruned.module, task) / _peak(task.model, task), rel=1e-9)
    assert found[1] == 1000 * table.predict(graph, Plan(keep, ""))
    assert judge.dense == {"memory": 1.0, "latency_ms": 1000 * table.predict(graph)}
    with pytest.raises(OptionError, match="latency: objective 'latency_ms' needs a LatencyTable"):
        mp.explore(graph, objectives=("latency_ms",), **QUICK)
    with pytest.raises(OptionError, match="workers: latencies are timed in one process"):
        mp.explore(graph, objectives=("latency_ms",), latency=table, workers=2, **QUICK)
    assert sorted(OBJECTIVES) == ["bytes", "distortion", "error", "latency_ms", "macs", "memory", "params"]
    front = mp.explore(task, "nsga2", ("error", "macs", "memory"), 20, **QUICK)
    assert front.provenance["dense"] == {"error": pytest.approx(1 - task.score()), "macs": 1.0, "memory": 1.0}


def _peak(model: torch.nn.Module, task: mp.Task) -> int:
    """Bytes of activations alive at once for one sample, from the nodes of a fresh trace, step by step."""
    graph = mp.trace(copy.deepcopy(model), task.inputs)
    names = [name for name, node in graph.nodes.items() if node.op != "tensor"]
    most = 0
    for at, name in enumerate(names):
        alive = [
            other
            for i, other in enumerate(names)
            if i <= at and (other == name or any(names.index(user) >= at for user in graph.users[other]))
        ]
        shapes = [graph.nodes[other].shape for other in alive]
        most = max(most, sum(4 * int(np.prod(shape)) // shape[0] for shape in shapes))
    return most
