"""What a network's groups look like, cut by cut and unit by unit, in numbers that mean the same in every network.

Sums along the order in which units go give all keep counts at once. Where the readers of a group are known by the
second moments of what they read, their errors do too: with H the moments in the order in which columns go, the last to
go first, and H = L L^T, the least squared error after the columns from j on have gone is the sum of the squares of the
rows from j on of L^T W (the trailing block of a Cholesky factor is that of the Schur complement).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metaprune import criteria
from metaprune.curvature import RIDGE, Columns, collect_columns
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.graphs.linear import linear_layers
from metaprune.metanet.schema import Schema
from metaprune.metanet.structure import Layout, structure
from metaprune.statistics import SAMPLES, Statistics, collect

Encoder: TypeAlias = Callable[[Graph], Mapping[str, Tensor]]
"""Gives each group's unit states, shape [size, width]."""

WIDEST = 4608
"""Layers with more columns than this are not looked at: their second moments are too large."""
DRAWS = 4
"""Labels drawn for each sample at temperature 1, where the gradients are far from even."""
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Description:
    """A network in features.

    Attributes:
        schema: Their names.
        sizes: Units of each group that is not pinned, in the graph's order.
        cuts: By group the features when k units are kept, shape [size + 1, cut features].
        units: By group the features of each unit, shape [size, unit features].
        pulls: By group the sum of the gate gradients, at temperature 1, of the units that are gone when k are kept,
            draw by draw, shape [size + 1, draws]; the groups' sum gives the second-order loss of a whole allocation.
            Without data no draws.
    """

    schema: Schema
    sizes: Mapping[str, int]
    cuts: Mapping[str, Tensor]
    units: Mapping[str, Tensor]
    pulls: Mapping[str, Tensor]


def observe(graph: Graph, data: Any, samples: int = SAMPLES, seed: int = 0) -> Statistics:
    """What `describe` and the block Fisher criterion look at: gate gradients, and second moments of what readers read.

    Args:
        graph: The network.
        data: Batches of inputs or of (inputs, labels), labels are not looked at; or `"noise"`.
        samples: At most this many; each costs a forward pass, and as many forward and backward passes as `DRAWS` + 1.
        seed: Of drawn labels, of positions and of noise.

    Raises:
        OptionError: No data, data that do not fit the network, or a network on the meta device.
        MetapruneError: The network gives values that are not finite.
    """
    found = collect(graph, data, samples, seed, per_sample=True)
    sharp = collect(graph, data, samples, seed, per_sample=True, temperature=1.0, draws=DRAWS)
    slices = {part.tensor for group in graph.groups if not group.pinned for part in group.slices}
    wanted = {layer.weight for layer in linear_layers(graph).values() if layer.width <= WIDEST} & slices
    return replace(found, columns=collect_columns(graph, data, samples, seed, wanted), sharp=sharp)


def describe(
    graph: Graph,
    order: Mapping[str, Tensor],
    statistics: Statistics | None = None,
    encoder: Encoder | None = None,
) -> Description:
    """Features of every keep count and every unit of all groups that are not pinned.

    Args:
        graph: The network.
        order: Units of each group, from the first to go to the last, shape [size].
        statistics: What `observe` found; None for features of the weights alone.
        encoder: Further states of the units; a cut has their means over the units that stay and those that go.

    Raises:
        OptionError: The order is not one of the group's units, or the encoder's states do not fit the groups.
        MetapruneError: A tensor of the network is not finite, or a feature is not.
    """
    graph.check_finite()
    groups = [group for group in graph.groups if not group.pinned]
    for group in groups:
        _check_order(group, order.get(group.name))
    states = _states(groups, encoder(graph)) if encoder is not None else {}
    layout = structure(graph)
    weights = criteria.Weights({n: graph.values[n] for n, info in graph.tensors.items() if info.kind == "parameter"})
    evidence = criteria.Evidence(weights, statistics)
    total = 0.0 if statistics is None else sum(float(m.square.sum()) for m in statistics.gates.values())
    cuts, units, pulls = {}, {}, {}
    for group in groups:
        own = order[group.name].long()
        fixed = [torch.from_numpy(layout.features[group.name]), *_weight_spread(group, evidence)]
        cut = [layout.kept_costs(group.name), *_weight_cuts(group, evidence, own)]
        unit = _weight_units(group, evidence)
        if statistics is not None:
            fixed += _data_spread(group, evidence, total)
            cut += _data_cuts(graph, layout, group, evidence, own)
            unit += _data_units(group, evidence, own)
        if group.name in states:
            cut += _means(states[group.name], own)
            unit.append(states[group.name])
        shared = torch.cat([value.double().reshape(-1) for value in fixed])
        cuts[group.name] = _table(shared, cut, group.size + 1)
        units[group.name] = _table(shared, unit, group.size)
        pulls[group.name] = _pulls(group, evidence, own)
    width = next(iter(states.values())).shape[1] if states else 0
    schema = Schema.of(statistics is not None, width)
    for name, table in [*cuts.items(), *units.items()]:
        if not bool(torch.isfinite(table).all()):
            raise MetapruneError(f"group {name}: a feature is not finite")
    return Description(schema, {group.name: group.size for group in groups}, cuts, units, pulls)


def _check_order(group: Group, order: Tensor | None) -> None:
    if order is None or not torch.equal(order.sort().values.long(), torch.arange(group.size)):
        raise OptionError(f"order: group {group.name} needs each of its {group.size} units once")


def _states(groups: Sequence[Group], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for group in groups:
        state = found.get(group.name)
        if state is None or state.ndim != 2 or len(state) != group.size:
            raise OptionError(f"encoder: it gives no state for each of the {group.size} units of group {group.name}")
    return {group.name: found[group.name].detach().double().cpu() for group in groups}


def _table(shared: Tensor, own: Sequence[Tensor], rows: int) -> Tensor:
    """Shared features and those of each row, float32, shape [rows, features]."""
    columns = [value.double().reshape(rows, -1) for value in own]
    return torch.cat([shared.expand(rows, -1), *columns], dim=1).float()


def _log(value: Tensor) -> Tensor:
    return value.double().clamp_min(_TINY).log()


def _gone(values: Tensor, order: Tensor) -> Tensor:
    """Sum of the values, shape [size, ...], of those units that are gone when k are kept, shape [size + 1, ...]."""
    ordered = values.double()[order]
    return torch.cat([torch.zeros_like(ordered[:1]), ordered.cumsum(0)]).flip(0)


def _share(values: Tensor, order: Tensor) -> Tensor:
    """The same over the sum of all values."""
    gone = _gone(values, order)
    return gone / gone[0].clamp_min(_TINY)


def _spread(values: Tensor) -> list[Tensor]:
    """How uneven values are: logarithms of the ratios of their 90, 50 and 10 % quantiles, cut at a factor of 1e4."""
    high, middle, low = values.double().quantile(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    return [(_log(a) - _log(b)).clamp(0.0, 9.2) for a, b in ((high, middle), (middle, low))]


def _over_mean(values: Tensor) -> Tensor:
    mean = values.double().mean()
    return (_log(values) - _log(mean)).clamp(-9.2, 9.2)


def _place(values: Tensor) -> Tensor:
    """Each unit's place by ascending value, from 0 to 1."""
    rank = torch.empty(len(values), dtype=torch.float64)
    rank[values.argsort(stable=True)] = torch.arange(len(values), dtype=torch.float64)
    return rank / max(1, len(values) - 1)


def _scale(group: Group, evidence: criteria.Evidence) -> Tensor:
    """Energy of a unit's vectors, those of its norms and biases, shape [size]; ones where it has none."""
    parts = [part for part in evidence.weights.of(group) if evidence.weights.values[part.tensor].ndim == 1]
    if not parts:
        return torch.ones(group.size)
    return torch.stack([evidence.weights.rows(part).square().sum(1) for part in parts]).sum(0)


def _weight_spread(group: Group, evidence: criteria.Evidence) -> list[Tensor]:
    return [*_spread(criteria.energy(group, evidence.weights)), *_spread(_scale(group, evidence))]


def _weight_cuts(group: Group, evidence: criteria.Evidence, order: Tensor) -> list[Tensor]:
    """Energies that are gone: of all slices, of vectors, and of readers, that is of later dimensions of matrices."""
    values = evidence.weights.values
    read = [
        _share(evidence.weights.rows(part).square().sum(1), order)
        for part in evidence.weights.of(group)
        if values[part.tensor].ndim > 1 and part.dim > 0
    ]
    shares = torch.stack(read, 1) if read else _share(torch.ones(group.size), order)[:, None]  # [size + 1, readers]
    energy = criteria.energy(group, evidence.weights)
    gone = [_share(energy, order), _share(_scale(group, evidence), order), shares.mean(1), shares.amax(1)]
    return [_log(share.clamp_min(1e-6)) for share in gone]


def _weight_units(group: Group, evidence: criteria.Evidence) -> list[Tensor]:
    energy, scale = criteria.energy(group, evidence.weights), _scale(group, evidence)
    return [_over_mean(energy), _place(energy), _over_mean(scale), _place(scale)]


def _data_spread(group: Group, evidence: criteria.Evidence, total: float) -> list[Tensor]:
    """Spread of the Fisher mass, participation ratio of the gradients over the size, and the mass of all groups."""
    rows = evidence.rows(group).double()
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    rank = gram.trace().square() / gram.square().sum().clamp_min(_TINY**2) / group.size
    everything = torch.tensor(0.5 * total, dtype=torch.float64)
    return [*_spread(evidence.moments(group).square), rank, _log(everything)]


def _data_cuts(graph: Graph, layout: Layout, group: Group, evidence: criteria.Evidence, order: Tensor) -> list[Tensor]:
    moments = evidence.moments(group)
    single = 0.5 * _gone(moments.square, order)
    block = 0.5 * _gone(evidence.rows(group).T, order).square().mean(1)
    assert evidence.statistics is not None
    sharp = 0.5 * _pulls(group, evidence, order).square().mean(1)
    plain, fitted = [], []
    for columns in evidence.statistics.columns.values():
        if group.name in layout.readers.get(columns.layer.node, ()):
            places = _places(graph, columns, group, order)
            errors = reader_errors(columns, graph.values[columns.layer.weight], places, group.size)
            plain.append(errors[0])
            fitted.append(errors[1])
    nothing = torch.zeros(group.size + 1, 1, dtype=torch.float64)
    before, after = (torch.stack(found, 1) if found else nothing for found in (plain, fitted))
    sums = [before.sum(1), before.amax(1), after.sum(1), after.amax(1)]
    mended = (after.sum(1) / before.sum(1).clamp_min(_TINY)).clamp(0.0, 1.0)
    relative = [_log((value / value[0].clamp_min(_TINY)).clamp_min(1e-6)) for value in (single, block, sharp)]
    by_readers = [_log(value.clamp_min(1e-6)) for value in sums]
    slope = _log(_gone(moments.absolute, order))
    return [_log(single), relative[0], _log(block), relative[1], _log(sharp), relative[2], slope, *by_readers, mended]


def _data_units(group: Group, evidence: criteria.Evidence, order: Tensor) -> list[Tensor]:
    moments = evidence.moments(group)
    place = torch.empty(group.size, dtype=torch.float64)
    place[order] = torch.arange(group.size, dtype=torch.float64) / max(1, group.size - 1)
    by_readers = [_over_mean(score(group, evidence)) for score in (criteria.wanda, criteria.obspa)]
    assert evidence.statistics is not None
    assert evidence.statistics.sharp is not None
    squares = [moments.square, evidence.statistics.sharp.gates[group.name].square]
    fisher = [value for square in squares for value in (_log(0.5 * square), _over_mean(square))]
    return [*fisher, _over_mean(moments.absolute), place, *by_readers]


def _pulls(group: Group, evidence: criteria.Evidence, order: Tensor) -> Tensor:
    """See `Description.pulls`."""
    if evidence.statistics is None:
        return torch.zeros(group.size + 1, 0)
    assert evidence.statistics.sharp is not None
    return _gone(evidence.statistics.sharp.rows[group.name].T, order).float()


def _means(states: Tensor, order: Tensor) -> list[Tensor]:
    """Means of the states over units that stay and that go when k are kept, shape [size + 1, width] each; or zero."""
    gone = _gone(states, order)
    kept = gone[0] - gone
    count = torch.arange(len(gone), dtype=torch.float64)[:, None]
    return [kept / count.clamp_min(1), gone / (len(gone) - 1 - count).clamp_min(1)]


def _places(graph: Graph, columns: Columns, group: Group, order: Tensor) -> Tensor:
    """When each column of a layer goes, 0 for the first unit of the order, `size` for never, shape [groups, width]."""
    layer, coupling = columns.layer, graph.coupling
    turn = np.empty(group.size, dtype=np.int64)
    turn[order.numpy()] = np.arange(group.size)
    axis = coupling.flow.axes[layer.input][layer.channel]
    found = np.full(axis.size, group.size, dtype=np.int64)
    number = coupling.number(group.name)
    for units in coupling.units(axis):
        at = (units >= 0) & (coupling.owner[units] == number)
        found[at] = np.minimum(found[at], turn[coupling.rank[units[at]]])
    each = layer.groups * layer.width // axis.size
    return torch.from_numpy(found).reshape(layer.groups, -1).repeat_interleave(each, dim=1)


def reader_errors(columns: Columns, weight: Tensor, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Squared error of a layer's response when columns are gone, over the response's energy.

    Args:
        columns: Second moments of what the layer reads.
        weight: Its weight.
        places: Turn in which each column goes, `size` for never, shape [groups, width].
        size: Number of turns.

    Returns:
        For k kept turns, as it is and after least squares of the columns that stay, shape [size + 1] each, float64.
    """
    layer = columns.layer
    turns, index = places.sort(dim=1, descending=True, stable=True)  # the last to go first
    matrix = layer.matrix(weight.detach().double().cpu())
    matrix = matrix.gather(1, index[:, :, None].expand_as(matrix))  # [groups, width, outputs]
    raw, centred = (
        moment.gather(1, index[:, :, None].expand_as(moment)).gather(2, index[:, None, :].expand_as(moment))
        for moment in (columns.moment[:, :-1, :-1].cpu(), columns.hessian(RIDGE).cpu())
    )
    products = raw * (matrix @ matrix.transpose(1, 2))
    lower = products.tril(-1).sum(1) + products.triu(1).sum(2)  # of each column with those that go before it
    plain = products.diagonal(dim1=1, dim2=2) + lower
    fitted = (torch.linalg.cholesky(centred).transpose(1, 2) @ matrix).square().sum(2)
    energy = (matrix * (centred @ matrix)).sum().clamp_min(_TINY)
    return _by_turn(plain, turns, size) / energy, _by_turn(fitted, turns, size) / energy


def _by_turn(values: Tensor, turns: Tensor, size: int) -> Tensor:
    """Sum over all columns whose turn has come when k turns are kept, shape [size + 1]."""
    total = torch.zeros(size + 1, dtype=torch.float64).index_add_(0, turns.flatten(), values.flatten())
    return torch.cat([torch.zeros(1, dtype=torch.float64), total[:-1].cumsum(0)]).flip(0).clamp_min(0)
