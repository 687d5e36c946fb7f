"""A network under construction: values with their shapes, and the table of operators that add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Shape = tuple[int, ...]
LARGEST = 48  # widest axis
WIDTHS = (4, 6, 8, 9, 12, 16)


@dataclass
class Builder:
    """A network under construction: values by number, with the shape each has without its batch."""

    modules: list[nn.Module] = field(default_factory=list)
    sources: list[tuple[int, ...]] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    inputs: int = 0
    names: list[str] = field(default_factory=list)

    def call(self, name: str, module: nn.Module, sources: tuple[int, ...], *shapes: Shape) -> int:
        """Adds a step with its results; returns the number of the last."""
        self.modules.append(module)
        self.sources.append((*sources, len(self.shapes), len(shapes)))
        self.shapes += shapes
        self.names.append(name)
        return len(self.shapes) - 1

    def of_rank(self, rank: int) -> list[int]:
        return [i for i, shape in enumerate(self.shapes) if len(shape) == rank]

    def take(self, rank: int, number: int) -> int | None:
        """A value of a rank: mostly the latest, sometimes an earlier one."""
        found = self.of_rank(rank)
        if not found:
            return None
        return found[-1 - (number // 4) % len(found)] if number % 4 == 3 else found[-1]

    def like(self, value: int, number: int) -> int:
        """Another value of the same shape; made by a layer if there is none."""
        same = [
            i for i, shape in enumerate(self.shapes) if shape == self.shapes[value] and i != value and i >= self.inputs
        ]
        if same:
            return same[number % len(same)]
        return self.call("also", self.layer(value, self.width(value)), (value,), self.shapes[value])

    def width(self, value: int) -> int:
        """Number of channels or features."""
        shape = self.shapes[value]
        return shape[0] if len(shape) == 3 else shape[-1]

    def layer(self, value: int, outputs: int, bias: bool = True) -> nn.Module:
        """A linear map of channels or features."""
        width = self.width(value)
        return (
            nn.Conv2d(width, outputs, 1, bias=bias)
            if len(self.shapes[value]) == 3
            else nn.Linear(width, outputs, bias=bias)
        )

    def resized(self, value: int, width: int) -> Shape:
        """The value's shape with another number of channels or features."""
        shape = self.shapes[value]
        return (width, *shape[1:]) if len(shape) == 3 else (*shape[:-1], width)


@dataclass
class Site:
    """What an operator sees: the builder, its source, and the numbers that choose."""

    b: Builder
    name: str
    x: int
    n: tuple[int, int, int]

    @property
    def shape(self) -> Shape:
        return self.b.shapes[self.x]

    @property
    def width(self) -> int:
        return self.b.width(self.x)

    @property
    def dim(self) -> int:
        return 1 if len(self.shape) != 2 else -1

    def choose(self, options: Any, which: int = 1) -> Any:
        return options[self.n[which] % len(options)]

    def emit(self, module: nn.Module, *shapes: Shape, others: tuple[int, ...] = ()) -> None:
        self.b.call(self.name, module, (self.x, *others), *shapes)

    def wide(self, module: nn.Module, width: int) -> None:
        self.emit(module, self.b.resized(self.x, width))

    def same(self, module: nn.Module) -> None:
        self.emit(module, self.shape)


Operator = Callable[[Site], None]
OPERATORS: dict[str, Operator] = {}


def operator(ranks: str) -> Callable[[Operator], Operator]:
    """Registers an operator under `kind.name` for each of the kinds."""

    def register(function: Operator) -> Operator:
        for kind in ranks.split():
            OPERATORS[f"{kind}.{function.__name__.strip('_')}"] = function
        return function

    return register


def divisors(n: int) -> list[int]:
    """All of 2 .. n - 1 that divide n; [1] if none does."""
    return [d for d in range(2, n) if n % d == 0] or [1]
