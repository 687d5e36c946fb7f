"""All heads together: from a network's features to its curves, its units' losses, and a surrogate of allocations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaprune.graphs.errors import LoadError
from metaprune.metanet.describe import Description
from metaprune.metanet.heads import Regressor, Surrogate, Tables, curve
from metaprune.metanet.schema import Schema

CURVES, ABLATION, JOINT = "curves", "ablation", "joint"
Curves = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Predictor:
    """Heads that were fitted on one list of features.

    Attributes:
        schema: The features.
        curves: Logarithms of the plain and the compensated loss of a cut.
        ablation: Logarithm of the loss when one unit alone is silenced.
        joint: Logarithm of the loss of a whole allocation; None where it was not fitted.
    """

    schema: Schema
    curves: Regressor
    ablation: Regressor
    joint: Surrogate | None = None

    def losses(self, description: Description, minima: Mapping[str, int]) -> tuple[Curves, Curves]:
        """Plain and compensated curves by group, shape [size + 1]; means of the members' logarithms.

        Args:
            description: The network.
            minima: The least count that each group may keep.
        """
        return losses(self.curves, description, minima)

    def ablations(self, description: Description) -> dict[str, NDArray[np.float64]]:
        """Loss in nats when each unit alone is silenced, by group, shape [size]."""
        return {name: np.exp(values) for name, values in logarithms(self.ablation, description).items()}

    def surrogate(self, description: Description, plain: Curves, compensated: Curves) -> Tables | None:
        """The joint head, ready for allocations of a network; None where there is no such head."""
        if self.joint is None:
            return None
        return Tables(self.joint, description.cuts, description.pulls, plain, compensated)

    def outside(self, description: Description, minima: Mapping[str, int]) -> list[str]:
        """Names of the features that lie outside the range of the networks that the heads were fitted on."""
        cuts = torch.cat([values[minima[name] : -1] for name, values in description.cuts.items()])
        units = torch.cat(list(description.units.values()))
        found = self.curves.scaler.outside(cuts, self.schema.cut) + self.ablation.scaler.outside(
            units, self.schema.unit
        )
        return list(dict.fromkeys(found))

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name."""
        parts = {CURVES: self.curves, ABLATION: self.ablation, JOINT: self.joint}
        return {
            f"{head}.{name}": value.detach().contiguous()
            for head, model in parts.items()
            if model is not None
            for name, value in model.state_dict().items()
        }

    @staticmethod
    def of(schema: Schema, tensors: Mapping[str, Tensor]) -> Predictor:
        """The inverse of `tensors`; raises `LoadError` for tensors of another shape."""
        draw = torch.Generator()
        parts: dict[str, dict[str, Tensor]] = {CURVES: {}, ABLATION: {}, JOINT: {}}
        for key, value in tensors.items():
            head, _, name = key.partition(".")
            parts.setdefault(head, {})[name] = value
        try:
            members = len(parts[CURVES]["centre"])
            curves = Regressor(members, len(schema.cut), 2, draw)
            ablation = Regressor(members, len(schema.unit), 1, draw)
            joint = Surrogate(members, len(schema.cut), draw) if parts[JOINT] else None
            for head, model in ((CURVES, curves), (ABLATION, ablation), (JOINT, joint)):
                if model is not None:
                    model.load_state_dict(parts[head])
        except (KeyError, RuntimeError) as error:
            raise LoadError(f"the heads are damaged: {' '.join(str(error).split())}") from None
        return Predictor(schema, curves, ablation, joint)


def logarithms(model: Regressor, description: Description) -> dict[str, NDArray[np.float64]]:
    """Logarithms of the losses in nats when each unit alone is silenced, by group, shape [size]."""
    with torch.no_grad():
        return {name: model(values).mean(0)[:, 0].double().numpy() for name, values in description.units.items()}


def losses(model: Regressor, description: Description, minima: Mapping[str, int]) -> tuple[Curves, Curves]:
    """See `Predictor.losses`."""
    plain: Curves = {}
    compensated: Curves = {}
    with torch.no_grad():
        for name, values in description.cuts.items():
            found = model(values).mean(0).double().numpy()  # [size + 1, 2]
            plain[name] = curve(found[:, 0], minima[name])
            compensated[name] = curve(found[:, 1], minima[name])
    return plain, compensated
