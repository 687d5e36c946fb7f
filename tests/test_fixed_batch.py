"""Networks that insist on the batch they were traced with: that batch is one sample of theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.statistics import collect

ROWS = 4


class Flattened(nn.Module):
    """Writes its batch into a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU())
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).reshape(ROWS, -1))


class Single(nn.Module):
    """Takes one image without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU())
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten())


def exported() -> torch.export.ExportedProgram:
    """A program that was exported for one batch size."""
    layers = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    return torch.export.export(nn.Sequential(*layers).eval(), (torch.zeros(ROWS, 3, 8, 8),))


def batches(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


CASES = {
    "reshape": (Flattened, (ROWS, 3, 8, 8), (ROWS, 3, 8, 8)),
    "reshape, larger batches": (Flattened, (ROWS, 3, 8, 8), (11, 3, 8, 8)),
    "exported": (exported, (ROWS, 3, 8, 8), (11, 3, 8, 8)),
    "no batch": (Single, (3, 8, 8), (3, 8, 8)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph, list[Tensor]]:
    make, traced, given = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    if isinstance(model, nn.Module):
        model.eval()
        return model, mp.trace(model, batches(1, *traced)[0]), batches(12, *given)
    return model.module(), mp.trace(model), batches(12, *given)


def test_plans_and_fits_are_made_on_whole_batches(case: tuple[nn.Module, Graph, list[Tensor]]) -> None:
    dense, graph, data = case
    plan = mp.plan(graph, "macs=0.5", data=data)
    pruned = mp.apply(graph, plan)
    rows = next(iter(graph.example.values())).shape[0]
    inputs = [x[:rows] for x in batches(8, *data[0].shape)[4:]]

    def error(module: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return sum(float((module(x) - dense(x)).square().mean()) for x in inputs)

    fitted = mp.reconstruct(pruned, data)
    assert error(fitted.module) < 0.8 * error(pruned.module)


@pytest.mark.parametrize("allocator", ["dp", "spdy", "refined", "measured"])
def test_every_way_to_measure_runs(case: tuple[nn.Module, Graph, list[Tensor]], allocator: str) -> None:
    _, graph, data = case
    plan = mp.plan(graph, "macs=0.6", data=data, allocator=allocator)
    assert plan.reached["macs"] <= 0.6


def test_gate_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    graph = mp.trace(Single().eval(), batches(1, 3, 8, 8)[0])
    found = collect(graph, batches(5, 3, 8, 8))
    assert found.samples == 5


def test_a_batch_that_is_too_small_is_named() -> None:
    torch.manual_seed(0)
    graph = mp.trace(Flattened().eval(), batches(1, ROWS, 3, 8, 8)[0])
    with pytest.raises(OptionError, match="batches of 4 at least"):
        mp.plan(graph, "macs=0.5", data=batches(6, ROWS - 1, 3, 8, 8))
