"""How far a pruned network is from the dense one once it has been fitted, measured on samples it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from metaprune.calibration import batch_size, joined, leaves_of, outputs_in
from metaprune.distances import distortion
from metaprune.graphs.errors import OptionError
from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph
from metaprune.graphs.surgery import cut
from metaprune.reconstruction import SAMPLES, Fit

Keep: TypeAlias = Mapping[str, tuple[int, ...]]
_SHARE = 0.4  # of the samples: so many, the first, are fitted on, and so many, the last, judge
_CHUNK = 50
_ROWS, _ROWS_PER_COLUMN, _STRENGTHS = 4096, 4, (1e-2,)  # coarser than a fit that is to be kept


class Judge:
    """Measures how far the outputs of pruned networks, fitted by least squares, are from the dense network's.

    The first two fifths of the samples are fitted on, and on the last two fifths the outputs are compared.
    """

    def __init__(self, graph: Graph, data: Any, samples: int = SAMPLES, seed: int = 0) -> None:
        """Takes a network, calibration data whose labels are not looked at, the most samples, and a seed.

        The seed is of the fit, and of noise.

        Raises:
            OptionError: Fewer than two samples, data that do not fit the network, or a network on the meta device.
        """
        if any(value.is_meta for value in graph.values.values()):
            raise OptionError("allocator: a network on the meta device can not be measured")
        leaves = leaves_of(graph, data, samples, seed)
        if len(leaves) < 2:
            raise OptionError("data: two samples are needed at least, one to fit on and one to judge by")
        self._graph, self._seed = graph, seed
        self._fitted = leaves[: max(1, round(_SHARE * len(leaves)))]
        self._judged = joined(graph, leaves[-max(1, round(_SHARE * len(leaves))) :], batch_size(graph) or _CHUNK)
        with torch.no_grad():
            self._wanted = [outputs_in(execute(graph, graph.values, batch)) for batch in self._judged]

    def distortions(self, plans: Sequence[Keep]) -> list[float]:
        """For each plan, kept units by group, the mean of `distortion`; infinite for a network that does not run."""
        with torch.no_grad():
            return [self._measured(keep) for keep in plans]

    def _measured(self, keep: Keep) -> float:
        small = cut(self._graph, keep).graph
        fit = Fit(
            self._graph,
            small,
            small.values,
            keep,
            self._fitted,
            seed=self._seed,
            rows=_ROWS,
            rows_per_column=_ROWS_PER_COLUMN,
            strengths=_STRENGTHS,
        )
        try:
            fit.run()
            found = [outputs_in(execute(small, fit.values, batch)) for batch in self._judged]
        except RuntimeError:  # the certificate will say what is wrong with this cut
            return float("inf")
        apart = [distortion(mine, theirs) for mine, theirs in zip(found, self._wanted, strict=True)]
        total = float(torch.cat(apart).mean())
        return total if total == total else float("inf")
