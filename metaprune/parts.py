"""A network in parts that are cut, repaired and judged alone, on features of the dense network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.calibration import Leaves, joined
from metaprune.graphs.cost import macs_by_node
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph, Node
from metaprune.graphs.segments import Segment, narrow_cuts, places, segments
from metaprune.objectives import FAULTS
from metaprune.search.division import Part
from metaprune.search.evaluate import Fidelity
from metaprune.search.ledger import Result
from metaprune.search.space import SearchSpace
from metaprune.trials import Bench, Trial

_CHUNK = 50  # samples that features are computed for together
_LEAST_SHARE = 1e-3  # of a whole evaluation: building a cut network takes time too


class Sections:
    """The parts of a network between narrow cuts, as a `metaprune.search.division.Division`.

    About as many parts as the square root of the number of variables, cut where the fewest groups play a role on both
    sides, and among such cuts where the parts' own groups are most evenly many. The features that the dense network
    has at each cut are computed once, when the first part is looked at.

    Attributes:
        forwards: What the features cost, as forward passes of one sample through the dense network.
    """

    def __init__(self, space: SearchSpace, bench: Bench) -> None:
        """Takes a space of the bench's graph, and the samples to look at parts with; nothing is done yet."""
        self._bench = bench
        self._space = space
        self.forwards = float(len(bench.repairing) + len(bench.judging))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts; none where there are no samples, or no cut that leaves something to choose on both sides."""
        total = sum(macs_by_node(self._bench.graph).values())
        names = {variable.name: number for number, variable in enumerate(self._space.variables)}
        return tuple(
            Part(
                segment.end or "output",
                tuple(sorted(names[name] for name in own)),
                max(_LEAST_SHARE, sum(macs_by_node(segment.graph).values()) / max(total, 1.0)),
            )
            for segment, own in zip(self._segments, self._units, strict=True)
        )

    @cached_property
    def _divided(self) -> tuple[list[Segment], list[Units]]:
        if not self._bench.judging:
            return [], []
        return _divided(self._bench.graph, self._space)

    @property
    def _segments(self) -> list[Segment]:
        return self._divided[0]

    @property
    def _units(self) -> list[Units]:
        return self._divided[1]

    def measure(self, number: int, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        """The relative squared error of a part's output, once the part is cut and repaired on its own inputs."""
        units = self._units[number]
        keep = {
            units[name][0]: tuple(sorted(units[name][1][list(chosen)].tolist()))
            for name, chosen in self._space.keep(config).items()
            if name in units
        }
        trial = Trial(self._benches[number], keep, fidelity.repair, fidelity.samples)
        try:
            with torch.no_grad():
                value = trial.feature_error()
        except (OptionError, torch.OutOfMemoryError):  # not the fault of this network
            raise
        except FAULTS as error:
            return Result(None, trial.forwards * self.parts[number].share, " ".join(str(error).split()))
        return Result((value,), trial.forwards * self.parts[number].share)

    @cached_property
    def _benches(self) -> list[Bench]:
        bench = self._bench
        repairing, judging = (
            _features(bench.graph, self._segments, leaves) for leaves in (bench.repairing, bench.judging)
        )
        return [
            Bench(segment.graph, first, second, bench.seed, bench.effort)
            for segment, first, second in zip(self._segments, repairing, judging, strict=True)
        ]


Units = Mapping[str, tuple[str, NDArray[np.int64]]]
"""For groups of the whole graph, the group of a part that is the same, and the number there of each of its units."""


def _divided(graph: Graph, space: SearchSpace) -> tuple[list[Segment], list[Units]]:
    """Segments and what each has of the space's groups; the most that leave something to choose in every part."""
    wanted = {variable.name for variable in space.variables}
    for count in range(max(1, round(len(wanted) ** 0.5)), 1, -1):
        found = segments(graph, even_cuts(graph, wanted, count))
        units: list[Units] = [_units(graph, segment.graph, wanted) for segment in found]
        if len(found) > 1 and all(units):
            return found, units
    return [], []


def even_cuts(graph: Graph, groups: set[str], parts: int) -> list[str]:
    """Narrow cuts into at most so many parts.

    The sum over the cuts of the groups on both sides is least, then the sum over the parts of the squares of the
    groups that are theirs alone; of equal cuts the last. Each part has one such group at least.

    Args:
        graph: The graph.
        groups: Names of those that count.
        parts: At most this many; fewer where there are not enough cuts.
    """
    cuts = narrow_cuts(graph)
    chosen = np.array([group.name in groups for group in graph.groups], dtype=bool)
    span = places(graph, cuts)[chosen]
    span = span[span[:, 0] >= 0]
    ends = range(len(cuts))
    across = [int(((span[:, 0] <= cut) & (span[:, 1] > cut)).sum()) for cut in ends]

    def own(after: int, until: int) -> int:
        return int(((span[:, 0] > after) & (span[:, 1] <= until)).sum())

    best: dict[int, tuple[tuple[int, int], list[int]]] = {-1: ((0, 0), [])}
    for _ in range(parts - 1):
        longer: dict[int, tuple[tuple[int, int], list[int]]] = {}
        for last, ((crossing, squares), way) in best.items():
            for cut in range(last + 1, len(cuts)):
                size = own(last, cut)
                value = crossing + across[cut], squares + size**2
                if size and (cut not in longer or value <= longer[cut][0]):
                    longer[cut] = value, [*way, cut]
        if not longer:
            break
        best = longer
    finished = [
        ((crossing, squares + own(last, len(cuts)) ** 2, [-cut for cut in way]), way)
        for last, ((crossing, squares), way) in best.items()
        if own(last, len(cuts))
    ]
    return [cuts[cut] for cut in min(finished, key=lambda item: item[0])[1]] if finished else []


def _units(whole: Graph, part: Graph, wanted: set[str]) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """The groups that a part has as the whole graph has them, free to shrink."""
    theirs = {_signature(group): group for group in part.groups if not group.pinned and group.slices}
    found = {}
    for group in whole.groups:
        same = theirs.get(_signature(group)) if group.name in wanted else None
        if same is not None:
            first = _rows(group)
            place = {row: number for number, row in enumerate(_rows(same))}
            found[group.name] = same.name, np.array([place[row] for row in first], dtype=np.int64)
    return found


def _signature(group: Group) -> frozenset[tuple[str, int, frozenset[tuple[int, ...]]]]:
    """What a group takes from which tensors, whatever the order of its units."""
    return frozenset(
        (part.tensor, part.dim, frozenset(tuple(sorted(row)) for row in part.index.tolist())) for part in group.slices
    )


def _rows(group: Group) -> list[tuple[tuple[str, int, tuple[int, ...]], ...]]:
    """What goes with each unit."""
    slices = sorted(group.slices, key=lambda part: (part.tensor, part.dim))
    return [
        tuple((part.tensor, part.dim, tuple(sorted(part.index[unit].tolist()))) for part in slices)
        for unit in range(group.size)
    ]


def _features(graph: Graph, found: Sequence[Segment], leaves: Sequence[Leaves]) -> list[list[Leaves]]:
    """For each segment the values of its input nodes, one sample at a time."""
    result: list[list[Leaves]] = [list(leaves) if not segment.source else [] for segment in found]
    sources = {segment.source: number for number, segment in enumerate(found) if segment.source}

    def watch(node: Node, value: Any) -> None:
        if node.name in sources:
            features: Tensor = value
            result[sources[node.name]] += [{node.name: row} for row in torch.split(features, 1)]

    with torch.no_grad():
        for batch in joined(graph, leaves, _CHUNK):
            execute(graph, graph.values, batch, watch=watch)
    return result
