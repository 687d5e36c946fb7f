"""Data sets as batches: the digits of scikit-learn, Fashion-MNIST and CIFAR, read from files and checked byte by byte.

A folder of images may come from anywhere: every size is compared with a bound before memory is taken for it, and
nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from metaprune.data import Augment, Batches, compose, flip, shift
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""
FASHION_AUGMENT: Augment = flip()
CIFAR_AUGMENT: Augment = compose(shift(4), flip())  # He et al. (2016), arXiv 1512.03385, section 4.2

_MOST = 60_000  # images in one file; Fashion-MNIST's training set, and more than any file of CIFAR
_UNSIGNED_BYTE = 0x08
_UNREADABLE = (OSError, EOFError, zlib.error)


def digits(seed: int = 0, size: int = 64, test_fraction: float = 0.25) -> tuple[Batches, Batches]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, ten classes.

    Args:
        seed: Of the split, the order and the augmentation (shifts by one pixel, training half only).
        size: Examples per training batch.
        test_fraction: Share of the examples held out.

    Returns:
        The training batches and the held-out ones; images are (n, 1, 8, 8) float32 with mean 0 and variance 1
        over the training half.

    Raises:
        MetapruneError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MetapruneError("digits: scikit-learn is missing; pip install 'metaprune[demo]'") from error
    if not 0 < test_fraction < 1:
        raise OptionError(f"test_fraction: a share between 0 and 1, not {test_fraction}")
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(raw.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out = round(test_fraction * len(images))
    test, train = order[:held_out], order[held_out:]
    images = (images - images[train].mean()) / images[train].std()
    return (
        Batches(images[train], labels[train], size, shuffle=True, augment=shift(1), generator=generator),
        Batches(images[test], labels[test], size=held_out),
    )


def fashion_mnist(
    directory: str | Path | None = None,
    subset: int | None = 20_000,
    validation: int = 5_000,
    size: int = 128,
    seed: int = 0,
    augment: Augment | None = FASHION_AUGMENT,
) -> tuple[Batches, Batches, Batches]:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 70,000 articles of clothing, 28 x 28 grey, ten classes.

    Args:
        directory: Folder with the four idx files, compressed (`train-images-idx3-ubyte.gz`, ...) or not; by default
            that of the Debian package dataset-fashion-mnist.
        subset: Images to train on, drawn from those that do not validate; None for all of them.
        validation: Images split off the training set. They are the same for every `subset`.
        size: Examples per batch.
        seed: Of the split, the order and the augmentation.
        augment: Of the training images, after normalisation.

    Returns:
        Batches to train on, to validate with, and to test with (the 10,000 test images, in the order of the file).
        Images are (n, 1, 28, 28) float32 with mean 0 and variance 1 over the images trained on, labels int64.

    Raises:
        OptionError: A file is not there, or `subset` and `validation` do not fit.
        LoadError: A file is truncated or holds something else.
    """
    folder = FASHION_MNIST if directory is None else Path(directory)
    train, test = (_idx_pair(folder, name) for name in ("train", "t10k"))
    return _batches(train, test, subset, validation, size, seed, augment)


def cifar(
    directory: str | Path,
    classes: int | None = None,
    subset: int | None = None,
    validation: int = 5_000,
    size: int = 128,
    seed: int = 0,
    augment: Augment | None = CIFAR_AUGMENT,
) -> tuple[Batches, Batches, Batches]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), the binary version: 32 x 32 colour images of objects.

    Written after the format's description and tested on made-up files; it has not been run on the real ones.

    Args:
        directory: Folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` (CIFAR-10), or
            `train.bin` and `test.bin` (CIFAR-100).
        classes: 10 or 100; None to tell by the files.
        subset: See `fashion_mnist`, as for all that follow.
        validation: Images split off the training set.
        size: Examples per batch.
        seed: Of all that is drawn.
        augment: Of the training images.

    Returns:
        Batches to train on, to validate with, and to test with. Images are (n, 3, 32, 32) float32, each channel with
        mean 0 and variance 1 over the images trained on; labels int64, the fine ones of CIFAR-100.

    Raises:
        OptionError: A file is not there, it is the version for Python (pickles, which can run code when they are
            read), or `classes`, `subset` or `validation` do not fit.
        LoadError: A file is truncated or holds something else.
    """
    folder = Path(directory)
    classes = _cifar_classes(folder, classes)
    names, test_name = _CIFAR_FILES[classes]
    parts = [_cifar_file(_present(folder, name), classes) for name in names]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    test = _cifar_file(_present(folder, test_name), classes)
    return _batches((images, labels), test, subset, validation, size, seed, augment)


def _batches(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    subset: int | None,
    validation: int,
    size: int,
    seed: int,
    augment: Augment | None,
) -> tuple[Batches, Batches, Batches]:
    """Splits, normalises and serves pairs of images, (n, channels, height, width) uint8, and labels, (n,) int64."""
    images, labels = train
    if validation < 1:
        raise OptionError(f"validation: at least one image validates, not {validation}")
    wanted = len(images) - validation if subset is None else subset
    if not 1 <= wanted <= len(images) - validation:
        raise OptionError(f"subset: can not train on {wanted} and validate with {validation} of {len(images)} images")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, chosen = order[:validation], order[validation : validation + wanted]
    std, mean = torch.std_mean(images[chosen].float(), dim=(0, 2, 3), correction=0, keepdim=True)  # (1, channels, 1, 1)
    if not std.all():
        raise OptionError("subset: a channel of the images to train on is the same everywhere")

    def normalised(raw: Tensor) -> Tensor:
        return raw.float().sub_(mean).div_(std)

    return (
        Batches(normalised(images[chosen]), labels[chosen], size, shuffle=True, augment=augment, generator=generator),
        Batches(normalised(images[held_out]), labels[held_out], size),
        Batches(normalised(test[0]), test[1], size),
    )


def _idx_pair(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images, (n, 1, 28, 28) uint8, and labels, (n,) int64, of one half of Fashion-MNIST."""
    images_path, labels_path = (_idx_path(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = _idx(images_path, (28, 28)), _idx(labels_path, ())
    if len(images) != len(labels):
        raise LoadError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    return images.unsqueeze(1), _checked_labels(labels_path, labels, 10)


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise OptionError(
        f"directory: {folder / name}.gz is not there; apt-get install dataset-fashion-mnist, or name a folder with it"
    )


def _idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The unsigned bytes of an idx file, (n, *shape).

    The format: two zero bytes, the type, the number of dimensions, each of them as a big-endian 32-bit number, data.
    """
    header = 4 + 4 * (1 + len(shape))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(header)
            count = _idx_count(path, start, shape)
            expected = count * torch.Size(shape).numel()
            data = file.read(expected + 1)  # one more, to see that the file ends there
    except _UNREADABLE as error:
        raise LoadError(f"{path}: {error}") from error
    if len(data) != expected:
        raise LoadError(
            f"{path}: {'more' if len(data) > expected else 'less'} data than the {expected} bytes announced"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *shape)


def _idx_count(path: Path, start: bytes, shape: tuple[int, ...]) -> int:
    """Number of examples that the header of an idx file announces."""
    dimensions = 1 + len(shape)
    if len(start) < 4 + 4 * dimensions or start[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise LoadError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions")
    count, *rest = struct.unpack(f">{dimensions}I", start[4:])
    if not 1 <= count <= _MOST or tuple(rest) != shape:
        raise LoadError(f"{path}: examples of shape {shape} are expected, at most {_MOST}, not {(count, *rest)}")
    return int(count)


_CIFAR_FILES = {
    10: ([f"data_batch_{number}.bin" for number in range(1, 6)], "test_batch.bin"),
    100: (["train.bin"], "test.bin"),
}
_CIFAR_PICKLES = ("data_batch_1", "batches.meta", "train", "meta")


def _cifar_classes(folder: Path, asked: int | None) -> int:
    if asked is not None and asked not in _CIFAR_FILES:
        raise OptionError(f"classes: CIFAR has 10 or 100, not {asked}")
    found = [classes for classes, (names, _) in _CIFAR_FILES.items() if (folder / names[0]).is_file()]
    if asked in found or (asked is None and len(found) == 1):
        return asked or found[0]
    if found and asked is None:
        raise OptionError(f"classes: {folder} holds CIFAR-10 and CIFAR-100, say which")
    if any((folder / name).is_file() for name in _CIFAR_PICKLES):
        raise OptionError(
            f"directory: {folder} holds the Python version of CIFAR, pickles that can run code when they are read; "
            "only the binary version is"
        )
    wanted = " or ".join(_CIFAR_FILES[classes][0][0] for classes in ([asked] if asked else _CIFAR_FILES))
    raise OptionError(f"directory: {folder} holds no {wanted}")


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise OptionError(f"directory: {folder / name} is not there")
    return folder / name


def _cifar_file(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images, (n, 3, 32, 32) uint8, and labels, (n,) int64.

    A record is the label (CIFAR-100: the coarse one, then the fine one), then the three planes of 32 x 32 bytes.
    """
    leading = 2 if classes == 100 else 1
    record = leading + 3 * 32 * 32
    try:
        length = path.stat().st_size
        if length == 0 or length % record or length > _MOST * record:
            raise LoadError(f"{path}: {length} bytes are not 1 to {_MOST} records of {record} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: {error}") from error
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, record)
    labels = _checked_labels(path, records[:, leading - 1], classes)
    return records[:, leading:].reshape(-1, 3, 32, 32), labels


def _checked_labels(path: Path, labels: Tensor, classes: int) -> Tensor:
    if labels.max() >= classes:
        raise LoadError(f"{path}: label {labels.max().item()} of {classes} classes")
    return labels.long()
