"""Batches, augmentations, the digits and the losses, against plain loops and textbook formulas."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from metaprune.data import Batches, digits, flip, shift
from metaprune.graphs.errors import OptionError
from metaprune.losses import distillation, standardised_distillation


def test_digits_are_split_without_overlap_and_standardised() -> None:
    train_half, held_out = digits(seed=3)
    assert (len(train_half.images), len(held_out.images)) == (1348, 449)
    images = torch.cat([train_half.images, held_out.images]).flatten(1)
    pixels = ((images - images.min()) / (images.max() - images.min()) * 16).round().int()  # 0 to 16 again
    labels = torch.cat([train_half.labels, held_out.labels])
    served = sorted((*row, label) for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    raw = load_digits()
    assert served == sorted((*row, label) for row, label in zip(raw.data.tolist(), raw.target.tolist(), strict=True))
    assert train_half.images.mean().abs() < 1e-5
    assert abs(train_half.images.std() - 1) < 1e-5


def test_digits_depend_on_the_seed_only() -> None:
    first, again, other = digits(1)[0], digits(1)[0], digits(2)[0]
    for (a, la), (b, lb) in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert not torch.equal(next(iter(digits(1)[0]))[1], next(iter(other))[1])


def test_batches_serve_every_example_once_in_a_new_order() -> None:
    numbers = torch.arange(10)
    batches = Batches(numbers, numbers, size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert len(batches) == 3
    orders = [torch.cat([images for images, _ in batches]).tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1]
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert all(torch.equal(images, labels) for images, labels in batches)


@pytest.mark.parametrize(
    ("images", "labels", "size", "option"), [(3, 2, 1, "labels"), (0, 0, 1, "images"), (3, 3, 0, "size")]
)
def test_batches_refuse_what_can_not_be_served(images: int, labels: int, size: int, option: str) -> None:
    with pytest.raises(OptionError, match=option):
        Batches(torch.zeros(images), torch.zeros(labels), size)


def test_shift_equals_a_loop_over_images() -> None:
    images = torch.randn(20, 3, 5, 7)
    moved = shift(2)(images, torch.Generator().manual_seed(1))
    top, left = torch.randint(5, (2, 20, 1), generator=torch.Generator().manual_seed(1))
    offsets = set()
    for image, result, down, right in zip(images, moved, top[:, 0], left[:, 0], strict=True):
        expected = F.pad(image, (2, 2, 2, 2))[:, down : down + 5, right : right + 7]
        assert torch.equal(result, expected)
        offsets.add((int(down), int(right)))
    assert len(offsets) > 5


def test_flip_mirrors_about_the_asked_share() -> None:
    images = torch.randn(1000, 1, 2, 3)
    result = flip(0.3)(images, torch.Generator().manual_seed(0))
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    assert ((result == images).flatten(1).all(1) ^ mirrored).all()
    assert 0.25 < mirrored.float().mean() < 0.35


# Losses


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
