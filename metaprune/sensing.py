"""The public call for sensitivity curves: options, ranking of the units, and where the curves come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaprune import criteria
from metaprune.calibration import NOISE, leaves_of, repeatable
from metaprune.curves import Sensitivity, weights_digest
from metaprune.distances import kinds_of
from metaprune.graphs.errors import OptionError, check_seed
from metaprune.graphs.ir import Graph
from metaprune.ranking import Scores, default_criterion, score
from metaprune.refits import consumers
from metaprune.statistics import SAMPLES
from metaprune.tables import ANCHORED, LEVELS, MEASURED, ONE_PASS, Table, tabulate

WEIGHTS = "weights"
METHODS = (MEASURED, ONE_PASS, ANCHORED, WEIGHTS)


def sensitivity(
    graph: Graph,
    data: Any = None,
    criterion: str | Scores | None = None,
    levels: int | None = None,
    method: str | None = None,
    compensate: bool = False,
    samples: int = SAMPLES,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> Sensitivity:
    """What the network's outputs lose when one group alone keeps its k best units, for every group and every k.

    The units of a group go in one order, the worst by the criterion first. Losses of several groups need not add up:
    see `metaprune.additivity`.

    Args:
        graph: The network.
        data: Batches of inputs or of (inputs, labels), labels are not looked at; `"noise"` for Gaussian noise; None for
            curves by the weights alone.
        criterion: How units are ranked, as for `metaprune.plan`, or scores that are there already.
        levels: At how many k each group is measured: 16 for `"measured"`, 2 for `"anchored"` unless told otherwise.
        method: `"measured"`: the units that go are silenced, and only what depends on them is computed again; between
            the levels, which are even from the least k on, the curve is a power of the number of units that go.
            `"one_pass"`: to second order in the gates, for all k from a few gradients (see `metaprune.quadratic`).
            `"anchored"`, the default with data: measured at a few levels, with the shape of the second-order curve in
            between. `"weights"`, the default without: the share of the group's squared weights that goes.
        compensate: Whether each linear layer that reads the group is fitted to its dense response first, in closed
            form (see `metaprune.refits`). For measured levels only.
        samples: At most this many samples.
        seed: Of criteria that draw, of directions, of positions for the fit and of noise.
        kinds: Kinds of distance, see `Sensitivity`; None for all that the network has.

    Raises:
        OptionError: An option has no meaning, the data do not fit the network, or there are none.
        MetapruneError: The network gives values that are not finite.
    """
    method = _checked(graph, data, method, levels, compensate, samples, seed, kinds)
    data = None if data is None else repeatable(data)
    ranking, passes = _ranking(graph, data, criterion, method, seed)
    free = [group for group in graph.groups if not group.pinned]
    order = {g.name: np.lexsort((np.arange(g.size), -ranking.units[g.name])) for g in free}
    provenance = {
        "method": method,
        "criterion": ranking.criterion,
        "data": None if data is None else NOISE if isinstance(data, str) else "calibration",
        "levels": levels or LEVELS.get(method),
        "compensate": compensate,
        "seed": seed,
    }
    if method == WEIGHTS:
        table, count = Table({WEIGHTS: _by_weights(graph, order)}), ranking.samples
    else:
        leaves = leaves_of(graph, data, samples, seed)
        layers = consumers(graph, data, samples, seed) if compensate else None
        table = tabulate(graph, order, leaves, method, levels, kinds_of(graph, kinds), layers, seed)
        count = len(leaves)
    return Sensitivity(
        table.curves,
        order,
        table.levels,
        table.points,
        table.forwards + passes * ranking.samples / max(1, count) + compensate,
        count,
        graph.fingerprint,
        weights_digest(graph),
        provenance,
    )


def _checked(
    graph: Graph,
    data: Any,
    method: str | None,
    levels: int | None,
    compensate: bool,
    samples: int,
    seed: int,
    kinds: Sequence[str] | None,
) -> str:
    """The method; raises `OptionError` for options that do not go together."""
    if not isinstance(graph, Graph):
        raise OptionError(f"graph: a Graph is needed, not {type(graph).__name__}")
    method = method or (WEIGHTS if data is None else ANCHORED)
    if method not in METHODS:
        raise OptionError(f"method: {method!r} is none of {', '.join(METHODS)}")
    if method != WEIGHTS and data is None:
        raise OptionError(f"data: method {method!r} needs calibration data or 'noise'")
    for option, value in (("levels", levels), ("samples", samples)):
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"{option}: must be a positive whole number, not {value!r}")
    check_seed(seed)
    if type(compensate) is not bool:
        raise OptionError(f"compensate: must be True or False, not {compensate!r}")
    if method not in LEVELS and (levels is not None or compensate):
        raise OptionError(f"{'compensate' if compensate else 'levels'}: method {method!r} measures nothing")
    if method == WEIGHTS and kinds is not None:
        raise OptionError(f"kinds: method {WEIGHTS!r} looks at no outputs")
    return method


def _ranking(graph: Graph, data: Any, criterion: str | Scores | None, method: str, seed: int) -> tuple[Scores, float]:
    """Scores of all units, and what they cost here, in forward passes of each sample that they looked at."""
    if isinstance(criterion, Scores):
        for group in graph.groups:
            if not group.pinned and len(criterion.units.get(group.name, ())) != group.size:
                raise OptionError(f"criterion: the scores are not those of group {group.name}")
        return criterion, 0.0
    name = default_criterion(criterion, data)
    row = criteria.find(name)
    if method == WEIGHTS and data is not None and not row.data:
        raise OptionError(f"data: neither method {method!r} nor criterion {name!r} uses data")
    found = score(graph, name, data if row.data else None, seed)
    return found, 1.0 if row.columns else 3.0 if row.data else 0.0


def _by_weights(graph: Graph, order: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """The share of each group's squared weights that goes with the units that go."""
    values = {name: graph.values[name] for name, info in graph.tensors.items() if info.kind == "parameter"}
    weights = criteria.Weights(values)
    found: dict[str, NDArray[np.float64]] = {}
    for name, units in order.items():
        group = graph.group(name)
        energy = criteria.energy(group, weights).double().numpy()[units]
        gone = np.append(energy[::-1].cumsum()[::-1], 0.0)
        found[name] = gone / gone[0] if gone[0] > 0 else gone
        found[name][: group.minimum] = np.inf
    return found
