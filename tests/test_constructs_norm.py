"""Normalisation: per channel, over kept channels, and held exact by rescaling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, Net, channelwise, check, conv, images, vectors

NONE: dict[str, tuple[int, ...]] = {}


class RMSNorm(nn.Module):
    """Written out, with the casts of the usual implementations."""

    def __init__(self, width: int, eps: float = 1e-6, cast: bool = False, offset: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.cast, self.offset = nn.Parameter(torch.ones(width)), eps, cast, offset

    def forward(self, x: Tensor) -> Tensor:
        h = x.float() if self.cast else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight + 1 if self.offset else self.weight) * h.to(x.dtype)


class RootNorm(nn.Module):
    """x / sqrt(mean(x * x) + eps) in another spelling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * self.gain


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of an image, decomposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Standard(nn.Module):
    """(x - mean) / std, with a weight."""

    def __init__(self, width: int, dim: int = -1) -> None:
        super().__init__()
        self.weight, self.dim = nn.Parameter(torch.ones(width)), dim

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(self.dim, keepdim=True)
        x = x / (x.std(self.dim, keepdim=True, correction=0) + 1e-3)
        return x * (self.weight if self.dim == -1 else self.weight[:, None, None])


class Contrast(nn.Module):
    """Positions enter each other several times, behind elementwise steps that leave no zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = (1.0 - torch.sigmoid(x) * self.weight).softmax(-1)
        return x * (y - y.amax(-1, keepdim=True)).exp()


class PermutedLayerNorm(nn.Module):
    """Layer norm over the channels of an image, by permutation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation: a channel's energy over the mean energy of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + self.bias + self.weight * x * (energy / (energy.mean(1, keepdim=True) + 1e-6))


class ScaleNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1) * width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)


def module(name: str, make: Callable[[], nn.Module], **options: Any) -> Case:
    """A norm between two convolutions."""
    return channelwise(name, lambda m, h: m.norm(h), children=lambda: {"norm": make()}, **options)


def between(name: str, make: Callable[[], nn.Module], width: int = 8, **options: Any) -> Case:
    """A norm between two linear layers, on vectors of shape [batch, 4, 6]."""
    options.setdefault("free", {"ffn": (width,)})
    build = lambda: Net(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(6, width), norm=make(), b=nn.Linear(width, 3))  # noqa: E731
    return Case(name, build, vectors(4, 6), **options)


def shared_norm() -> nn.Module:
    body = lambda m, x: m.c(m.norm(m.b(m.norm(m.a(x)).tanh())))  # noqa: E731
    return Net(body, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3), norm=nn.RMSNorm(8, eps=1e-5))


def post_norm_stream() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        for i in range(2):
            h = m.norms[i](h + m.down[i](F.gelu(m.up[i](h))))
        return m.head(h)

    layers = {name: nn.ModuleList(nn.Linear(i, o) for _ in range(2)) for name, i, o in (("up", 8, 12), ("down", 12, 8))}
    norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
    return Net(body, embed=nn.Linear(6, 8), norms=norms, head=nn.Linear(8, 3), **layers)


def pre_norm_stream(make: Callable[[int], nn.Module]) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        for norm, up, down in zip(m.norms, m.up, m.down, strict=True):
            h = h + down(F.silu(up(norm(h))))
        return m.head(m.last(h))

    layers = {name: nn.ModuleList(nn.Linear(i, o) for _ in range(2)) for name, i, o in (("up", 8, 12), ("down", 12, 8))}
    norms = nn.ModuleList(make(8) for _ in range(2))
    return Net(body, embed=nn.Linear(6, 8), norms=norms, last=make(8), head=nn.Linear(8, 3), **layers)


STREAM = {"ffn": (12, 12), "residual": (8,)}

CASES = [
    module("batch_norm", lambda: nn.BatchNorm2d(8), kind="native"),
    module("batch_norm_without_affine", lambda: nn.BatchNorm2d(8, affine=False)),
    module("batch_norm_of_the_batch", lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    Case(
        "batch_norm_1d",
        lambda: nn.Sequential(nn.Conv1d(3, 8, 2), nn.BatchNorm1d(8), nn.ELU(), nn.Conv1d(8, 4, 2)),
        vectors(3, 6),
        {"channels": (8,)},
        kind="native",
    ),
    module("instance_norm", lambda: nn.InstanceNorm2d(8, affine=True), kind="native"),
    module("instance_norm_without_affine", lambda: nn.InstanceNorm2d(8)),
    module("instance_norm_tracking", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    module("local_response_norm", lambda: nn.LocalResponseNorm(3), free=NONE, pins=("",)),
    module("group_norm", lambda: nn.GroupNorm(2, 8), free={"channels": (4,), "conv_group": (2,)}, aware=True),
    module("group_norm_of_one_group", lambda: nn.GroupNorm(1, 8), aware=True),
    module("group_norm_per_channel", lambda: nn.GroupNorm(8, 8)),
    module("group_norm_no_affine", lambda: nn.GroupNorm(8, 8, affine=False)),
    module("layer_norm_2d", lambda: LayerNorm2d(8), kind="portable"),
    module("layer_norm_2d_by_std", lambda: Standard(8, 1), kind="portable"),
    between("layer_norm_by_hand", lambda: Standard(8), kind="portable"),
    Case("stream_layer_norm_by_hand", lambda: pre_norm_stream(Standard), vectors(4, 6), STREAM, kind="portable"),
    between("softmax_of_a_difference", lambda: Contrast(8), free=NONE, pins=("amax mixes its positions",)),
    module("layer_norm_permuted", lambda: PermutedLayerNorm(8), aware=True),
    module("layer_norm_over_space", lambda: nn.LayerNorm(6)),
    module("layer_norm_over_space_2d", lambda: nn.LayerNorm((6, 6))),
    module("response_norm", lambda: ResponseNorm(8), free={"residual": (8,)}),
    between("layer_norm", lambda: nn.LayerNorm(8), aware=True, kind="native"),
    between("layer_norm_no_bias", lambda: nn.LayerNorm(8, bias=False), aware=True),
    between("rms_norm", lambda: nn.RMSNorm(8, eps=1e-2), kind="native"),
    between("rms_norm_default_eps", lambda: nn.RMSNorm(8), kind="native"),
    between("rms_norm_no_weight", lambda: nn.RMSNorm(8, eps=1e-4, elementwise_affine=False)),
    between("rms_norm_by_hand", lambda: RMSNorm(8, 1e-2), kind="native"),
    between("rms_norm_in_float", lambda: RMSNorm(8, 1e-2, cast=True), tolerance=1e-6),
    between("rms_norm_offset", lambda: RMSNorm(8, 1e-2, offset=True), kind="native"),
    between("rms_norm_by_division", lambda: RootNorm(8)),
    between("scale_norm", lambda: ScaleNorm(8)),
    Case("rms_norm_shared", shared_norm, vectors(4, 6), {"ffn": (8,)}),
    Case("stream_post_layer_norm", post_norm_stream, vectors(4, 6), STREAM, aware=True, kind="native"),
    Case(
        "stream_pre_layer_norm", lambda: pre_norm_stream(nn.LayerNorm), vectors(4, 6), STREAM, aware=True, kind="native"
    ),
    Case("stream_pre_rms_norm", lambda: pre_norm_stream(nn.RMSNorm), vectors(4, 6), STREAM, kind="native"),
    Case("stream_rms_norm_by_hand", lambda: pre_norm_stream(RMSNorm), vectors(4, 6), STREAM, kind="native"),
    Case(
        "layer_norm_over_two_dims",
        lambda: Net(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(6, 8), norm=nn.LayerNorm((4, 8)), b=nn.Linear(8, 3)),
        vectors(4, 6),
        {"ffn": (8,)},
        ("network's input",),
        aware=True,
    ),
    Case(
        "rms_norm_over_two_dims",
        lambda: Net(
            lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(6, 8), norm=nn.RMSNorm((4, 8), eps=1e-4), b=nn.Linear(8, 3)
        ),
        vectors(4, 6),
        {"ffn": (8,)},
    ),
    Case(
        "group_norm_residual",
        lambda: Net(
            lambda m, x: m.head(F.relu((h := m.norm(m.stem(x))) + m.norm2(m.body_(h)))),
            stem=conv(3, 8),
            norm=nn.GroupNorm(4, 8),
            body_=conv(8, 8),
            norm2=nn.GroupNorm(2, 8),
            head=conv(8, 2),
        ),
        images(),
        {"residual": (2,), "conv_group": (2,)},
        aware=True,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(2, 8, affine=False)],
    ids=["layer_norm", "group_norm"],
)
def test_a_norm_over_channels_without_weights_is_exact_or_kept_whole(norm: nn.Module) -> None:
    import metaprune as mp
    from tests.support import oracle

    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    network = oracle.alive(nn.Sequential(*layers))
    pruned = mp.prune(network, torch.randn(2, 6), budget="width=0.5", allocator="uniform")
    assert pruned.kept["3.weight"][0].size == 3
    assert pruned.certificate is not None
    assert pruned.certificate.wiring <= 1e-9
    if 0 in pruned.kept.get("0.weight", {}):
        return
    assert oracle.difference(network, pruned.module, pruned.kept, torch.randn(3, 6))[0] <= 1e-9
