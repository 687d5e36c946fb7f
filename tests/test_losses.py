"""The losses, against textbook formulas and the identities between them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.graphs.errors import OptionError
from metaprune.losses import (
    cross_entropy,
    decoupled_distillation,
    distillation,
    feature_matching,
    standardised_distillation,
)


def logits(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Those of a student and a teacher in float64, wide enough apart that some classes are all but certain."""
    student, teacher = 6 * torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return student, teacher


@pytest.mark.parametrize("extra", [(), (5,), (2, 3)])
def test_cross_entropy_leaves_out_what_is_labelled_so(extra: tuple[int, ...]) -> None:
    scores = torch.randn(4, 7, *extra, dtype=torch.float64)
    labels = torch.randint(7, (4, *extra))
    labels[1] = -100
    log_p = scores.log_softmax(1).movedim(1, -1).flatten(0, -2)
    chosen = [row[label] for row, label in zip(log_p, labels.flatten(), strict=True) if label != -100]
    assert cross_entropy(scores, labels).item() == pytest.approx(-torch.stack(chosen).mean().item(), rel=1e-12)


def test_cross_entropy_takes_probabilities_as_torch_does() -> None:
    scores, target = torch.randn(2, 4, 7)
    target = target.softmax(1)
    assert torch.equal(cross_entropy(scores, target), F.cross_entropy(scores, target))


@pytest.mark.parametrize(("label", "named"), [(10, "10"), (-1, "-1"), (255, "255")])
def test_a_label_that_is_no_class_is_named(label: int, named: str) -> None:
    labels = torch.tensor([3, 9, label, 11])
    with pytest.raises(OptionError, match=rf"^labels: {named} is not one of the 10 classes, 0 to 9$"):
        cross_entropy(torch.randn(4, 10), labels)
    with pytest.raises(OptionError, match=rf"^labels: {named} is not one of the 10 classes, 0 to 9$"):
        decoupled_distillation(torch.randn(4, 10), torch.randn(4, 10), labels)


@pytest.mark.parametrize(("scores", "labels"), [((4, 10), (4, 1)), ((4, 10), (3,)), ((4, 5, 10), (4, 5)), ((4,), (4,))])
def test_labels_of_another_shape_are_named(scores: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"labels: shape .* does not fit logits of shape") as caught:
        cross_entropy(torch.randn(scores), torch.zeros(labels, dtype=torch.long))
    assert str(scores) in str(caught.value)
    assert str(labels) in str(caught.value)


def test_distillation_is_the_textbook_formula() -> None:
    student, teacher = torch.randn(2, 6, 10, dtype=torch.float64).float()
    p, q = (teacher / 3).softmax(1).double(), (student / 3).softmax(1).double()
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert distillation(student, teacher, temperature=3).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_distillation_at_high_temperature_matches_logits() -> None:
    # Hinton et al. section 2.1: for T large against zero-mean logits the loss tends to |z - v|^2 / (2 N).
    student, teacher = torch.randn(2, 4, 10)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    expected = ((student - teacher) ** 2).sum(1).mean() / 20
    assert distillation(student, teacher, temperature=200).item() == pytest.approx(expected.item(), rel=0.02)


def test_distillation_averages_over_every_position() -> None:
    student, teacher = torch.randn(2, 3, 5, 10)
    rows = torch.stack([distillation(s, t) for s, t in zip(student, teacher, strict=True)])
    assert distillation(student, teacher).item() == pytest.approx(rows.mean().item(), rel=1e-5)


def test_standardised_distillation_ignores_scale_and_offset() -> None:
    student, teacher = torch.randn(2, 6, 10)
    plain = standardised_distillation(student, teacher)
    assert plain > 0.1
    assert standardised_distillation(5 * student - 2, teacher / 3 + 1).item() == pytest.approx(plain.item(), rel=1e-4)


# Decoupled distillation


def test_decoupled_distillation_is_the_definition_written_as_loops() -> None:
    student, teacher = logits(5, 6)
    labels = torch.tensor([0, 5, 2, 2, 4])
    total = 0.0
    for s, t, label in zip((student / 3).softmax(1).tolist(), (teacher / 3).softmax(1).tolist(), labels, strict=True):
        others = [i for i in range(6) if i != label]
        rest_s, rest_t = sum(s[i] for i in others), sum(t[i] for i in others)
        target = t[label] * math.log(t[label] / s[label]) + rest_t * math.log(rest_t / rest_s)
        non_target = sum(t[i] / rest_t * math.log((t[i] / rest_t) / (s[i] / rest_s)) for i in others)
        total += 9 * (0.7 * target + 2.5 * non_target) / 5
    loss = decoupled_distillation(student, teacher, labels, alpha=0.7, beta=2.5, temperature=3)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_plain_distillation_is_the_decoupled_one_with_the_teacher_own_weights(temperature: float) -> None:
    # Equation 6: KD = TCKD + (1 - p_teacher(label)) NCKD, exactly, for every example.
    student, teacher = logits(64, 10)
    labels = torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))
    sure = (teacher / temperature).softmax(1).gather(1, labels[:, None])[:, 0]
    assert sure.max() > 0.6
    assert sure.min() < 0.01
    for row in range(64):
        s, t, label = student[row : row + 1], teacher[row : row + 1], labels[row : row + 1]
        decoupled = decoupled_distillation(s, t, label, 1.0, 1 - sure[row].item(), temperature)
        assert decoupled.item() == pytest.approx(distillation(s, t, temperature).item(), rel=1e-12, abs=1e-12)


def test_decoupled_distillation_averages_over_every_position() -> None:
    student, teacher = logits(3, 5, 10)
    labels = torch.randint(10, (3, 5))
    rows = [decoupled_distillation(s, t, y) for s, t, y in zip(student, teacher, labels, strict=True)]
    assert decoupled_distillation(student, teacher, labels).item() == pytest.approx(
        torch.stack(rows).mean().item(), rel=1e-12
    )


def test_gradients_of_decoupled_distillation_are_right_and_finite() -> None:
    student, teacher = logits(3, 4)
    labels = torch.tensor([1, 0, 3])
    assert torch.autograd.gradcheck(lambda s: decoupled_distillation(s, teacher, labels), student.requires_grad_())
    sure = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    loss = decoupled_distillation(sure, torch.flip(sure.detach(), [0]), torch.tensor([0, 0]), temperature=1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()
    assert sure.grad.abs().max() > 0.1
    assert decoupled_distillation(student, student.detach(), labels).item() == pytest.approx(0, abs=1e-12)


def test_two_classes_leave_nothing_but_the_target() -> None:
    student, teacher = logits(8, 2)
    labels = torch.randint(2, (8,))
    one, other = (decoupled_distillation(student, teacher, labels, 1, beta, 2) for beta in (0, 50))
    assert one.item() == pytest.approx(distillation(student, teacher, 2).item(), rel=1e-12)
    assert one.item() == pytest.approx(other.item(), rel=1e-9)
    with pytest.raises(OptionError, match=r"student: .* at least two"):
        decoupled_distillation(student[:, :1], teacher[:, :1], labels * 0)
    with pytest.raises(OptionError, match=r"labels: shape \(8, 1\) does not fit logits of shape \(8, 2\)"):
        decoupled_distillation(student, teacher, labels[:, None])


# Features


def test_feature_matching_counts_in_units_of_the_teacher() -> None:
    student, teacher = torch.randn(2, 4, 8, 3, 3, dtype=torch.float64)
    expected = sum((s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    expected /= sum(t**2 for t in teacher.flatten().tolist())
    assert feature_matching(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert feature_matching(-1e3 * student, -1e3 * teacher).item() == pytest.approx(expected, rel=1e-12)
    assert feature_matching(torch.zeros_like(teacher), teacher).item() == pytest.approx(1, rel=1e-12)
    assert feature_matching(teacher, teacher) == 0
    with pytest.raises(OptionError, match="teacher: features that are zero"):
        feature_matching(student, torch.zeros_like(teacher))


# Precision and shapes, all of them


@pytest.mark.parametrize("loss", [distillation, standardised_distillation, feature_matching])
def test_a_teacher_of_another_shape_is_refused_with_both_shapes(loss: object) -> None:
    assert callable(loss)
    with pytest.raises(OptionError, match=r"teacher: shape \(4, 100\) does not fit the student's \(4, 10\)"):
        loss(torch.randn(4, 10), torch.randn(4, 100))
    with pytest.raises(OptionError, match=r"teacher: shape \(1, 10\) does not fit the student's \(4, 10\)"):
        loss(torch.randn(4, 10), torch.randn(1, 10))  # would be broadcast


def test_decoupled_distillation_refuses_a_teacher_of_another_shape() -> None:
    with pytest.raises(OptionError, match=r"teacher: shape \(4, 9\) does not fit the student's \(4, 10\)"):
        decoupled_distillation(torch.randn(4, 10), torch.randn(4, 9), torch.zeros(4, dtype=torch.long))


def test_low_precision_is_widened_and_double_precision_kept() -> None:
    student, teacher = logits(6, 10)
    labels = torch.arange(6)
    for loss in (
        lambda s, t: distillation(s, t),
        lambda s, t: standardised_distillation(s, t),
        lambda s, t: decoupled_distillation(s, t, labels),
        lambda s, t: feature_matching(s, t),
        lambda s, t: cross_entropy(s, labels),
    ):
        assert loss(student, teacher).dtype == torch.float64
        low_student, low_teacher = student.bfloat16(), teacher.bfloat16()
        low = loss(low_student, low_teacher)
        assert low.dtype == torch.float32
        assert low.item() == pytest.approx(loss(low_student.double(), low_teacher.double()).item(), rel=1e-5)
