"""Batches and augmentations, against plain loops."""

import pytest
import torch
import torch.nn.functional as F

from metaprune.data import Batches, compose, flip, shift
from metaprune.graphs.errors import OptionError


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


def test_composed_augmentations_are_applied_in_order_from_one_generator() -> None:
    images = torch.randn(20, 3, 5, 7)
    composed = compose(shift(2), flip(), lambda images, generator: images + 1)
    by_hand = torch.Generator().manual_seed(1)
    expected = flip()(shift(2)(images, by_hand), by_hand) + 1
    assert torch.equal(composed(images, torch.Generator().manual_seed(1)), expected)
    assert compose()(images, by_hand) is images
