"""Hand-written networks for the mutation test and the soak test: one for each way in which layers can be coupled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_layers import FeedForward, Fn, FusedAttention, GroupedQuery, RmsNorm, SqueezeExcite
from tests.support.random_networks import enliven


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.norm_a, self.norm_b = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + self.skip(x))


class Dense(nn.Module):
    """Every layer reads all earlier ones, the raw input included; the result is split unevenly and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + 6 * i, 6, 3, padding=1) for i in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3 + 6 * i) for i in range(1, 3)])
        self.mix, self.a, self.b = nn.Conv2d(21, 12, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for i, layer in enumerate(self.layers):
            read = F.relu(self.norms[i - 1](features)) if i else features
            features = torch.cat([features, layer(read)], 1)
        y = F.gelu(self.mix(features))
        left, right = y.split([5, 7], dim=1)
        right = torch.cat([right, y[:, 2:8:3]], 1)
        y = self.a(left) * self.b(right.roll(2, 1)).flip(1)
        return self.head(F.adaptive_avg_pool2d(y, 4).flatten(1))


class Shuffling(nn.Module):
    """Grouped convolutions with channel shuffles, group norm, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 1, 1, groups=4)
        self.norm, self.second = nn.GroupNorm(4, 24), nn.Conv2d(24, 12, 3, 1, 1, groups=4)
        self.shuffle, self.up = Fn("shuffle", groups=4), nn.Conv2d(12, 16, 1)
        self.head = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        y = F.relu(self.second(self.shuffle(y)))
        return self.head(F.pixel_shuffle(self.up(y), 2)).mean((2, 3))


class Mobile(nn.Module):
    """Inverted residuals: depthwise convolutions, squeeze and excite, a transposed convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        )
        self.gate, self.project = SqueezeExcite(16, 6, True), nn.Conv2d(16, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.InstanceNorm2d(16, affine=True)])
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norms[0](self.stem(x)))
        y = F.hardswish(self.norms[2](self.depth(F.hardswish(self.norms[1](self.expand(x))))))
        x = x + self.project(self.gate(y))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


class Attention(nn.Module):
    """Two transformer blocks with fused qkv, a class token and position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 5, 12))
        self.norms = nn.ModuleList([nn.LayerNorm(12) for _ in range(3)])
        self.attention = nn.ModuleList(
            [FusedAttention(12, 3, 4, 5, "sdpa", False, False), FusedAttention(12, 3, 4, 5, "matmul", True, True)]
        )
        self.mlp, self.head = FeedForward(12, 10, "gelu"), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.attention[0](self.norms[0](x))
        x = x + self.attention[1](self.norms[1](x))
        return self.head((x + self.mlp(self.norms[2](x)))[:, 0])


class Language(nn.Module):
    """A decoder: grouped queries, rotary positions, SwiGLU, root-mean-square norms; tied embedding on request."""

    def __init__(self, tied: bool, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attention = nn.ModuleList([GroupedQuery(12, 4, 2, 4, 5, "expand", True) for _ in range(layers)])
        self.mlp = nn.ModuleList([FeedForward(12, 9, "swiglu" if not tied else "fused") for _ in range(layers)])
        self.norms = nn.ModuleList([nn.RMSNorm(12, eps=1e-5) if tied else RmsNorm(12) for _ in range(2 * layers + 1)])
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


class Sequence(nn.Module):
    """An embedding, two recurrent layers and a head over all time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 10), nn.LSTM(10, 8, batch_first=True)
        self.gru, self.norm = nn.GRU(8, 6, batch_first=True), nn.LayerNorm(8)
        self.mid, self.head = nn.Linear(8, 8), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.lstm(self.embed(tokens))[0])
        return self.head(self.gru(F.silu(self.mid(x)))[0])


def _image(size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, size, size, dtype=torch.float64),)


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (2, 5)),)


def _residual() -> nn.Module:
    blocks = (nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 12, 2))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


PATIENTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "residual": (_residual, _image(8)),
    "dense concatenation": (Dense, _image(8)),
    "grouped convolution and shuffle": (Shuffling, _image(8)),
    "depthwise, squeeze and excite": (Mobile, _image(8)),
    "fused attention": (Attention, _image(8)),
    "grouped queries and rotary positions": (lambda: Language(tied=False), _tokens),
    "tied embedding": (lambda: Language(tied=True), _tokens),
    "recurrent": (Sequence, _tokens),
}


def admit(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with live weights in float64, and its inputs."""
    make, inputs = PATIENTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make().double().eval()
        enliven(net, torch.Generator().manual_seed(seed))
        return net, inputs()
