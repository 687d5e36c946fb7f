"""Measured latency: a table of operators timed alone, and what it predicts for a network and its cuts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from metaprune.engines import Machine, check_on_cpu, engine_called, module_of
from metaprune.graphs.calls import OperatorCall, callers_example, calls
from metaprune.graphs.errors import LoadError, OptionError, PlanError, check_seed
from metaprune.graphs.files import write_atomically
from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.polynomial import Counts, Size, Term
from metaprune.graphs.surgery import cut
from metaprune.latency_fit import KINDS, Correction, kind_of, operator_terms
from metaprune.timing import Timing, check_count, timings

Kept: TypeAlias = Plan | Sequence[float] | NDArray[Any]
SCHEMA = 1
_TOGETHER = 256  # operators that take turns
_ROUNDS = 15  # in which a whole network is measured: there are few of them, and all else hangs on them
_LEAST, _FASTEST = 0.15, 1e-9  # width of the narrowest random plan; seconds below which an operator counts as free


class LatencyTable:
    """Times of operators, each measured alone and remembered by operator, attributes, shapes, dtypes and layouts.

    Args:
        engine: `"torch"` or `"onnxruntime"`.
        threads: Threads that the engine has; on one, CPU time counts, on more, wall time.
        path: A file of such a table. If it exists it is read, and must be of this machine; `save` writes to it.

    Attributes:
        machine: What the times hold for.
        times: What was measured, by a description of the call.
        corrections: What `calibrate` found, by `network_key`.

    Raises:
        OptionError: An option has no meaning, or the file is of another machine.
        MetapruneError: The engine is not installed.
        LoadError: The file is damaged.
    """

    def __init__(self, engine: str = "torch", threads: int = 1, path: str | Path | None = None) -> None:
        self._engine = engine_called(engine, threads)
        if not isinstance(path, str | Path | None):
            raise OptionError(f"path: a path is needed, not a {type(path).__name__}")
        self._path = None if path is None else Path(path)
        self.machine = Machine.here(engine, threads)
        self.times: dict[str, Timing] = {}
        self.corrections: dict[str, Correction] = {}
        if self._path is not None and self._path.exists():
            self._take(_Stored.read(self._path), force=False)

    @classmethod
    def load(cls, path: str | Path, force: bool = False) -> LatencyTable:
        """Reads a table, with the engine and the threads that it was measured with.

        Args:
            path: What `save` wrote.
            force: Whether a table of another machine is taken. It stays that machine's, though operators which it
                lacks are measured here.

        Raises:
            OptionError: The table is of another machine.
            LoadError: The file can not be read or is damaged.
        """
        stored = _Stored.read(Path(path))
        table = cls(stored.machine.engine, stored.machine.threads)
        table._path = Path(path)
        table._take(stored, force)
        return table

    def save(self, path: str | Path | None = None) -> None:
        """Writes the table as JSON, atomically, to `path` or to its own file; raises `OptionError` if there is none."""
        target = self._path if path is None else Path(path)
        if target is None:
            raise OptionError("path: the table was made without a file, so one is needed here")
        body = {
            "schema": SCHEMA,
            "machine": asdict(self.machine),
            "times": {key: asdict(timing) for key, timing in self.times.items()},
            "corrections": {network: asdict(correction) for network, correction in self.corrections.items()},
        }
        write_atomically(target, json.dumps(body, indent=1).encode())

    def measure(self, graphs: Iterable[Graph]) -> list[dict[str, float]]:
        """Seconds of the operators of several networks, by node; those that the table lacks are measured.

        Raises:
            MetapruneError: A network is not on the CPU, or an operator does not run in the engine.
        """
        wanted = []
        missing: dict[str, OperatorCall] = {}
        for graph in graphs:
            found = self._calls(graph)
            missing |= {call.key: call for call in found if call.key not in self.times}
            wanted.append([(call.node, call.key) for call in found])
        self._time(list(missing.values()))
        return [{node: self.times[key].seconds for node, key in rows} for rows in wanted]

    def predict(self, graph: Graph, plan: Kept | None = None) -> float:
        """Seconds that a network, or what a plan leaves of it, takes for one call; see `predictions`."""
        return self.predictions(graph, [graph.coupling.costs.sizes if plan is None else plan])[0]

    def predictions(self, graph: Graph, plans: Iterable[Kept]) -> list[float]:
        """Seconds that a network takes for one call under each of several plans.

        It is the sum of the times of its operators, corrected if the network was calibrated. Operators that the table
        lacks are measured, those of all plans together.

        Args:
            graph: The whole network.
            plans: Plans for it, or kept counts of all its groups, shape [groups] each.

        Raises:
            OptionError: Counts do not fit.
            PlanError: A plan does not fit.
            MetapruneError: See `measure`.
        """
        cuts = [_planned(graph, plan) if isinstance(plan, Plan) else _narrowed(graph, plan) for plan in plans]
        return [self.correction(graph).total(sums) for sums in self._sums(cuts)]

    def correction(self, graph: Graph) -> Correction:
        """The correction of a network, none if it was not calibrated."""
        return self.corrections.get(network_key(graph), Correction())

    def calibrate(self, graph: Graph, plans: int = 10, seed: int = 0) -> Correction:
        """Measures the network and random cuts of it end to end and fits the correction of their operators' sum.

        In a network operators are fused, and data are handed on in the processor's caches; calls cost time between
        operators. A constant and one factor for each kind of operator stand for all that.

        Args:
            graph: The network.
            plans: How many networks are measured; the whole one is the first.
            seed: Of the random cuts.

        Raises:
            OptionError: An option has no meaning.
            MetapruneError: See `measure`.
        """
        check_count("plans", plans)
        cuts = [_narrowed(graph, counts) for counts in random_counts(graph, plans, seed)]
        sums = self._sums(cuts)
        runs = [self._engine.network(incision.graph, module_of(graph, incision)) for incision in cuts]
        measured = [timing.seconds for timing in timings(runs, self.machine.threads, _ROUNDS)]
        found = self.corrections[network_key(graph)] = Correction.fitted(sums, measured)
        return found

    def terms(self, graph: Graph, step: NDArray[np.int64] | None = None, plans: int = 9, seed: int = 0) -> list[Term]:
        """The latency in seconds as a polynomial in the kept counts, for `Costs.extended`.

        Every operator is measured at several widths, and a constant, its multiply-adds, the bytes that it reads and
        those that it writes are fitted to its times. Engines have steps (multiples of 4, 8 or 16 channels) that no
        polynomial has: it lies between what is measured at the widths that `step` allows. Operators that exist in cuts
        only, such as an index that fills an axis up, are left out.

        Args:
            graph: The network.
            step: For each group, the step its kept count moves in, shape [groups]; a group whose step is its size
                stays whole. None for steps of 1.
            plans: Number of widths.
            seed: Of the random widths.
        """
        check_count("plans", plans)
        kept = random_counts(graph, plans, seed, step)
        measured = self.measure(_narrowed(graph, counts).graph for counts in kept)
        correction, costs = self.correction(graph), graph.coupling.costs
        terms: list[Term] = [(Size(correction.intercept),)]
        for name, node in graph.nodes.items():
            rows = [i for i, times in enumerate(measured) if times.get(name, 0.0) > _FASTEST]
            if rows:
                seconds = np.array([measured[i][name] for i in rows])
                slope = Size(correction.slopes[kind_of(node.op)])
                terms += [(slope, *term) for term in operator_terms(costs, node, kept[rows], seconds)]
        return terms

    def provenance(self, graph: Graph) -> dict[str, Any]:
        """Where latencies of a network come from, for a plan: the machine, and whether their sum was calibrated."""
        return {**asdict(self.machine), "calibrated": network_key(graph) in self.corrections}

    def _calls(self, graph: Graph) -> list[OperatorCall]:
        for value in graph.values.values():
            check_on_cpu(value.device)
        return [call for call in calls(graph) if not self._engine.is_free(call)]

    def _sums(self, cuts: Sequence[Incision]) -> list[dict[str, float]]:
        """Summed seconds of the operators of cuts, by kind."""
        found = []
        for incision, times in zip(cuts, self.measure(incision.graph for incision in cuts), strict=True):
            sums: dict[str, float] = defaultdict(float)
            for name, seconds in times.items():
                sums[kind_of(incision.graph.nodes[name].op)] += seconds
            found.append(sums)
        return found

    def _time(self, missing: Sequence[OperatorCall]) -> None:
        """Measures calls and adds them to the table."""
        for start in range(0, len(missing), _TOGETHER):
            some, empty = missing[start : start + _TOGETHER], self._engine.empty()
            found = timings(self._engine.operators([*some, *empty]), self.machine.threads)
            overhead = found[-1].seconds if empty else 0.0
            for call, timing in zip(some, found[: len(some)], strict=True):
                self.times[call.key] = Timing(max(timing.seconds - overhead, 0.0), timing.spread)

    def _take(self, stored: _Stored, force: bool) -> None:
        difference = self.machine.difference(stored.machine)
        if difference and not force:
            raise OptionError(f"latency table {self._path} is of another machine: {difference}; see LatencyTable.load")
        self.machine, self.times, self.corrections = stored.machine, stored.times, stored.corrections


@dataclass(frozen=True)
class _Stored:
    """What a file holds."""

    machine: Machine
    times: dict[str, Timing]
    corrections: dict[str, Correction]

    @staticmethod
    def read(path: Path) -> _Stored:
        """Reads a file; raises `LoadError`."""
        try:
            body = json.loads(path.read_text())
            if body["schema"] != SCHEMA:
                raise ValueError(f"schema {SCHEMA} is needed")
            found = _Stored(
                Machine(**body["machine"]),
                {key: Timing(**row) for key, row in body["times"].items()},
                {network: Correction(**row) for network, row in body["corrections"].items()},
            )
            numbers = [n for timing in found.times.values() for n in (timing.seconds, timing.spread)]
            numbers += [
                n for row in found.corrections.values() for n in (row.intercept, *(row.slopes[k] for k in KINDS))
            ]
            if not all(type(n) in (int, float) and 0 <= n < np.inf for n in numbers):
                raise ValueError("a time is not a positive number")
            engine_called(found.machine.engine, found.machine.threads)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OptionError, RecursionError) as error:
            raise LoadError(f"latency table {path} can not be read: {error}") from None
        return found


def random_counts(graph: Graph, plans: int, seed: int, step: NDArray[np.int64] | None = None) -> Counts:
    """Kept counts, shape [plans, groups]: the whole network, then random cuts from wide to narrow.

    Each plan has a width of its own, and each of its groups a width between half of that and half as much again.

    Args:
        graph: The network.
        plans: How many.
        seed: Of the widths.
        step: See `LatencyTable.terms`.
    """
    check_seed(seed)
    groups = graph.groups
    sizes = np.array([group.size for group in groups], dtype=np.int64)
    least = np.array([group.size if group.pinned else max(1, group.minimum) for group in groups], dtype=np.int64)
    steps = np.ones_like(sizes) if step is None else np.asarray(step)
    generator = np.random.default_rng(seed)
    levels = np.linspace(1.0, _LEAST, plans)[:, None]
    widths = levels * generator.uniform(0.5, 1.5, (plans, len(groups)))
    widths[0] = 1.0
    whole = np.round(widths * sizes / steps) * steps
    return np.clip(whole, np.minimum(np.maximum(least, steps), sizes), sizes).astype(float)


def network_key(graph: Graph) -> str:
    """What a correction belongs to: a network, and the shapes of its inputs at the caller's batch size."""
    return " ".join([graph.fingerprint, *(str(list(value.shape)) for value in callers_example(graph).values())])


def _planned(graph: Graph, plan: Plan) -> Incision:
    if plan.graph and plan.graph != graph.fingerprint:
        raise PlanError("the plan was made for another network: its axis table differs")
    return cut(graph, plan.keep)


def _narrowed(graph: Graph, kept: Sequence[float] | NDArray[Any]) -> Incision:
    """The cut of a network in which each group keeps its first units, as many as `kept` says."""
    groups, counts = graph.groups, np.asarray(kept)
    if counts.shape != (len(groups),):
        raise OptionError(f"kept: one count for each of {len(groups)} groups is needed, not shape {list(counts.shape)}")
    keep = {}
    for group, count in zip(groups, counts.tolist(), strict=True):
        if not 0 < count <= group.size or count != int(count):
            raise OptionError(f"kept: group {group.name} can not keep {count} of {group.size} units")
        if count < group.size:
            keep[group.name] = tuple(range(int(count)))
    return cut(graph, keep)
