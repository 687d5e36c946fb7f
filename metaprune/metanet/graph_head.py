"""A head over the metanetwork: what silencing units and cutting groups costs, read from weights and wiring.

Beside a unit's own features, which the group-level heads (`metaprune.metanet.heads`) know too, it sees what the
unit is connected to.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.graphs.errors import LoadError, OptionError
from metaprune.metanet.engine import Metanetwork
from metaprune.metanet.exchange import DenseExchange
from metaprune.metanet.heads import FLOOR
from metaprune.metanet.schema import Schema
from metaprune.metanet.weight_graph import WeightGraph

if TYPE_CHECKING:
    from metaprune.metanet.describe import Description

HIDDEN, LAYERS = 24, 3
LOSSES = 2
"""Of a cut: the plain loss, and that after least squares."""
_FLAT = 1e-3  # least standard deviation that a target is divided by


@dataclass(frozen=True, eq=False)
class Subject:
    """A network as a graph head reads it.

    The rows of all that is said of it are its units, group by group, and its cuts, group by group from none kept to
    all kept; only groups that are not pinned count.

    Attributes:
        graph: The network.
        described: Its features; those of the units are observations for the metanetwork.
        order: By group its units, from the first to go to the last, shape [size].
    """

    graph: WeightGraph
    described: Description
    order: Mapping[str, Tensor]

    @cached_property
    def exchange(self) -> DenseExchange:
        """How the network's units hear of each other."""
        return DenseExchange(self.graph)

    @cached_property
    def turns(self) -> Tensor:
        """Rows of the units in the order in which those of each group go, shape [units]."""
        sizes = self.described.sizes
        starts = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        return torch.cat([self.order[name].long() + start for name, start in zip(sizes, starts, strict=False)])

    @cached_property
    def places(self) -> Tensor:
        """Of each cut where its group starts among the units, where what stays starts, where it ends; [3, cuts]."""
        found, start = [], 0
        for size in self.described.sizes.values():
            gone = torch.arange(size, -1, -1)
            found.append(torch.stack([torch.full_like(gone, start), start + gone, torch.full_like(gone, start + size)]))
            start += size
        return torch.cat(found, 1)

    def units_of(self, values: Tensor) -> dict[str, Tensor]:
        """Rows of the units by group."""
        sizes = self.described.sizes
        return dict(zip(sizes, torch.split(values, list(sizes.values())), strict=True))

    def cuts_of(self, values: Tensor) -> dict[str, Tensor]:
        """Rows of the cuts by group, by kept count."""
        sizes = self.described.sizes
        return dict(zip(sizes, torch.split(values, [size + 1 for size in sizes.values()]), strict=True))


class GraphHead(nn.Module):
    """Logarithms of losses of units and of cuts, from the states that a metanetwork gives the units.

    Each unit's loss is read from its state; a cut's losses from the means of the states of the units that stay and of
    those that go, from the kept and the lost fraction, and from the sum of the predicted losses of the units that go.

    Args:
        observed: Number of features of a unit, see `metaprune.metanet.schema.Schema.unit`.
        hidden: Width of the units' states.
        layers: Rounds of messages.
        seed: Of the initial weights; the caller's random state is left alone.

    Attributes:
        config: The arguments that build it again, but for the seed.
        centre: Means of the targets, of a unit's loss and of the losses of a cut, shape [1 + LOSSES].
        spread: Their standard deviations.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, observed: int, hidden: int = HIDDEN, layers: int = LAYERS, seed: int = 0) -> None:
        super().__init__()
        self.config = {"observed": observed, "hidden": hidden, "layers": layers}
        self.encoder = Metanetwork(hidden, layers, observed, seed)
        self.encoder.of_budget.requires_grad_(False)  # no budget is asked for
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            self.unit = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            self.line = nn.Linear(3, LOSSES)
            self.cut = nn.Sequential(nn.Linear(2 * hidden + 3, hidden), nn.SiLU(), nn.Linear(hidden, LOSSES))
        nn.init.zeros_(self.line.weight)
        self.register_buffer("centre", torch.zeros(1 + LOSSES))
        self.register_buffer("spread", torch.ones(1 + LOSSES))

    def forward(self, subject: Subject) -> Tensor:
        """All predictions on a network: of the units, then of the cuts row by row, shape [units + LOSSES * cuts]."""
        observed = subject.described.units
        found = self.encoder(subject.graph, observed=observed, exchange=subject.exchange)
        states = torch.cat([found[name] for name in subject.described.sizes])  # [units, h]
        units = self.unit(states)[:, 0] * self.spread[0] + self.centre[0]
        start, split, stop = subject.places
        total = F.pad(states[subject.turns].cumsum(0), (0, 0, 1, 0))  # [units + 1, h]
        gone = (total[split] - total[start]) / (split - start).clamp_min(1)[:, None]
        kept = (total[stop] - total[split]) / (stop - split).clamp_min(1)[:, None]
        harm = F.pad(units[subject.turns].double().exp().cumsum(0), (1, 0))
        lost = (harm[split] - harm[start]).clamp_min(FLOOR).log().float()
        size = stop - start
        fractions = [((part / size).clamp_min(0.5 / size)).log() for part in (stop - split, split - start)]
        numbers = torch.stack([(lost - self.centre[1]) / self.spread[1], *fractions], 1)
        cuts = self.line(numbers) + self.cut(torch.cat([gone, kept, numbers], 1))
        return torch.cat([units, (cuts * self.spread[1:] + self.centre[1:]).flatten()])

    def learn(self, subjects: list[Subject], targets: list[Tensor]) -> None:
        """Takes the constants of features and targets.

        Args:
            subjects: The networks it will be trained on.
            targets: Measured values in the order of `forward`'s, not a number where nothing was measured.
        """
        for subject in subjects:
            self.encoder.widen(subject.graph, observed=subject.described.units)
        split = [len(subject.turns) for subject in subjects]
        units = torch.cat([own[:count] for own, count in zip(targets, split, strict=True)])[:, None]
        cuts = torch.cat([own[count:].view(-1, LOSSES) for own, count in zip(targets, split, strict=True)])
        for columns, values in ((slice(0, 1), units), (slice(1, None), cuts)):
            known = values[values.isfinite().all(1)].double()
            self.centre[columns] = known.mean(0)
            self.spread[columns] = known.std(0, correction=0).clamp_min(_FLAT)

    @torch.no_grad()
    def read(self, subject: Subject) -> Description:
        """The features of a network, and the predictions on it as features behind them.

        What lies outside the range that was learnt is taken as at its edge, without a word: that is for those to say
        who use the features.
        """
        described = subject.described
        if not described.sizes:
            return replace(described, schema=described.schema.with_graph())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self(subject)
        count = len(subject.turns)
        units, cuts = subject.units_of(found[:count, None]), subject.cuts_of(found[count:].view(-1, LOSSES))
        return replace(
            described,
            schema=described.schema.with_graph(),
            units={name: torch.cat([own, units[name]], 1) for name, own in described.units.items()},
            cuts={name: torch.cat([own, cuts[name]], 1) for name, own in described.cuts.items()},
        )

    @staticmethod
    def of(schema: Schema, config: Mapping[str, int], tensors: Mapping[str, Tensor]) -> GraphHead:
        """A head from its config and tensors.

        Args:
            schema: The features that it reads, without its own.
            config: `GraphHead.config`.
            tensors: Its state.

        Raises:
            LoadError: They do not fit one another.
        """
        try:
            head = GraphHead(**config)
            if config["observed"] != len(schema.unit):
                raise LoadError("the graph head reads other features than this version of metaprune computes")
            head.load_state_dict(dict(tensors))
        except (KeyError, TypeError, RuntimeError, OptionError) as error:
            raise LoadError(f"the graph head is damaged: {' '.join(str(error).split())}") from None
        return head.requires_grad_(False)
