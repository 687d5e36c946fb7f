"""One pass of the metanetwork prunes a network to several budgets, and starts a search (needs scikit-learn)."""

import torch
import torch.nn.functional as F
from torch import nn

import metaprune as mp

torch.manual_seed(0)
torch.set_num_threads(1)
train, test = mp.digits(seed=0)
model = nn.Sequential(
    nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
    nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU(),
    nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
)  # fmt: skip
mp.train(model, train, lambda logits, _, labels: F.cross_entropy(logits, labels), mp.Settings(epochs=8, lr=0.05))
task = mp.Task(model.eval(), test.images[:1], train, test)
print(f"{'dense':12} {task.score(model):.1%}")

# Fitted on other networks on other data; it sees this network once, and no label.
pruner = mp.MetaPruner.load("default")
encoded = pruner.encode(model, task.inputs, data=train)
for budget in ("macs=0.5", "macs=0.25", "macs=0.125"):
    pruned = pruner.prune(encoded, budget=budget)
    print(f"{budget:12} {task.score(pruned.module):.1%}   kept {pruned.plan.provenance['guard']['kept']}")

# The predicted front costs no further look at the network; a search verifies it and goes on from there.
front = pruner.front(encoded, points=6)
found = mp.explore(task, objectives=("error", "macs"), evaluations=8, init=front)
for point in found.points:
    print("error {:.3f}, {:.1%} of the MACs".format(*point.objectives))
