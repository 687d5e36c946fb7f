"""The training loop: against independent formulas, on real data, killed and resumed in real processes."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.data import Batches, shift
from metaprune.datasets import digits
from metaprune.evaluation import evaluate
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.losses import cross_entropy
from metaprune.training import Settings, TrainingError, train


def network(seed: int = 0) -> nn.Sequential:
    """A small network with batch norm and dropout: both depend on the random state and on the mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def classify(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def some(count: int, size: int = 32) -> Batches:
    full, _ = digits()
    generator = torch.Generator().manual_seed(0)
    return Batches(full.images[:count], full.labels[:count], size, True, shift(1), generator)


def test_training_learns_digits() -> None:
    train_half, held_out = digits()
    model = network()
    before = evaluate(model, held_out)
    losses = train(model, train_half, classify, Settings(epochs=8, lr=0.1))
    assert before < 0.3
    assert evaluate(model, held_out) > 0.9
    assert len(losses) == 8
    assert losses[-1] < 0.4 < losses[0]


def test_one_step_is_nesterov_sgd_with_decay_on_matrices_only() -> None:
    images, labels = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Linear(4, 3)
    expected = copy.deepcopy(model)
    settings = Settings(epochs=1, lr=0.5, weight_decay=0.1, warmup=0, precision="float32")
    loss = train(model, [(images, labels)], classify, settings)
    reference = F.cross_entropy(expected(images), labels)
    reference.backward()  # type: ignore[no-untyped-call]
    assert loss == [pytest.approx(reference.item(), rel=1e-6)]
    for name, old in expected.named_parameters():
        assert old.grad is not None
        gradient = old.grad + (0.1 * old.detach() if old.ndim > 1 else 0)
        torch.testing.assert_close(model.get_parameter(name), old.detach() - 0.5 * 1.9 * gradient)


def test_adamw_is_its_paper_written_out_with_decay_on_matrices_only() -> None:
    images, labels = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Linear(4, 3)
    settings = Settings(
        epochs=3, lr=0.02, momentum=0.8, weight_decay=0.1, warmup=0, precision="float32", optimizer="adamw"
    )
    weights = [p.detach().double().requires_grad_() for p in (model.weight, model.bias)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    train(model, [(images, labels)], classify, settings)
    for t in range(1, 4):  # algorithm 2 of arXiv 1711.05101, whose schedule multiplier is the rate over lr
        rate = settings.rate((t - 1) / 3)
        loss = F.cross_entropy(images.double() @ weights[0].T + weights[1], labels)
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            step = first[i] / (1 - 0.8**t) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            decay = 0.1 if i == 0 else 0.0
            weights[i] = (weights[i] - rate * (step + decay * weights[i])).detach().requires_grad_()
    torch.testing.assert_close(model.weight.double(), weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bias.double(), weights[1], rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_bits_and_leave_the_random_state_alone() -> None:
    batches, results = some(256), []
    for seed in (5, 5, 6):
        model = network()
        state = torch.get_rng_state()
        train(model, batches, classify, Settings(epochs=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(bits(model))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0]["0.weight"], results[2]["0.weight"])


def test_a_torch_data_loader_is_seeded_too() -> None:
    full, _ = digits()
    data = torch.utils.data.TensorDataset(full.images[:128], full.labels[:128])
    results = []
    for generator in (torch.Generator(), None, None):
        loader = torch.utils.data.DataLoader(data, 32, shuffle=True, generator=generator)
        model = network()
        train(model, loader, classify, Settings(epochs=2), seed=1)
        again = network()
        train(again, loader, classify, Settings(epochs=2), seed=1)
        assert_same_bits(bits(model), bits(again))
        results.append(bits(model))
    assert_same_bits(results[1], results[2])


def test_modes_are_put_back() -> None:
    model = network().eval()
    model[5].train()
    train(model, some(64), classify, Settings(epochs=1))
    assert [m.training for m in model.modules()] == [m is model[5] for m in model.modules()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_layout_reach_the_network(precision: str, channels_last: bool) -> None:
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            seen.append((str(y.dtype), x.is_contiguous(memory_format=torch.channels_last)))
            return y.flatten(1)  # type: ignore[no-any-return]

    seen: list[tuple[str, bool]] = []
    model = Spy()
    settings = Settings(epochs=1, precision=precision, channels_last=channels_last)  # type: ignore[arg-type]
    train(model, [(torch.randn(4, 3, 8, 8), torch.arange(4))], classify, settings)
    assert seen == [(f"torch.{precision}", channels_last)]
    assert model.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("input", "an input of the batch is not finite in epoch 2, step 2 of 4"),
        ("logits", "a logit of the network is not finite in epoch 2, step 2 of 4"),
        ("loss", "the loss is not finite in epoch 2, step 2 of 4"),
        ("gradient", r"the gradient of 0\.weight is not finite in epoch 2, step 2 of 4"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_at_the_last_finite_epoch(where: str, message: str) -> None:
    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] * math.inf

    class Poisoned(Batches):
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            Poisoned.passes += 1
            for step, (images, labels) in enumerate(super().__iter__()):
                bad = where == "input" and Poisoned.passes == 2 and step == 1
                yield images * math.nan if bad else images, labels

    calls = 0

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls != 6:
            return cross_entropy(logits, labels)
        if where == "gradient":
            logits = Blow.apply(logits)
        return cross_entropy(logits, labels) * (math.inf if where == "loss" else 1)

    def corrupt(model: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * math.nan if where == "logits" and model.training and calls == 5 else output

    batches = some(128)
    poisoned = Poisoned(batches.images, batches.labels, 32, True, None, batches.generator)
    model, undisturbed = network(), network()
    model.register_forward_hook(corrupt)
    settings = Settings(epochs=4, warmup=0)
    with pytest.raises(TrainingError, match=message):
        train(model, poisoned, objective, settings)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 16
        if done == 4:
            reached.update(bits(undisturbed))
            raise Stop

    reached: dict[str, Tensor] = {}
    clean = Batches(batches.images, batches.labels, 32, True, None, batches.generator)
    with pytest.raises(Stop):
        train(undisturbed, clean, classify, settings, progress=stop)
    assert_same_bits(reached, bits(model))


RESUME = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import bits, classify, network, some
from metaprune.training import Settings, train
from safetensors.torch import save_file
kill_at = int(sys.argv[4])
settings = Settings(epochs=4, lr=0.01, optimizer=sys.argv[5])
def progress(done, total):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
model = network()
losses = train(model, some(256), classify, settings, seed=2, checkpoint=sys.argv[2], progress=progress)
save_file(bits(model), sys.argv[3], {"losses": repr(losses)})
"""


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[2, 1, 0, 0] = math.inf
    with pytest.raises(TrainingError, match=r"3\.weight is not finite in epoch 1, step 1 of 2"):
        train(model, some(64), classify, Settings(epochs=1))
    model = network()
    before = bits(model)
    with pytest.raises(TrainingError, match=r"\d\.\w+ is not finite after epoch 1"):  # overflow in the last step
        train(model, some(32), lambda logits, i, labels: 1e3 * logits.sum(), Settings(epochs=1, lr=1e38, warmup=0))
    assert_same_bits(before, bits(model))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    def run(checkpoint: str, result: str, kill_at: int) -> int:
        arguments = [str(Path(__file__).parent), checkpoint, result, str(kill_at), optimizer]
        command = [sys.executable, "-c", RESUME, *arguments]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("one.safetensors", "undisturbed", -1) == 0
    assert run("two.safetensors", "resumed", 13) == -signal.SIGKILL  # in epoch 2
    assert run("two.safetensors", "resumed", 27) == -signal.SIGKILL  # in epoch 4
    assert not (tmp_path / "resumed").exists()
    assert run("two.safetensors", "resumed", -1) == 0
    assert (tmp_path / "undisturbed").read_bytes() == (tmp_path / "resumed").read_bytes()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    checkpoint = tmp_path / "deep" / "run.safetensors"
    model, again = network(), network(seed=9)
    settings = Settings(epochs=2)
    losses = train(model, some(64), classify, settings, checkpoint=checkpoint)
    steps: list[int] = []
    resumed = train(again, some(64), classify, settings, 0, checkpoint, progress=lambda done, total: steps.append(done))
    assert resumed == losses
    assert steps == []
    assert_same_bits(bits(model), bits(again))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.safetensors"]


def test_a_foreign_or_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    train(network(), some(64), classify, Settings(epochs=1), checkpoint=checkpoint)
    model = network(seed=3)
    before = bits(model)
    other = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(OptionError, match="another model, data, settings or seed"):
        train(other, some(64), classify, Settings(epochs=1), checkpoint=checkpoint)
    for settings in (Settings(epochs=2), Settings(epochs=1, optimizer="adamw")):
        with pytest.raises(OptionError, match="another model, data, settings or seed"):
            train(model, some(64), classify, settings, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(LoadError, match="can not be read"):
        train(model, some(64), classify, Settings(epochs=1), checkpoint=checkpoint)
    checkpoint.write_text(json.dumps({"not": "a checkpoint"}))
    with pytest.raises(LoadError, match="can not be read"):
        train(model, some(64), classify, Settings(epochs=1), checkpoint=checkpoint)
    assert_same_bits(before, bits(model))


def test_tied_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.flatten(1)).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Tied()
    fresh = copy.deepcopy(model)
    train(model, some(64), classify, Settings(epochs=1), checkpoint=tmp_path / "c")
    train(fresh, some(64), classify, Settings(epochs=1), checkpoint=tmp_path / "c")
    assert fresh.second.weight is fresh.first.weight
    assert_same_bits(bits(model), bits(fresh))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"warmup": 2.0}, "warmup"),
        ({"precision": "float8"}, "precision"),
        ({"ema": 1.0}, "ema"),
        ({"ema": -0.1}, "ema"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is unknown, choose from adamw, sgd"),
    ],
)
def test_settings_name_the_option_at_fault(settings: dict[str, float], option: str) -> None:
    with pytest.raises(OptionError, match=option):
        Settings(**settings)  # type: ignore[arg-type]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(OptionError, match="model: no parameter requires a gradient"):
        train(nn.Linear(64, 10).requires_grad_(False), some(64), classify, Settings())
    with pytest.raises(OptionError, match="train: no batches"):
        train(network(), [], classify, Settings())


def test_a_loader_that_yields_nothing_is_named_and_changes_nothing() -> None:
    class Spent:
        passes = 0

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            return iter(some(64)) if self.passes == 1 else iter(())

    once, model = network(), network()
    train(once, Spent(), classify, Settings(epochs=1, warmup=0, lr=1e-9))
    with pytest.raises(OptionError, match="train: no examples in epoch 2, though the loader has 2 batches"):
        train(model, Spent(), classify, Settings(epochs=2, warmup=0, lr=1e-9))
    assert (model[1].running_mean - once[1].running_mean).abs().max() == 0


def test_a_bad_label_is_named_and_leaves_the_model_as_it_was() -> None:
    batches = some(96)
    batches.labels[-1] = 10
    model = network()
    before = bits(model)
    with pytest.raises(OptionError, match="labels: 10 is not one of the 10 classes, 0 to 9"):
        train(model, batches, classify, Settings(epochs=1, warmup=0))
    assert_same_bits(before, bits(model))
