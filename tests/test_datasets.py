"""The data sets: the digits and Fashion-MNIST as they are, CIFAR on made-up files, and files of an enemy."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from metaprune.data import Batches
from metaprune.datasets import FASHION_MNIST, cifar, digits, fashion_mnist
from metaprune.graphs.errors import LoadError, OptionError

Rows = list[tuple[bytes, int]]


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


# Files made up here


def pixels(count: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, length), dtype=np.uint8)


def idx(path: Path, data: np.ndarray, header: bytes | None = None) -> None:
    start = struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape) if header is None else header
    content = start + data.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def clothes(folder: Path, suffix: str = ".gz") -> dict[str, np.ndarray]:
    """A folder of 50 and 20 images in the format of Fashion-MNIST; what it holds."""
    folder.mkdir(exist_ok=True)
    held = {}
    for name, count in (("train", 50), ("t10k", 20)):
        held[name] = pixels(count, 784, count).reshape(count, 28, 28)
        idx(folder / f"{name}-images-idx3-ubyte{suffix}", held[name])
        idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)
    return held


def objects(folder: Path, classes: int) -> dict[str, np.ndarray]:
    """A folder of records in the binary format of CIFAR; the records of each file."""
    folder.mkdir(exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    held = {}
    for seed, name in enumerate(names):
        labels = np.arange(12, dtype=np.uint8)[:, None] * 7 % classes
        coarse = labels[:, : 1 if classes == 100 else 0] // 5
        held[name] = np.concatenate([coarse, labels, pixels(12, 3072, seed)], axis=1)
        (folder / f"{name}.bin").write_bytes(held[name].tobytes())
    return held


def served(batches: Batches, mean: Tensor, std: Tensor) -> Rows:
    """What batches hold, as the bytes of the files, sorted."""
    raw = (batches.images.double() * std + mean).round().byte().flatten(1)
    return sorted((bytes(row.tolist()), int(label)) for row, label in zip(raw, batches.labels, strict=True))


def moments(chosen: Rows, channels: int) -> tuple[Tensor, Tensor]:
    values = torch.tensor([list(row) for row, _ in chosen], dtype=torch.float64).view(len(chosen), channels, -1)
    shape = (1, channels, 1, 1)
    return values.mean((0, 2)).view(shape), values.std((0, 2), correction=0).view(shape)


def check_split(parts: tuple[Batches, Batches, Batches], train: Rows, test: Rows, sizes: tuple[int, int]) -> None:
    """Every image is served once, in one part, with its label, normalised by the images trained on."""
    channels = parts[0].images.shape[1]
    by_label = dict(train)
    # The numbers of the normalisation are those of the images that are trained on; they are found by their order.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(3))
    chosen = [train[i] for i in order[sizes[1] : sizes[1] + sizes[0]]]
    mean, std = moments(chosen, channels)
    learned, held_out, tested = (served(part, mean, std) for part in parts)
    assert learned == sorted(chosen)
    assert (len(learned), len(held_out)) == sizes
    assert not {row for row, _ in learned} & {row for row, _ in held_out}
    assert all(by_label[row] == label for row, label in held_out)
    assert tested == sorted(test)
    for part in parts:
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
    assert parts[0].images.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(parts[0].images.std((0, 2, 3), correction=0), torch.ones(channels))
    assert [part.shuffle for part in parts] == [True, False, False]
    assert [part.augment is None for part in parts] == [False, True, True]


# Fashion-MNIST


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_is_what_its_authors_describe() -> None:
    train, validation, test = fashion_mnist(subset=2000, validation=1000)
    assert [len(part.images) for part in (train, validation, test)] == [2000, 1000, 10_000]
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    grey = test.images * 90.0 + 73.0  # 0.353 * 255 and 0.286 * 255, the numbers of the full training set
    assert grey.mean().item() == pytest.approx(73.1, abs=3)
    assert train.images.std().item() == pytest.approx(1, abs=1e-3)
    images, labels = next(iter(train))
    assert (images.shape, labels.shape) == ((128, 1, 28, 28), (128,))


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_from_a_folder(tmp_path: Path, suffix: str) -> None:
    held = clothes(tmp_path, suffix)
    train, test = (
        [(image.tobytes(), number % 10) for number, image in enumerate(held[name])] for name in ("train", "t10k")
    )
    check_split(fashion_mnist(tmp_path, 30, 8, seed=3), train, test, (30, 8))
    check_split(fashion_mnist(tmp_path, None, 8, seed=3), train, test, (42, 8))
    _, one, _ = fashion_mnist(tmp_path, 10, 8, seed=3)
    _, other, tested = fashion_mnist(tmp_path, None, 8, seed=3)
    assert torch.equal(one.labels, other.labels)  # the same images validate, whatever is trained on
    assert tested.labels.tolist() == [number % 10 for number in range(20)]


def test_equal_seeds_give_equal_batches(tmp_path: Path) -> None:
    clothes(tmp_path)
    first, again, other = (list(fashion_mnist(tmp_path, 30, 8, 16, seed)[0]) for seed in (1, 1, 2))
    for (a, la), (b, lb) in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert not torch.equal(first[0][0], other[0][0])
    plain = fashion_mnist(tmp_path, 30, 8, augment=None)[0]
    assert plain.augment is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": 43}, "subset: can not train on 43 and validate with 8 of 50 images"),
        ({"subset": 0}, "subset: can not train on 0"),
        ({"subset": None, "validation": 50}, "subset: can not train on 0 and validate with 50"),
        ({"validation": 0}, "validation: at least one image validates, not 0"),
        ({"directory": "nowhere"}, "directory: nowhere/train-images-idx3-ubyte.gz is not there; apt-get install"),
    ],
)
def test_splits_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    clothes(tmp_path)
    with pytest.raises(OptionError, match=message):
        fashion_mnist(**{"directory": tmp_path, "subset": 30, "validation": 8, **options})  # type: ignore[arg-type]


def test_a_channel_without_contrast_is_refused(tmp_path: Path) -> None:
    clothes(tmp_path)
    idx(tmp_path / "train-images-idx3-ubyte.gz", np.full((50, 28, 28), 7, dtype=np.uint8))
    with pytest.raises(OptionError, match="the same everywhere"):
        fashion_mnist(tmp_path, 30, 8)


def images_header(*shape: int, kind: int = 8, dimensions: int = 3) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, dimensions, *shape)


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (images_header(2**32 - 1, 2**32 - 1, 2**32 - 1), "at most 60000, not"),
        (images_header(2**32 - 1, 28, 28), "at most 60000, not"),
        (images_header(60_001, 28, 28), "at most 60000, not"),
        (images_header(0, 28, 28), "at most 60000, not"),
        (images_header(50, 28, 0), "at most 60000, not"),
        (images_header(50, 784, 1), r"shape \(28, 28\) are expected"),
        (images_header(60_000, 28, 28), "less data than the 47040000 bytes announced"),
        (images_header(51, 28, 28), "less data than the 39984 bytes announced"),
        (images_header(49, 28, 28), "more data than the 38416 bytes announced"),
        (images_header(50, 28, 28, kind=0x0D), "not an idx file of unsigned bytes in 3 dimensions"),
        (images_header(50, 784, dimensions=2), "not an idx file of unsigned bytes in 3 dimensions"),
        (images_header(50, 28, 28, dimensions=255), "not an idx file of unsigned bytes in 3 dimensions"),
        (b"\x00\x01" + images_header(50, 28, 28)[2:], "not an idx file"),
    ],
)
def test_a_hostile_idx_header_is_refused(tmp_path: Path, suffix: str, header: bytes, message: str) -> None:
    held = clothes(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    idx(path, held["train"], header)
    with pytest.raises(LoadError, match=message) as caught:
        fashion_mnist(tmp_path, 30, 8)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-4],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content[: len(content) // 2] + b"\x00\xff" + content[len(content) // 2 + 2 :],
        lambda content: content[:-8] + bytes(8),  # the checksum
        lambda content: gzip.compress(b""),
        lambda content: gzip.compress(bytes(10**7)),
        lambda content: b"no gzip at all",
    ],
)
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    clothes(tmp_path)
    for name in ("t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(LoadError, match=name):
            fashion_mnist(tmp_path, 30, 8)
        path.write_bytes(whole)
    fashion_mnist(tmp_path, 30, 8)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    clothes(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    idx(path, np.zeros(49, dtype=np.uint8))
    with pytest.raises(LoadError, match="49 labels for the 50 images of train-images"):
        fashion_mnist(tmp_path, 30, 8)
    idx(path, np.full(50, 10, dtype=np.uint8))
    with pytest.raises(LoadError, match=r"train-labels-idx1-ubyte\.gz: label 10 of 10 classes"):
        fashion_mnist(tmp_path, 30, 8)


# CIFAR


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("told", [False, True])
def test_cifar_from_a_folder(tmp_path: Path, classes: int, told: bool) -> None:
    held = objects(tmp_path, classes)
    leading = 2 if classes == 100 else 1
    rows = {
        name: [(record[leading:].tobytes(), int(record[leading - 1])) for record in records]
        for name, records in held.items()
    }
    test = rows.pop("test_batch" if classes == 10 else "test")
    train = [row for records in rows.values() for row in records]
    parts = cifar(tmp_path, classes if told else None, validation=4, seed=3)
    check_split(parts, train, test, (len(train) - 4, 4))
    check_split(cifar(tmp_path, subset=7, validation=4, seed=3), train, test, (7, 4))
    assert {image.shape for image, _ in parts[0]} <= {(n, 3, 32, 32) for n in range(1, 129)}


def test_planes_are_red_green_and_blue_by_rows(tmp_path: Path) -> None:
    objects(tmp_path, 100)
    image = np.zeros((3, 32, 32), dtype=np.uint8)
    image[2, 5, 30] = 255  # blue, row 5, column 30
    (tmp_path / "test.bin").write_bytes(bytes([1, 42]) + image.tobytes())
    _, _, test = cifar(tmp_path, validation=4)
    assert test.labels.tolist() == [42]
    lowest = test.images.amin((2, 3), keepdim=True)
    assert (test.images - lowest).nonzero().tolist() == [[0, 2, 5, 30]]


@pytest.mark.parametrize("names", [["data_batch_1", "batches.meta"], ["train", "test", "meta"]])
def test_the_version_in_pickles_is_refused_unread(tmp_path: Path, names: list[str]) -> None:
    for name in names:  # reading it would make a folder
        (tmp_path / name).write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(OptionError, match="Python version of CIFAR, pickles that can run code"):
        cifar(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_cifar_folder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"holds no data_batch_1\.bin or train\.bin"):
        cifar(tmp_path)
    objects(tmp_path, 10)
    with pytest.raises(OptionError, match=r"holds no train\.bin"):
        cifar(tmp_path, classes=100)
    with pytest.raises(OptionError, match="classes: CIFAR has 10 or 100, not 20"):
        cifar(tmp_path, classes=20)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(OptionError, match=r"data_batch_4\.bin is not there"):
        cifar(tmp_path)
    objects(tmp_path, 100)
    with pytest.raises(OptionError, match="holds CIFAR-10 and CIFAR-100, say which"):
        cifar(tmp_path)
    assert len(cifar(tmp_path, classes=100, validation=4)[2].images) == 12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "0 bytes are not 1 to 60000 records of 3073 bytes"),
        (lambda content: content[:-1], "36875 bytes are not"),
        (lambda content: content + b"\x00", "36877 bytes are not"),
        (lambda content: content[:3073] + b"\x0a" + content[3074:], "label 10 of 10 classes"),
        (lambda content: content[:3073] + b"\xff" + content[3074:], "label 255 of 10 classes"),
    ],
)
def test_a_damaged_cifar_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    objects(tmp_path, 10)
    for name in ("data_batch_3.bin", "test_batch.bin"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(LoadError, match=message) as caught:
            cifar(tmp_path, validation=4)
        assert name in str(caught.value)
        path.write_bytes(whole)


def test_a_file_longer_than_any_of_cifar_is_refused_unread(tmp_path: Path) -> None:
    objects(tmp_path, 10)
    with (tmp_path / "data_batch_2.bin").open("r+b") as file:
        file.truncate(3073 * 2**30)  # three terabytes on paper, nothing on the disk
    with pytest.raises(LoadError, match=r"data_batch_2\.bin: 3299608625152 bytes are not"):
        cifar(tmp_path)
