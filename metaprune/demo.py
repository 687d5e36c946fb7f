"""The whole job on real data in under a minute: train, prune, certify, recover, save, reload, export.

A residual network learns the 8 x 8 handwritten digits of scikit-learn, is cut to a quarter of its multiply-accumulate
operations and gets its accuracy back by distillation from itself before the cut. The metanetwork's default checkpoint,
which has never seen it, prunes it in one pass to several budgets besides. `tests` run the same functions.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.evaluation import latency, onnx_runner, predict, single_thread
from metaprune.graphs.cost import Cost
from metaprune.graphs.errors import MetapruneError
from metaprune.losses import cross_entropy
from metaprune.task import Task
from metaprune.training import Progress as Report
from metaprune.training import Settings, train

SHARES = (0.5, 0.25, 0.125)
"""What the metanetwork is asked to keep of the multiply-accumulate operations."""


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        total: Tensor = y + self.shortcut(x)
        return total.relu()


class ResNet(nn.Module):
    """A residual network with three stages for small grey images."""

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, 1, h, w) to logits (batch, classes)."""
        features = self.stages(self.stem(x))  # (batch, 4 * width, h / 4, w / 4)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Figures:
    """One side of the demo's table.

    Attributes:
        accuracy: Share of the held-out digits recognised.
        parameters: Number of parameters.
        macs: Multiply-accumulate operations for one image.
        latency: Seconds for a batch of 64 in onnxruntime, one thread.
        size: Bytes of the ONNX file.
    """

    accuracy: float
    parameters: int
    macs: int
    latency: float
    size: int


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Attributes:
        dense: The trained network.
        cut: Accuracy of the pruned network before recovery.
        pruned: The recovered network.
        wiring: The certificate's relative distance between the cut and the masked network.
        onnx: Largest difference between the outputs of torch and onnxruntime, relative to the largest output.
        one_pass: Accuracy of the networks that the metanetwork makes of the dense one without training, by the share of
            multiply-accumulate operations that they were asked to keep.
    """

    dense: Figures
    cut: float
    pruned: Figures
    wiring: float
    onnx: float
    one_pass: dict[float, float]


def run(out: Path, seed: int = 0, epochs: int = 15, report: Callable[[str], Report] | None = None) -> Result:
    """Runs the demo on one thread and leaves its artefacts under `out`.

    Args:
        out: Folder for the pruned network (`pruned/`), `dense.onnx` and `pruned.onnx`.
        seed: Of data, initialisation and training.
        epochs: Of the training and of the recovery.
        report: Called with the name of each step; what it returns is called with the steps done and in all.

    Raises:
        MetapruneError: A check failed: the cut is not certified, or the reloaded or exported network gives other
            outputs.
    """
    step = report or (lambda name: lambda done, total: None)
    out.mkdir(parents=True, exist_ok=True)
    with single_thread():
        task = _trained(seed, epochs, step("train the dense network"))
        images = next(iter(task.val))[0][:64]
        cut, recovered = _pruned(task, seed, epochs, step)
        one_pass = _in_one_pass(task, seed, step("prune in one pass"))
        return _delivered(task, cut, recovered, one_pass, images, out, step("save, reload, export and measure"))


def _trained(seed: int, epochs: int, report: Report) -> Task:
    train_half, held_out = digits(seed)
    torch.manual_seed(seed)
    dense = ResNet().eval()

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    train(dense, train_half, objective, Settings(epochs=epochs, channels_last=True), seed, progress=report)
    return Task(dense, held_out.images[:1], train_half, held_out)


def _pruned(task: Task, seed: int, epochs: int, step: Callable[[str], Report]) -> tuple[mp.Pruned, mp.Pruned]:
    report = step("prune and certify")
    cut = mp.prune(task.model, task.inputs, budget="macs=0.25", seed=seed)
    report(1, 1)
    report = step("recover by distillation")
    return cut, mp.recover(cut, task, teacher=task.model, recipe="kd", epochs=epochs, seed=seed, progress=report)


def _in_one_pass(task: Task, seed: int, report: Report) -> dict[float, float]:
    pruner = mp.MetaPruner.load("default")
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outside the range")  # features are clamped, and the guard decides
        encoded = pruner.encode(task.model, task.inputs, data=task.train, seed=seed)
    for number, share in enumerate(SHARES, 1):
        found[share] = task.score(pruner.prune(encoded, budget=f"macs={share}").module)
        report(number, len(SHARES))
    return found


def _delivered(
    task: Task,
    cut: mp.Pruned,
    recovered: mp.Pruned,
    one_pass: dict[float, float],
    images: Tensor,
    out: Path,
    report: Report,
) -> Result:
    recovered.save(out / "pruned")
    check_reload(out / "pruned", images, predict(recovered.module, images))
    report(1, 4)
    whole = mp.prune(task.model, task.inputs, budget="width=1.0", certify=False)  # the same exporter on both sides
    whole.export_onnx(out / "dense.onnx")
    report(2, 4)
    recovered.export_onnx(out / "pruned.onnx")
    distance = check_onnx(out / "pruned.onnx", images, predict(recovered.module, images))
    report(3, 4)
    assert cut.certificate is not None  # certifying is the default
    result = Result(
        _figures(task, task.model, cut.cost["before"], out / "dense.onnx", images),
        task.score(cut.module),
        _figures(task, recovered.module, cut.cost["after"], out / "pruned.onnx", images),
        cut.certificate.wiring,
        distance,
        one_pass,
    )
    report(4, 4)
    return result


def _figures(task: Task, model: nn.Module, cost: Cost, onnx: Path, images: Tensor) -> Figures:
    session = onnx_runner(onnx)
    seconds = latency(lambda: session(images))
    return Figures(task.score(model), cost.params, cost.macs, seconds, onnx.stat().st_size)


def check_reload(folder: Path, images: Tensor, expected: Tensor) -> None:
    """Loads a saved network in a new process and compares its outputs bit by bit.

    Raises:
        MetapruneError: The other process fails or gives other outputs.
    """
    exchange = folder.parent / "reload.safetensors"
    save_file({"images": images}, exchange)
    done = subprocess.run([sys.executable, "-c", _RELOAD, str(folder), str(exchange)], capture_output=True, text=True)
    if done.returncode != 0:
        raise MetapruneError(f"reloading {folder} failed in a new process: {done.stderr.strip()}")
    outputs = load_file(exchange)["outputs"]
    exchange.unlink()
    if not torch.equal(outputs, expected):
        raise MetapruneError(f"{folder} gives other outputs after reloading: {(outputs - expected).abs().max():.1e}")


def check_onnx(path: Path, images: Tensor, expected: Tensor) -> float:
    """Runs an exported network in onnxruntime; the largest difference relative to the largest output.

    Raises:
        MetapruneError: The difference exceeds what float32 explains.
    """
    outputs = onnx_runner(path)(images)
    distance = ((outputs - expected).abs().max() / expected.abs().max()).item()
    if not distance <= 1e-4:
        raise MetapruneError(f"{path} gives other outputs in onnxruntime: relative difference {distance:.1e}")
    return distance


def show(console: Console, out: Path, seed: int = 0) -> None:
    """Runs the demo with a progress bar and prints its table."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:

        def step(name: str) -> Report:
            task = bar.add_task(name, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        result = run(out, seed, report=step)
    before, after = result.dense, result.pruned
    table = Table("", "dense", "pruned", "kept", title="residual network on the digits of scikit-learn")
    table.add_row("accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}", f"{result.cut:.1%} before recovery")
    for name, old, new, form in (
        ("parameters", before.parameters, after.parameters, "{:,}"),
        ("MACs", before.macs, after.macs, "{:,}"),
        ("latency of 64 (ms)", before.latency * 1e3, after.latency * 1e3, "{:.3f}"),
        ("ONNX file (bytes)", before.size, after.size, "{:,}"),
    ):
        table.add_row(name, form.format(old), form.format(new), f"{new / old:.1%}")
    console.print(table)
    console.print(f"cut against the masked network, relative distance: {result.wiring:.1e}")
    console.print("reloaded in a new process: equal to the bit")
    console.print(f"onnxruntime against torch, relative difference: {result.onnx:.1e}")
    shown = ", ".join(f"{accuracy:.1%} at {share:g} of the MACs" for share, accuracy in result.one_pass.items())
    console.print(f"the metanetwork in one pass, no training: {shown}")
    console.print(f"artefacts in {out}")


_RELOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
import metaprune

folder, exchange = sys.argv[1:]
torch.set_num_threads(1)
with torch.no_grad():
    outputs = metaprune.load(folder).eval()(load_file(exchange)["images"])
save_file({"outputs": outputs}, exchange)
"""
