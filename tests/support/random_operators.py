"""The operators of random networks: what each does to the values of a network under construction."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.random_builder import LARGEST, WIDTHS, Site, divisors, operator
from tests.support.random_layers import (
    ACTIVATIONS,
    ChannelLast,
    Convolution1d,
    EfficientChannelAttention,
    FeedForward,
    Fn,
    FusedAttention,
    GroupedQuery,
    MultiHead,
    Parameter,
    Recurrent,
    RmsNorm,
    SqueezeExcite,
    Tied,
    TokenMixing,
    normed,
)

EVERY = "image sequence vector"


# ---- layers with weights


@operator("image")
def conv(s: Site) -> None:
    c, h, w = s.shape
    outputs, kernel = s.choose(WIDTHS), s.choose((1, 3, 3), 2)
    stride = 2 if kernel == 3 and h > 3 and s.n[2] % 4 == 0 else 1
    size = (h - 1) // stride + 1, (w - 1) // stride + 1
    s.emit(nn.Conv2d(c, outputs, kernel, stride, kernel // 2, bias=s.n[0] % 2 == 0), (outputs, *size))


@operator("image")
def grouped(s: Site) -> None:
    groups = s.choose(divisors(s.width), 2)
    s.wide(
        nn.Conv2d(s.width, groups * (1 + s.n[1] % 4), 3, 1, 1, groups=groups, bias=s.n[0] % 2 == 0),
        groups * (1 + s.n[1] % 4),
    )


@operator("image")
def depthwise(s: Site) -> None:
    outputs = s.width * (2 if s.n[1] % 4 == 0 and s.width <= LARGEST // 2 else 1)
    s.wide(nn.Conv2d(s.width, outputs, 3, 1, 1, groups=s.width, bias=s.n[2] % 2 == 0), outputs)


@operator("image")
def transposed(s: Site) -> None:
    c, h, w = s.shape
    if h > 4 or w > 4:
        return
    groups = s.choose((1, 1, *divisors(c)), 2)
    outputs = groups * (1 + s.n[1] % 4)
    s.emit(nn.ConvTranspose2d(c, outputs, 2, 2, groups=groups), (outputs, 2 * h, 2 * w))


@operator("sequence vector")
def linear(s: Site) -> None:
    width = s.choose(WIDTHS)
    s.wide(nn.Linear(s.width, width, bias=s.n[2] % 3 > 0), width)


@operator("image sequence vector")
def weight_norm(s: Site) -> None:
    width = s.choose(WIDTHS)
    s.wide(normed(s.b.layer(s.x, width)), width)


@operator("sequence")
def conv1d(s: Site) -> None:
    groups = s.choose((1, *divisors(s.width)), 2)
    outputs = groups * (1 + s.n[1] % 4)
    s.wide(Convolution1d(s.width, outputs, groups), outputs)


@operator("vector")
def bilinear(s: Site) -> None:
    other = s.b.take(1, s.n[0])
    if other is not None and s.width * s.b.width(other) <= 200:
        s.emit(nn.Bilinear(s.width, s.b.width(other), s.choose((4, 6))), (s.choose((4, 6)),), others=(other,))


@operator("sequence vector")
def tied(s: Site) -> None:
    s.same(Tied(s.width, s.choose(WIDTHS), s.choose(("alias", "transpose"), 2)))


@operator(EVERY)
def shared(s: Site) -> None:
    """A layer used before, on another value."""
    fitting = [
        (module, first)
        for module, (*sources, first, count) in zip(s.b.modules, s.b.sources, strict=True)
        if len(sources) == 1
        and count == 1
        and s.b.shapes[sources[0]] == s.shape
        and any(True for _ in module.parameters())
    ]
    if fitting:
        module, first = s.choose(fitting)
        s.emit(module, s.b.shapes[first])


# ---- norms and activations


@operator(EVERY)
def norm(s: Site) -> None:
    c, rank = s.width, len(s.shape)
    groups = s.choose((1, *divisors(c), c), 2)
    if rank == 3:
        options: tuple[nn.Module, ...] = (
            nn.BatchNorm2d(c),
            nn.BatchNorm2d(c, affine=s.n[2] % 2 == 0),
            nn.GroupNorm(groups, c),
            nn.GroupNorm(groups, c, affine=s.n[2] % 2 == 0),
            nn.InstanceNorm2d(c, affine=s.n[2] % 2 == 0) if s.shape[1] > 1 else nn.Identity(),
            ChannelLast(c),
            nn.LayerNorm(s.shape),
        )
    else:
        batch = nn.BatchNorm1d(c) if rank == 1 else nn.LayerNorm(c, bias=False)
        group = nn.GroupNorm(groups, c) if rank == 1 else nn.RMSNorm(c)
        options = (
            batch,
            group,
            nn.LayerNorm(c),
            nn.LayerNorm(c, elementwise_affine=s.n[2] % 2 == 0),
            nn.RMSNorm(c, eps=1e-5),
            RmsNorm(c),
        )
    s.same(s.choose(options))


@operator(EVERY)
def activation(s: Site) -> None:
    s.same(Fn(s.choose(tuple(ACTIVATIONS))))


@operator(EVERY)
def smooth(s: Site) -> None:
    s.same(Fn(s.choose(("relu", "gelu", "silu", "affine", "scale", "relu_"))))


@operator("image vector")
def prelu(s: Site) -> None:
    s.same(nn.PReLU(s.choose((1, s.width))))


@operator(EVERY)
def in_place(s: Site) -> None:
    if len(s.shape) == 2:
        s.same(Fn("write_sum"))
    else:
        s.same(Fn(s.choose(("write_slice", "write_sum")), count=1 + s.n[2] % s.width))


# ---- several values


@operator(EVERY)
def combine(s: Site) -> None:
    """Residual additions and gates."""
    how = s.choose(("add", "add", "add", "gate", "mul", "sub", "maximum", "stack_mean"), 2)
    s.emit(Fn(how), s.shape, others=(s.b.like(s.x, s.n[1]),))


@operator("sequence vector")
def einsum(s: Site) -> None:
    if s.n[2] % 2:
        s.emit(Fn("einsum_gate"), s.shape, others=(s.b.like(s.x, s.n[1]),))
    else:
        width = s.choose(WIDTHS)
        s.wide(Parameter("einsum", torch.randn(width, s.width)), width)


@operator(EVERY)
def cat(s: Site) -> None:
    """With itself, an earlier value, the raw input or all of them."""
    found = [i for i in s.b.of_rank(len(s.shape)) if s.b.resized(i, 0) == s.b.resized(s.x, 0)]
    others = ((s.x,), (found[0],), (s.choose(found),), (s.choose(found), found[0]))[s.n[2] % 4]
    width = s.width + sum(s.b.width(i) for i in others)
    if width <= LARGEST:
        s.emit(Fn("cat", dim=s.dim), s.b.resized(s.x, width), others=others)


@operator(EVERY)
def cat_constant(s: Site) -> None:
    extra = 1 + s.n[1] % 3
    value = torch.randn(1, *s.b.resized(s.x, extra))
    s.wide(Parameter(s.choose(("cat", "prepend"), 2), value, parameter=s.n[2] % 3 > 0, dim=s.dim), s.width + extra)


@operator("sequence")
def class_token(s: Site) -> None:
    if s.shape[0] < 8:
        s.emit(Parameter("prepend", torch.randn(1, 1, s.width)), (s.shape[0] + 1, s.width))


@operator(EVERY)
def raw_parameter(s: Site) -> None:
    """Position embeddings, layer scales, gains."""
    c = s.width
    shape = (c, 1, 1) if len(s.shape) == 3 else (c,)
    if len(s.shape) == 2 and s.n[2] % 2:
        shape = (1, *s.shape)
    s.same(Parameter(s.choose(("add", "mul")), torch.randn(shape), parameter=s.n[2] % 5 > 0))


# ---- blocks


@operator("image")
def attention_to_channels(s: Site) -> None:
    s.same(EfficientChannelAttention() if s.n[1] % 3 == 0 else SqueezeExcite(s.width, 2 + s.n[2] % 4, s.n[1] % 3 == 1))


@operator("sequence")
def self_attention(s: Site) -> None:
    tokens, width = s.shape
    heads, head_dim = s.choose((2, 3, 4)), s.choose((2, 4, 5), 2)
    how = ("sdpa", "matmul", "einsum")[s.n[0] % 3]
    s.same(FusedAttention(width, heads, head_dim, tokens, how, s.n[1] // 3 % 2 == 0, s.n[2] // 3 % 3 == 0))


@operator("sequence")
def grouped_query(s: Site) -> None:
    tokens, width = s.shape
    groups, times = s.choose((1, 2, 2, 3)), s.choose((1, 2, 3), 2)
    how = ("interleave", "expand", "gqa")[s.n[0] % 3]
    s.same(GroupedQuery(width, groups * times, groups, s.choose((4, 6), 2), tokens, how, s.n[1] % 2 == 0))


@operator("sequence")
def multi_head(s: Site) -> None:
    other = s.b.take(2, s.n[0])
    cross = other is not None and other != s.x
    module = MultiHead(
        s.width, s.choose(divisors(s.width)), s.b.width(other) if cross and other is not None else None, s.n[2] % 3 > 0
    )
    s.emit(module, s.shape, others=(other,) if cross and other is not None else ())


@operator("sequence")
def feed_forward(s: Site) -> None:
    s.same(FeedForward(s.width, s.choose(WIDTHS), s.choose(("gelu", "swiglu", "fused"), 2)))


@operator("sequence")
def tokens(s: Site) -> None:
    s.same(TokenMixing(s.shape[0], s.choose((4, 6, 8))))


@operator("sequence")
def mix(s: Site) -> None:
    s.same(Fn(s.choose(("self_mix", "self_mix", "channel_mix")), width=s.width))


@operator("sequence")
def recurrent(s: Site) -> None:
    hidden, both, last = s.choose((4, 6)), s.n[1] % 4 == 3, s.n[2] % 2 == 0
    width = hidden * (2 if both else 1)
    module = Recurrent(("lstm", "gru", "rnn")[s.n[0] % 3], s.width, hidden, 1 + (s.n[2] % 5 == 4), both, last)
    s.emit(module, (width,) if last else (s.shape[0], width))
