"""Evaluation, latency and the task."""

import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.data import Batches
from metaprune.datasets import digits
from metaprune.evaluation import accuracy, evaluate, latency, predict
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.task import Task


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


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


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


def test_evaluate_names_an_unknown_metric() -> None:
    _, held_out = digits()
    with pytest.raises(OptionError, match="metric: 'f1' is unknown, choose from accuracy"):
        evaluate(network(), held_out, "f1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(math.nan), "metric measure is nan in batch 1 of the held-out data"),
        (-math.inf, "metric measure is -inf in batch 1 of the held-out data"),
        (torch.zeros(449), r"metric measure returns a tensor of shape \(449,\), not one number"),
        ((0.5, 0.6), "metric measure returns tuple, not one number"),
        (None, "metric measure returns NoneType, not one number"),
    ],
)
def test_a_metric_that_is_not_one_finite_number_is_named(value: object, message: str) -> None:
    def measure(logits: Tensor, labels: Tensor) -> object:
        return value

    _, held_out = digits()
    with pytest.raises(MetapruneError, match=message):
        evaluate(network(), held_out, measure)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.tensor(0.25), torch.tensor([0.25]), 0.25, np.float32(0.25), np.float64(0.25)])
def test_a_metric_may_return_a_tensor_or_a_number(value: object) -> None:
    _, held_out = digits()
    assert evaluate(network(), held_out, lambda logits, labels: value) == 0.25  # type: ignore[arg-type, return-value]


def test_logits_that_are_nan_get_no_score() -> None:
    _, held_out = digits()
    model = network()
    with torch.no_grad():
        model[8].bias[3] = math.nan  # argmax would answer 3 for every example
    with pytest.raises(MetapruneError, match="a logit of the network is NaN in batch 1"):
        evaluate(model, held_out)


def test_labels_in_a_column_are_not_broadcast() -> None:
    with pytest.raises(OptionError, match=r"labels: shape \(3, 1\) does not fit logits of shape \(3, 3\)"):
        accuracy(torch.eye(3), torch.tensor([[0], [1], [0]]))


def test_a_loader_that_yields_nothing_is_named() -> None:
    class Spent:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(())

    with pytest.raises(OptionError, match="loader: no examples to evaluate on"):
        evaluate(network(), Spent())


def test_predict_takes_tuples_dicts_and_mappings_with_logits() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": a + 2 * b, "cache": a}

    a, b = torch.randn(2, 3)
    assert torch.equal(predict(Add(), (a, b)), a + 2 * b)
    assert torch.equal(predict(Add(), {"b": b, "a": a}), a + 2 * b)
    pairs = [((a[i], b[i]), 0) for i in range(3)]
    (collated, _), *_ = torch.utils.data.DataLoader(pairs, batch_size=3)  # type: ignore[arg-type]
    assert torch.equal(predict(Add(), collated), a + 2 * b)
    with pytest.raises(MetapruneError, match="LSTM returns no tensor of logits but tuple"):
        predict(nn.LSTM(3, 4), torch.randn(2, 5, 3))


def test_latency_is_the_median_on_one_thread() -> None:
    threads = torch.get_num_threads()
    seen, pauses = [], iter([0.0, 0.05, 0.002, 0.002, 0.002, 0.05, 0.002])

    def run() -> None:
        seen.append(torch.get_num_threads())
        time.sleep(next(pauses))

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
