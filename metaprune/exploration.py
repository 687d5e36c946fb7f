"""Searches for the trade-off between what a pruned network is worth and what it costs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from metaprune.calibration import repeatable
from metaprune.criteria import find as find_criterion
from metaprune.graphs.errors import MetapruneError, NothingFound, OptionError, check_seed
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.trace import trace
from metaprune.latency import LatencyTable
from metaprune.objectives import Objectives, named_objective
from metaprune.parts import Sections
from metaprune.planning import may_shrink, patterns
from metaprune.ranking import default_criterion, unit_scores
from metaprune.search import backends
from metaprune.search.budget import Budget
from metaprune.search.evaluate import SAMPLES, Evaluator, Fidelity
from metaprune.search.front import Front
from metaprune.search.ledger import Ledger, Result
from metaprune.search.space import LEVELS, Configs, SearchSpace
from metaprune.search.workers import Workers
from metaprune.task import Task
from metaprune.training import Progress, seeded

Watch: TypeAlias = Callable[[Front, int, int], None]
"""Called after each evaluation with the front so far, the evaluations made and those allowed."""
Start: TypeAlias = Front | Iterable[Plan]


def explore(
    target: Task | Graph,
    backend: str = "random",
    objectives: Sequence[str] | None = None,
    evaluations: int = 100,
    budget: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    init: Start | None = None,
    data: Any = None,
    criterion: str | None = None,
    levels: int = LEVELS,
    round_to: int = 1,
    protect: Iterable[str] = (),
    only: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    samples: int = SAMPLES,
    repair: str = Fidelity.repair,
    latency: LatencyTable | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Front:
    """Looks for networks of which none is better than another in everything.

    A network keeps, of each group that may shrink, so many units, the best by a criterion. It is cut, repaired in
    closed form and judged; nothing is trained. What comes out is the front of all that were judged, each point with
    the plan that makes it: `mp.recover(mp.apply(graph, point.plan), task)` goes on from there.

    Args:
        target: A task; or a graph, with calibration data and without labels.
        backend: The search; see `metaprune.search.backends.BACKENDS`. `"random"` draws over the whole range of costs.
            `"dp"` judges networks in which one group alone has shrunk, takes what they lose to add up, and solves for
            the best at every cost; what is left goes into neighbours of the front. `"spdy"` also corrects, at
            several costs, how much each group counts. Neither has a random choice; both look at the first objective
            that is no cost, and pay where each group gets several evaluations. `"nsga2"` breeds networks from the
            best so far, beginning with `init` and with networks whose groups all keep about the same share. `"emo"`
            does so in every part of the network, on the dense network's features, and joins the parts' fronts.
        objectives: What is to be small, the first being what a point is chosen for: `"error"` (1 - the task's metric
            on `val`), `"distortion"` (of the outputs, without labels), the kept fractions `"macs"`, `"params"`,
            `"bytes"` and `"memory"` (bytes of activations alive at once), and `"latency_ms"`. By default
            `("error", "macs")` for a task, else `("distortion", "macs")`.
        evaluations: Networks that may be judged; a part of one counts by its share of the multiply-adds.
        budget: What all of them are within, such as `"macs=0.5"`; by default nothing is asked for.
        out: Folder of the search: `ledger.jsonl` (every evaluation, on the disk as soon as it is made), `space.json`
            and, at the end, `front.json`. A search that was killed, called again with the same arguments, goes on and
            gives what it would have given, to the bit; with more `evaluations` it goes further.
        seed: Of every random choice.
        init: A front, or plans, of this network to start from; they are brought within the budget. Of each, the
            number of units in every group counts, as near as the levels allow.
        data: Calibration data: batches of inputs or of (inputs, labels), or `"noise"`. By default a task's `train`.
        criterion: How units are ranked; see `metaprune.criteria.CRITERIA`. By default `"fisher_block"` where there
            are data, else `"magnitude"`.
        levels: At most this many widths of a group are tried.
        round_to: Kept channel counts are multiples of this.
        protect: Globs of groups or tensors that stay whole.
        only: Globs of the groups or tensors that may shrink; empty for all.
        kinds: Kinds of groups that may shrink; None for all.
        samples: Samples that each network is repaired with; as many judge its distortion.
        repair: `"least_squares"` (see `metaprune.reconstruct`), `"recalibrate"` (batch norms) or `"none"`.
        latency: Table of timed operators, for `"latency_ms"`. Operators that it lacks are timed, and times differ from
            run to run; those of evaluations in `out` do not change any more.
        workers: Processes that judge networks at the same time, each on one thread: as many as are judged between two
            decisions of a back end can be shared out, but for parts of networks. The front is that of one process on
            one thread.
        progress: Called after each evaluation with the evaluations spent and those allowed.
        watch: Called after each evaluation with the front so far, and the same two numbers.

    Returns:
        The front. `front.forwards` is what its evaluations cost, as forward passes of one sample through the dense
        network; ranking the units comes on top.

    Raises:
        OptionError: An option has no meaning, there are no samples, `out` belongs to another search, or all
            objectives are costs where the back end needs one that is not.
        NothingFound: None of the networks that were judged runs, or every one gave a value that is not finite.
        BudgetInfeasible: No network is within the budget; `attainable` is the least fraction.
        PlanError: `init` is of another network.
        LoadError: The ledger in `out` is damaged.
    """
    if not isinstance(target, (Task, Graph)):
        raise OptionError(f"target: a Task or a Graph is needed, not a {type(target).__name__}")
    check_seed(seed)
    task = target if isinstance(target, Task) else None
    names = _objectives(objectives, task)
    run = backends.find(backend)
    goal = None if budget is None else Budget.parse(budget)
    fidelity = Fidelity(samples, repair)
    data = task.train if task is not None and data is None else repeatable(data)
    graph = target if isinstance(target, Graph) else trace(target.model, target.inputs)
    criterion = default_criterion(criterion, data)
    protect, only = patterns("protect", protect), patterns("only", only)
    free, step, least = may_shrink(graph, round_to, protect, only, None if kinds is None else patterns("kinds", kinds))
    space = SearchSpace.of(graph, free, _scores(graph, free, criterion, data, seed), step, least, levels)
    start = space.repair(_start(space, init), goal)
    judge = Objectives(graph, names, data, task, samples, seed, latency)
    if workers != 1 and latency is not None:
        raise OptionError("workers: latencies are timed in one process")
    provenance = {
        "backend": backend,
        "seed": seed,
        "budget": "" if goal is None else goal.text,
        "criterion": criterion,
        "fidelity": str(fidelity),
    }
    search = {
        "network": graph.fingerprint,
        "objectives": list(names),
        **provenance,
        "metric": None if task is None else _name(task.metric),
        "weights": judge.weights,
        "data": judge.data,
        "space": space.digest,
        "init": hashlib.sha256(start.tobytes()).hexdigest(),
    }

    def measure(config: Configs, level: Fidelity) -> Result:
        return judge(space.keep(config), level)

    def after(evaluator: Evaluator) -> None:
        if progress is not None:
            progress(evaluations - evaluator.left, evaluations)
        if watch is not None:
            watch(evaluator.front(), evaluations - evaluator.left, evaluations)

    with Workers(measure, workers) as pool, _ledger(out, search, space) as ledger:  # a worker must not hold the ledger
        evaluator = Evaluator(
            space,
            names,
            measure,
            evaluations,
            fidelity,
            ledger,
            after,
            provenance,
            judge.forwards,
            Sections(space, judge.bench),
            pool,
            judge.dense,
        )
        front = run(space, evaluator, goal, seed, start)
        if not front.points:
            raise NothingFound(f"explore: none of {front.evaluations} networks could be judged; {evaluator.fault}")
        if ledger is not None:
            front.save(ledger.path.with_name("front.json"))
    return front


def _objectives(objectives: Sequence[str] | None, task: Task | None) -> tuple[str, ...]:
    if objectives is None:
        return ("distortion" if task is None else "error", "macs")
    names = patterns("objectives", objectives)
    if not names or len(set(names)) < len(names):
        raise OptionError(f"objectives: one or more different names are needed, not {list(names)}")
    for name in names:
        named_objective(name)
    return names


def _scores(graph: Graph, free: Sequence[int], criterion: str, data: Any, seed: int) -> list[Any]:
    """Scores of the units of the groups that may shrink, the same whenever the same loader is gone through."""
    groups = [graph.groups[i] for i in free]
    if not find_criterion(criterion).data:
        return unit_scores(graph, groups, criterion, None, seed)[0]
    with seeded(PortableModule(graph, shared=True), data, seed):
        return unit_scores(graph, groups, criterion, data, seed)[0]


def _start(space: SearchSpace, init: Start | None) -> Configs:
    """The configurations nearest to those that a search is to start from, each once."""
    if init is None:
        return space.checked([])
    plans = [point.plan for point in init.points] if isinstance(init, Front) else init
    if isinstance(plans, (str, Plan)) or not isinstance(plans, Iterable):
        raise OptionError(f"init: a Front or plans are needed, not a {type(init).__name__}")
    found = []
    for plan in plans:
        if not isinstance(plan, Plan):
            raise OptionError(f"init: a Front or plans are needed, not a {type(plan).__name__}")
        found.append(tuple(space.encode(plan).tolist()))
    return space.checked(np.array(list(dict.fromkeys(found)), dtype=np.int64))


@contextlib.contextmanager
def _ledger(out: str | Path | None, search: dict[str, Any], space: SearchSpace) -> Iterator[Ledger | None]:
    if out is None:
        yield None
        return
    if not isinstance(out, (str, Path)):
        raise OptionError(f"out: a path is needed, not a {type(out).__name__}")
    with Ledger(Path(out) / "ledger.jsonl", search) as ledger:
        try:
            write_atomically(ledger.path.with_name("space.json"), space.to_json().encode())
            yield ledger
        except OSError as error:
            raise MetapruneError(f"out: {out} can not be written: {error.strerror or error}") from error


def _name(metric: object) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "__qualname__", type(metric).__name__))
