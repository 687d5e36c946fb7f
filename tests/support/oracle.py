"""An oracle that knows nothing of the engine: is a pruned network the original with silenced slices?

It reads the original module, the pruned one and the kept positions that the library states. Every tensor of the pruned
one must be the stated part of the original's, and its output that of a copy of the original in which all other slices
are zero, in float64.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Kept = Mapping[str, Mapping[int, Any]]


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every floating-point tensor distinct random values, so that nothing can vanish unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if "running_" in n)]
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(_values(name, tensor, generator))
    return module


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if tensor.ndim > 1:
        return noise * (1.5 / max(1, tensor[0].numel())) ** 0.5
    if name.endswith("running_var"):
        return noise.abs() + 0.5
    if name.endswith(("bias", "running_mean")) or "bias_" in name:
        return 0.5 * noise
    return 1 + 0.3 * noise.clamp(-2.5, 2.5)


def in_double(module: nn.Module) -> nn.Module:
    """A copy in float64; a default epsilon stays that of the dtype it had."""
    result = copy.deepcopy(module).eval()
    for norm in result.modules():
        if isinstance(norm, nn.RMSNorm) and norm.eps is None:
            norm.eps = torch.finfo(next(result.parameters()).dtype).eps
    return result.double()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by every name they have."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def flat(output: Any) -> list[Tensor]:
    """The tensors in a nested output, in order."""
    return list(_flat(output))


def _flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _flat(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _flat(value))
    elif dataclasses.is_dataclass(output):
        yield from (tensor for f in dataclasses.fields(output) for tensor in _flat(getattr(output, f.name)))


def call(module: nn.Module, inputs: Any) -> Any:
    """The module on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def double(inputs: Any) -> Any:
    """Nested inputs with floats in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: double(value) for name, value in inputs.items()}
    return type(inputs)(double(value) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def distance(found: Any, expected: Any) -> float:
    """Largest difference between two nested outputs, relative to the largest value of each expected tensor."""
    left, right = flat(found), flat(expected)
    assert [t.shape for t in left] == [t.shape for t in right], "the outputs have other shapes"
    worst = 0.0
    for a, b in zip((t.detach() for t in left), (t.detach() for t in right), strict=True):
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
        elif a.numel():
            error = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
            worst = max(worst, float(error) if bool(torch.isfinite(error)) else float("inf"))
    return worst


def selection(tensor: Tensor, dims: Mapping[int, Any]) -> Tensor:
    """The stated part of a tensor."""
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, torch.as_tensor(np.asarray(index)))
    return tensor


def pruned_double(original: nn.Module, pruned: nn.Module, kept: Kept) -> nn.Module:
    """The pruned module in float64, once each of its tensors is shown to be the stated part of the original's.

    A one-dimensional tensor may be the part times sqrt(N / N'), which a root-mean-square norm needs (or that of
    weight + 1); it is then recomputed in float64.
    """
    before, after = tensors_of(original), tensors_of(pruned)
    assert set(before) <= set(after), f"tensors are missing: {sorted(set(before) - set(after))}"
    assert not set(dict(pruned.named_parameters())) - set(before), "there are parameters the original does not have"
    result = in_double(pruned)
    targets = tensors_of(result)
    for name, full in before.items():
        part = selection(full, kept.get(name, {}))
        assert part.shape == after[name].shape, f"{name}: shape {tuple(after[name].shape)}, stated {tuple(part.shape)}"
        assert part.dtype == after[name].dtype, name
        if torch.equal(part, after[name]):
            continue
        assert part.ndim == 1, f"{name} differs from the stated part of the original"
        scale = (len(full) / len(part)) ** 0.5
        forms = (part.double() * scale, (part.double() + 1) * scale - 1)  # of a norm that multiplies by weight + 1
        eps = torch.finfo(part.dtype).eps
        exact = [form for form in forms if torch.allclose(form, after[name].double(), rtol=2 * eps, atol=2 * eps)]
        assert exact, f"{name} is neither equal nor rescaled"
        targets[name].copy_(exact[0])
    return result


class NormOverKept(nn.Module):
    """A layer or group norm whose statistics leave out removed channels; those come out as zero."""

    def __init__(self, norm: nn.Module, kept: Mapping[int, Any]) -> None:
        super().__init__()
        self.norm, self.kept = norm, {dim: torch.as_tensor(np.asarray(index)) for dim, index in kept.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the kept channels: the last axes of a layer norm's operand, the second of a group norm's."""
        norm = self.norm
        weight, bias = (None if t is None else selection(t, self.kept) for t in (norm.weight, norm.bias))
        first = x.ndim - norm.weight.ndim if isinstance(norm, nn.LayerNorm) else 1
        dims = {first + dim: index for dim, index in self.kept.items()}
        y = selection(x, dims)
        if isinstance(norm, nn.LayerNorm):
            y = nn.functional.layer_norm(y, weight.shape, weight, bias, norm.eps)
        else:
            groups = len(torch.unique(self.kept[0] // (norm.num_channels // norm.num_groups)))
            y = nn.functional.group_norm(y, groups, weight, bias, norm.eps)
        for dim, index in dims.items():
            shape = [*y.shape[:dim], x.shape[dim], *y.shape[dim + 1 :]]
            y = y.new_zeros(shape).index_copy(dim, index, y)
        return y


def silenced(original: nn.Module, kept: Kept, aware: bool = False) -> nn.Module:
    """A float64 copy of the original with zeros outside the kept slices; running statistics stay.

    With `aware`, layer and group norms take their statistics over kept channels.
    """
    result = in_double(original)
    for name, tensor in tensors_of(result).items():
        if "running_" not in name and tensor.is_floating_point():
            for dim, index in kept.get(name, {}).items():
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[torch.as_tensor(np.asarray(index))] = False
                tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    for name, module in list(result.named_modules()) if aware else ():
        dims = kept.get(f"{name}.weight", {})
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and dims:
            parent = result.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], NormOverKept(module, dims))
    return result


@torch.no_grad()
def difference(
    original: nn.Module, pruned: nn.Module, kept: Kept, inputs: Any, aware: bool = False
) -> tuple[float, float]:
    """Distance of the pruned network to the silenced original, and of that to the untouched original."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operators hide layer norms from the wrappers
    try:
        inputs = double(inputs)
        dense = call(in_double(original), inputs)
        expected = call(silenced(original, kept, aware), inputs)
        found = call(pruned_double(original, pruned, kept), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return distance(found, expected), distance(expected, dense)
