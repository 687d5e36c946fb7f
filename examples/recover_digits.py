"""Train a small network on handwritten digits, prune it, and distil the lost accuracy back (needs scikit-learn)."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metaprune as mp

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train = DataLoader(TensorDataset(images[order[:1400]], labels[order[:1400]]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(images[order[1400:]], labels[order[1400:]]), batch_size=400)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(64 * 16, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(6):
    for x, y in train:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
model.eval()

task = mp.Task(model, images[:1], train, val)
pruned = mp.prune(model, task.inputs, budget="macs=0.2")
recovered = mp.recover(pruned, task, teacher=model, recipe="kd+recalibrate", epochs=4)

for name, network in (("dense", model), ("pruned", pruned.module), ("recovered", recovered.module)):
    print(f"{name:10} {task.score(network):.1%}")
