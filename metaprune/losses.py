"""Training losses: cross entropy and knowledge distillation.

Each takes tensors and returns one scalar. It is computed in float32, of float64 tensors in float64.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.graphs.errors import OptionError

Loss = Callable[[Tensor, Tensor], Tensor]

_LEFT_OUT = -100  # the label of positions that do not count, by torch's convention


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy; positions labelled -100 are left out.

    Shapes:
        logits: (batch, classes), or (batch, classes, d1, ...) with one label per position.
        labels: (batch,) or (batch, d1, ...), class indices; or class probabilities in the shape of the logits.

    Raises:
        OptionError: The shapes do not fit, or a label is no class.
    """
    if not labels.is_floating_point():
        check_shapes(logits, labels)
        _check_labels(labels, logits.shape[1], left_out=_LEFT_OUT)
    return F.cross_entropy(_wide(logits), labels)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Soft-target distillation, `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over the rows.

    Hinton, Vinyals and Dean (2015), arXiv 1503.02531, section 2. The factor T^2 keeps the size of the gradient
    independent of the temperature; the sum runs over the classes, the mean over everything else.

    Shapes:
        student, teacher: (..., classes).

    Raises:
        OptionError: The shapes differ.
    """
    _check_alike(student, teacher)
    log_student = F.log_softmax(_wide(student).flatten(0, -2) / temperature, dim=-1)
    log_teacher = F.log_softmax(_wide(teacher).flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def standardised_distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Distillation of logits standardised row by row, so that a small student need not match the teacher's scale.

    Sun, Ren, Li, Wang and Cao (2024), arXiv 2403.01643, algorithm 1.

    Shapes:
        student, teacher: (..., classes).

    Raises:
        OptionError: The shapes differ.
    """
    return distillation(_standardise(student), _standardise(teacher), temperature)


def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Distillation with a weight of its own for what the teacher says about the classes that are not the label.

    `T^2 * (alpha * TCKD + beta * NCKD)`, mean over the rows, of softmax(logits / T): TCKD is the divergence between
    teacher and student of (label, any other class), NCKD that of the other classes among themselves. Zhao, Cui, Song,
    Qiu and Liang (2022), arXiv 2203.08679, equation 7. Soft-target distillation is alpha = 1 and, row by row,
    beta = 1 - the teacher's probability of the label (equation 6): where the teacher is sure, it hears little else.

    Args:
        student: Logits.
        teacher: Logits.
        labels: Class indices.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: T.

    Shapes:
        student, teacher: (..., classes).
        labels: (...).

    Raises:
        OptionError: The shapes do not fit, there is one class only, or a label is no class.
    """
    _check_alike(student, teacher)
    classes = student.shape[-1]
    if labels.shape != student.shape[:-1]:
        raise OptionError(f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(student.shape)}")
    if classes < 2:
        raise OptionError("student: distillation between classes takes at least two of them")
    _check_labels(labels, classes)
    target = F.one_hot(labels, classes).bool()  # (..., classes)
    label_s, rest_s, others_s = _decoupled(student, target, temperature)
    label_t, rest_t, others_t = _decoupled(teacher, target, temperature)
    binary = label_t.exp() * (label_t - label_s) + rest_t.exp() * (rest_t - rest_s)  # (...)
    among = (others_t.exp() * (others_t - others_s)).sum(dim=-1)  # (...); the label's own term is 0
    return temperature**2 * (alpha * binary + beta * among).mean()


def feature_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference in units of the teacher's mean square: 0 for equal features, 1 for a student of zeros.

    A factor common to both changes nothing, so layers of any scale can be added up.

    Shapes:
        student, teacher: any, the same.

    Raises:
        OptionError: The shapes differ, or the teacher's features are zero throughout and have no scale.
    """
    _check_alike(student, teacher)
    reference = _wide(teacher)
    scale = reference.square().mean()
    if scale == 0:
        raise OptionError("teacher: features that are zero throughout can not be matched")
    return (_wide(student) - reference).square().mean() / scale


def check_shapes(logits: Tensor, labels: Tensor) -> None:
    """Checks that there is one label for each position of the logits.

    Shapes:
        logits: (batch, classes, ...).
        labels: (batch, ...).

    Raises:
        OptionError: They do not fit; broadcasting would compare every label with every other example.
    """
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise OptionError(
            f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}, "
            "which should be (batch, classes, ...) for labels (batch, ...)"
        )


def _check_labels(labels: Tensor, classes: int, left_out: int | None = None) -> None:
    """Refuses class indices that are none; on a GPU they would end the process's use of it."""
    wrong = (labels < 0) | (labels >= classes)
    if left_out is not None:
        wrong &= labels != left_out
    if wrong.any():
        raise OptionError(f"labels: {labels[wrong][0].item()} is not one of the {classes} classes, 0 to {classes - 1}")


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise OptionError(f"teacher: shape {tuple(teacher.shape)} does not fit the student's {tuple(student.shape)}")


def _decoupled(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of what decoupled distillation compares.

    Shapes:
        logits, target: (..., classes), the latter true at the label.

    Returns:
        The probability of the label, (...); of any other class, (...); and of each other class given that it is not the
        label, (..., classes), with 0 at the label.
    """
    log_p = F.log_softmax(_wide(logits) / temperature, dim=-1)
    rest = log_p.masked_fill(target, -torch.inf).logsumexp(dim=-1)
    label = log_p.masked_fill(~target, 0).sum(dim=-1)
    return label, rest, (log_p - rest.unsqueeze(-1)).masked_fill(target, 0)


def _standardise(logits: Tensor) -> Tensor:
    logits = _wide(logits)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / (logits.std(dim=-1, keepdim=True) + 1e-7)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
