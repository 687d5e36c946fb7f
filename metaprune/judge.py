"""How far a pruned network is from the dense one once it has been fitted, measured on samples it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metaprune.calibration import leaves_of
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.reconstruction import COARSE, SAMPLES
from metaprune.trials import Bench, Keep, Trial

_SHARE = 0.4  # of the samples: so many, the first, are fitted on, and the others judge


class Judge:
    """Measures how far the outputs of pruned networks, fitted by least squares, are from the dense network's.

    The first two fifths of the samples are fitted on, more coarsely than for a fit that is to be kept, and on the other
    three fifths the outputs are compared.
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
        count = max(1, round(_SHARE * len(leaves)))
        self._bench = Bench(graph, leaves[:count], leaves[count:], seed, COARSE)

    def distortions(self, plans: Sequence[Keep]) -> list[float]:
        """For each plan, kept units by group, the mean of `distortion`.

        It is infinite for a network that does not run or gives values that are not finite.

        Raises:
            MetapruneError: The dense network's output is not finite.
        """
        self._bench.check_finite()
        with torch.no_grad():
            return [self._distortion(keep) for keep in plans]

    def _distortion(self, keep: Keep) -> float:
        try:
            found = Trial(self._bench, keep).distortion()
        except (OptionError, torch.OutOfMemoryError):
            raise
        except (MetapruneError, RuntimeError):  # the certificate will say what is wrong with this cut
            return float("inf")
        return found if found == found else float("inf")
