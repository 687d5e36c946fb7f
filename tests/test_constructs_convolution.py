"""Convolutional networks: residual, grouped, depthwise, transposed; channel attention; computed weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.cases import Case, Net, channelwise, check, conv, images, vectors

NONE: dict[str, tuple[int, ...]] = {}


class Block(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.c1, self.n1 = conv(inputs, outputs, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.n2 = conv(outputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)
        self.short = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.n2(self.c2(self.act(self.n1(self.c1(x))))) + self.short(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = self.up(F.gelu(self.down(x.mean((2, 3))))).sigmoid()
        return x * gate.view(batch, channels, 1, 1)


class EfficientChannels(nn.Module):
    """ECA: a one-dimensional convolution over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mix(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.transpose(1, 2).unsqueeze(-1)


class BlockAttention(nn.Module):
    """CBAM: channel attention from two pools, then spatial attention from mean and maximum over the channels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))
        self.space = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()[..., None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.space(pooled).sigmoid()


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: every filter is normalised over its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Ghost(nn.Module):
    """Half of the features by a convolution, half by a cheap depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.cheap = conv(8, 6), conv(6, 6, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.main(x).relu()
        return torch.cat([first, self.cheap(first)], 1)


def module(name: str, make: Any, into: int = 8, **options: Any) -> Case:
    """A module between two convolutions of eight channels."""
    return channelwise(name, lambda m, h: m.inner(h), into, children=lambda: {"inner": make()}, **options)


def resnet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), Block(8, 8), Block(8, 12, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def normalised(network: nn.Module, wrap: Any) -> nn.Module:
    """Parametrises the middle layer's weight."""
    wrap(network[2])
    return network


def plain() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))


def shared() -> nn.Module:
    """One convolution used three times: its inputs and outputs are one set of channels."""
    return Net(
        lambda m, x: m.tail(m.twice(m.twice(m.twice(m.stem(x)).relu()))),
        stem=conv(3, 8),
        twice=conv(8, 8),
        tail=conv(8, 2),
    )


def scaled_residual(m: Any, h: Tensor) -> Tensor:
    return h + m.gain * m.inner(h)


CASES = [
    Case("resnet", resnet, images(8), {"channels": (8, 12), "residual": (8, 12)}, kind="native"),
    Case("resnet_batch_1", resnet, images(8), {"channels": (8, 12), "residual": (8, 12)}, kind="native", batch=1),
    Case("resnet_batch_3", resnet, images(8), {"channels": (8, 12), "residual": (8, 12)}, kind="native", batch=3),
    channelwise(
        "residual", lambda m, h: h + m.second(h), children=lambda: {"second": conv(8, 8)}, free={"residual": (8,)}
    ),
    channelwise(
        "residual_in_place",
        lambda m, h: h.add_(m.second(h.clone())).relu_(),
        children=lambda: {"second": conv(8, 8)},
        free={"residual": (8,)},
    ),
    channelwise(
        "layer_scale",
        scaled_residual,
        children=lambda: {
            "inner": nn.Sequential(conv(8, 12), nn.GELU(), conv(12, 8)),
            "gain": nn.Parameter(torch.ones(8, 1, 1)),
        },
        free={"channels": (12,), "residual": (8,)},
    ),
    channelwise(
        "subtract_scaled",
        lambda m, h: 2.0 * h - m.s(h) / 3 + 1.5,
        children=lambda: {"s": conv(8, 8)},
        free={"residual": (8,)},
    ),
    channelwise("product", lambda m, h: h * m.s(h), children=lambda: {"s": conv(8, 8)}),
    channelwise("add_sigmoid", lambda m, h: h.sigmoid() + h.exp(), free={"residual": (8,)}),
    channelwise("broadcast_one_channel", lambda m, h: h * m.map(h), children=lambda: {"map": conv(8, 1)}),
    # convolutions
    module("depthwise", lambda: conv(8, 8, groups=8)),
    module("depthwise_multiplier", lambda: conv(8, 16, groups=8), 16, free={"channels": (2, 8)}),
    module("grouped", lambda: conv(8, 12, groups=4), 12, free={"channels": (3, 2), "conv_group": (4,)}),
    module(
        "grouped_chain",
        lambda: nn.Sequential(conv(8, 8, groups=2), nn.ReLU(), conv(8, 8, groups=2)),
        free={"channels": (4, 4, 4), "conv_group": (2,)},
    ),
    module(
        "inverted_residual",
        lambda: nn.Sequential(conv(8, 24, 1), nn.ReLU6(), conv(24, 24, groups=24), nn.Hardswish(), conv(24, 8, 1)),
        free={"channels": (8, 8, 24)},
    ),
    module(
        "dilated_strided",
        lambda: nn.Conv2d(8, 8, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1)),
        free={"channels": (8, 8)},
    ),
    module(
        "padding_same_circular",
        lambda: nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"),
        free={"channels": (8, 8)},
    ),
    module("padding_reflect", lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), free={"channels": (8, 8)}),
    module("transposed", lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), 6, free={"channels": (6, 8)}),
    module(
        "transposed_output_padding",
        lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        6,
        free={"channels": (6, 8)},
    ),
    module(
        "transposed_grouped",
        lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
        12,
        free={"channels": (2, 3), "conv_group": (4,)},
    ),
    module("transposed_depthwise", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
    module(
        "transposed_dilated", lambda: nn.ConvTranspose2d(8, 6, 2, dilation=2, bias=False), 6, free={"channels": (6, 8)}
    ),
    module("ghost", Ghost, 12, free={"channels": (6, 8)}),
    Case(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 2)),
        vectors(3, 9),
        {"channels": (8,)},
        kind="native",
    ),
    Case(
        "conv1d_grouped",
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 2, groups=2), nn.Conv1d(8, 4, 1)),
        vectors(3, 9),
        {"channels": (4, 4), "conv_group": (2,)},
    ),
    Case(
        "conv3d",
        lambda: nn.Sequential(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 2)),
        vectors(2, 4, 4, 4),
        {"channels": (8,)},
        kind="native",
    ),
    Case(
        "transposed1d",
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose1d(8, 4, 2)),
        vectors(3, 5),
        {"channels": (8,)},
    ),
    Case(
        "transposed3d",
        lambda: nn.Sequential(nn.ConvTranspose3d(2, 8, 2), nn.ReLU(), nn.ConvTranspose3d(8, 4, 2, groups=2)),
        vectors(2, 3, 3, 3),
        {"channels": (4,)},
        ("output",),
    ),
    Case("shared_convolution", shared, images(), {"channels": (8,)}),
    # channel attention
    module("squeeze_excite", lambda: SqueezeExcite(8, 4), free={"channels": (8,), "ffn": (4,)}),
    module("efficient_channels", EfficientChannels),
    module("block_attention", lambda: BlockAttention(8, 4), free={"residual": (8,), "ffn": (4,)}),
    channelwise("channel_softmax", lambda m, h: h * h.mean((2, 3), keepdim=True).softmax(1)),
    channelwise(
        "channel_maximum", lambda m, h: torch.cat([h.max(1, keepdim=True).values, h.min(1, keepdim=True)[0], h], 1), 10
    ),
    channelwise("normalize", lambda m, h: F.normalize(h, dim=1)),
    channelwise("normalize_flat", lambda m, h: F.normalize(h.flatten(2), p=1, dim=-1).unflatten(2, (6, 6))),
    channelwise(
        "cosine",
        lambda m, h: h * F.cosine_similarity(h, m.second(h), dim=1).unsqueeze(1),
        children=lambda: {"second": conv(8, 8)},
        free={"channels": (8, 8)},
    ),
    channelwise(
        "gram_matrix", lambda m, h: (h.flatten(2) @ h.flatten(2).transpose(1, 2) @ h.flatten(2)).unflatten(2, (6, 6))
    ),
    channelwise("cumsum", lambda m, h: h.cumsum(1)),
    channelwise("argmax_mask", lambda m, h: torch.where(h > h.mean((2, 3), keepdim=True), h, h * 0.1)),
    # pooling and sampling
    *(
        channelwise(f"pool_{name}", lambda m, h, f=function: f(h))
        for name, function in {
            "max": lambda h: F.max_pool2d(h, 3, 2, 1, ceil_mode=True),
            "average": lambda h: F.avg_pool2d(h, 2, count_include_pad=False),
            "adaptive_max": lambda h: F.adaptive_max_pool2d(h, 3),
            "adaptive_average": lambda h: F.adaptive_avg_pool2d(h, (2, 3)),
            "power": lambda h: F.lp_pool2d(h.abs() + 0.1, 2, 2),
        }.items()
    ),
    channelwise(
        "unpool",
        lambda m, h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
        free=NONE,
        pins=("max_unpool2d",),
    ),
    *(
        channelwise(f"resize_{mode}", lambda m, h, mode=mode: F.interpolate(h, scale_factor=2, mode=mode))
        for mode in ("nearest", "bilinear", "bicubic", "nearest-exact", "area")
    ),
    channelwise(
        "grid_sample",
        lambda m, h: F.grid_sample(h, m.grid(h).tanh().permute(0, 2, 3, 1), align_corners=False),
        children=lambda: {"grid": conv(8, 2)},
    ),
    channelwise(
        "affine_grid",
        lambda m, h: F.grid_sample(
            h, F.affine_grid(m.theta(h.mean((2, 3))).view(-1, 2, 3), [h.shape[0], 1, 5, 5], False), align_corners=False
        ),
        children=lambda: {"theta": nn.Linear(8, 6)},
        free={"channels": (8,), "ffn": (3,)},
    ),
    # activations with weights of their own
    module("prelu", lambda: nn.PReLU(8)),
    module("prelu_single", nn.PReLU),
    module("gated_linear", lambda: nn.Sequential(conv(8, 16), nn.GLU(1)), free={"channels": (8, 8)}),
    channelwise(
        "gated_by_product",
        lambda m, h: (c := m.wide(h))[:, :8].tanh() * c[:, 8:].sigmoid(),
        children=lambda: {"wide": conv(8, 16)},
        free={"channels": (8, 8)},
    ),
    # weights that are computed
    module("weight_standardisation", lambda: StandardisedConv(8, 8, 3, padding=1), free={"channels": (8, 8)}),
    Case(
        "weight_norm",
        lambda: normalised(plain(), parametrizations.weight_norm),
        images(),
        {"channels": (8,)},
        ("weight_norm",),
    ),
    Case(
        "weight_norm_over_inputs",
        lambda: normalised(plain(), lambda c: parametrizations.weight_norm(c, dim=1)),
        images(),
        {"channels": (6,)},
        ("weight_norm",),
    ),
    Case("spectral_norm", lambda: normalised(plain(), parametrizations.spectral_norm), images(), {"channels": (6, 8)}),
    Case(
        "orthogonal_scale",
        lambda: Net(
            lambda m, x: m.tail(F.conv2d(m.stem(x), m.w / m.w.norm())),
            stem=conv(3, 8),
            tail=conv(6, 4),
            w=nn.Parameter(torch.ones(6, 8, 3, 3)),
        ),
        images(),
        {"channels": (6, 8)},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: Case) -> None:
    check(case)
