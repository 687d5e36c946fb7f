"""Least-squares reconstruction: against closed forms, on redundant networks that it must restore, and on real ones."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.evaluation import evaluate
from metaprune.graphs.linear import linear_layers
from metaprune.graphs.replay import Replay
from metaprune.graphs.responses import responses
from metaprune.recovery import recalibrate
from metaprune.ridge import Moments, fitted, ridge
from metaprune.training import Settings, train

# ---- ridge regression


def _rows(seed: int = 0, groups: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(groups, 200, 5, generator=generator, dtype=torch.float64) + 0.7
    wishes = columns @ torch.randn(groups, 5, 2, generator=generator, dtype=torch.float64) + 3
    return columns, wishes + 0.3 * torch.randn(wishes.shape, generator=generator, dtype=torch.float64)


def _moments(columns: Tensor, wishes: Tensor) -> Moments:
    moments = Moments.zeros(columns.shape[0], columns.shape[2], wishes.shape[2])
    for part in range(0, 200, 37):  # streamed in uneven parts
        moments.add(columns[:, part : part + 37], wishes[:, part : part + 37])
    return moments


def test_ridge_is_least_squares_at_strength_zero() -> None:
    columns, wishes = _rows()
    matrix, bias = ridge(_moments(columns, wishes), torch.zeros(3, 5, 2, dtype=torch.float64), 0.0, intercept=True)
    for g in range(3):
        wide = np.concatenate([columns[g].numpy(), np.ones((200, 1))], axis=1)
        expected = np.linalg.lstsq(wide, wishes[g].numpy(), rcond=None)[0]
        np.testing.assert_allclose(torch.cat([matrix[g], bias[g][None]]).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_minimises_its_objective(intercept: bool) -> None:
    columns, wishes = _rows(1, groups=1)
    moments, prior = _moments(columns, wishes), torch.randn(1, 5, 2, dtype=torch.float64)
    matrix, bias = ridge(moments, prior, 0.3, intercept)
    gram = moments.centred()[0] if intercept else moments.gram[:, :-1, :-1]
    weight = 0.3 * gram[0].diagonal().mean()

    def objective(m: Tensor, b: Tensor) -> Tensor:
        return (columns @ m + b[:, None] - wishes).square().sum() + weight * (m - prior).square().sum()

    matrix, bias = matrix.requires_grad_(), bias.requires_grad_(intercept)
    gradients = torch.autograd.grad(objective(matrix, bias), [matrix, bias] if intercept else [matrix])
    assert max(float(g.abs().max()) for g in gradients) < 1e-8


def test_error_of_moments_is_the_squared_error() -> None:
    columns, wishes = _rows(2)
    matrix, bias = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    expected = float((columns @ matrix + bias[:, None] - wishes).square().sum())
    assert _moments(columns, wishes).error(matrix, bias) == pytest.approx(expected, rel=1e-10)


def test_fit_stays_at_the_prior_when_rows_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(1, 60, 50, generator=generator, dtype=torch.float64)
    noise = torch.randn(1, 60, 1, generator=generator, dtype=torch.float64)
    prior = torch.randn(1, 50, 1, generator=generator, dtype=torch.float64)
    wishes = columns @ prior + 5 * noise
    train, held_out = Moments.zeros(1, 50, 1), Moments.zeros(1, 50, 1)
    train.add(columns[:, :48], wishes[:, :48])
    held_out.add(columns[:, 48:], wishes[:, 48:])
    matrix, _ = fitted(train, held_out, prior, intercept=False)
    plain, _ = ridge(train + held_out, prior, 0.0, intercept=False)
    assert (matrix - prior).norm() < 0.3 * (plain - prior).norm()


# ---- layers


class _Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 7))
        self.b = nn.Parameter(torch.randn(7, 5))
        self.c = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c, torch.tanh(x @ self.a), self.b)


_LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (4, 11)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 8, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=(2, 1), dilation=(2, 3), groups=2), (4, 12, 11)),
    (nn.Conv2d(6, 6, 5, padding="same", groups=6, bias=False), (6, 8, 8)),
    (nn.Conv2d(4, 5, 4, padding="same"), (4, 8, 8)),
    (nn.Conv2d(4, 5, 2, padding="valid", bias=False), (4, 8, 8)),
    (nn.Conv3d(2, 4, 2, padding=1, groups=2), (2, 4, 5, 6)),
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3, bias=False), (2, 7, 5)),
    (_Products(), (6,)),
]


@pytest.mark.parametrize(
    ("module", "shape"), _LAYERS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
)
def test_columns_times_matrix_is_the_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    graph = mp.trace(module, torch.randn(3, *shape, dtype=torch.float64))
    layers = linear_layers(graph)
    assert layers
    values = {name: value.detach() for name, value in graph.values.items()}
    for name, layer in layers.items():
        replay = Replay(graph, values, [graph.example])
        replay._left.update([layer.input, name])
        value, output = replay.get(layer.input)[0], replay.get(name)[0]
        matrix = layer.matrix(values[layer.weight])
        bias = values[layer.bias].reshape(layer.groups, 1, -1) if layer.bias else 0.0
        torch.testing.assert_close(layer.columns(value) @ matrix + bias, layer.outputs(output), rtol=0, atol=1e-12)
        some = torch.arange(0, layer.positions(output), 3)
        torch.testing.assert_close(layer.columns(value, some), layer.columns(value)[:, some])
        torch.testing.assert_close(layer.tensor(matrix), values[layer.weight])


def test_a_shared_weight_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.outer(torch.relu(self.inner(torch.relu(self.inner(x)))))
            return y

    layers = linear_layers(mp.trace(Shared(), torch.randn(2, 6)))
    assert [layer.weight for layer in layers.values()] == ["outer.weight"]


class _Block(nn.Module):
    """A residual block of which both halves are layers, one behind reorderings and a scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.short = nn.Conv2d(3, 5, 1)
        self.scale = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)).permute(0, 2, 3, 1)) * self.scale
        return torch.relu(y.permute(0, 3, 1, 2) + self.short(x))


def test_the_wider_half_of_a_sum_answers_for_it_and_wishes_come_true() -> None:
    graph = mp.trace(_Block(), torch.randn(4, 3, 6, 6))
    found = responses(graph, linear_layers(graph))
    by_weight = {response.layer.weight: response for response in found.values()}
    block = by_weight["second.weight"]
    assert graph.nodes[block.target].base == "add"
    assert graph.nodes[block.other].base == "conv2d"
    assert not by_weight["short.weight"].other
    assert len(block.steps) == 2
    replay = Replay(graph, {n: v.detach() for n, v in graph.values.items()}, [graph.example])
    own, goal = torch.randn(4, 6, 6, 5), torch.randn(4, 5, 6, 6)
    value = block.wish(goal, own, replay, 0)
    for step, source in zip(block.steps, (block.start, *block.steps), strict=False):
        value = replay.function(step, source)(0, value)
    torch.testing.assert_close(value, goal)


# ---- whole networks


def _alive(module: nn.Module) -> nn.Module:
    """Norms with statistics and affine maps of their own."""
    generator = torch.Generator().manual_seed(3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.4)
    return module.eval()


class _Residual(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12, affine=affine),
        )  # fmt: skip
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(torch.relu(x + self.body(x)).mean((2, 3)))
        return y


class _Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 24)
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(self.embed(x.flatten(2).transpose(1, 2))).mean(1))
        return y


def _images(count: int, seed: int) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, 8, mode="bilinear")


@pytest.mark.parametrize("build", [_Residual, lambda: _Residual(affine=False), _Separable, _Attention])
def test_outputs_come_closer_to_the_dense_network(build: "type[nn.Module]") -> None:
    torch.manual_seed(0)
    model = _alive(build())
    graph = mp.trace(model, _images(2, 9))
    pruned = mp.apply(graph, mp.plan(graph, "macs=0.5"))
    before = {name: value.clone() for name, value in pruned.module.state_dict().items()}
    fitted_ = mp.reconstruct(pruned, [_images(50, seed) for seed in range(8)])
    x = _images(100, 99)
    with torch.no_grad():
        dense = model(x)
        distances = [float((p.module.eval()(x) - dense).norm() / dense.std(0).norm()) for p in (pruned, fitted_)]
    assert distances[1] < 0.5 * distances[0]
    for name, value in pruned.module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the network that came in has changed"


def test_a_redundant_network_is_restored() -> None:
    torch.manual_seed(0)
    model = _alive(_Residual())
    body = model.body  # type: ignore[union-attr]
    with torch.no_grad():  # the second half of the inner channels repeats the first
        body[0].weight[8:] = body[0].weight[:8]  # type: ignore[index, operator]
        for tensor in body[1].state_dict().values():  # type: ignore[index, operator, union-attr]
            if tensor.ndim:
                tensor[8:] = tensor[:8]
    graph = mp.trace(model, _images(2, 9))
    group = next(g for g in graph.groups if g.size == 16)
    plan = dataclasses.replace(mp.plan(graph, "macs=1.0"), keep={group.name: tuple(range(8))})
    pruned = mp.apply(graph, plan)
    restored = mp.reconstruct(pruned, [_images(64, seed) for seed in range(8)])
    x = _images(100, 99)
    with torch.no_grad():
        dense = model(x)
        assert float((pruned.module(x) - dense).abs().max()) > 0.05
        assert float((restored.module(x) - dense).abs().max()) < 0.005  # the ridge keeps it from being perfect


def test_nothing_is_fitted_where_nothing_was_cut() -> None:
    model = _alive(_Residual())
    graph = mp.trace(model, _images(2, 9))
    whole = mp.apply(graph, mp.plan(graph, "macs=1.0"))
    kept = mp.reconstruct(whole, [_images(50, 0)])
    for name, value in kept.module.named_parameters():
        if value.ndim > 1:
            torch.testing.assert_close(value, whole.module.get_parameter(name), rtol=1e-3, atol=1e-3)
    x = _images(20, 99)
    torch.testing.assert_close(kept.module(x), whole.module(x), rtol=1e-3, atol=1e-3)


def test_equal_seeds_give_equal_bits() -> None:
    torch.manual_seed(0)
    graph = mp.trace(_alive(_Residual()), _images(2, 9))
    pruned = mp.apply(graph, mp.plan(graph, "macs=0.5"))
    a, b = (mp.reconstruct(pruned, [_images(300, 0)], seed=4).module.state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batch_norms_in_training_mode_agree_with_their_new_statistics() -> None:
    torch.manual_seed(0)
    data, model = [_images(100, seed) for seed in range(5)], _alive(_Residual())
    recalibrate(model, [(torch.cat(data), torch.zeros(500))])
    graph = mp.trace(model, _images(2, 9))
    pruned = mp.reconstruct(mp.apply(graph, mp.plan(graph, "macs=0.5")), data, samples=500)
    with torch.no_grad():
        x = torch.cat(data)
        stored = pruned.module.eval()(x)
        own = pruned.module.train()(x)
    assert float((own - stored).abs().max()) < 0.05 * float(stored.std())


def test_digits_survive_without_training() -> None:
    batches, test = digits(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    train(model, batches, lambda logits, x, y: F.cross_entropy(logits, y), Settings(epochs=4))
    plain = list(dataclasses.replace(batches, augment=None))
    graph = mp.trace(model, batches.images[:2])
    magnitude = mp.prune(graph, budget="macs=0.25")
    recalibrate(magnitude.module, plain)
    core = mp.prune(graph, budget="macs=0.25", data=plain)
    assert core.plan.provenance["criterion"] == "fisher_block"
    assert core.certificate is not None
    assert core.certificate.ok
    assert any("least squares" in note for note in core.notes)
    scores = [evaluate(m, test) for m in (model, magnitude.module, core.module)]
    assert scores[2] > scores[1] + 0.05
    assert scores[2] > scores[0] - 0.08


def test_bad_requests_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = mp.trace(model, torch.randn(2, 6))
    pruned = mp.apply(graph, mp.plan(graph, "macs=0.5"))
    with pytest.raises(mp.MetapruneError, match="no samples"):
        mp.reconstruct(pruned, [])
    with pytest.raises(mp.MetapruneError, match="batches are needed"):
        mp.reconstruct(pruned, torch.randn(4, 6))
    with pytest.raises(mp.MetapruneError, match="not finite"):
        mp.reconstruct(pruned, [torch.full((20, 6), float("nan"))])
    tokens = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(mp.MetapruneError, match="noise can not stand for input"):
        mp.prune(tokens, torch.randint(9, (2, 5)), budget="macs=0.5", reconstruct=True)
    with pytest.raises(mp.MetapruneError, match="noise can not stand for input"):
        mp.prune(tokens, torch.randint(9, (2, 5)), budget="macs=0.5", data="noise")


def test_noise_stands_in_for_data() -> None:
    torch.manual_seed(0)
    graph = mp.trace(_alive(_Residual()), _images(2, 9))
    pruned = mp.prune(graph, budget="macs=0.5", data="noise")
    assert pruned.plan.provenance["samples"] == 256
    x = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    plain = mp.prune(graph, budget="macs=0.5", criterion="fisher", data="noise", reconstruct=False)
    with torch.no_grad():
        dense = graph.source(x)  # type: ignore[misc]
        assert (pruned.module(x) - dense).norm() < 0.5 * (plain.module(x) - dense).norm()


class _NormOfPositions(nn.Module):
    """Batch norms over the rows of a table, of which there are as many as channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.norm(self.second(F.relu(self.first(x))))).mean(1))
        return out


class _SharedNorm(nn.Module):
    """One batch norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.norm(self.second(F.relu(self.norm(self.first(x)))))))
        return out


@pytest.mark.parametrize(("build", "shape"), [(_NormOfPositions, (5, 6)), (_SharedNorm, (6,))])
def test_a_norm_that_is_not_the_layers_own_is_left_alone(build: "type[nn.Module]", shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        values = model.get_submodule("norm").state_dict(keep_vars=True)
        for name in ("weight", "running_var"):
            values[name].uniform_(0.5, 2.0)
        values["running_mean"].normal_()
    x = torch.randn(200, *shape)
    graph = mp.trace(model, x[:2])
    layers = linear_layers(graph)
    assert all(not response.norm for response in responses(graph, layers).values())
    keep = {group.name: tuple(range(5)) for group in graph.groups if not group.pinned}
    pruned = mp.apply(graph, mp.Plan(keep, graph.fingerprint))
    fitted_ = mp.reconstruct(pruned, [x]).module
    own, others = pruned.module.state_dict(), fitted_.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in own.items() if name.startswith("norm"))
    with torch.no_grad():
        before, after = ((module(x) - model(x)).norm() for module in (pruned.module, fitted_))
    assert after < 0.7 * before
    assert mp.prune(model, x[:2], "macs=0.6", reconstruct=True).certificate
