"""Layers from which random networks are built: small modules whose numbers are attributes, as in real code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "abs": torch.abs,
    "square": torch.square,
    "sigmoid": torch.sigmoid,  # from here on f(0) != 0
    "softplus": F.softplus,
    "cos": torch.cos,
    "hardsigmoid": F.hardsigmoid,
    "shift": lambda x: x + 0.5,
    "from_one": lambda x: 1 - x,
    "clamp": lambda x: x.clamp(min=0.25),
}


def _write_slice(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, : m.count] *= 2
    return y


def _write_sum(m: Any, x: Tensor) -> Tensor:
    y = x * 0.5
    y += x
    y.mul_(1.5).relu_()
    return y


def _shuffle(m: Any, x: Tensor) -> Tensor:
    batch, channels, *space = x.shape
    return x.view(batch, m.groups, channels // m.groups, *space).transpose(1, 2).reshape(batch, channels, *space)


def _window(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return F.unfold(x, 3, padding=1).view(batch, channels * 9, height, width)


def _gram(m: Any, x: Tensor) -> Tensor:
    flat = x.flatten(2) if x.ndim == 4 else x.transpose(1, 2)  # [batch, channels, positions]
    return (flat @ flat.transpose(1, 2)).flatten(1) / flat.shape[-1]


def _self_mix(m: Any, x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(1, 2) / math.sqrt(m.width), dim=-1) @ x


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: (lambda m, x, f=f: f(x)) for name, f in ACTIVATIONS.items()},
    "add": lambda m, x, y: x + y,
    "mul": lambda m, x, y: x * y,
    "sub": lambda m, x, y: x - y,
    "maximum": lambda m, x, y: torch.maximum(x, y),
    "gate": lambda m, x, y: x * torch.sigmoid(y),
    "affine": lambda m, x: x * 0.7 + 0.2,
    "scale": lambda m, x: -1.3 * x,
    "cat": lambda m, *xs: torch.cat(xs, dim=m.dim),
    "chunk": lambda m, x: x.chunk(m.pieces, dim=m.dim),
    "split": lambda m, x: x.split(m.sizes, dim=m.dim),
    "slice": lambda m, x: x.movedim(m.dim, 0)[m.start : m.stop : m.step].movedim(0, m.dim),
    "slice1": lambda m, x: x[:, m.start : m.stop : m.step],
    "slice_last": lambda m, x: x[..., m.start : m.stop : m.step],
    "narrow": lambda m, x: x.narrow(m.dim, m.start, m.length),
    "shuffle": _shuffle,
    "flip": lambda m, x: x.flip(m.dim),
    "roll": lambda m, x: x.roll(m.shift, m.dim),
    "pad1": lambda m, x: F.pad(x, (0, 0) * (x.ndim - 2) + (m.before, m.after), value=m.value),
    "pad_last": lambda m, x: F.pad(x, (m.before, m.after), value=m.value),
    "pad_space": lambda m, x: F.pad(x, (1, 0, 0, 1), mode=m.mode),
    "repeat1": lambda m, x: x.repeat(1, m.times, *[1] * (x.ndim - 2)),
    "repeat_last": lambda m, x: x.repeat(*[1] * (x.ndim - 1), m.times),
    "repeat_interleave": lambda m, x: x.repeat_interleave(m.times, dim=m.dim),
    "mean_expand": lambda m, x: x.mean(m.dim, keepdim=True).expand_as(x) + x,
    "mean_gate": lambda m, x: x * x.mean(m.dim, keepdim=True),
    "max_gate": lambda m, x: x * torch.sigmoid(x.amax(m.dim, keepdim=True)),
    "sum_gate": lambda m, x: x + 0.1 * x.sum(m.dim, keepdim=True),
    "softmax": lambda m, x: x.softmax(m.dim),
    "log_softmax": lambda m, x: x.log_softmax(m.dim),
    "normalize": lambda m, x: F.normalize(x, dim=m.dim),
    "cumsum": lambda m, x: x.cumsum(m.dim),
    "glu": lambda m, x: F.glu(x, dim=m.dim),
    "max_pool": lambda m, x: F.max_pool2d(x, 2),
    "avg_pool": lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive_pool": lambda m, x: F.adaptive_avg_pool2d(x, m.size),
    "adaptive_max": lambda m, x: F.adaptive_max_pool2d(x, m.size),
    "upsample": lambda m, x: F.interpolate(x, scale_factor=2.0, mode=m.mode),
    "window": _window,
    "gram": _gram,
    "self_mix": _self_mix,
    "channel_mix": lambda m, x: _self_mix(m, x.transpose(1, 2)).transpose(1, 2),
    "to_sequence": lambda m, x: x.flatten(2).transpose(1, 2),
    "to_image": lambda m, x: x.transpose(1, 2).reshape(x.shape[0], -1, m.height, m.width),
    "flatten": lambda m, x: x.flatten(1),
    "flatten_last": lambda m, x: x.permute(0, *range(2, x.ndim), 1).flatten(1),
    "view_flat": lambda m, x: x.reshape(x.shape[0], m.features),
    "pool": lambda m, x: x.mean(tuple(range(2, x.ndim))),
    "mean_tokens": lambda m, x: x.mean(1),
    "first_token": lambda m, x: x[:, 0],
    "last_token": lambda m, x: x[:, -1],
    "max_tokens": lambda m, x: x.max(dim=1).values,
    "as_sequence": lambda m, x: x.unsqueeze(1).expand(-1, m.tokens, -1),
    "as_image": lambda m, x: x[:, :, None, None].expand(-1, -1, m.size, m.size),
    "fold_sequence": lambda m, x: x.view(x.shape[0], m.tokens, m.width),
    "head_mean": lambda m, x: x.reshape(*x.shape[:-1], m.heads, m.width).mean(-2),
    "head_softmax": lambda m, x: x.reshape(*x.shape[:-1], m.heads, m.width).softmax(-1).flatten(-2),
    "head_swap": lambda m, x: x.reshape(*x.shape[:-1], m.heads, m.width).transpose(-1, -2).flatten(-2),
    "spread": lambda m, x, y: x * y[:, :, None, None],
    "spread_tokens": lambda m, x, y: x + y.unsqueeze(1),
    "stack_mean": lambda m, x, y: torch.stack([x, y], 1).mean(1),
    "einsum_gate": lambda m, x, y: torch.einsum("b...d,b...d->b...d", x, y),
    "write_slice": _write_slice,
    "write_sum": _write_sum,
    "relu_": lambda m, x: F.relu(x * 1.1, inplace=True),
    "identity": lambda m, x: x,
}


class Fn(nn.Module):
    """A step without parameters: a row of `FUNCTIONS`, its numbers as attributes."""

    def __init__(self, function: str, **numbers: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, *values: Tensor) -> Any:
        return FUNCTIONS[self.function](self, *values)

    def extra_repr(self) -> str:
        hidden = ("training", "function")
        return ", ".join(
            [self.function, *(f"{k}={v}" for k, v in vars(self).items() if k[0] != "_" and k not in hidden)]
        )


class Parameter(nn.Module):
    """A raw parameter or buffer that meets its input: added, multiplied, concatenated, as index, or in an einsum."""

    def __init__(self, how: str, value: Tensor, parameter: bool = True, dim: int = 1) -> None:
        super().__init__()
        self.how, self.dim = how, dim
        if parameter:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "add":
            return x + self.value
        if self.how == "mul":
            return x * self.value
        if self.how == "cat":
            return torch.cat([x, self.value.expand(x.shape[0], *[-1] * (x.ndim - 1))], dim=self.dim)
        if self.how == "prepend":
            return torch.cat([self.value.expand(x.shape[0], *[-1] * (x.ndim - 1)), x], dim=self.dim)
        if self.how == "index":
            return x[:, self.value] if self.dim == 1 else x[..., self.value]
        if self.how == "index_select":
            return x.index_select(self.dim, self.value)
        if self.how == "gather":
            shape = [-1 if d == self.dim % x.ndim else 1 for d in range(x.ndim)]
            index = self.value.view(shape).expand(
                *[-1 if d == self.dim % x.ndim else x.shape[d] for d in range(x.ndim)]
            )
            return x.gather(self.dim, index)
        if self.how == "matmul":
            return x @ self.value
        return torch.einsum("b...d,ed->b...e", x, self.value)

    def extra_repr(self) -> str:
        return f"{self.how}, shape={tuple(self.value.shape)}, dim={self.dim}"


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int, hard: bool) -> None:
        super().__init__()
        self.down, self.up, self.hard = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), hard

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * (F.hardsigmoid(gate) if self.hard else torch.sigmoid(gate))


class EfficientChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(y)[:, :, None, None]


class RmsNorm(nn.Module):
    """Spelled out, as in language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ChannelLast(nn.Module):
    """A norm over channels of an image, with permutes around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FusedAttention(nn.Module):
    """Fused qkv; `how` is sdpa, matmul or einsum; a relative position bias and norms of q and k on request."""

    def __init__(self, width: int, heads: int, head_dim: int, tokens: int, how: str, bias: bool, norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.how, self.norm = heads, head_dim, how, norm
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim, bias=bias), nn.Linear(heads * head_dim, width)
        self.position = nn.Parameter(torch.zeros(heads, tokens, tokens)) if bias else None
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim), RmsNorm(head_dim)) if norm else (None, None)
        self.scale = head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) if self.how == "einsum" else q @ k.transpose(-2, -1)
            scores = scores * self.scale
            scores = scores if self.position is None else scores + self.position
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class GroupedQuery(nn.Module):
    """Grouped-query attention with rotary embedding; key-value heads repeated by `how`."""

    def __init__(self, width: int, heads: int, groups: int, head_dim: int, tokens: int, how: str, causal: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim, self.how, self.causal = heads, groups, head_dim, how, causal
        self.q, self.k = nn.Linear(width, heads * head_dim, bias=False), nn.Linear(width, groups * head_dim, bias=False)
        self.v, self.o = nn.Linear(width, groups * head_dim), nn.Linear(heads * head_dim, width, bias=False)
        angle = torch.outer(torch.arange(tokens).float(), 10.0 ** -(torch.arange(head_dim // 2) / head_dim))
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos + turned * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.rotated(self.q(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2))
        k = self.rotated(self.k(x).view(batch, tokens, self.groups, self.head_dim).transpose(1, 2))
        v = self.v(x).view(batch, tokens, self.groups, self.head_dim).transpose(1, 2)
        if self.how == "interleave":
            times = self.heads // self.groups
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        elif self.how == "expand":
            shape = (batch, self.groups, self.heads // self.groups, tokens, self.head_dim)
            k = k[:, :, None].expand(shape).reshape(batch, self.heads, tokens, self.head_dim)
            v = v[:, :, None].expand(shape).reshape(batch, self.heads, tokens, self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.how == "gqa")
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1))


class MultiHead(nn.Module):
    """`nn.MultiheadAttention`, on itself or on another sequence with widths of its own."""

    def __init__(self, width: int, heads: int, other: int | None, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True, kdim=other, vdim=other)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.attention(x, y, y, need_weights=False)[0]


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.up = nn.Linear(width, 2 * hidden if how == "fused" else hidden)
        self.gate = nn.Linear(width, hidden, bias=False) if how == "swiglu" else None
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.how == "fused":
            gate, y = y.chunk(2, dim=-1)
            return self.down(F.silu(gate) * y)
        return self.down(F.gelu(y) if self.gate is None else F.silu(self.gate(x)) * y)


class TokenMixing(nn.Module):
    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Tied(nn.Module):
    """Two layers that share a weight: used twice, as transpose, or under a second name."""

    def __init__(self, width: int, hidden: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.encode = nn.Linear(width, width if how == "alias" else hidden)
        self.decode = nn.Linear(width, width, bias=False) if how == "alias" else None
        if self.decode is not None:
            self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.encode(x))
        return F.linear(y, self.encode.weight.t()) if self.decode is None else self.decode(y)


class Recurrent(nn.Module):
    def __init__(self, kind: str, width: int, hidden: int, layers: int, both: bool, last: bool) -> None:
        super().__init__()
        cls = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.net, self.last = cls(width, hidden, layers, batch_first=True, bidirectional=both), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)[0]
        return y[:, -1] if self.last else y


class Convolution1d(nn.Module):
    """A convolution along a sequence, between transposes."""

    def __init__(self, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, outputs, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def normed(layer: nn.Module) -> nn.Module:
    """The layer with its weight reparametrised as direction and length."""
    return weight_norm(layer)
