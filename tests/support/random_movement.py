"""Operators of random networks that move values, reduce them, or turn one kind into another."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.random_builder import LARGEST, Site, divisors, operator
from tests.support.random_layers import Fn, Parameter

EVERY = "image sequence vector"


# ---- pieces


@operator(EVERY)
def chunk(s: Site) -> None:
    pieces = 2 + s.n[1] % 2
    sizes = [t.shape[0] for t in torch.empty(s.width).chunk(pieces)]
    if len(sizes) > 1:
        s.emit(Fn("chunk", dim=s.dim, pieces=pieces), *(s.b.resized(s.x, n) for n in sizes))


@operator(EVERY)
def split(s: Site) -> None:
    first = 1 + s.n[1] % (s.width - 1) if s.width > 1 else 0
    if first:
        sizes = (first, s.width - first)
        s.emit(Fn("split", dim=s.dim, sizes=list(sizes)), *(s.b.resized(s.x, n) for n in sizes))


@operator(EVERY)
def slice_(s: Site) -> None:
    options = (
        (1, None, 2),
        (None, -1, None),
        (-3, None, None),
        (None, None, 2),
        (1, -1, None),
        (0, s.width // 2, None),
        (-4, -1, 2),
    )
    start, stop, step = s.choose(options)
    width = len(range(s.width)[start:stop:step])
    if width:
        s.wide(Fn("slice_last" if len(s.shape) == 2 else "slice1", start=start, stop=stop, step=step), width)


@operator(EVERY)
def narrow(s: Site) -> None:
    start = s.n[1] % s.width
    length = 1 + s.n[2] % (s.width - start)
    s.wide(Fn("narrow", dim=s.dim, start=start, length=length), length)


@operator(EVERY)
def index(s: Site) -> None:
    generator = torch.Generator().manual_seed(s.n[2])
    wanted = torch.randint(0, s.width, (1 + s.n[1] % LARGEST // 2,), generator=generator)
    if s.n[2] % 2:
        wanted = torch.randperm(s.width, generator=generator)
    how = s.choose(("index", "index_select", "gather"), 0)
    s.wide(Parameter(how, wanted, parameter=False, dim=s.dim), len(wanted))


@operator(EVERY)
def glu(s: Site) -> None:
    if s.width % 2 == 0:
        s.wide(Fn("glu", dim=s.dim), s.width // 2)


# ---- movement


@operator("image vector")
def shuffle(s: Site) -> None:
    groups = s.choose(divisors(s.width))
    s.same(nn.ChannelShuffle(groups) if len(s.shape) == 3 and s.n[2] % 3 == 0 else Fn("shuffle", groups=groups))


@operator(EVERY)
def move(s: Site) -> None:
    s.same(
        s.choose(
            (Fn("flip", dim=s.dim), Fn("roll", dim=s.dim, shift=1 + s.n[2] % s.width), Fn("roll", dim=s.dim, shift=-2))
        )
    )


@operator(EVERY)
def pad(s: Site) -> None:
    before, after, value = s.n[1] % 3, s.n[1] // 3 % 3, s.choose((0.0, 0.0, 1.0), 2)
    if len(s.shape) == 3 and s.n[2] % 4 == 0:
        c, h, w = s.shape
        if min(h, w) > 1 and h < 9:
            s.emit(Fn("pad_space", mode=s.choose(("constant", "reflect", "replicate"))), (c, h + 1, w + 1))
    else:
        s.wide(
            Fn("pad_last" if len(s.shape) == 2 else "pad1", before=before, after=after, value=value),
            s.width + before + after,
        )


@operator(EVERY)
def repeat(s: Site) -> None:
    if s.width <= LARGEST // 2:
        last = "repeat_last" if len(s.shape) == 2 else "repeat1"
        s.wide(s.choose((Fn(last, times=2), Fn("repeat_interleave", dim=s.dim, times=2))), 2 * s.width)


@operator("image")
def pixels(s: Site) -> None:
    c, h, w = s.shape
    if s.n[1] % 2 and c % 4 == 0 and h <= 4:
        s.emit(nn.PixelShuffle(2), (c // 4, 2 * h, 2 * w))
    elif h % 2 == 0 and w % 2 == 0 and 4 * c <= LARGEST:
        s.emit(nn.PixelUnshuffle(2), (4 * c, h // 2, w // 2))


@operator("image")
def window(s: Site) -> None:
    if s.width <= 6:
        s.wide(Fn("window"), 9 * s.width)


@operator("sequence vector")
def heads(s: Site) -> None:
    count = s.choose(divisors(s.width))
    how = s.choose(("head_mean", "head_softmax", "head_swap"), 2)
    s.wide(Fn(how, heads=count, width=s.width // count), s.width // count if how == "head_mean" else s.width)


# ---- along channels, space and tokens


@operator(EVERY)
def along(s: Site) -> None:
    how = s.choose(
        ("mean_expand", "mean_gate", "max_gate", "sum_gate", "softmax", "log_softmax", "normalize", "cumsum")
    )
    s.same(Fn(how, dim=s.dim))


@operator("image")
def pool(s: Site) -> None:
    c, h, w = s.shape
    small = 1 + s.n[2] % 2
    options = [
        (Fn("avg_pool"), (c, h, w)),
        (Fn("adaptive_pool", size=small), (c, small, small)),
        (Fn("adaptive_max", size=small), (c, small, small)),
    ]
    if h > 1 and w > 1:
        options.append((Fn("max_pool"), (c, h // 2, w // 2)))
    if h <= 4:
        options += [(Fn("upsample", mode=mode), (c, 2 * h, 2 * w)) for mode in ("nearest", "bilinear")]
    s.emit(*s.choose(options))


# ---- from one kind of value to another


@operator("image")
def to_sequence(s: Site) -> None:
    s.emit(Fn("to_sequence"), (s.shape[1] * s.shape[2], s.shape[0]))


@operator("image")
def flatten(s: Site) -> None:
    c, h, w = s.shape
    if c * h * w <= 320:
        s.emit(s.choose((Fn("flatten"), Fn("flatten_last"), Fn("view_flat", features=c * h * w))), (c * h * w,))


@operator("sequence")
def flatten_tokens(s: Site) -> None:
    t, d = s.shape
    if t * d <= 320:
        s.emit(s.choose((Fn("flatten"), Fn("flatten_last"), Fn("view_flat", features=t * d))), (t * d,))


@operator("image")
def gram(s: Site) -> None:
    if s.width <= 12:
        s.emit(Fn("gram"), (s.width**2,))


@operator("sequence")
def summary(s: Site) -> None:
    s.emit(Fn(s.choose(("mean_tokens", "first_token", "last_token", "max_tokens"))), (s.width,))


@operator("sequence")
def to_image(s: Site) -> None:
    t, d = s.shape
    height = s.choose(divisors(t))
    s.emit(Fn("to_image", height=height, width=t // height), (d, height, t // height))


@operator("vector")
def unfold_vector(s: Site) -> None:
    count = s.choose(divisors(s.width))
    options = [
        (Fn("as_sequence", tokens=4), (4, s.width)),
        (Fn("as_image", size=2), (s.width, 2, 2)),
        (Fn("fold_sequence", tokens=count, width=s.width // count), (count, s.width // count)),
    ]
    s.emit(*s.choose(options, 2))


@operator("vector")
def condition(s: Site) -> None:
    """A vector gates the channels of an image, or is added to a sequence's tokens."""
    for rank, how in ((3, "spread"), (2, "spread_tokens")):
        for value in reversed(s.b.of_rank(rank)):
            if s.b.width(value) == s.width and value >= s.b.inputs:
                s.b.call(s.name, Fn(how), (value, s.x), s.b.shapes[value])
                return
