"""What a smaller network cannot avoid: statistics over fewer channels, and scales derived from a width."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from random_weights import BUILT_IN, is_norm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Positions = dict[str, list[Tensor]]  # tensor name -> kept positions of every dimension


class KeptStatistics(TorchFunctionMode):
    """Normalisations see the kept channels only.

    Those are the channels with a gain that is not zero; without gains, or where gains say nothing because the network
    adds one to them (`silent`), the channels that are not zero throughout.
    """

    def __init__(self, rms: bool, silent: bool) -> None:
        super().__init__()
        self.rms, self.silent = rms, silent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercepts the three functional normalisations."""
        kwargs = kwargs or {}
        renamed = {{"normalized_shape": "shape"}.get(key, key): value for key, value in kwargs.items()}
        renamed.pop("cudnn_enable", None)
        if func in (F.layer_norm, torch.layer_norm):
            return self._over_last(True, *args, **renamed)
        if self.rms and func in (F.rms_norm, torch.rms_norm):
            return self._over_last(False, *args, **renamed)
        if func in (F.group_norm, torch.group_norm):
            return self._over_groups(*args, **kwargs)
        return func(*args, **kwargs)

    def _over_last(
        self, centre: bool, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: Any = None, *_: Any
    ) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        alive = _audible(input, dims) if weight is None or self.silent else weight != 0
        x = input * alive
        count = alive.sum().clamp_min(1)
        mean = x.sum(dims, keepdim=True) / count if centre else 0.0
        variance = ((x - mean) ** 2 * alive).sum(dims, keepdim=True) / count
        eps = eps if eps is not None else 1e-5 if centre else torch.finfo(x.dtype).eps
        y = (x - mean) * (variance + eps).rsqrt() * alive
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _over_groups(
        self, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        other = tuple(d for d in range(input.ndim) if d != 1)
        named = weight is not None and not self.silent
        alive = weight != 0 if named else input.detach().abs().amax(other) > 0
        shape = (1, -1, *[1] * (input.ndim - 2))
        grouped = (input * alive.view(shape)).unflatten(1, (num_groups, -1))  # n g c *
        mask = alive.view(1, num_groups, -1, *[1] * (input.ndim - 2))
        dims = tuple(range(2, grouped.ndim))
        count = (mask.sum(dims, keepdim=True) * input[0, 0].numel()).clamp_min(1)
        mean = grouped.sum(dims, keepdim=True) / count
        variance = ((grouped - mean) ** 2 * mask).sum(dims, keepdim=True) / count
        y = ((grouped - mean) * (variance + eps).rsqrt() * mask).flatten(1, 2)
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)


def _audible(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Channels of the last dimensions that are not zero throughout."""
    rest = tuple(range(x.ndim - len(dims)))
    return x.detach().abs().amax(rest) > 0 if rest else x != 0


class OnKept(nn.Module):
    """A normalisation written by hand, run on the kept channels alone; the others are zero."""

    def __init__(self, module: nn.Module, keep: Tensor, size: int) -> None:
        super().__init__()
        self.inner = copy.deepcopy(module)
        self.keep, self.size = keep, size
        for store in (self.inner._parameters, self.inner._buffers):
            for name, tensor in store.items():
                if tensor is not None and size in tensor.shape:
                    cut = tensor.detach().index_select(list(tensor.shape).index(size), keep)
                    store[name] = nn.Parameter(cut, requires_grad=False) if store is self.inner._parameters else cut
        self.first = "2d" in type(module).__name__.lower() or getattr(module, "data_format", "") == "channels_first"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Cuts, normalises, and puts back."""
        order = (1, x.ndim - 1) if self.first else (x.ndim - 1, 1)
        dim = next(d for d in order if d < x.ndim and x.shape[d] == self.size)
        like = [isinstance(a, Tensor) and a.shape == x.shape for a in args]
        args = tuple(a.index_select(dim, self.keep) if cut else a for a, cut in zip(args, like, strict=True))
        y = self.inner(x.index_select(dim, self.keep), *args, **kwargs)
        whole = y.new_zeros([self.size if d == dim else n for d, n in enumerate(y.shape)])
        return whole.index_copy(dim, self.keep, y)


def with_kept_norms(model: nn.Module, original: nn.Module, positions: Positions, rescaled: set[str]) -> nn.Module:
    """Puts `OnKept` in place of the hand-written normalisations of a masked model."""
    for path, module in original.named_modules():
        if not path or not is_norm(module) or isinstance(module, BUILT_IN) or any(map(is_norm, module.children())):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            long = [d for d, n in enumerate(tensor.shape) if n > 1]
            if len(long) == 1 and full in positions and full not in rescaled:
                parent, _, attribute = path.rpartition(".")
                wrapped = OnKept(module, positions[full][long[0]], tensor.shape[long[0]])
                setattr(model.get_submodule(parent), attribute, wrapped)
                break
    return model


class FixedScale(TorchFunctionMode):
    """Attention that states no scale uses one constant, whatever the width of its queries."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds the scale."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs["scale"] = 0.125
        return func(*args, **kwargs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switches off the fused inference path of `nn.MultiheadAttention`, which bypasses functional calls."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
