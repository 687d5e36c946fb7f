"""Small networks that predict sensitivities from features, several at once, each with the range it has learnt on.

All parameters have a leading dimension of members. The members of an ensemble, and the ensembles of a cross-validation,
are trained in one batch and never see each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from metaprune.monotone import non_increasing

HIDDEN = 64
FLOOR = 1e-6
"""Losses in nats below this count as this."""
OVERALL = (
    "log groups",
    "log sum of plain losses",
    "log sum of compensated losses",
    "log greatest plain loss",
    "log greatest compensated loss",
    "log block Fisher of all groups together",
    "log mean kept fraction",
)
"""What the surrogate knows of an allocation as a whole."""
_MARGIN = 0.1  # of a feature's range: so far outside it is not worth a warning
_FLAT = 1e-3  # least standard deviation that a feature is divided by


class Scaler(nn.Module):
    """Brings features into the range that was seen, then to mean 0 and deviation 1.

    Args:
        members: Number of members.
        features: Number of features.
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, members: int, features: int) -> None:
        super().__init__()
        for name, value in (("mean", 0.0), ("deviation", 1.0), ("low", -math.inf), ("high", math.inf)):
            self.register_buffer(name, torch.full((members, features), value))

    def learn(self, values: Tensor, seen: Tensor) -> None:
        """Takes constants from the rows that each member sees.

        Args:
            values: Shape [rows, features].
            seen: Whether each member sees a row, shape [members, rows].
        """
        for member, mask in enumerate(seen):
            own = values[mask].double()
            self.mean[member] = own.mean(0)
            self.deviation[member] = own.std(0, correction=0).clamp_min(_FLAT)
            self.low[member], self.high[member] = own.amin(0), own.amax(0)

    def forward(self, values: Tensor) -> Tensor:
        """Features of shape [rows, features], scaled for each member, shape [members, rows, features]."""
        inside = torch.minimum(torch.maximum(values, self.low[:, None]), self.high[:, None])
        return (inside - self.mean[:, None]) / self.deviation[:, None]

    def outside(self, values: Tensor, names: Sequence[str]) -> list[str]:
        """Names of the features, in order, that lie well outside the range in any row."""
        low, high = self.low.amin(0), self.high.amax(0)
        margin = _MARGIN * (high - low) + _FLAT
        out = ((values < low - margin) | (values > high + margin)).any(0)
        return [name for name, far in zip(names, out.tolist(), strict=True) if far]


class _Layer(nn.Module):
    """A linear map for each member, on shape [members, rows, inputs]."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator, gain: float = 1.0) -> None:
        super().__init__()
        drawn = torch.randn(members, inputs, outputs, generator=generator)
        self.weight = nn.Parameter(drawn * gain / math.sqrt(max(1, inputs)))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, values: Tensor) -> Tensor:
        """The map."""
        return torch.baddbmm(self.bias, values, self.weight)


class Regressor(nn.Module):
    """Logarithms of losses from the features of single rows: a straight line plus two hidden layers.

    Args:
        members: Number of members.
        features: Number of features.
        outputs: Number of outputs.
        generator: Of the initial weights.
        hidden: Width of the hidden layers.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self, members: int, features: int, outputs: int, generator: torch.Generator, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.scaler = Scaler(members, features)
        self.line = _Layer(members, features, outputs, generator, 0.0)
        self.first = _Layer(members, features, hidden, generator)
        self.second = _Layer(members, hidden, hidden, generator, math.sqrt(2))
        self.last = _Layer(members, hidden, outputs, generator, 0.1)
        self.register_buffer("centre", torch.zeros(members, outputs))
        self.register_buffer("spread", torch.ones(members, outputs))

    def learn(self, values: Tensor, targets: Tensor, seen: Tensor) -> None:
        """Takes the constants of features and targets; see `Scaler.learn`."""
        self.scaler.learn(values, seen)
        _learn_targets(self.centre, self.spread, targets, seen)

    def forward(self, values: Tensor) -> Tensor:
        """Predictions for features of shape [rows, features], shape [members, rows, outputs]."""
        scaled = self.scaler(values)
        hidden = F.silu(self.second(F.silu(self.first(scaled))))
        found: Tensor = (self.line(scaled) + self.last(hidden)) * self.spread[:, None] + self.centre[:, None]
        return found


@dataclass(frozen=True, eq=False)
class Allocations:
    """Allocations in features; the parts of each stand together, in the order of the allocations.

    Attributes:
        parts: Features of every group at its keep count, with the logarithms of its plain and compensated loss behind,
            shape [parts, features + 2].
        owner: Allocation of each part, shape [parts].
        overall: What `OVERALL` names, shape [allocations, len(OVERALL)].
    """

    parts: Tensor
    owner: Tensor
    overall: Tensor

    @cached_property
    def _counts(self) -> Tensor:
        return torch.bincount(self.owner, minlength=len(self.overall))

    def taken(self, chosen: Tensor) -> Allocations:
        """Some of the allocations, by number, repeats included."""
        counts = self._counts[chosen]
        starts = (self._counts.cumsum(0) - self._counts)[chosen]
        owner = torch.arange(len(chosen)).repeat_interleave(counts)
        within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        return Allocations(self.parts[starts[owner] + within], owner, self.overall[chosen])

    @staticmethod
    def joined(several: Sequence[Allocations]) -> Allocations:
        """All allocations of several networks, one after the other."""
        counts = [len(values.overall) for values in several]
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        owner = torch.cat([values.owner + first for values, first in zip(several, firsts, strict=True)])
        overall = torch.cat([values.overall for values in several])
        return Allocations(torch.cat([values.parts for values in several]), owner, overall)


class Surrogate(nn.Module):
    """The logarithm of the loss of a whole allocation after reconstruction, whatever the number and order of groups.

    An affine function of the overall features, among them the summed losses, is corrected by a network that sees the
    means over the groups of what a first network makes of each, plainly and by each group's share of the summed loss.

    Args:
        members: Number of members.
        features: Number of features of a cut, without its two losses.
        generator: Of the initial weights.
        hidden: Width of all hidden layers.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, members: int, features: int, generator: torch.Generator, hidden: int = HIDDEN // 2) -> None:
        super().__init__()
        self.scaler = Scaler(members, features + 2)
        self.overall = Scaler(members, len(OVERALL))
        self.line = _Layer(members, len(OVERALL), 1, generator, 0.0)
        self.first = _Layer(members, features + 2, hidden, generator)
        self.second = _Layer(members, hidden, hidden, generator, math.sqrt(2))
        self.third = _Layer(members, 2 * hidden + len(OVERALL), hidden, generator)
        self.last = _Layer(members, hidden, 1, generator, 0.1)
        self.register_buffer("centre", torch.zeros(members, 1))
        self.register_buffer("spread", torch.ones(members, 1))

    def learn(self, values: Allocations, targets: Tensor, seen: Tensor) -> None:
        """Takes the constants of features and of targets, shape [allocations]; see `Scaler.learn`."""
        self.scaler.learn(values.parts, seen[:, values.owner])
        self.overall.learn(values.overall, seen)
        _learn_targets(self.centre, self.spread, targets[:, None], seen)

    def forward(self, values: Allocations) -> Tensor:
        """Predictions, shape [members, allocations]."""
        count = len(values.overall)
        states = self.states(values.parts)
        harm = values.parts[:, -1].exp()
        ones = torch.ones_like(harm)
        means = []
        for weight in (ones, harm):
            total = torch.zeros(count).index_add_(0, values.owner, weight)
            share = (weight / total[values.owner])[None, :, None]
            pooled = states.new_zeros(len(states), count, states.shape[2])
            means.append(pooled.index_add(1, values.owner, states * share))
        return self.judged(means[0], means[1], values.overall)

    def states(self, parts: Tensor) -> Tensor:
        """What the first network makes of parts, shape [members, parts, hidden]."""
        return F.silu(self.second(F.silu(self.first(self.scaler(parts)))))

    def judged(self, mean: Tensor, weighted: Tensor, overall: Tensor) -> Tensor:
        """Predictions from pooled states, shape [members, allocations, hidden] each, and overall features."""
        scaled = self.overall(overall)
        hidden = F.silu(self.third(torch.cat([mean, weighted, scaled], dim=2)))
        found: Tensor = (self.line(scaled) + self.last(hidden)) * self.spread[:, None] + self.centre[:, None]
        return found[:, :, 0]


def _learn_targets(centre: Tensor, spread: Tensor, targets: Tensor, seen: Tensor) -> None:
    for member, mask in enumerate(seen):
        own = targets[mask].double()
        centre[member] = own.mean(0)
        spread[member] = own.std(0, correction=0).clamp_min(_FLAT)


def logarithm(losses: Tensor) -> Tensor:
    """Logarithms of losses, float32, those below `FLOOR` as of `FLOOR`."""
    return losses.double().clamp_min(FLOOR).log().float()


def curve(logarithms: NDArray[np.float64], minimum: int) -> NDArray[np.float64]:
    """A curve from predicted logarithms of losses, shape [size + 1]: non-increasing, 0 at the size.

    Args:
        logarithms: By kept count, shape [size + 1]; what is said of the whole group is not looked at.
        minimum: The least count that may be kept; below it the curve is infinite.
    """
    found = np.full(len(logarithms), np.inf)
    found[minimum:-1] = np.exp(non_increasing(logarithms[minimum:-1]))
    found[-1] = 0.0
    return found


def overall_features(plain: Tensor, compensated: Tensor, block: Tensor, fractions: Tensor) -> Tensor:
    """What `OVERALL` names, shape [allocations, len(OVERALL)].

    Args:
        plain: Predicted loss of each group alone, shape [allocations, groups].
        compensated: The same after least squares.
        block: Second-order loss of all groups together, shape [allocations].
        fractions: Kept fractions, shape [allocations, groups].
    """
    groups = torch.full((len(plain),), math.log(plain.shape[1]))
    losses = [plain.sum(1), compensated.sum(1), plain.amax(1), compensated.amax(1), block]
    return torch.stack([groups, *map(logarithm, losses), fractions.log().mean(1).float()], dim=1)


class Tables:
    """A surrogate's states for all cuts of one network, so that an allocation costs a sum over its groups.

    Args:
        surrogate: The surrogate.
        cuts: By group the features of its cuts, shape [size + 1, features].
        pulls: By group summed gate gradients, see `metaprune.metanet.describe.Description`.
        plain: By group its plain curve, shape [size + 1].
        compensated: By group its compensated curve.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        cuts: Mapping[str, Tensor],
        pulls: Mapping[str, Tensor],
        plain: Mapping[str, NDArray[np.float64]],
        compensated: Mapping[str, NDArray[np.float64]],
    ) -> None:
        self._surrogate = surrogate
        parts = [parts_of(cuts[name], plain[name], compensated[name]) for name in cuts]
        self._sizes = torch.tensor([len(own) - 1 for own in parts])
        self._losses = [torch.from_numpy(np.stack([plain[name], compensated[name]])).float() for name in cuts]
        self._pulls = [pulls[name] for name in cuts]
        with torch.no_grad():
            self._states = [surrogate.states(own) for own in parts]
            self._harm = [own[:, -1].exp() for own in parts]
            self._weighted = [own * harm[:, None] for own, harm in zip(self._states, self._harm, strict=True)]

    def __call__(self, kept: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted logarithms of losses by member for kept counts [allocations, groups], shape [members, allocations].

        The groups are all those of the tables, in their order.
        """
        counts = torch.from_numpy(kept)
        at = list(counts.T)
        with torch.no_grad():
            plain, compensated = torch.stack([own[:, k] for own, k in zip(self._losses, at, strict=True)], dim=2)
            pull = torch.stack([own[k] for own, k in zip(self._pulls, at, strict=True)]).sum(0)
            mean, weighted = (
                torch.stack([own[:, k] for own, k in zip(states, at, strict=True)]).sum(0)
                for states in (self._states, self._weighted)
            )  # [members, allocations, hidden]
            total = torch.stack([own[k] for own, k in zip(self._harm, at, strict=True)]).sum(0)
            overall = overall_features(plain, compensated, 0.5 * pull.square().mean(1), counts / self._sizes)
            found = self._surrogate.judged(mean / len(at), weighted / total[:, None], overall)
        result: NDArray[np.float64] = found.double().numpy()
        return result


def parts_of(cuts: Tensor, plain: NDArray[np.float64], compensated: NDArray[np.float64]) -> Tensor:
    """Features of cuts with the logarithms of their two losses behind, shape [size + 1, features + 2].

    What may not be kept counts as the least that may.
    """
    losses = torch.from_numpy(np.stack([plain, compensated], axis=1))
    least = int(torch.isfinite(losses).all(1).int().argmax())
    losses[:least] = losses[least]
    return torch.cat([cuts, logarithm(losses)], dim=1)
