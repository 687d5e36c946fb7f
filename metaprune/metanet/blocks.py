"""Building blocks of the zoo's networks: small modules that `nn.Sequential` strings together.

Images are (batch, channels, height, width), tokens (batch, tokens, width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.graphs.errors import OptionError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def activation(name: str) -> nn.Module:
    """A new activation function; raises `OptionError` for a name that is none."""
    if name not in ACTIVATIONS:
        raise OptionError(f"act: {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def normalised(name: str, width: int) -> list[nn.Module]:
    """A normalisation of images, `"batch"`, or none, `"none"`; raises `OptionError` for another name."""
    if name not in ("batch", "none"):
        raise OptionError(f"norm: {name!r} is neither batch nor none")
    return [nn.BatchNorm2d(width)] if name == "batch" else []


def convolution(
    inputs: int, outputs: int, kernel: int, norm: str, act: str | None = None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the positions (over the stride), normalisation and activation; a bias without a norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=norm == "none")
    return nn.Sequential(conv, *normalised(norm, outputs), *([activation(act)] if act else []))


class Residual(nn.Module):
    """The sum of a body and a shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape that body and shortcut agree on."""
        total: Tensor = self.body(x) + self.shortcut(x)
        return total


class Concatenated(nn.Module):
    """The input with a body's output behind its channels (Huang et al. 2017, arXiv 1608.06993, equation 2)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, h, w) to (batch, channels + growth, h, w)."""
        return torch.cat([x, self.body(x)], dim=1)


class SqueezeExcite(nn.Module):
    """Channels times a gate that all channels' means decide (Hu et al. 2018, arXiv 1709.01507, equations 2 to 4)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, squeezed)
        self.excite = nn.Linear(squeezed, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, width, h, w) to the same shape."""
        gate: Tensor = self.excite(self.squeeze(x.mean(dim=(2, 3))).relu()).sigmoid()  # (batch, width)
        return x * gate[:, :, None, None]


class Permute(nn.Module):
    """The dimensions in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape of as many dimensions as the order has."""
        return x.permute(self.order)


class LayerScale(nn.Module):
    """One learned factor per channel, the last dimension (Touvron et al. 2021, arXiv 2103.17239, equation 4)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to the same shape."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017, arXiv 1706.03762, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.out(mixed)
        return out


class Positions(nn.Module):
    """Adds learned positions to tokens, after a class token in front of them where one is wanted."""

    def __init__(self, tokens: int, width: int, class_token: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width)) if class_token else None
        self.embedding = nn.Parameter(0.02 * torch.randn(1, tokens + class_token, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to the same shape, with one more token for a class token."""
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.embedding


class FirstToken(nn.Module):
    """The first token alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to (batch, width)."""
        return x[:, 0]


class MeanToken(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to (batch, width)."""
        return x.mean(dim=1)


def feed_forward(width: int, hidden: int, act: str) -> list[nn.Module]:
    """Two linear layers on the last dimension with an activation between them."""
    return [nn.Linear(width, hidden), activation(act), nn.Linear(hidden, width)]


def patches(channels: int, width: int, patch: int) -> list[nn.Module]:
    """Maps (batch, channels, h, w) to (batch, h * w / patch^2, width); an incomplete patch at the edge is left out."""
    return [nn.Conv2d(channels, width, patch, patch), nn.Flatten(2), Permute(0, 2, 1)]


def pooled_classifier(width: int, classes: int) -> list[nn.Module]:
    """Mean over the positions of images, then one linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
