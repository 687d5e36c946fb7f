"""Training losses: cross entropy and knowledge distillation. Logits in, one scalar out, computed in float32."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy.

    Shapes:
        logits: (batch, classes), or (batch, classes, d1, ...) with one label per position.
        labels: (batch,) or (batch, d1, ...), class indices.
    """
    return F.cross_entropy(logits.float(), labels)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Soft-target distillation, `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over the rows.

    Hinton, Vinyals and Dean (2015), arXiv 1503.02531, section 2. The factor T^2 keeps the size of the gradient
    independent of the temperature; the sum runs over the classes, the mean over everything else.

    Shapes:
        student, teacher: (..., classes).
    """
    log_student = F.log_softmax(student.float().flatten(0, -2) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float().flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def standardised_distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Distillation of logits standardised row by row, so that a small student need not match the teacher's scale.

    Sun, Ren, Li, Wang and Cao (2024), arXiv 2403.01643, algorithm 1.

    Shapes:
        student, teacher: (..., classes).
    """
    return distillation(_standardise(student), _standardise(teacher), temperature)


def _standardise(logits: Tensor) -> Tensor:
    logits = logits.float()
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / (logits.std(dim=-1, keepdim=True) + 1e-7)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
