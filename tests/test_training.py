"""Data, losses, the training loop: against independent formulas, real data and real processes."""

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
from sklearn.datasets import load_digits
from torch import Tensor, nn

from metaprune.data import Batches, digits, flip, shift
from metaprune.evaluation import accuracy, evaluate, latency, predict
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.losses import cross_entropy, distillation, standardised_distillation
from metaprune.task import Task
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


# Data


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


# Evaluation


def test_evaluate_weighs_batches_by_their_size() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(x, 3).float()

    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    wrong = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    assert evaluate(Fixed(), Batches(wrong, labels, size=6)) == pytest.approx(6 / 7, abs=1e-12)
    assert accuracy(torch.eye(3), torch.tensor([0, 1, 0])).item() == pytest.approx(2 / 3, abs=1e-12)


def test_evaluate_uses_eval_mode_and_puts_every_mode_back() -> None:
    model = network().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = bits(model)
    _, held_out = digits()
    assert evaluate(model, held_out) == evaluate(model, held_out)
    assert [m.training for m in model.modules()] == modes
    assert_same_bits(before, bits(model))


def test_evaluate_names_an_unknown_metric_and_a_metric_that_is_not_finite() -> None:
    _, held_out = digits()
    with pytest.raises(OptionError, match="metric: 'f1' is unknown, choose from accuracy"):
        evaluate(network(), held_out, "f1")
    with pytest.raises(MetapruneError, match="nan"):
        evaluate(network(), held_out, lambda logits, labels: logits.mean() * math.nan)


def test_predict_takes_tuples_dicts_and_mappings_with_logits() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": a + 2 * b, "cache": a}

    a, b = torch.randn(2, 3)
    assert torch.equal(predict(Add(), (a, b)), a + 2 * b)
    assert torch.equal(predict(Add(), {"b": b, "a": a}), a + 2 * b)
    with pytest.raises(MetapruneError, match="LSTM returns no tensor of logits but tuple"):
        predict(nn.LSTM(3, 4), torch.randn(2, 5, 3))


def test_latency_is_the_median_on_one_thread() -> None:
    threads = torch.get_num_threads()
    seen, pauses = [], iter([0.0, 0.05, 0.002, 0.002, 0.002, 0.05, 0.002])

    def run() -> None:
        seen.append(torch.get_num_threads())
        signal.sigtimedwait([], next(pauses))

    assert 0.002 <= latency(run, repeats=5, warmup=2) < 0.04
    assert seen == [1] * 7
    assert torch.get_num_threads() == threads


# Task


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet"}, "model: an nn.Module is needed, not str"),
        ({"inputs": None}, "inputs: a tensor, tuple or dict is needed, not NoneType"),
        ({"train": iter([1])}, "train: an iterator is empty after one pass"),
        ({"train": 3}, "train: batches with a length are needed, not int"),
        ({"val": []}, "val: no batches"),
        ({"val": torch.utils.data.DataLoader(Stream())}, "val: the number of batches must be known"),
        ({"loss": "hinge"}, "loss: 'hinge' is unknown, choose from cross_entropy"),
        ({"loss": 3}, "loss: a name or a function is needed, not int"),
        ({"metric": "f1"}, "metric: 'f1' is unknown, choose from accuracy"),
    ],
)
def test_a_task_names_the_attribute_at_fault(change: dict[str, object], message: str) -> None:
    train_half, held_out = digits()
    good = {"model": network(), "inputs": held_out.images[:2], "train": train_half, "val": held_out}
    assert Task(**good).score() == evaluate(good["model"], held_out)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        Task(**{**good, **change})  # type: ignore[arg-type]


# Training


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
def progress(done, total):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
model = network()
losses = train(model, some(256), classify, Settings(epochs=4), seed=2, checkpoint=sys.argv[2], progress=progress)
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


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(checkpoint: str, result: str, kill_at: int) -> int:
        command = [sys.executable, "-c", RESUME, str(Path(__file__).parent), checkpoint, result, str(kill_at)]
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
    with pytest.raises(OptionError, match="another model, data, settings or seed"):
        train(model, some(64), classify, Settings(epochs=2), checkpoint=checkpoint)
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
