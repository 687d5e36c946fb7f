"""Closed-form compensation: exact where it must be, means and deviations re-computed by hooks elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.compensation import absorb, match_moments
from metaprune.datasets import digits
from metaprune.evaluation import evaluate
from metaprune.graphs.execute import execute
from metaprune.graphs.replay import peak_bytes


def convolutional(bias: bool = True, padding: int = 0) -> nn.Sequential:
    """With batch norms where there is no bias; the odd channels of both inner layers do not depend on the input."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, groups in ((1, 6, 1), (6, 8, 1)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=padding, groups=groups, bias=bias)
        norm = nn.BatchNorm2d(outputs)
        nn.init.uniform_(norm.bias, 0.2, 1.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.zeros_(convolution.weight[1::2])
        if bias:
            nn.init.uniform_(convolution.bias, 0.2, 1.0)
        layers += [convolution, nn.Identity() if bias else norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double().eval()


def images(count: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 9, 9, dtype=torch.float64, generator=generator)


def without_odd_units(model: nn.Module, inputs: Tensor) -> mp.Pruned:
    graph = mp.trace(model, inputs[:2])
    keep = {group.name: tuple(range(0, group.size, 2)) for group in graph.groups if not group.pinned}
    assert keep
    return mp.apply(graph, mp.Plan(keep, graph.fingerprint))


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [True, False])
def test_constant_units_are_absorbed_exactly(bias: bool) -> None:
    model, inputs = convolutional(bias), images()
    pruned = without_odd_units(model, inputs)
    dense = output(model, inputs)
    before = {name: tensor.clone() for name, tensor in pruned.module.state_dict().items()}
    absorbed = absorb(pruned, [inputs[:32]])
    assert (output(pruned.module, inputs) - dense).abs().max() > 1e-2
    torch.testing.assert_close(output(absorbed.module, inputs), dense, rtol=0, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.module.state_dict().items())
    assert "by 2 of the 2 layers" in absorbed.notes[-1]


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_the_mean_output_of_the_reader_is_kept(padding: int) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=padding), nn.GELU(), nn.Conv2d(6, 4, 3, padding=padding, stride=2, dilation=2),
    ).double()  # fmt: skip
    inputs = images()
    pruned = without_odd_units(model, inputs)
    absorbed = absorb(pruned, [inputs[:20], inputs[20:]])
    wanted = output(model, inputs).mean((0, 2, 3))
    assert (output(pruned.module, inputs).mean((0, 2, 3)) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(output(absorbed.module, inputs).mean((0, 2, 3)), wanted, rtol=0, atol=1e-12)


def test_the_mean_is_absorbed_behind_grouped_readers_and_in_token_networks() -> None:
    torch.manual_seed(3)
    inputs = torch.randn(40, 7, 6, dtype=torch.float64)  # (batch, tokens, features)
    tokens = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)).double()
    absorbed = absorb(without_odd_units(tokens, inputs), [inputs])
    difference = output(absorbed.module, inputs) - output(tokens, inputs)
    assert difference.mean((0, 1)).abs().max() < 1e-12
    grouped = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3, groups=2)).double()
    pruned = without_odd_units(grouped, images())
    absorbed = absorb(pruned, [images()])
    difference = output(absorbed.module, images()) - output(grouped, images())
    assert difference.mean((0, 2, 3)).abs().max() < 1e-12


def test_a_reader_without_a_place_for_a_constant_stays() -> None:
    torch.manual_seed(4)
    inputs = torch.randn(40, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6, bias=False)).double()
    pruned = without_odd_units(model, inputs)
    absorbed = absorb(pruned, [inputs])
    assert "by 0 of the 1 layers" in absorbed.notes[-1]
    assert torch.equal(output(absorbed.module, inputs), output(pruned.module, inputs))


def test_a_fitted_network_is_refused() -> None:
    model, inputs = convolutional(), images()
    nn.init.normal_(model[3].weight)
    pruned = without_odd_units(model, inputs)
    for changed in (mp.reconstruct(pruned, [inputs]), absorb(pruned, [inputs])):
        with pytest.raises(mp.MetapruneError, match=r"^absorb: \d\.(weight|bias) has been fitted or trained"):
            absorb(changed, [inputs])


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 6, 3, padding=1)
            self.inner = nn.Conv2d(6, 12, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(12)
            self.outer = nn.Conv2d(12, 6, 3, padding=1, groups=2)
            self.bare = nn.BatchNorm2d(6, affine=False)
            self.head = nn.Linear(6, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.bare(self.outer(torch.relu(self.norm(self.inner(x)))))
            logits: Tensor = self.head(torch.tanh(x).mean((2, 3)))
            return logits

    torch.manual_seed(5)
    model = Residual().double()
    for _ in range(50):  # running statistics that are the network's own
        model(images())
    nn.init.normal_(model.norm.weight)  # negative gains too
    nn.init.normal_(model.norm.bias)
    return model.eval()


def moments(model: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel that a submodule puts out."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: found.append(o))
    output(model, inputs)
    handle.remove()
    rows = found[0].movedim(1, -1).flatten(0, -2)
    return rows.mean(0), rows.std(0, correction=0)


def test_moments_of_every_layer_are_those_of_the_dense_network() -> None:
    model, inputs = residual(), images()
    pruned = without_odd_units(model, inputs)
    assert pruned.kind == "native"
    matched = match_moments(pruned, [inputs[:16], inputs[16:]])
    for name, channels in (("stem", "stem"), ("norm", "norm"), ("bare", "outer"), ("head", "head")):
        (mean, deviation), (cut_mean, cut_deviation) = (moments(m, name, inputs) for m in (model, matched.module))
        cut = pruned.kept.get(f"{channels}.weight", {})
        kept = torch.from_numpy(cut[0]) if 0 in cut else torch.arange(len(mean))
        torch.testing.assert_close(cut_deviation, deviation[kept], rtol=1e-9, atol=0)
        if name != "head":  # without a bias
            torch.testing.assert_close(cut_mean, mean[kept], rtol=0, atol=1e-9)
    gains = pruned.module.get_parameter("norm.weight"), matched.module.get_parameter("norm.weight")
    assert torch.equal(gains[0].sign(), gains[1].sign())
    assert "outputs of 4 layers" in matched.notes[-1]


def test_nothing_cut_is_nothing_changed() -> None:
    model, inputs = residual(), images()
    graph = mp.trace(model, inputs[:2])
    pruned = mp.apply(graph, mp.Plan({}, graph.fingerprint))
    matched = match_moments(pruned, [inputs])
    torch.testing.assert_close(output(matched.module, inputs), output(model, inputs), rtol=0, atol=1e-9)
    assert torch.equal(output(absorb(pruned, [inputs]).module, inputs), output(pruned.module, inputs))


def test_a_constant_channel_keeps_its_scale() -> None:
    model, inputs = convolutional(), images()
    nn.init.normal_(model[0].weight)
    pruned = without_odd_units(model, inputs)
    with torch.no_grad():
        pruned.module.get_parameter("0.weight")[0] = 0
    matched = match_moments(pruned, [inputs])
    assert all(p.isfinite().all() for p in matched.module.parameters())
    assert not matched.module.get_parameter("0.weight")[0].any()


@pytest.mark.parametrize("function", [absorb, match_moments])
def test_values_that_are_not_finite_are_named(function: object) -> None:
    model, inputs = convolutional(), images()
    inputs[3] = torch.inf
    with pytest.raises(mp.MetapruneError, match="not finite"):
        function(without_odd_units(model, images()), [inputs])  # type: ignore[operator]


def test_a_plain_network_on_digits_gains_from_both() -> None:
    train_half, held_out = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train_half.images), train_half.labels).backward()
        optimizer.step()
    batches = [(train_half.images, train_half.labels)]
    pruned = mp.prune(model, held_out.images[:1], budget="width=0.4")
    cut = evaluate(pruned.module, held_out)
    assert cut < evaluate(model, held_out) - 0.2
    assert evaluate(absorb(pruned, batches).module, held_out) > cut
    assert evaluate(match_moments(pruned, batches).module, held_out) > cut + 0.2


def test_the_peak_is_what_is_alive_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    assert peak_bytes(mp.trace(model, torch.zeros(3, 4, dtype=torch.float64))) == 8 * (8 + 8)  # before and behind ReLU


def test_little_memory_means_fewer_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = convolutional(), images()
    pruned = without_odd_units(model, inputs)
    passed: list[int] = []

    def counted(graph: Any, values: Any, batch: Any, watch: Any) -> Any:
        passed.append(max(len(value) for value in batch.values()))
        return execute(graph, values, batch, watch=watch)

    monkeypatch.setattr("metaprune.compensation.execute", counted)
    unbounded, (most, *_) = absorb(pruned, [inputs]), passed
    passed.clear()
    absorbed = absorb(pruned, [inputs], memory=3 * peak_bytes(pruned.original))
    assert max(passed) == 3 < most
    torch.testing.assert_close(output(absorbed.module, inputs), output(unbounded.module, inputs), rtol=0, atol=1e-12)


def test_little_memory_means_fewer_samples_to_match() -> None:
    torch.manual_seed(4)
    layers = [nn.Conv2d(1, 6, 3), nn.GELU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 3)]
    model, inputs = nn.Sequential(*layers).double().eval(), images()
    pruned = without_odd_units(model, inputs)
    memory = 7 * peak_bytes(pruned.graph)
    bounded, some, all_ = (
        output(match_moments(pruned, [inputs], **options).module, inputs)
        for options in ({"memory": memory}, {"samples": 7}, {})
    )
    torch.testing.assert_close(bounded, some, rtol=0, atol=1e-9)
    assert (bounded - all_).abs().max() > 1e-3
