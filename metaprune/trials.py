"""Plans tried without any training: a network is cut, repaired in closed form and compared with the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from metaprune.calibration import Leaves, joined, outputs_in
from metaprune.distances import distortion, relative_error
from metaprune.graphs.cost import Cost, counted
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph, Meta
from metaprune.graphs.surgery import cut
from metaprune.reconstruction import FINE, Effort, Fit
from metaprune.recovery import recalibrate_values

Keep: TypeAlias = Mapping[str, tuple[int, ...]]
"""The units that stay, by group, where any go."""

_CHUNK = 50
_BATCH = 128  # samples that give one mean and variance when batch norms are recalibrated


class Bench:
    """What all networks that are cut from one graph are repaired and judged on.

    Args:
        graph: The dense network.
        repairing: Samples to repair with.
        judging: Samples to compare outputs on.
        seed: Of the repair.
        effort: What goes into a fit by least squares.
    """

    def __init__(
        self,
        graph: Graph,
        repairing: Sequence[Leaves] = (),
        judging: Sequence[Leaves] = (),
        seed: int = 0,
        effort: Effort = FINE,
    ) -> None:
        self.graph, self.seed, self.effort = graph, seed, effort
        self.repairing, self.judging = repairing, judging

    @cached_property
    def batches(self) -> list[Leaves]:
        """The samples that judge, put together; for errors see `metaprune.calibration.joined`."""
        return joined(self.graph, self.judging, _CHUNK)

    @cached_property
    def wanted(self) -> list[list[Tensor]]:
        """The dense network's floating-point outputs for each of the batches."""
        with torch.no_grad():
            return [outputs_in(execute(self.graph, self.graph.values, batch)) for batch in self.batches]

    def check_finite(self) -> None:
        """Raises `MetapruneError` where the dense network's outputs are not finite; then no trial tells anything."""
        if not all(bool(torch.isfinite(output).all()) for outputs in self.wanted for output in outputs):
            raise MetapruneError("data: the network's output is not finite")

    @cached_property
    def cost(self) -> Cost:
        """Cost of the dense network."""
        return counted(self.graph)

    @cached_property
    def macs(self) -> float:
        """Multiply-adds of one sample in the dense network."""
        return max(self.cost.macs, 1) / _example_batch(self.graph)


class Trial:
    """One cut network, made as far as it is asked for. Nothing of it needs gradients.

    Args:
        bench: What it is tried on.
        keep: The units that stay.
        repair: `"least_squares"`, `"recalibrate"` (statistics of batch norms only) or `"none"`.
        samples: At most this many samples repair it; None for all there are.
    """

    def __init__(self, bench: Bench, keep: Keep, repair: str = "least_squares", samples: int | None = None) -> None:
        self.bench = bench
        self.keep = keep
        self._repair = repair
        self._leaves = bench.repairing[:samples]
        self._passes = 0
        self._spent = 0.0

    @cached_property
    def graph(self) -> Graph:
        """The cut graph."""
        return cut(self.bench.graph, self.keep).graph

    @cached_property
    def cost(self) -> Cost:
        """Its cost, counted on the shapes that it has."""
        return counted(self.graph)

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """Its tensors, repaired."""
        if self._repair == "recalibrate":
            values = {name: value.clone() for name, value in self.graph.values.items()}
            batches = joined(self.graph, self._leaves, _BATCH)
            if recalibrate_values(self.graph, values, batches):
                self.passed(len(self._leaves))
            return values
        if self._repair == "none":
            return self.graph.values
        bench = self.bench
        fit = Fit(
            bench.graph, self.graph, self.graph.values, self.keep, self._leaves, seed=bench.seed, effort=bench.effort
        )
        fit.run()
        self.passed(fit.samples)
        self._spent += fit.samples + fit.macs / bench.macs
        return fit.values

    def distortion(self) -> float:
        """Mean of `metaprune.distances.distortion` over the samples that judge."""
        apart = [distortion(mine, theirs) for mine, theirs in zip(self._outputs(), self.bench.wanted, strict=True)]
        return float(torch.cat(apart).mean())

    def feature_error(self) -> float:
        """Mean of `metaprune.distances.relative_error` over the batches that judge, whatever the output means."""
        apart = [relative_error(mine, theirs) for mine, theirs in zip(self._outputs(), self.bench.wanted, strict=True)]
        return float(torch.cat(apart).mean())

    def _outputs(self) -> list[list[Tensor]]:
        """Outputs for each of the batches that judge."""
        values = self.values
        self.passed(len(self.bench.judging))
        return [outputs_in(execute(self.graph, values, batch)) for batch in self.bench.batches]

    def passed(self, samples: int) -> None:
        """Counts that many samples through the cut network."""
        self._passes += samples

    @property
    def forwards(self) -> float:
        """What was spent on it so far, as forward passes of one sample through the dense network.

        That is its passes by their multiply-adds, and the second moments of a fit; factorisations are not counted.
        """
        if not self._passes:
            return self._spent
        return self._spent + self._passes * self.cost.macs / max(self.bench.cost.macs, 1)


def _example_batch(graph: Graph) -> int:
    """Samples in the batch that costs are of."""
    for name, value in graph.example.items():
        meta = graph.nodes[name].meta
        if isinstance(meta, Meta) and meta.batched and meta.batched[0]:
            return max(1, round(len(value) * graph.batch))
    return 1
