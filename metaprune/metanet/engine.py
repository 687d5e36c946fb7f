"""The metanetwork: one graph network that reads trained networks of any architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.graphs.coupling import ROLES
from metaprune.graphs.errors import OptionError
from metaprune.metanet.aggregation import AGGREGATORS, ManyExchange
from metaprune.metanet.encoding import POSITION, SET, TENSOR
from metaprune.metanet.exchange import MOMENTS, DenseExchange, Exchange
from metaprune.metanet.layout import Incidence
from metaprune.metanet.reading import ARGUMENTS, FAMILIES
from metaprune.metanet.weight_graph import WeightGraph

MEAN, PNA = AGGREGATIONS = ("mean", "pna")
_SIDES = ("outputs", "inputs", "lines")
_SMALL = 0.2  # of what depends on types alone, so that it does not drown what tells one unit from another
_SLACK = 1e-6  # what is stored in a lower precision is not outside


class Layer(nn.Module):
    """One round of messages; every unit hears both directions at once.

    With n = LayerNorm(x), units send s = silu(A n) as inputs and t = silu(B n) as outputs (one state per moment of the
    weights, see `metaprune.metanet.exchange`), each block multiplies them by 1 + C b with b its embedding, and with
    what is heard, d from the inputs and u from the outputs,

        x <- x + MLP([n, d * (1 + G n), u * (1 + H n)]).

    The product of a message with the hearer's own gate stands for the product over both ends of an edge and its
    weight, which is how graph metanetworks are built (Lim et al. 2023, arXiv 2312.04501; here factorised, so that
    no message is ever materialised). With several aggregators d and u hold what each of them gives.

    Shapes: x [units, h]; b [blocks, h]; returns [units, h].
    """

    def __init__(self, hidden: int, aggregators: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        self.send = nn.Linear(hidden, 2 * MOMENTS * hidden, bias=False)
        self.modulate = nn.Linear(hidden, 2 * MOMENTS * hidden)
        heard = 2 * aggregators * hidden
        self.gate = nn.Linear(hidden, heard)
        self.update = nn.Sequential(nn.Linear(hidden + heard, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, blocks: Tensor, exchange: Exchange) -> Tensor:
        """See the class."""
        shape = (-1, 2, MOMENTS, self.hidden)
        normal = F.layer_norm(x, (self.hidden,))
        sent = F.silu(self.send(normal)).view(shape)  # [units, 2, 3, h]
        factors = 1 + self.modulate(blocks).view(shape)  # [blocks, 2, 3, h]
        heard = torch.cat(exchange(sent[:, 0], sent[:, 1], factors), 1)  # [units, 2 h]
        change: Tensor = self.update(torch.cat([normal, heard * (1 + self.gate(normal))], 1))
        return x + change


class Metanetwork(nn.Module):
    """Encodes the units of a network, whatever its architecture, from its weights and wiring.

    Its result does not depend on the order of units, nor on a batch norm's free scales
    (`metaprune.metanet.canonical`).

    Args:
        hidden: Width of all states.
        layers: Rounds of messages.
        observed: Number of features per unit that a caller may add, such as activation moments or Fisher mass.
        aggregation: `"mean"`, or `"pna"` for the several aggregators of `metaprune.metanet.aggregation`, which takes a
            tensor entry for each edge and state instead of products of matrices.
        seed: Of the initial weights; the caller's random state is left alone.

    Attributes:
        config: The arguments that build it again, but for the seed and the aggregation.
        aggregation: How messages are aggregated.
        low: Least value of each feature among the networks seen by `widen`, shape [features].
        high: Greatest value of each.
        mean: Mean of each feature over them.
        spread: Sum of squared distances from it.
        count: Number of values of each feature.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    spread: Tensor
    count: Tensor

    def __init__(
        self, hidden: int = 32, layers: int = 4, observed: int = 0, seed: int = 0, aggregation: str = MEAN
    ) -> None:
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise OptionError(f"aggregation: {aggregation!r} is none of {', '.join(AGGREGATIONS)}")
        if hidden < 1 or layers < 0 or observed < 0:
            raise OptionError("metanetwork: hidden must be at least 1, layers and observed at least 0")
        self.config = {"hidden": hidden, "layers": layers, "observed": observed}
        self.aggregation = aggregation
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            self.kind, self.family, self.argument = (
                nn.Embedding(len(names), hidden) for names in (ROLES, FAMILIES, ARGUMENTS)
            )
            for table in (self.kind, self.family, self.argument):
                nn.init.normal_(table.weight, std=_SMALL)
            self.of_set, self.of_tensor = nn.Linear(len(SET), hidden), nn.Linear(len(TENSOR), hidden)
            self.of_position = nn.ModuleDict({side: nn.Linear(len(POSITION), hidden) for side in _SIDES})
            self.of_parts = nn.Linear(len(_SIDES) * hidden, hidden)
            self.of_budget, self.no_budget = nn.Linear(1, hidden), nn.Parameter(_SMALL * torch.randn(hidden))
            if observed:
                self.of_observed, self.unobserved = (
                    nn.Linear(observed, hidden),
                    nn.Parameter(_SMALL * torch.randn(hidden)),
                )
            self.layers = nn.ModuleList(
                Layer(hidden, len(AGGREGATORS) if aggregation == PNA else 1) for _ in range(layers)
            )
        self._names, self._places = _places(observed)
        for name, value in (("low", torch.inf), ("high", -torch.inf), ("mean", 0.0), ("spread", 0.0), ("count", 0.0)):
            self.register_buffer(name, torch.full((len(self._names),), value))

    def forward(
        self,
        weight_graph: WeightGraph,
        budget: float | None = None,
        observed: Mapping[str, Tensor] | None = None,
        exchange: Exchange | None = None,
    ) -> dict[str, Tensor]:
        """States of all units.

        Features are standardised by the networks it was fitted to (`widen`); those outside of these networks' range
        are clamped to it, with a warning that names them.

        Args:
            weight_graph: The network.
            budget: Part of the network to keep, over 0 up to 1, when the states shall depend on it.
            observed: For some groups what was observed of their units, shape [size] or [size, observed].
            exchange: Another way to pass messages, `metaprune.metanet.edge_list.EdgeListExchange`, of the same
                aggregation; dense by default.

        Returns:
            For each group of the network, in its order, shape [size, hidden].

        Raises:
            OptionError: A budget out of range, or observations of an unknown group or another shape.
            GraphError: The network holds a value that is not finite.
        """
        encoding, layout = weight_graph.encoding, weight_graph.layout
        features, known = self._features(weight_graph, budget, observed)
        table, device = self._bounded(features, known), known.device
        tensors = F.silu(
            self.of_tensor(table["tensors"])
            + self.family(encoding.families.to(device))
            + self.argument(encoding.arguments.to(device))
        )  # [blocks + vectors, h]
        blocks, vectors = tensors[: len(layout.blocks)], tensors[len(layout.blocks) :]
        parts = [
            self._positions(side, table[side], embedded, incidence)
            for side, embedded, incidence in zip(
                _SIDES, (blocks, blocks, vectors), (layout.outputs, layout.inputs, layout.lines), strict=True
            )
        ]
        sets = self.of_set(table["sets"]) + self.kind(encoding.kinds.to(device))
        sets = sets + (self.no_budget if budget is None else self.of_budget(table["budget"]))
        states = sets.repeat_interleave(encoding.sizes.to(device), 0) + self.of_parts(torch.cat(parts, 1))
        if self.config["observed"]:
            states = states + torch.where(known[:, None], self.of_observed(table["observed"]), self.unobserved)
        passing = exchange or (ManyExchange if self.aggregation == PNA else DenseExchange)(weight_graph)
        for layer in self.layers:
            states = layer(states, blocks, passing)
        return weight_graph.split(F.layer_norm(states, states.shape[1:]))

    @torch.no_grad()
    def widen(
        self, weight_graph: WeightGraph, budget: float | None = None, observed: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes a network among those by whose features all others are measured; see `forward`.

        Args:
            weight_graph: The network.
            budget: One of the budgets it will be read with.
            observed: Observations of its units.
        """
        table, known = self._features(weight_graph, budget, observed)
        for name, place in self._places.items():
            rows = table[name][known] if name == "observed" else table[name]
            if len(rows):
                self.low[place] = torch.minimum(self.low[place], rows.amin(0).to(self.low))
                self.high[place] = torch.maximum(self.high[place], rows.amax(0).to(self.high))
                self._average(place, rows)

    def _average(self, place: slice, rows: Tensor) -> None:
        """Joins the mean and spread of rows [values, features] to those stored (Chan et al. 1979, eq. 2.1)."""
        old, new = self.count[place], float(len(rows))
        step = rows.mean(0) - self.mean[place]
        self.spread[place] += (rows - rows.mean(0)).square().sum(0) + step.square() * old * new / (old + new)
        self.mean[place] += step * new / (old + new)
        self.count[place] += new

    def _bounded(self, table: Mapping[str, Tensor], known: Tensor) -> dict[str, Tensor]:
        """Features clamped to the stored range and standardised; as they are where no range is stored.

        Warns once of all features that lay outside.
        """
        result, outside = {}, set[str]()
        for name, place in self._places.items():
            seen = self.low[place] <= self.high[place]
            low, high = self.low[place].where(seen, -torch.inf), self.high[place].where(seen, torch.inf)
            clamped = torch.minimum(torch.maximum(table[name], low), high)
            moved = (clamped - table[name]).abs() > _SLACK
            moved = moved[known] if name == "observed" else moved
            outside.update(self._names[place][i] for i in moved.any(0).nonzero().flatten().tolist())
            deviation = (self.spread[place] / self.count[place].clamp_min(1)).sqrt()
            result[name] = (clamped - self.mean[place]) / deviation.where(deviation > _SLACK, 1.0)
        if outside:
            names = ", ".join(name for name in self._names if name in outside)
            warnings.warn(f"outside of the range the metanetwork was fitted to, clamped: {names}", stacklevel=3)
        return result

    def _positions(self, side: str, features: Tensor, tensors: Tensor, incidence: Incidence) -> Tensor:
        """What the positions of one kind of side tell their units, shape [units, h]."""
        sizes = torch.tensor(incidence.sizes, dtype=torch.long, device=features.device)
        return incidence.collect(F.silu(self.of_position[side](features) + tensors.repeat_interleave(sizes, 0)))

    def _features(
        self, graph: WeightGraph, budget: float | None, observed: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """All features of a network in the metanetwork's dtype, and for which units there are observations [units]."""
        if budget is not None and not 0 < budget <= 1:
            raise OptionError(f"budget: the part to keep must be over 0 and at most 1, not {budget}")
        logs = torch.zeros(0, 1) if budget is None else torch.tensor([[budget]], dtype=torch.float64).log10()
        values, known = _observations(graph, observed or {}, self.config["observed"])
        table = {name: getattr(graph.encoding, name) for name in ("sets", "tensors", *_SIDES)}
        every = {**table, "budget": logs, "observed": values}
        return {name: value.to(self.no_budget) for name, value in every.items()}, known.to(self.no_budget.device)


def _observations(graph: WeightGraph, observed: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Observations of all units, 0 where there are none, [units, width], and where there are some [units]."""
    values = torch.zeros(graph.layout.count, width, dtype=torch.float64)
    known = torch.zeros(graph.layout.count, dtype=torch.bool)
    rows, flags = graph.split(values), graph.split(known)
    for name, given in observed.items():
        if name not in rows:
            raise OptionError(f"observed: the network has no group {name}")
        size = len(rows[name])
        if not width or tuple(given.shape) not in ((size, width), (size,) * (width == 1)):
            raise OptionError(f"observed: {name} must be {[size, width]}, not {list(given.shape)}")
        if not bool(torch.isfinite(given).all()):
            raise OptionError(f"observed: {name} holds a value that is not finite")
        rows[name].copy_(given.reshape(-1, width))
        flags[name].fill_(True)
    return values, known


def _places(observed: int) -> tuple[list[str], dict[str, slice]]:
    """Names of all features whose range is stored, and the place of each table's in that list."""
    names: list[str] = []
    places: dict[str, slice] = {}
    more = tuple(f"observed {i}" for i in range(observed))
    for tables, own in (
        (("sets",), SET),
        (("tensors",), TENSOR),
        (_SIDES, POSITION),
        (("budget",), ("log budget",)),
        (("observed",), more),
    ):
        places |= dict.fromkeys(tables, slice(len(names), len(names) + len(own)))
        names += own
    return names, places
