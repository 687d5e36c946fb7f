"""A network with single weights at zero: its masks, how they are kept in training, saved and read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.files import write_atomically

_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Sparse:
    """A network some of whose weights are zero; shapes and operators are those of the dense one.

    Attributes:
        module: The network.
        masks: Whether each weight stays, by name of the tensor, shaped like it.
        distortion: Squared error of the outputs on the calibration data, measured with all masks; None without data.
        provenance: Method, sparsity asked for, samples, seed and, for "dp", what the solver says.
    """

    module: nn.Module
    masks: Mapping[str, Tensor]
    distortion: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def density(self) -> dict[str, float]:
        """Share of the weights that stay, by name of the tensor."""
        return {name: float(mask.double().mean()) for name, mask in self.masks.items()}

    @property
    def sparsity(self) -> float:
        """Share of all weights under a mask that are gone."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / max(1, total)

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """Trains around the zeros: while it is open, no gradient reaches a weight that is gone.

        Weights at zero without a gradient stay there under momentum, adaptive steps and weight decay, whatever the
        training loop is; in the end they are written once more.

        ```python
        with sparse.held() as module:
            mp.train(module, loader, objective, mp.Settings(epochs=3, lr=0.01))
        ```
        """
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        hooks = [
            parameters[name].register_post_accumulate_grad_hook(_silencer(mask))  # type: ignore[no-untyped-call]
            for name, mask in self.masks.items()
            if parameters[name].requires_grad
        ]
        try:
            yield self.module
        finally:
            for hook in hooks:
                hook.remove()
            write_zeros(self.module, self.masks)

    def save(self, path: str | Path) -> None:
        """Writes the masks, and where they came from, as one safetensors file; `Sparse.load` reads it."""
        about = {"schema": _SCHEMA, "distortion": self.distortion, "provenance": dict(self.provenance)}
        masks = {name: mask.cpu().contiguous() for name, mask in self.masks.items()}
        write_atomically(Path(path), serialise(masks, {"sparse": json.dumps(about)}))

    @staticmethod
    def load(path: str | Path, model: nn.Module) -> Sparse:
        """Reads masks and applies them to a copy of a model.

        Args:
            path: File that `save` wrote. Only the masks are in it, so what was trained since is the model's to hold.
            model: Network with the masked tensors; it is not changed.

        Raises:
            LoadError: The file is damaged, or is no file of masks.
            OptionError: The model lacks a tensor of the file, or has it in another shape.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("sparse", "null"))
                masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise LoadError(f"masks {path} can not be read: {error}") from error
        if not isinstance(about, dict) or about.get("schema") != _SCHEMA:
            raise LoadError(f"masks {path} need schema {_SCHEMA}")
        distortion, provenance = about.get("distortion"), about.get("provenance")
        if not isinstance(distortion, float | None) or not isinstance(provenance, dict):
            raise LoadError(f"masks {path}: distortion must be a number or nothing, and provenance a map")
        if not all(mask.dtype == torch.bool for mask in masks.values()):
            raise LoadError(f"masks {path} hold a tensor that is no mask")
        module = copy.deepcopy(model)
        write_zeros(module, masks)
        return Sparse(module, masks, distortion, provenance)


def write_zeros(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the weights that are gone to zero; raises `OptionError` for a tensor that the module lacks."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise OptionError(f"model: it has no parameter {name} of shape {list(mask.shape)}")
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def _silencer(mask: Tensor) -> Callable[[Tensor], None]:
    """Clears the gradient of the weights that are gone."""

    def silence(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~mask.to(parameter.grad.device), 0.0)

    return silence
