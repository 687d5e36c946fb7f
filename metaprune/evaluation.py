"""What a network is worth: its score on held-out data, and its measured latency."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metaprune.data import Inputs, Loader
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.losses import check_shapes

T = TypeVar("T")
Metric = Callable[[Tensor, Tensor], Tensor | float]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of examples whose largest logit is the label's, a float64 scalar between 0 and 1.

    Shapes:
        logits: (batch, classes, ...).
        labels: (batch, ...).

    Raises:
        OptionError: The shapes do not fit.
    """
    check_shapes(logits, labels)
    return (logits.argmax(dim=1) == labels).double().mean()


METRICS: dict[str, Metric] = {"accuracy": accuracy}


def evaluate(model: nn.Module, loader: Loader, metric: str | Metric = "accuracy") -> float:
    """Mean of a metric over all examples, in eval mode and without gradients; the model's modes are put back.

    Args:
        model: Network that maps inputs to logits.
        loader: Batches of (inputs, labels).
        metric: Name in `METRICS`, or a function of (logits, labels) that returns the mean over a batch.

    Raises:
        OptionError: Unknown metric, or a loader without examples.
        MetapruneError: A logit is NaN, or the metric of a batch is not one finite number.
    """
    measure = named(metric, METRICS, "metric")
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    total, examples = 0.0, 0
    with evaluating(model), torch.no_grad():
        for number, (inputs, labels) in enumerate(loader, start=1):
            logits = predict(model, inputs)
            if logits.isnan().any():  # the largest of them would count as a decision
                raise MetapruneError(f"a logit of the network is NaN in batch {number} of the held-out data")
            value = _scalar(measure(logits, labels.to(device_of(model))), name)
            if not math.isfinite(value):
                raise MetapruneError(f"metric {name} is {value} in batch {number} of the held-out data")
            total += value * len(labels)
            examples += len(labels)
    if examples == 0:
        raise OptionError("loader: no examples to evaluate on")
    return total / examples


def latency(run: Callable[[], object], repeats: int = 30, warmup: int = 5) -> float:
    """Median wall time of one call in seconds, on one thread, after a warm-up.

    Args:
        run: What to measure, for instance `lambda: model(inputs)` or an onnxruntime session's call.
        repeats: Measured calls.
        warmup: Calls before the clock is read, which fill caches and allocate memory.
    """
    if repeats < 1:
        raise OptionError(f"repeats: at least one call is measured, not {repeats}")
    with single_thread(), torch.no_grad():
        for _ in range(warmup):
            run()
        return statistics.median(_seconds(run) for _ in range(repeats))


def onnx_runner(path: str | Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file with one input and one output as a function, run by onnxruntime on one thread.

    Raises:
        MetapruneError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MetapruneError("onnxruntime is missing; pip install 'metaprune[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()

    def run(inputs: Tensor) -> Tensor:
        (output,) = session.run(None, {argument.name: inputs.numpy()})
        return torch.from_numpy(output)

    return run


def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits of a model for a tensor, a tuple of arguments or a dict of keyword arguments.

    Inputs are moved to the model's device. A mapping with an entry `logits`, as Hugging Face models return, is
    accepted as output.
    """
    outputs = called(model, inputs)
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    if not isinstance(outputs, Tensor):
        raise MetapruneError(f"{type(model).__name__} returns no tensor of logits but {type(outputs).__name__}")
    return outputs


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Whatever a model returns for a tensor, a tuple of arguments or a dict of them, moved to the model's device."""
    inputs = _moved(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):  # a DataLoader collates tuples into lists
        return model(*inputs)
    return model(inputs)


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Torch on one thread; small networks are slower on more, and equal seeds give equal bits only on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def named(choice: str | T, table: Mapping[str, T], option: str) -> T:
    """Looks a choice up by name; anything but a string is taken as it is.

    Raises:
        OptionError: An unknown name.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in table:
        raise OptionError(f"{option}: {choice!r} is unknown, choose from {', '.join(sorted(table))}")
    return table[choice]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        moved = [_moved(item, device) for item in value]
        return moved if isinstance(value, list) else tuple(moved)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _scalar(value: object, metric: str) -> float:
    match value:
        case Tensor() if value.numel() == 1:
            return float(value)
        case Tensor():
            raise MetapruneError(f"metric {metric} returns a tensor of shape {tuple(value.shape)}, not one number")
        case Real():
            return float(value)
    raise MetapruneError(f"metric {metric} returns {type(value).__name__}, not one number")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
