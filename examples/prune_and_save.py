"""Prune a residual network to half of its MACs, look at the result, save it and load it again.

The command line does the same:  metaprune prune examples.prune_and_save:build --budget macs=0.5 --out runs/half
"""

import sys
from pathlib import Path

import torch
from torch import nn

import metaprune as mp


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


def build():
    stem, head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
    model = nn.Sequential(stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return model, torch.randn(1, 3, 32, 32)


if __name__ == "__main__":
    torch.manual_seed(0)
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/prune_and_save")
    model, inputs = build()

    pruned = mp.prune(model, inputs, budget="macs=0.5")

    before, after = pruned.cost["before"], pruned.cost["after"]
    print(f"MACs {before.macs:,} -> {after.macs:,}, parameters {before.params:,} -> {after.params:,}")
    print(pruned.certificate.summary())
    print(pruned.module)

    pruned.save(out)
    again = mp.load(out)
    x = torch.randn(5, 3, 32, 32)
    print("reloaded equal:", torch.equal(again(x), pruned.module.eval()(x)))
