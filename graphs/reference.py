"""Runs a user's own module in float64, one operator at a time, with parameter slices of removed units silenced.

This is the certificate's reference. It does not execute the graph: the module's own Python code runs, and a dispatch
mode replaces every parameter by a masked float64 copy in the moment an operator reads it, so memory is that of one
operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metaprune.graphs.errors import CertificateError

Channels = Mapping[int, torch.Tensor]
Weights = Callable[[str, torch.Tensor], torch.Tensor]
_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class Exact(TorchFunctionMode):
    """Everything in float64; the network's tensors go through `weights` when read.

    Functions see lifted operands (so that composite operators agree on dtypes), and a dispatch mode inside keeps
    operators from falling back to lower precision.

    Args:
        names: Name of each of the network's tensors, by identity.
        weights: Gives the float64 tensor that stands for a named one.
        channels: For layer and group norms: kept positions of each dimension of a weight, by its name.
        eps: Epsilon of root-mean-square norms that leave it to the dtype of the original.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        weights: Weights,
        channels: Mapping[str, Channels] | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        self._names = names
        self._weights = weights
        self._lifted: dict[int, str] = {}
        self._derived: dict[int, tuple[torch.Tensor, str]] = {}
        self._eps = eps
        self._depth = 0
        self._inner = _Double(self, channels or {})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls one function with its operands lifted."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args, **kwargs)
            if not isinstance(found, torch.Tensor):
                return _DOUBLE.get(found, found) if isinstance(found, torch.dtype) else found
        new_args, new_kwargs = _mapped(self.lift, args), _mapped(self.lift, kwargs)
        if new_kwargs.get("dtype") in _DOUBLE:
            new_kwargs["dtype"] = _DOUBLE[new_kwargs["dtype"]]
        if getattr(func, "__name__", "").partition(".")[0] == "rms_norm":  # a function or an operator overload
            new_args, new_kwargs = self._with_eps(new_args, new_kwargs)
        self._depth += 1
        try:
            with self._inner:
                result = func(*new_args, **new_kwargs)
            self._derive(args, result)
            return result
        finally:
            self._depth -= 1
            if not self._depth:
                self._lifted.clear()

    def _derive(self, args: Any, result: Any) -> None:
        """A vector computed from one weight alone, such as `weight + 1`, has that weight's channels."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.ndim == 1 and len(tensors) == 1:
            name = self.owner(tensors[0])
            if name is not None and result.shape == tensors[0].shape:
                self._derived[id(result)] = (result, name)

    def _with_eps(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of a root-mean-square norm with the epsilon that the original's dtype implies."""
        if len(args) > 3:
            return (*args[:3], self._eps if args[3] is None else args[3]), kwargs
        return args, kwargs if kwargs.get("eps") is not None else {**kwargs, "eps": self._eps}

    def lift(self, value: Any) -> Any:
        """What stands for an operand: the masked float64 copy of a named tensor, float64 of any other."""
        if not isinstance(value, torch.Tensor):
            return value
        name = self._names.get(id(value))
        if name is None:
            return _to_double(value)
        lifted = self._weights(name, value)
        self._lifted[id(lifted)] = name
        return lifted

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Name of the network's tensor that an operand is, or stands for."""
        name = self._lifted.get(id(tensor)) or self._names.get(id(tensor))
        return name or self._derived.get(id(tensor), (None, None))[1]


class _Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators in float64, whatever dtypes the code asks for."""

    def __init__(self, outer: Exact, channels: Mapping[str, Channels]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outer = outer
        self._channels = channels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator in float64."""
        kwargs = dict(kwargs or {})
        owner = self._norm_owner(func, args)
        new_args, new_kwargs = _mapped(self._outer.lift, args), _mapped(self._outer.lift, kwargs)
        if "dtype" in new_kwargs:
            new_kwargs["dtype"] = _DOUBLE.get(new_kwargs["dtype"], new_kwargs["dtype"])
        new_args = tuple(_DOUBLE.get(a, a) if isinstance(a, torch.dtype) else a for a in new_args)
        if owner is not None:
            return _norm_over_kept(func, new_args, self._channels[owner])
        function = _WITHOUT_DOUBLE.get(func._schema.name, func)
        return _mapped(_to_double, function(*new_args, **new_kwargs))

    def _norm_owner(self, func: Any, args: Any) -> str | None:
        name = func._schema.name
        if name not in ("aten::native_layer_norm", "aten::native_group_norm"):
            return None
        weight = args[2] if name.endswith("layer_norm") else args[1]
        owner = self._outer.owner(weight) if isinstance(weight, torch.Tensor) else None
        return owner if owner in self._channels else None


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """Products of consecutive row blocks of `a` (ending at `offs`) with the matrices in `b`."""
    if offs is None or a.ndim != 2 or b.ndim != 3 or bias is not None:
        raise CertificateError("_grouped_mm in this form can not be run in float64")
    out = a.new_zeros(a.shape[0], b.shape[-1])
    start = 0
    for i, end in enumerate(offs.tolist()):
        out[start:end] = a[start:end] @ b[i]
        start = end
    return out


_WITHOUT_DOUBLE: dict[str, Callable[..., Any]] = {"aten::_grouped_mm": _grouped_mm}


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` applied to every leaf; the plain containers of nearly all calls are walked without a tree's overhead."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_mapped(change, item) for item in value])
    if kind is dict:
        return {key: _mapped(change, item) for key, item in value.items()}
    return change(value) if isinstance(value, torch.Tensor) or not isinstance(value, tuple) else tree_map(change, value)


def _to_double(value: Any) -> Any:
    return value.to(_DOUBLE[value.dtype]) if isinstance(value, torch.Tensor) and value.dtype in _DOUBLE else value


def _norm_over_kept(func: Any, args: Any, kept: Channels) -> Any:
    """A layer or group norm whose statistics leave out removed channels; the others come out as weight * 0 + bias."""
    x = args[0]
    if func._schema.name.endswith("layer_norm"):
        shape, weight, bias, eps = args[1:5]
        first = x.ndim - len(shape)
        places = {first + d: index for d, index in kept.items()}
        weight, bias = _selected(weight, kept), _selected(bias, kept)
        part = torch.ops.aten.native_layer_norm(_selected(x, places), list(weight.shape), weight, bias, eps)[0]
    else:
        weight, bias, batch, channels, positions, groups, eps = args[1:8]
        places = {1: kept[0]}
        count = len(torch.unique(kept[0] // (channels // groups)))
        small = _selected(x, places).contiguous()
        part = torch.ops.aten.native_group_norm(
            small, _selected(weight, kept), _selected(bias, kept), batch, len(kept[0]), positions, count, eps
        )[0]
    for dim, index in places.items():
        shape = list(part.shape)
        shape[dim] = x.shape[dim]
        part = part.new_zeros(shape).index_copy(dim, index.to(part.device), part)
    return part, None, None


def _selected(tensor: Any, kept: Channels) -> Any:
    if tensor is None:
        return None
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


@contextlib.contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused attention path, for a while."""
    flags = [(m, m.training) for m in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    for m, _ in flags:
        m.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, flag in flags:
            m.training = flag


def names_of(module: nn.Module, canonical: Mapping[str, str]) -> dict[int, str]:
    """The graph's name of each tensor of a module, by identity."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {id(tensor): canonical.get(name, name) for name, tensor in tensors.items()}


def run_exact(
    module: nn.Module,
    call: Callable[[nn.Module], Any],
    names: Mapping[int, str],
    weights: Weights,
    channels: Mapping[str, Channels] | None = None,
) -> list[torch.Tensor]:
    """Float64 tensors that a call of the module returns, in order of its output structure."""
    from metaprune.graphs.structure import take_apart

    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with evaluated(module), Exact(names, weights, channels, torch.finfo(dtype).eps):
            result = call(module)
    finally:
        torch.set_default_dtype(default)
    found: list[torch.Tensor] = []
    take_apart(result, found.append, lambda _, value: None)
    return found
