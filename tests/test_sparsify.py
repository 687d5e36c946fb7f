"""Unstructured pruning: masks against sorting, curves against plain passes, the knapsack against enumeration."""

import copy
import itertools
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import metaprune as mp
from metaprune.calibration import leaves_of
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.weights import linear_weights
from metaprune.rate_distortion import Magnitudes, distortion_curves
from metaprune.search.densities import erdos_renyi


class _Net(nn.Module):
    """A residual network with batch norm and a biased head, so that values branch and join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, 2, 1)
        self.outer = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.relu(self.norm(self.stem(x))))
        return self.head((x + F.relu(self.outer(x))).mean((2, 3)))


WEIGHTS = ["stem.weight", "inner.weight", "outer.weight", "head.weight"]


@cache
def trained() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    train, test = mp.digits()
    model = _Net()
    mp.train(model, train, lambda y, _, t: F.cross_entropy(y, t), mp.Settings(epochs=1, lr=0.1), seed=0)
    return model.eval(), train, test


def images(count: int = 40) -> Tensor:
    return trained()[1].images[:count]


@cache
def graph() -> Graph:
    return mp.trace(trained()[0], images(2))


def with_zeros(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Independent of the library: a copy with the tensors multiplied by masks."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            tensor = result.get_parameter(name)
            tensor.copy_(torch.where(mask, tensor, torch.zeros(())))
    return result


def top(weight: Tensor, count: int) -> Tensor:
    """Whether each weight is among the greatest, by an independent sort."""
    values = weight.detach().abs().flatten().tolist()
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[best] = True
    return mask.reshape(weight.shape)


@pytest.mark.parametrize("method", ["dp", "global", "uniform", "erk", "lamp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.917, 0.99])
def test_the_greatest_weights_stay_and_the_budget_is_kept(method: str, sparsity: float) -> None:
    model = trained()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = mp.sparsify(graph(), None, sparsity, method, data=[images(6)] if method == "dp" else None, levels=9)
    assert list(sparse.masks) == WEIGHTS
    total = sum(mask.numel() for mask in sparse.masks.values())
    kept = sum(int(mask.sum()) for mask in sparse.masks.values())
    most = int((1 - sparsity) * total + 1e-6)
    assert kept <= most if method == "dp" else kept == most
    assert sparse.sparsity == pytest.approx(1 - kept / total)
    for name, mask in sparse.masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(mask, top(weight, int(mask.sum())))
        assert sparse.density[name] == pytest.approx(float(mask.sum()) / mask.numel())
    expected = with_zeros(model, dict(sparse.masks)).state_dict()
    found = sparse.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_rankings_of_all_weights_are_sorts() -> None:
    weights = {name: trained()[0].get_parameter(name).detach().double().flatten() for name in WEIGHTS}
    total = sum(len(w) for w in weights.values())
    count = int(0.2 * total + 1e-6)
    sparse = mp.sparsify(graph(), sparsity=0.8, method="global")
    threshold = torch.cat(list(weights.values())).abs().sort(descending=True).values[count - 1]
    assert {n: int(m.sum()) for n, m in sparse.masks.items()} == {
        n: int((w.abs() >= threshold).sum()) for n, w in weights.items()
    }
    scores = {}
    for name, weight in weights.items():  # equation 2 of LAMP, by its definition
        squares = weight.square()
        scores[name] = torch.stack([s / squares[squares >= s].sum() for s in squares])
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[count - 1]
    sparse = mp.sparsify(graph(), sparsity=0.8, method="lamp")
    assert {n: int(m.sum()) for n, m in sparse.masks.items()} == {
        n: int((s >= threshold).sum()) for n, s in scores.items()
    }


def test_densities_of_layers_are_those_asked_for() -> None:
    shapes = [tuple(trained()[0].get_parameter(name).shape) for name in WEIGHTS]
    even = mp.sparsify(graph(), sparsity=0.75, method="uniform").density
    for (name, density), shape in zip(even.items(), shapes, strict=True):
        assert density == pytest.approx(0.25, abs=1.0 / prod(shape)), name
    kernel = mp.sparsify(graph(), sparsity=0.75, method="erk").density
    for density, wanted, shape in zip(kernel.values(), erdos_renyi(shapes, 0.25), shapes, strict=True):
        assert density == pytest.approx(wanted, abs=1.0 / prod(shape))


@pytest.mark.parametrize("worst_case", [True, False])
def test_curves_are_those_of_plain_forward_passes(worst_case: bool) -> None:
    model = trained()[0]
    counts = {name: [0, 7, model.get_parameter(name).numel()] for name in WEIGHTS}
    data = images(70)  # more than one batch
    with torch.no_grad():
        found = distortion_curves(graph(), counts, leaves_of(graph(), [data], 70), worst_case)
        for name, tried in counts.items():
            for count, value in zip(tried, found[name].tolist(), strict=True):
                changed = with_zeros(model, {name: top(model.get_parameter(name), count)})
                errors = (changed(data) - model(data)).double().square().mean(1)
                wanted = errors.max() if worst_case else errors.mean()
                assert value == pytest.approx(float(wanted), rel=1e-4, abs=1e-12)
    assert all(curve[-1] == 0 for curve in found.values())  # nothing gone, nothing changed


@pytest.mark.parametrize("worst_case", [True, False])
def test_the_joint_distortion_is_measured(worst_case: bool) -> None:
    model, data = trained()[0], images(30)
    for method in ("dp", "erk"):
        sparse = mp.sparsify(model, data[:2], 0.8, method, data=[data], levels=11, worst_case=worst_case)
        with torch.no_grad():
            errors = (sparse.module(data) - model(data)).double().square().mean(1)
        assert sparse.distortion == pytest.approx(float(errors.max() if worst_case else errors.mean()), rel=1e-4)
        assert sparse.provenance["samples"] == 30


def test_dp_is_the_best_of_all_choices_of_levels() -> None:
    levels, data = 6, images(20)
    sizes = [graph().values[name].numel() for name in WEIGHTS]
    counts = {n: [s - round(s * j / (levels - 1)) for j in range(levels)] for n, s in zip(WEIGHTS, sizes, strict=True)}
    with torch.no_grad():
        curves = distortion_curves(graph(), counts, leaves_of(graph(), [data], 20), True)
    for sparsity in (0.3, 0.6, 0.8, 0.95):
        capacity = int((1 - sparsity) * sum(sizes) + 1e-6)
        best = min(
            sum(curves[n][j] for n, j in zip(WEIGHTS, choice, strict=True))
            for choice in itertools.product(range(levels), repeat=len(WEIGHTS))
            if sum(counts[n][j] for n, j in zip(WEIGHTS, choice, strict=True)) <= capacity
        )
        sparse = mp.sparsify(graph(), sparsity=sparsity, data=[data], levels=levels)
        assert sparse.provenance["optimal"] is True
        assert sparse.provenance["predicted"] == pytest.approx(float(best), rel=1e-6)
        kept = [int(mask.sum()) for mask in sparse.masks.values()]
        assert all(k in counts[n] for n, k in zip(WEIGHTS, kept, strict=True))


def test_dp_moves_the_outputs_less_than_one_share_for_all() -> None:
    for sparsity in (0.5, 0.7):
        found = {
            method: mp.sparsify(graph(), None, sparsity, method, [images()], 26, worst_case=False).distortion
            for method in ("dp", "uniform")
        }
        assert found["dp"] is not None
        assert found["uniform"] is not None
        assert found["dp"] < found["uniform"]


class _Mixed(nn.Module):
    """Weights in all places where they may stand, and tensors that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.product = nn.Parameter(torch.randn(8, 8))
        self.added = nn.Parameter(torch.randn(10, 8))
        self.paths = nn.Parameter(torch.randn(2, 8, 8))
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.shared = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.place  # [batch, 5, 8]
        x = self.up(x.transpose(1, 2)).transpose(1, 2)
        x = torch.einsum("bsi,goi->bso", x, self.paths)
        x = self.norm(self.rnn(x)[0])
        x = self.shared(F.relu(self.shared(x))) @ self.product.t()
        return torch.addmm(self.added, x.reshape(10, 8), self.product)


@cache
def mixed() -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (2, 5))
    return mp.trace(_Mixed().eval(), tokens), tokens


def test_weights_are_found_by_what_reads_them() -> None:
    traced, _ = mixed()
    expected = {"up.weight", "paths", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "shared.weight", "product"}
    assert set(linear_weights(traced)) == expected

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.middle = nn.Linear(8, 8)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.middle(self.table(tokens)))

    tied = mp.trace(Tied(), torch.randint(0, 11, (2, 5)))
    assert linear_weights(tied) == ["middle.weight"]
    with pytest.raises(OptionError, match="model: the network has no weights"):
        mp.sparsify(nn.ReLU(), torch.randn(2, 3), method="global")


def test_networks_of_other_kinds_are_measured_too() -> None:
    traced, tokens = mixed()
    sparse = mp.sparsify(traced, sparsity=0.6, data=[tokens], levels=6)
    assert sparse.sparsity >= 0.6
    assert sparse.distortion is not None
    layer = mp.trace(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 4, 16))
    sparse = mp.sparsify(layer, sparsity=0.5, data="noise", levels=3, seed=3)
    again = mp.sparsify(layer, sparsity=0.5, data="noise", levels=3, seed=3)
    assert sparse.provenance["samples"] == 256
    assert all(torch.equal(mask, again.masks[name]) for name, mask in sparse.masks.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_around_the_zeros(optimizer: Any) -> None:
    model, train, _ = trained()
    sparse = mp.sparsify(model, images(2), 0.8, "global")
    rate = 0.05 if optimizer == "sgd" else 3e-3
    with sparse.held() as module:
        settings = mp.Settings(epochs=2, lr=rate, optimizer=optimizer, ema=0.5)
        losses = mp.train(module, train, lambda y, _, t: F.cross_entropy(y, t), settings, seed=0)
    assert losses[1] < losses[0]
    for name, mask in sparse.masks.items():
        weight = module.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight, model.get_parameter(name) * mask)  # the others were trained
        assert not weight._post_accumulate_grad_hooks
    module.zero_grad()
    module(images(4)).sum().backward()
    assert any(bool(module.get_parameter(n).grad[~m].any()) for n, m in sparse.masks.items())  # free again


def test_weights_that_are_gone_stay_gone_in_the_next_round() -> None:
    first = mp.sparsify(graph(), sparsity=0.6, data=[images(8)], levels=21)
    second = mp.sparsify(first.module, images(2), sparsity=0.85, data=[images(8)], levels=21)
    for name, mask in second.masks.items():
        assert not bool((mask & ~first.masks[name]).any())


def test_masks_are_saved_and_read(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    sparse = mp.sparsify(graph(), sparsity=0.9, data=[images(4)], levels=5)
    sparse.save(path)
    model = trained()[0]
    found = mp.Sparse.load(path, model)
    assert all(torch.equal(mask, found.masks[name]) for name, mask in sparse.masks.items())
    assert (found.distortion, found.provenance) == (sparse.distortion, sparse.provenance)
    assert torch.equal(found.module(images(4)), sparse.module(images(4)))
    assert not torch.equal(found.module(images(4)), model(images(4)))
    with pytest.raises(OptionError, match="it has no parameter"):
        mp.Sparse.load(path, nn.Linear(2, 2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoadError, match="can not be read"):
        mp.Sparse.load(path, model)
    for tensors, about in (({"a": torch.ones(2)}, None), ({"a": torch.ones(2)}, {"sparse": '{"schema": 1}'})):
        save_file(tensors, path, about)
        with pytest.raises(LoadError):
            mp.Sparse.load(path, model)
    with pytest.raises(MetapruneError, match="can not be written"):
        sparse.save(tmp_path)


def test_a_graph_with_other_weights_and_one_without_a_module() -> None:
    other = graph().with_values({"head.weight": graph().values["head.weight"].detach() * 2})
    sparse = mp.sparsify(other, sparsity=0.5, method="uniform")
    mask = sparse.masks["head.weight"]
    assert torch.equal(sparse.module.get_parameter("head.weight"), other.values["head.weight"] * mask)
    program = torch.export.export(trained()[0], (images(2),))
    portable = mp.sparsify(program, sparsity=0.5, method="uniform")
    plain = mp.sparsify(graph(), sparsity=0.5, method="uniform")
    assert torch.allclose(portable.module(images(2)), plain.module(images(2)), atol=1e-6)


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    mp.sparsify(graph(), sparsity=0.5, data="noise", levels=2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_equal_magnitudes_leave_from_the_end() -> None:
    assert Magnitudes(torch.tensor([[1.0, -1.0], [1.0, 2.0]])).mask(2).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "sparsity: a share"),
        ({"sparsity": -0.1}, "sparsity: a share"),
        ({"sparsity": float("nan")}, "sparsity: a share"),
        ({"method": "magic"}, "method: 'magic' is none of dp, erk"),
        ({"levels": 1}, "levels: two or more"),
        ({"levels": 2.0}, "levels: two or more"),
        ({"data": None}, "data: method 'dp'"),
        ({"data": []}, "data: there are no samples"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        mp.sparsify(graph(), **{"data": [images(2)], **options})


def test_what_is_not_finite_or_has_no_values_is_named() -> None:
    with pytest.raises(MetapruneError, match="not finite"):
        mp.sparsify(graph(), data=[torch.full((2, 1, 8, 8), torch.inf)], levels=2)
    with torch.device("meta"):
        empty = mp.trace(nn.Linear(3, 2), torch.empty(2, 3))
    with pytest.raises(OptionError, match="meta device"):
        mp.sparsify(empty, method="global")


def test_an_overflow_is_an_infinite_distortion() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e20, -1e20], [1.0, 2.0]]))  # type: ignore[union-attr]
        model[1].weight.copy_(torch.tensor([[1e20, 0.5], [0.1, 0.2]]))  # type: ignore[union-attr]
    traced = mp.trace(model, torch.ones(2, 2))
    with torch.no_grad():
        curve = distortion_curves(traced, {"0.weight": [4, 1]}, leaves_of(traced, [torch.ones(2, 2)], 2), True)
    assert curve["0.weight"][0] == 0
    assert np.isinf(curve["0.weight"][1])
