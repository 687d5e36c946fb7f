"""Criteria against their definitions, gate gradients against autograd by hand, and the options that go with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune import statistics
from metaprune.criteria import CRITERIA, Evidence, Weights
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.groups import Group
from metaprune.graphs.ir import Graph
from metaprune.statistics import TEMPERATURE, collect
from tests.support import oracle
from tests.support.cases import conv


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return oracle.alive(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))).double()


def convolutional() -> nn.Module:
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return oracle.alive(nn.Sequential(*layers, nn.Linear(6, 4))).eval()


def vectors(count: int = 9) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(count: int = 9, classes: int = 3) -> Tensor:
    return torch.arange(count) % classes


def evidence(graph: Graph, data: Any = None, seed: int = 0) -> Evidence:
    values = {name: graph.values[name] for name, info in graph.tensors.items() if info.kind == "parameter"}
    return Evidence(Weights(values), collect(graph, data) if data is not None else None, seed)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Gradients of one sample's softened loss by gates on the first hidden layer, shape [samples, 7]."""
    rows = []
    for i in range(len(x)):
        hidden = net[1](net[0](x[i : i + 1])).detach().requires_grad_()
        loss = F.cross_entropy(net[4](net[3](net[2](hidden))) / temperature, y[i : i + 1], reduction="sum")
        rows.append((torch.autograd.grad(loss, hidden)[0] * hidden)[0].detach())
    return torch.stack(rows)


def drawn(net: nn.Module, x: Tensor) -> Tensor:
    """The labels that `collect` draws with seed 0."""
    generator = torch.Generator().manual_seed(0)
    soft = [(net(row[None]) / TEMPERATURE).softmax(1).detach() for row in x]
    return torch.cat([torch.multinomial(p, 1, generator=generator)[:, 0] for p in soft])


def first(graph: Graph) -> Group:
    return next(group for group in graph.groups if group.name == "0")


def test_gate_moments_are_those_of_single_samples() -> None:
    net, x = mlp(), vectors()
    graph = mp.trace(net, x[:2])
    found = collect(graph, [(x[:4], labels(4)), x[4:]])
    gradients = by_hand(net, x, drawn(net, x))
    assert found.samples == 9
    assert torch.allclose(found.gates["0"].mean, gradients.mean(0), atol=1e-12)
    assert torch.allclose(found.gates["0"].absolute, gradients.abs().mean(0), atol=1e-12)
    assert torch.allclose(found.gates["0"].square, gradients.square().mean(0), atol=1e-12)


def test_at_most_so_many_samples_are_used() -> None:
    graph = mp.trace(mlp(), vectors(2))
    assert collect(graph, [vectors()], samples=4).samples == 4


@pytest.mark.parametrize(
    ("temperature", "draws", "within"), [(TEMPERATURE, 1, 0.35), (TEMPERATURE, 8, 0.12), (1.0, 8, 0.12)]
)
def test_labels_are_drawn_from_softened_predictions(temperature: float, draws: int, within: float) -> None:
    net, x = mlp(), vectors(400)
    graph = mp.trace(net, x[:2])
    probabilities = (net(x) / temperature).softmax(1)
    expected = torch.zeros(7, dtype=torch.float64)
    for label in range(3):
        gradients = by_hand(net, x, torch.full((400,), label), temperature)
        expected += (probabilities[:, label, None].detach() * gradients.square()).mean(0)
    found = collect(graph, [x], 400, per_sample=True, temperature=temperature, draws=draws)
    assert torch.allclose(found.gates["0"].square, expected, rtol=within)
    assert found.rows["0"].shape == (400 * draws, 7)
    assert torch.allclose(found.rows["0"].double().square().mean(0), found.gates["0"].square, rtol=1e-5)


def test_draws_depend_on_the_seed_alone() -> None:
    x = vectors(400)
    graph = mp.trace(mlp(), x[:2])
    found = collect(graph, [x], samples=400).gates["0"].square
    assert torch.equal(found, collect(graph, [x], samples=400).gates["0"].square)
    assert not torch.equal(found, collect(graph, [x], samples=400, seed=1).gates["0"].square)


def test_other_outputs_count_by_how_far_they_move() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Unflatten(1, (1, 7)), nn.Linear(7, 4)).double()
    x = vectors(300)
    graph = mp.trace(oracle.alive(net), x[:2])
    moved = net[1](net[0](x)).square() * net[3].weight.square().sum(0)  # sum over outputs of (dy/dg)^2
    assert torch.allclose(collect(graph, [x], samples=300).gates["0"].square, moved.mean(0).detach(), rtol=0.35)


def slices(net: nn.Module) -> Tensor:
    """All values of each unit of the first layer, shape [7, values]."""
    return torch.cat([net[0].weight, net[0].bias[:, None], net[2].weight.T], 1).detach().float()


def lamp(net: nn.Module) -> Tensor:
    energy = slices(net).square().sum(1)
    return torch.stack([e / energy[energy >= e].sum() for e in energy])


def geometric_median(net: nn.Module) -> Tensor:
    rows = slices(net)[:, :6]  # what writes the units
    distance = torch.stack([torch.stack([(r - s).norm() for s in rows]).sum() for r in rows])
    return distance / distance.mean()


DEFINITIONS: dict[str, Callable[[nn.Module], Tensor]] = {
    "magnitude": lambda net: (norm := slices(net).norm(dim=1)) / norm.mean(),
    "magnitude_l1": lambda net: (norm := slices(net).abs().sum(1)) / norm.mean(),
    "magnitude_max": lambda net: (norm := slices(net).norm(dim=1)) / norm.max(),
    "magnitude_plain": lambda net: slices(net).norm(dim=1),
    "lamp": lamp,
    "fpgm": geometric_median,
    "taylor": lambda net: (g := by_hand(net, vectors(), drawn(net, vectors())).abs().mean(0)) / g.mean(),
    "fisher": lambda net: 0.5 * by_hand(net, vectors(), drawn(net, vectors())).square().mean(0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_criterion_is_what_its_paper_says(name: str) -> None:
    net = mlp()
    graph = mp.trace(net, vectors(2))
    row = CRITERIA[name]
    found = row.function(first(graph), evidence(graph, [vectors()] if row.data else None))
    assert torch.allclose(found.double(), DEFINITIONS[name](net).double(), rtol=1e-5)


def test_norm_scale_reads_the_norm() -> None:
    net = convolutional()
    graph = mp.trace(net, torch.randn(2, 3, 6, 6))
    group = first(graph)
    found = CRITERIA["norm_scale"].function(group, evidence(graph))
    assert torch.allclose(found, net[1].weight.abs().detach() / net[1].weight.abs().mean())


def test_random_follows_the_seed() -> None:
    graph = mp.trace(mlp(), vectors(2))
    score = CRITERIA["random"].function
    one, two = (next(g for g in graph.groups if g.name == name) for name in ("0", "2"))
    assert torch.equal(score(one, evidence(graph)), score(one, evidence(graph)))
    assert not torch.equal(score(one, evidence(graph)), score(one, evidence(graph, seed=1)))
    assert not torch.equal(score(one, evidence(graph))[:6], score(two, evidence(graph)))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("allocator", ["uniform", "global", "cost"])
def test_every_criterion_prunes(name: str, allocator: str) -> None:
    net, x = convolutional(), torch.randn(6, 3, 6, 6)
    data = [(x, labels(6, 4))] if CRITERIA[name].data else None
    pruned = mp.prune(net, x[:2], budget="macs=0.5", criterion=name, allocator=allocator, data=data)
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    assert pruned.plan.reached["macs"] <= 0.5
    assert pruned.plan.provenance["criterion"] == name


def test_data_choose_the_default() -> None:
    graph = mp.trace(convolutional(), torch.randn(2, 3, 6, 6))
    with_data = mp.plan(graph, data=[torch.randn(8, 3, 6, 6)]).provenance
    assert (with_data["criterion"], with_data["allocator"], with_data["samples"]) == ("fisher_block", "measured", 8)
    without = mp.plan(graph).provenance
    assert (without["criterion"], without["allocator"], without["samples"]) == ("magnitude", "global", 0)


def test_a_loader_of_dicts_and_of_tuples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.c(torch.relu(self.a(x)) * self.b(y))
            return out

    torch.manual_seed(0)
    net, x = oracle.alive(Two()), torch.randn(6, 5)
    named = mp.trace(net, {"x": x[:2], "y": x[:2]})
    placed = mp.trace(net, (x[:2], x[:2]))
    one = collect(named, [({"x": x, "y": x}, labels(6))])
    two = collect(placed, [((x, x), labels(6))])
    assert torch.allclose(one.gates["a"].square, two.gates["a"].square)
    assert float(one.gates["a"].square.min()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "fisher"}, "needs calibration data"),
        ({"criterion": "magnitude", "data": [torch.randn(2, 5).double()]}, "does not use data"),
        ({"criterion": "no such"}, "magnitude_l1"),
        ({"data": []}, "no samples"),
        ({"data": torch.randn(2, 5).double()}, "batches are needed"),
        ({"data": [torch.full((2, 5), float("nan"), dtype=torch.float64)]}, "output for sample 0 is not finite"),
        ({"data": [["text"]]}, "holds no tensor"),
    ],
)
def test_bad_data_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MetapruneError, match=said):
        mp.plan(mp.trace(mlp(), vectors(2)), **options)


def test_data_are_refused_where_neither_the_criterion_nor_the_fit_looks_at_them() -> None:
    graph, data = mp.trace(mlp(), vectors(2)), [vectors(12)]
    with pytest.raises(OptionError, match="does not use data"):
        mp.prune(graph, criterion="magnitude", data=data, reconstruct=False)
    fitted = mp.prune(graph, criterion="magnitude", data=data)
    assert fitted.plan.keep == mp.plan(graph, criterion="magnitude").keep
    assert any("least squares" in note for note in fitted.notes)
    scored = mp.prune(graph, criterion="fisher", data=data, reconstruct=False)
    assert scored.plan == mp.plan(graph, criterion="fisher", data=data)


def test_an_output_without_gradient_is_named() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).argmax(1)

    graph = mp.trace(oracle.alive(Choice()), torch.randn(2, 5))
    with pytest.raises(OptionError, match="no floating-point output"):
        mp.plan(graph, data=[torch.randn(2, 5)])


def test_labels_are_left_aside() -> None:
    net, x = mlp(), vectors(8)
    graph = mp.trace(net, x[:2])
    plain = collect(graph, [x]).gates["0"].square
    for target in (torch.randn(8, 3), labels(8)):
        assert torch.equal(collect(graph, [(x, target)]).gates["0"].square, plain)


@pytest.mark.parametrize("kind", ["image", "sequence", "tokens"])
def test_gradients_of_many_samples_at_once_are_those_of_single_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x: Tensor = torch.randn(11, 3, 8, 8)
    if kind == "image":
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip
    elif kind == "sequence":
        model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()), x[:, 0]
    else:
        model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5))
        x = torch.randint(0, 9, (11, 4))
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    graph = mp.trace(model, x[:1])
    together = statistics.collect(graph, [x], per_sample=True)
    monkeypatch.setattr(statistics, "_CHUNK", 1)
    apart = statistics.collect(graph, [x], per_sample=True)
    assert together.samples == apart.samples == 11
    for name, rows in apart.rows.items():
        assert rows.shape[0] == 11
        assert float(rows.abs().max()) > 0
        assert torch.allclose(together.rows[name], rows, rtol=1e-6, atol=1e-7)
        assert torch.allclose(together.gates[name].square, apart.gates[name].square, rtol=1e-9)


def test_samples_of_different_lengths_are_looked_at_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)).double().eval()
    short, long = torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (3, 7))
    graph = mp.trace(model, short[:1], dynamic={0: (1,)})
    both = collect(graph, [short, long], per_sample=True)
    one = collect(graph, [short], per_sample=True)
    assert both.samples == 6
    for name, rows in one.rows.items():
        assert torch.allclose(both.rows[name][:3], rows)
        assert float(both.rows[name][3:].abs().max()) > 0
