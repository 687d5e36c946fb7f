"""See what can be removed from a transformer layer, keep some of it whole, and plan before cutting."""

import torch
from torch import nn

import metaprune as mp

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(20, 64), nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=256, batch_first=True), nn.Linear(64, 5)
)
inputs = torch.randn(2, 12, 20)  # (batch, tokens, features)

graph = mp.trace(model, inputs)
for group in graph.groups:
    print(f"{group.name:40} {group.kind:10} {group.size:4} {group.reason}")

# The residual stream stays as wide as it is; heads and feed-forward units pay for the whole budget.
residual = [group.name for group in graph.groups if group.kind == "residual"]
plan = mp.plan(graph, budget="macs=0.6", protect=residual)
pruned = mp.apply(graph, plan)

for name, units in plan.keep.items():
    print(f"{name}: {len(units)} units stay")
print(pruned.certificate.summary())
