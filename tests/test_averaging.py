"""The moving average of the weights that training may end with: by formula, killed and resumed."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from metaprune.graphs.errors import OptionError
from metaprune.training import Settings, TrainingError, train
from tests.test_training import assert_same_bits, bits, classify, network, some


def trained(model: nn.Module, ema: float, epochs: int = 3, **options: object) -> list[dict[str, Tensor]]:
    """The weights before the first step and after each."""
    path = [bits(model)]
    settings = Settings(epochs=epochs, ema=ema, precision="float32")
    train(model, some(128), classify, settings, progress=lambda done, total: path.append(bits(model)))
    return path


@pytest.mark.parametrize("ema", [0.5, 0.9])  # the warm-up matters up to step 9 and to step 81
def test_the_model_ends_with_the_average_and_is_trained_without_it(ema: float) -> None:
    model, plain = network(), network()
    path, reference = trained(model, ema), trained(plain, 0.0)
    assert len(path) == 1 + 3 * 4
    for one, other in zip(path, reference, strict=True):
        assert_same_bits(one, other)
    for name, value in bits(model).items():
        if not value.is_floating_point():
            assert torch.equal(value, path[-1][name])  # the counter of batch norm
            continue
        expected = path[0][name].double()
        for step, weights in enumerate(path[1:]):
            decay = min(ema, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weights[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, path[-1][name]), name


def test_what_never_changes_stays_to_the_bit() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.inner[3].weight.requires_grad_(False)
            self.register_buffer("scale", torch.rand(10) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale  # type: ignore[no-any-return]

    model = Scaled()
    before = bits(model)
    train(model, some(128), classify, Settings(epochs=5, ema=0.97))
    after = bits(model)
    for name in ("scale", "inner.3.weight"):
        assert torch.equal(before[name], after[name]), name


def test_low_precision_weights_are_averaged_in_single_precision() -> None:
    # The weight rises by exactly 1/16 a step. In bfloat16 an average would soon stand still.
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 4.0)
    batches = [(torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1))] * 32
    settings = Settings(epochs=1, lr=1e-3, momentum=0, weight_decay=0, warmup=0, ema=0.99)

    def rise(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        with torch.no_grad():
            model.weight += 1 / 16
        return logits.float().sum() * 1e-9

    train(model, batches, rise, settings)
    expected = 4.0
    for step in range(32):
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (4 + (step + 1) / 16)
    assert model.weight.item() == pytest.approx(expected, abs=2**-6)  # half a unit in the last place below 8


def test_tied_weights_and_layouts_are_averaged_once() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)
    path = trained(model, 0.5, epochs=1)
    expected = path[0]["1.weight"].double()
    for step, weights in enumerate(path[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights["1.weight"].double()
    assert second.weight is first.weight
    torch.testing.assert_close(first.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    images = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    contiguous = copy.deepcopy(images).to(memory_format=torch.contiguous_format)
    trained(images, 0.9)
    trained(contiguous, 0.9)
    for name, value in bits(images).items():
        torch.testing.assert_close(value, bits(contiguous)[name], rtol=1e-3, atol=1e-4)


def test_an_error_leaves_the_weights_and_not_their_average() -> None:
    model, undisturbed = network(), network()
    calls = 0

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return classify(logits, inputs, labels) * (float("nan") if calls == 7 else 1)

    with pytest.raises(TrainingError, match="the loss is not finite in epoch 2"):
        train(model, some(128), objective, Settings(epochs=3, ema=0.9, precision="float32"))
    path = trained(undisturbed, 0.9)
    assert_same_bits(bits(model), path[4])


RESUME = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import bits, classify, network, some
from metaprune.training import Settings, train
from safetensors.torch import save_file
kill_at = int(sys.argv[3])
def progress(done, total):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
model = network()
settings = Settings(epochs=4, ema=0.95)
train(model, some(256), classify, settings, seed=2, checkpoint="checkpoint", progress=progress)
save_file(bits(model), sys.argv[2])
"""


def test_a_killed_run_resumes_to_the_same_average(tmp_path: Path) -> None:
    def run(result: str, kill_at: int) -> int:
        command = [sys.executable, "-c", RESUME, str(Path(__file__).parent), result, str(kill_at)]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("result", 21) == -signal.SIGKILL  # in epoch 3 of 4
    assert run("result", -1) == 0
    model, again = network(), network(seed=4)
    settings = Settings(epochs=4, ema=0.95)
    train(model, some(256), classify, settings, seed=2)
    assert_same_bits(bits(model), load_file(tmp_path / "result"))
    train(again, some(256), classify, settings, seed=2, checkpoint=tmp_path / "checkpoint")  # it is finished
    assert_same_bits(bits(model), bits(again))
    with pytest.raises(OptionError, match="another model, data, settings or seed"):
        train(again, some(256), classify, Settings(epochs=4), seed=2, checkpoint=tmp_path / "checkpoint")
