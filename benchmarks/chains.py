"""Networks that grow: residual, plain and dense chains, a wide operator graph, a small Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """A residual step."""
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


class Chain(nn.Module):
    """Stem, blocks, classifier."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The classes of a batch of images."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads the concatenation of all earlier ones."""

    def __init__(self, depth: int, growth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + growth * i, growth, 3, padding=1) for i in range(depth))
        self.head = nn.Linear(3 + growth * depth, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The classes of a batch of images."""
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x.mean((2, 3)))


def residual(depth: int, width: int = 16) -> nn.Module:
    """One residual stream: a long coupled group and a small one per block."""
    return Chain([Block(width) for _ in range(depth)], width)


def plain(depth: int, width: int = 16) -> nn.Module:
    """Nothing coupled: a group per layer."""
    layers = [[nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()] for _ in range(depth)]
    return Chain([nn.Sequential(*three) for three in layers], width)


def dense(depth: int) -> nn.Module:
    """Layers that read all earlier ones."""
    return Dense(depth)


def dense_slots(depth: int, growth: int = 8) -> int:
    """Channel slots of a dense chain: the widths of all its concatenations, summed."""
    return sum(3 + growth * (i + 1) for i in range(depth))


def llama() -> nn.Module:
    """A Llama of two layers with grouped-query attention."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=131, num_hidden_layers=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)
