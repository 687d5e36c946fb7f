"""Random networks from plain data.

A program is a start, a seed and a list of steps `(operator, a, b, c)`; the numbers choose sources and sizes. Every
program means some network: a step that fits nothing is left out. So programs shrink, print and replay as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import random_movement, random_operators
from tests.support.random_builder import OPERATORS, Builder, Shape, Site
from tests.support.random_layers import Fn

Step = tuple[str, int, int, int]
RANK = {"image": 3, "sequence": 2, "vector": 1}
STARTS = ("image", "vector", "sequence", "tokens", "image+vector", "sequence+sequence")
TABLES = (random_operators, random_movement)  # each fills OPERATORS when imported
MODULES = 16  # most steps


@dataclass(frozen=True)
class Program:
    """A network as data; see the module docstring."""

    start: str
    steps: tuple[Step, ...]
    seed: int = 0


class Net(nn.Module):
    """Runs the steps of a builder; `outputs` are the values it returns."""

    def __init__(self, builder: Builder, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(builder.modules)
        self._sources, self._outputs = tuple(builder.sources), outputs

    def forward(self, *inputs: Tensor) -> Any:
        values: dict[int, Tensor] = dict(enumerate(inputs))
        for step, (*sources, first, count) in zip(self.steps, self._sources, strict=True):
            result = step(*(values[i] for i in sources))
            values.update(enumerate(result, first) if count > 1 else [(first, result)])
        results = tuple(values[i] for i in self._outputs)
        return results[0] if len(results) == 1 else results


def build(program: Program) -> tuple[Net, tuple[Tensor, ...], Builder]:
    """The network of a program with alive weights in float64, and its inputs."""
    b = Builder()
    generator = torch.Generator().manual_seed(program.seed)
    inputs: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        for kind in program.start.split("+"):
            inputs.append(_input(kind, b, generator))
        b.inputs = len(inputs)
        for value, x in enumerate(inputs):
            if not x.is_floating_point():
                b.call("embedding", nn.Embedding(20, 12), (value,), (5, 12))
            else:
                b.call(
                    "stem",
                    b.layer(value, 8 + 4 * (program.seed % 2)),
                    (value,),
                    b.resized(value, 8 + 4 * (program.seed % 2)),
                )
        for name, a, c, d in program.steps:
            if len(b.modules) < MODULES and name in OPERATORS:
                source = b.take(RANK[name.partition(".")[0]], a)
                if source is not None:
                    OPERATORS[name](Site(b, name, source, (a // 4, c, d)))
        outputs = _heads(b, program.seed)
        net = Net(b, outputs).double()
        enliven(net, generator)
    return net.eval(), tuple(inputs), b


def _input(kind: str, b: Builder, generator: torch.Generator) -> Tensor:
    shapes: dict[str, Shape] = {"image": (3, 6, 6), "vector": (10,), "sequence": (5, 7), "tokens": (5,)}
    shape = shapes[kind]
    b.shapes.append(shape if kind != "tokens" else ())
    if kind == "tokens":
        return torch.randint(0, 20, (2, *shape), generator=generator)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def _heads(b: Builder, seed: int) -> tuple[int, ...]:
    """The values nobody reads become outputs (at most three): some as they are, most behind a pool and a linear map."""
    read = {i for sources in b.sources for i in sources[:-2]}
    loose = [i for i in range(b.inputs, len(b.shapes)) if i not in read][-3:]
    if seed % 3 == 2:
        loose = loose[-1:]  # the others are unused branches
    outputs: list[int] = []
    for place, value in enumerate(loose):
        if (seed + place) % 6 == 5:
            outputs.append(value)
            continue
        rank = len(b.shapes[value])
        if rank == 3 and (seed + place) % 6 == 1:
            shape = b.shapes[value]
            value = b.call("flatten", Fn("flatten"), (value,), (shape[0] * shape[1] * shape[2],))
        elif rank > 1:
            value = b.call("pool", Fn("pool" if rank == 3 else "mean_tokens"), (value,), (b.width(value),))
        outputs.append(b.call("head", nn.Linear(b.shapes[value][0], 3), (value,), (3,)))
    return tuple(outputs)


@torch.no_grad()
def enliven(net: nn.Module, generator: torch.Generator) -> None:
    """Random weights and statistics of which none is zero or repeated."""

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for module in net.modules():
        positive = "Norm" in type(module).__name__
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not value.is_floating_point():
                continue
            if name == "running_var" or (positive and name == "weight"):
                value.copy_(0.6 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
            elif isinstance(value, nn.Parameter) and value.ndim > 1:
                value.copy_(normal(value.shape) * (1.5 / max(1, value[0].numel())) ** 0.5)
            elif isinstance(value, nn.Parameter) or name == "running_mean":
                value.copy_(0.4 * normal(value.shape) + (0.3 if value.ndim == 1 else 0.0))


def describe(builder: Builder) -> str:
    """The steps of a network, one per line, for people."""
    lines = []
    for name, module, (*sources, first, count) in zip(builder.names, builder.modules, builder.sources, strict=True):
        made = ", ".join(f"v{i}{list(builder.shapes[i])}" for i in range(first, first + count))
        lines.append(f"{made} = {name}({', '.join(f'v{i}' for i in sources)})  # {str(module).splitlines()[0]}")
    return "\n".join(lines)
