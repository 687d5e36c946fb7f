"""Imitation: a pruned network is trained, without labels, to answer what the dense network answers.

Outputs are compared as they are, whatever they stand for: class scores, embeddings, hidden states, probabilities. For
class scores, matching the scores themselves serves a student at least as well as matching softened probabilities (Kim,
Oh, Kim, Cho and Yun, IJCAI 2021, arXiv 2105.08919). The student stays in eval mode, without dropout and with its batch
norms' statistics as they are: it is trained as the function that it will be used as, on inputs that need not be
distributed as those the network was made for.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaprune.calibration import Unlabelled, floats_in
from metaprune.data import Inputs, Loader
from metaprune.evaluation import called, device_of
from metaprune.features import Features
from metaprune.graphs.errors import OptionError
from metaprune.losses import feature_matching
from metaprune.training import Progress, Settings, train

if TYPE_CHECKING:
    from metaprune.api import Pruned


def imitate(
    pruned: Pruned,
    loader: Loader,
    settings: Settings,
    teacher: nn.Module | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pruned:
    """Trains a pruned network in place to follow the dense one.

    The loss is the mean of `feature_matching` over all floating-point outputs, and the same over the ends of residual
    blocks (see `metaprune.features.matched_nodes`) against the network that was cut.

    Args:
        pruned: The pruned network, whose module is changed.
        loader: Batches of inputs or of (inputs, labels); no label is looked at.
        settings: Of the training.
        teacher: The network whose outputs are followed; by default the one that was cut.
        seed: Of every random choice.
        progress: Called after each training step.

    Raises:
        OptionError: The network has no floating-point output, or the teacher others.
        TrainingError: A loss or gradient is not finite.
    """
    features = Features(pruned)
    student = _Answering(features.student)
    other = None if teacher is None else copy.deepcopy(teacher).to(device_of(pruned.module)).eval()

    def objective(answer: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = called(features.dense, inputs)
            wanted = wanted if other is None else called(other, inputs)
        return _apart(student.answers, floats_in(wanted)) + features.distance().to(answer.device)

    train(student, Unlabelled(pruned.original, loader), objective, settings, seed, progress=progress)
    note = f"outputs and features of {len(features.names)} nodes imitated, without labels"
    return dataclasses.replace(pruned, notes=(*pruned.notes, note))


class _Answering(nn.Module):
    """A network that stays in eval mode and returns the first of its floating-point outputs; `answers` has them all."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.answers: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the network."""
        self.answers = floats_in(self.network(*args, **kwargs))
        if not self.answers:
            raise OptionError("imitate: the network gives no floating-point output to follow")
        return self.answers[0]

    def train(self, mode: bool = True) -> _Answering:
        """Eval mode, whatever is asked for."""
        return super().train(False)


def _apart(answers: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean of `feature_matching` over outputs."""
    if len(answers) != len(wanted):
        raise OptionError(f"teacher: {len(wanted)} outputs do not fit the student's {len(answers)}")
    return torch.stack([feature_matching(a, w) for a, w in zip(answers, wanted, strict=True)]).mean()
