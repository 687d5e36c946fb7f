"""An exactness oracle that shares nothing with the certificate.

The original network is copied, every parameter slice that `pruned.kept` does not list is overwritten with zero, layer
and group norms are replaced by own ones whose statistics leave out removed channels, and the two networks run side by
side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Kept = Mapping[str, Mapping[int, Any]]


class NormOverKept(nn.Module):
    """A layer or group norm whose mean and variance are those of the kept channels."""

    def __init__(self, inner: nn.LayerNorm | nn.GroupNorm, mask: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, eps = self.inner.weight, self.inner.bias, self.inner.eps
        if isinstance(self.inner, nn.GroupNorm):
            shape = [1, -1, *[1] * (x.ndim - 2)]
            y = x.reshape(x.shape[0], self.inner.num_groups, -1)
            mask = self.mask.reshape(shape).expand_as(x).reshape(y.shape).to(x.dtype)
            y = standardised(y, mask, (2,), eps).reshape(x.shape)
            weight, bias = weight.reshape(shape), bias.reshape(shape)
        else:
            dims = tuple(range(x.ndim - self.mask.ndim, x.ndim))
            y = standardised(x, self.mask.to(x.dtype).expand_as(x), dims, eps)
        y = y * weight
        return y if bias is None else y + bias


def standardised(x: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) with moments over positions where `mask` is 1."""
    count = mask.sum(dims, keepdim=True).clamp_min(1)
    mean = (x * mask).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * mask).sum(dims, keepdim=True) / count
    return (x - mean) / (variance + eps).sqrt()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, every name of a shared one."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def part_of(tensor: Tensor, dims: Mapping[int, Any]) -> Tensor:
    """The kept part of a tensor."""
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, torch.as_tensor(index, dtype=torch.long))
    return tensor


@torch.no_grad()
def masked(original: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the network with all but the kept parameter slices silenced."""
    reference = copy.deepcopy(original)
    tensors = named_tensors(reference)
    for name, dims in kept.items():
        value = tensors[name]
        if "running_var" in name or not value.is_floating_point():
            continue
        for dim, index in dims.items():
            if name.endswith("original1") and dim == 0:
                continue  # a direction has no length zero; its length, original0, is silenced
            gone = torch.ones(value.shape[dim], dtype=torch.bool)
            gone[torch.as_tensor(index, dtype=torch.long)] = False
            value.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    for path, module in list(reference.named_modules()):
        dims = kept.get(f"{path}.weight", {})
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and dims:
            mask = torch.zeros(module.weight.shape)
            mask[
                torch.meshgrid(
                    *(torch.as_tensor(dims.get(d, range(n))) for d, n in enumerate(mask.shape)), indexing="ij"
                )
            ] = 1
            wrapped = NormOverKept(module, mask)
            for other in reference.modules():  # a shared norm stands in several places
                for child, found in other._modules.items():
                    if found is module and not isinstance(other, NormOverKept):
                        other._modules[child] = wrapped
    return reference.eval()


def misplaced(original: nn.Module, pruned: nn.Module, kept: Kept) -> list[str]:
    """Names of tensors that are not the kept part of the original's; vectors may be rescaled (RMS norms)."""
    old, new = named_tensors(original), named_tensors(pruned)
    wrong = []
    for name, value in old.items():
        part = part_of(value.detach(), kept.get(name, {}))
        found = new.get(name)
        if (
            found is None
            or found.shape != part.shape
            or (not torch.equal(found, part) and not (part.ndim == 1 and name in kept))
        ):
            wrong.append(name)
    return wrong


def flat(value: Any) -> list[Tensor]:
    """Tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in flat(item)] if isinstance(value, (list, tuple)) else []


def distance(found: Any, expected: Any) -> float:
    """Largest difference of two outputs relative to the largest value; infinite for other shapes or not a number."""
    left, right = flat(found), flat(expected)
    if [t.shape for t in left] != [t.shape for t in right]:
        return math.inf
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not b.numel():
            continue
        off = float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-30)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def jittered(inputs: Iterable[Tensor], seed: int) -> tuple[Tensor, ...]:
    """Other inputs of the same kind, in a batch that is larger by one."""
    generator = torch.Generator().manual_seed(seed)

    def other(x: Tensor) -> Tensor:
        shape = (x.shape[0] + 1, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype)
        return x.flatten()[torch.randint(0, x.numel(), shape, generator=generator)]

    return tuple(map(other, inputs))


@torch.no_grad()
def error(original: nn.Module, pruned: nn.Module, kept: Kept, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """(distance of the pruned network to the masked original, distance of that to the original), over two inputs."""
    reference = masked(original, kept)
    worst, change = 0.0, 0.0
    for call in (inputs, jittered(inputs, 1)):
        expected = reference(*call)
        worst = max(worst, distance(pruned(*call), expected))
        change = max(change, distance(expected, original(*call)))
    return worst, change
