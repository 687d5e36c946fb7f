"""The one training loop: SGD or AdamW with a cosine schedule, seeded, resumable to the bit.

Everything that is trained goes through `train`; what differs is the objective, a function of the logits and the batch.
On hardware with bfloat16 the forward pass runs in it; the weights stay float32.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from metaprune.data import Inputs, Loader
from metaprune.evaluation import device_of, evaluating, predict
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.files import write_atomically

Objective: TypeAlias = Callable[[Tensor, Inputs, Tensor], Tensor]
Progress: TypeAlias = Callable[[int, int], None]
"""Called after each step with the number of steps done and the number of steps in all."""

_VERSION = 2
_SECOND_DECAY = 0.999  # of AdamW's mean squared gradient, the value of its paper


class TrainingError(MetapruneError):
    """Training met a number that is not finite; the model is back at its last finite epoch."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a training run.

    Attributes:
        epochs: Passes over the training batches.
        lr: Peak learning rate.
        momentum: Of SGD, Nesterov's form; of AdamW the decay of the mean gradient, its beta 1.
        weight_decay: On matrices and kernels; never on biases and normalisation parameters.
        warmup: Share of the steps over which the learning rate rises linearly; it then falls to 0 as a cosine.
        precision: Of the forward pass; "auto" is bfloat16 for float32 models on hardware that computes in it.
        channels_last: Lay images out channels last, which is faster; a network that calls `view` may refuse them so.
        ema: Decay of an exponential moving average of the weights, which the model holds at the end; 0 for none. After
            step t = 0, 1, ... the average moves by `1 - min(ema, (1 + t) / (10 + t))` of the way to the weights, so
            that the first steps do not linger in it.
        optimizer: "sgd", or "adamw" (Loshchilov and Hutter 2019, arXiv 1711.05101), whose steps do not follow the
            scale of the loss: it wants a much smaller `lr`, such as 1e-3.
    """

    epochs: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool = False
    ema: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise OptionError(f"epochs: zero or more passes, not {self.epochs}")
        if not self.lr > 0:
            raise OptionError(f"lr: a positive learning rate, not {self.lr}")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum: a number from 0 to below 1, not {self.momentum}")
        if not 0 <= self.warmup <= 1:
            raise OptionError(f"warmup: a share between 0 and 1, not {self.warmup}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise OptionError(f"precision: {self.precision!r} is unknown, choose from auto, bfloat16, float32")
        if not 0 <= self.ema < 1:
            raise OptionError(f"ema: a decay from 0 to below 1, not {self.ema}")
        if self.optimizer not in ("sgd", "adamw"):
            raise OptionError(f"optimizer: {self.optimizer!r} is unknown, choose from adamw, sgd")

    def rate(self, progress: float) -> float:
        """Learning rate after a share `progress` of all steps.

        >>> settings = Settings(lr=0.2, warmup=0.1)
        >>> [round(settings.rate(p), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.1, 0.2, 0.1, 0.0]
        """
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 1.0
        return self.lr * 0.5 * (1 + math.cos(math.pi * rest))


def train(
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    settings: Settings,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Trains a model in place.

    The caller's random state is left alone; the loader's own `generator`, if it has one, is seeded too. Equal seeds
    on one thread give equal weights to the bit.

    Args:
        model: Network from inputs to logits; it is put back into its own train or eval modes at the end. With
            `settings.ema` it then holds the averages of its parameters and floating-point buffers.
        loader: Batches of (inputs, labels).
        objective: Function of (logits, inputs, labels) that returns a scalar loss.
        settings: Hyper-parameters.
        seed: Of every random choice.
        checkpoint: File written atomically after each epoch. If it exists, training goes on from it and ends with the
            same weights as an undisturbed run.
        progress: Called after each step.

    Returns:
        Mean loss of each epoch.

    Raises:
        TrainingError: A loss, gradient or weight is not finite; the model is as it was before that epoch.
        OptionError: The checkpoint belongs to another run, the loader yields nothing, or the objective refuses a batch;
            the model is as it was before that epoch.
        LoadError: The checkpoint is damaged.
    """
    run = _Run(model, _optimizer(model, settings), loader, objective, settings, seed)
    path = None if checkpoint is None else Path(checkpoint)
    with seeded(model, loader, seed), evaluating(model):
        losses = run.restore(path) if path is not None and path.exists() else []
        for epoch in range(len(losses), settings.epochs):
            before = run.state()
            model.train()
            try:
                losses.append(run.epoch(epoch, progress))
            except MetapruneError:
                run.put_back(before)
                raise
            if path is not None:
                run.save(path, losses)
        run.average.store()
    return losses


@contextlib.contextmanager
def seeded(model: nn.Module, loader: Loader, seed: int) -> Iterator[None]:
    """Seeds torch and a loader's own `generator`, and puts torch's random state back at the end."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generator = _generator(loader)
        if generator is not None:
            generator.manual_seed(seed)
        yield


class _Average:
    """Exponential moving average of a model's parameters and floating-point buffers.

    Buffers are averaged with the weights they belong to, as the running statistics of a batch normalisation do;
    counters keep their last value. A buffer that never changes stays as it is to the bit. Averages of low-precision
    weights are float32, in which small moves are not lost.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach() for name, t in _tensors(model).items() if decay and t.is_floating_point()}
        self.values = {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in self.tensors.items()
        }

    def update(self, step: int) -> None:
        """Moves the averages towards the weights after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.tensors[name].to(value.dtype), 1 - decay)

    def store(self) -> None:
        """Writes the averages into the model."""
        for name, value in self.values.items():
            self.tensors[name].copy_(value)


@dataclasses.dataclass
class _Run:
    """What one call of `train` works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    objective: Objective
    settings: Settings
    seed: int

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        if len(self.loader) == 0:
            raise OptionError("train: no batches")
        self.low_precision = _low_precision(self.model, self.settings)
        self.average = _Average(self.model, self.settings.ema)

    def epoch(self, epoch: int, progress: Progress | None) -> float:
        """One pass over the data; the mean loss over its examples."""
        steps = len(self.loader)
        total, examples = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for step, (inputs, labels) in enumerate(self.loader):
            done, where = epoch * steps + step, f"epoch {epoch + 1}, step {step + 1} of {steps}"
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.rate(done / (steps * self.settings.epochs))
            labels = labels.to(self.device)
            with _autocast(self.model, self.low_precision):
                logits = predict(self.model, _laid_out(inputs, self.settings))
                loss = self.objective(logits, inputs, labels)
            if not loss.isfinite():
                raise TrainingError(f"{self._culprit(inputs, logits)} is not finite in {where}")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._check_gradients(where)
            self.optimizer.step()
            self.average.update(done)
            total += loss.detach() * len(labels)
            examples += len(labels)
            if progress is not None:
                progress(done + 1, steps * self.settings.epochs)
        if examples == 0:
            raise OptionError(
                f"train: no examples in epoch {epoch + 1}, though the loader has {steps} batches by its length"
            )
        bad = self._bad_tensor()
        if bad:
            raise TrainingError(f"{bad} is not finite after epoch {epoch + 1}")
        return total.item() / examples

    def _check_gradients(self, where: str) -> None:
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        if not gradients:
            raise OptionError("model: no parameter receives a gradient")
        norm = torch.nn.utils.get_total_norm(gradients.values())
        if not norm.isfinite():
            names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            raise TrainingError(f"the gradient of {names[0] if names else 'the loss'} is not finite in {where}")

    def _culprit(self, inputs: Any, logits: Tensor) -> str:
        """What made the loss something that is not finite, from the first cause on."""
        if isinstance(inputs, Tensor) and not inputs.isfinite().all():
            return "an input of the batch"
        return self._bad_tensor() or ("the loss" if logits.isfinite().all() else "a logit of the network")

    def _bad_tensor(self) -> str:
        """Name of the first parameter or buffer that is not finite, or nothing."""
        return next((name for name, tensor in _tensors(self.model).items() if not tensor.isfinite().all()), "")

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a later epoch depends on: weights, buffers, averages, optimiser and random states."""
        found = {f"model.{name}": tensor for name, tensor in _tensors(self.model).items()}
        found |= {f"average.{name}": value for name, value in self.average.values.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{key}.{name}"] = value
        found["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["random.device"] = torch.cuda.get_rng_state(self.device)
        generator = _generator(self.loader)
        if generator is not None:
            found["random.loader"] = generator.get_state()
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}

    def put_back(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            for name, tensor in _tensors(self.model).items():
                tensor.copy_(state[f"model.{name}"])
        for name, value in self.average.values.items():
            value.copy_(state[f"average.{name}"])
        self.optimizer.state.clear()
        parameters = dict(self.model.named_parameters())
        for entry in (name for name in state if name.startswith("optimizer.")):
            _, key, name = entry.split(".", 2)
            counts = key == "step"  # kept where the optimiser has it, on the CPU; all else lies as its parameter does
            value = state[entry].clone() if counts else torch.empty_like(parameters[name]).copy_(state[entry])
            self.optimizer.state[parameters[name]][key] = value
        torch.set_rng_state(state["random.cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.device"].cpu(), self.device)
        generator = _generator(self.loader)
        if generator is not None:
            generator.set_state(state["random.loader"].cpu())

    def save(self, path: Path, losses: list[float]) -> None:
        """Writes the state and the losses so far; the file is complete or absent."""
        about = {"identity": self._identity(), "losses": losses}
        write_atomically(path, serialise(self.state(), {"run": json.dumps(about)}))

    def restore(self, path: Path) -> list[float]:
        """Reads what `save` wrote; the losses so far."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("run", "{}"))
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise LoadError(f"checkpoint {path} can not be read: {error}") from error
        shapes = {name: tensor.shape for name, tensor in self.state().items()}
        same = all(name in stored and stored[name].shape == shape for name, shape in shapes.items())
        if not isinstance(about, dict) or about.get("identity") != self._identity() or not same:
            raise OptionError(f"checkpoint {path} belongs to a run with another model, data, settings or seed")
        self.put_back(stored)
        return [float(loss) for loss in about["losses"]]

    def _identity(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        return {"version": _VERSION, "settings": settings, "seed": self.seed, "steps": len(self.loader)}


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("model: no parameter requires a gradient")
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, _SECOND_DECAY))
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def _low_precision(model: nn.Module, settings: Settings) -> bool:
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return False
    kind = device_of(model).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each shared one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _generator(loader: Loader) -> torch.Generator | None:
    """The source of randomness of a `Batches` or a torch `DataLoader`; both carry it under this name."""
    generator = getattr(loader, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def _autocast(model: nn.Module, low_precision: bool) -> torch.autocast:
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=low_precision)


def _laid_out(inputs: Any, settings: Settings) -> Any:
    if settings.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs
