"""How well heads predict what was measured on networks whose family they have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.metanet.crossfit import Setting
from metaprune.metanet.heads import FLOOR, Allocations, Surrogate
from metaprune.metanet.predictor import Curves

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Predicted and measured values, logarithms of losses."""
Units = Mapping[str, NDArray[np.float64]]


def explained(pairs: Sequence[Pair]) -> float:
    """The coefficient of determination, R2, of all predictions together; not a number without any variance."""
    if not pairs:
        return float("nan")
    predicted, measured = (np.concatenate(values) for values in zip(*pairs, strict=True))
    total = float(((measured - measured.mean()) ** 2).sum()) if len(measured) else 0.0
    return 1 - float(((predicted - measured) ** 2).sum()) / total if total else float("nan")


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Rank correlation, equal values sharing their mean rank; not a number where all are equal."""
    first, second = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else float("nan")


def of_curves(setting: Setting, predicted: Sequence[tuple[Curves, Curves]]) -> dict[str, Any]:
    """R2 of the plain and the compensated curves at the levels that were measured."""
    found: dict[str, Any] = {}
    for kind, what in enumerate(("plain", "compensated")):
        pairs: dict[int, Pair] = {}
        for number, example in enumerate(setting.examples):
            mine, theirs = [], []
            for name, levels in example.levels.items():
                measured = getattr(example, what)[name]
                use = torch.isfinite(measured) & (levels < len(example.ablation[name]))
                mine.append(predicted[number][kind][name][levels[use].long().numpy()])
                theirs.append(measured[use].numpy())
            pairs[number] = (_log(np.concatenate(mine)), _log(np.concatenate(theirs)))
        found[what] = _summary(setting, pairs)
    return found


def of_ablation(setting: Setting, predicted: Sequence[Units]) -> dict[str, Any]:
    """R2 of the units' losses, and the mean over groups of the rank correlation within each.

    Args:
        setting: The networks.
        predicted: For each the logarithms of the units' losses by group, shape [size].
    """
    pairs: dict[int, Pair] = {}
    within = []
    for number, (example, mine) in enumerate(zip(setting.examples, predicted, strict=True)):
        theirs = {name: _log(values.numpy()) for name, values in example.ablation.items()}
        finite = {name: np.isfinite(values) for name, values in theirs.items()}
        pairs[number] = tuple(  # type: ignore[assignment]
            np.concatenate([values[name][finite[name]] for name in mine]) for values in (mine, theirs)
        )
        if any(number in held for held in setting.folds[:-1]):
            within += [spearman(mine[name], theirs[name]) for name in mine if len(mine[name]) > 2]
    return {**_summary(setting, pairs), "spearman within groups": _mean(within)}


def of_joint(setting: Setting, model: Surrogate, found: Sequence[tuple[Allocations, Tensor]]) -> dict[str, Any]:
    """R2 of the losses of whole allocations, and the mean over networks of the rank correlation within each."""
    pairs: dict[int, Pair] = {}
    for number, (values, targets) in enumerate(found):
        with torch.no_grad():
            mine = setting.of_fold(model, setting.fold_of(number))(values).mean(0)
        pairs[number] = (mine.double().numpy(), targets.double().numpy())
    held = [number for numbers in setting.held_out.values() for number in numbers]
    within = [spearman(*pairs[number]) for number in held]
    return {**_summary(setting, pairs), "spearman within networks": _mean(within)}


def _summary(setting: Setting, pairs: Mapping[int, Pair]) -> dict[str, Any]:
    held = {family: [pairs[number] for number in numbers] for family, numbers in setting.held_out.items()}
    every = [pair for own in held.values() for pair in own]
    return {
        "r2": _number(explained(every)),
        "r2 by family": {family: _number(explained(own)) for family, own in held.items()},
        "least r2 of a network": _number(min((explained([pair]) for pair in every), default=float("nan"))),
        "networks": len(every),
    }


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(np.maximum(values, FLOOR))
    return result


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else None


def _number(value: float) -> float | None:
    """A number, or None, which JSON knows."""
    return value if np.isfinite(value) else None
