"""The metanetwork's encoder: equivariant, equal to its edge-list reference, blind to what a norm undoes, and able."""

import warnings
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.datasets import digits
from metaprune.graphs.errors import GraphError, OptionError
from metaprune.metanet.canonical import canonical
from metaprune.metanet.edge_list import EdgeListExchange
from metaprune.metanet.engine import Metanetwork
from metaprune.metanet.exchange import DenseExchange
from metaprune.metanet.rewrite import Rewriter
from metaprune.metanet.weight_graph import WeightGraph
from tests.support import oracle
from tests.support.units import orders, reordered, weights

States = dict[str, Tensor]
NAMES = """
    resnet inverted_residual depthwise_multiplier grouped_chain dense_block flatten_batch_norm vision_transformer
    grouped_queries stacked_experts lstm
""".split()


@cache
def metanetwork(dtype: torch.dtype = torch.float64, observed: int = 0) -> Metanetwork:
    return Metanetwork(hidden=12, layers=3, observed=observed, seed=1).to(dtype)


def gap(one: States, other: States) -> float:
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def single(graph: WeightGraph) -> WeightGraph:
    """The same network in float32."""
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in graph.tensors().items()}
    return graph.with_tensors(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_units_does_not_matter(name: str) -> None:
    graph, _ = weights(name)
    order = orders(graph.graph)
    moved = reordered(graph, order)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        one, other = (graph, moved) if dtype == torch.float64 else (single(graph), single(moved))
        net = metanetwork(dtype)
        with torch.no_grad():
            states, found = net(one, budget=0.5), net(other, budget=0.5)
        expected = {n: s[order[n]] if n in order else s for n, s in states.items()}
        assert gap(found, expected) <= bound
    assert any(float((s - s[order[n]]).abs().max()) > 1e-3 for n, s in states.items() if n in order), "units look alike"


@pytest.mark.parametrize("name", NAMES)
def test_matrix_products_equal_the_edge_list(name: str) -> None:
    graph, _ = weights(name)
    for one, dtype, bound in ((graph, torch.float64, 1e-9), (single(graph), torch.float32, 1e-5)):
        net = Metanetwork(hidden=12, layers=3, seed=5).to(dtype)
        net.load_state_dict(metanetwork(dtype).state_dict())
        with torch.no_grad():
            assert gap(metanetwork(dtype)(one), net(one, exchange=EdgeListExchange(one))) <= bound


@pytest.mark.parametrize("name", ["resnet", "grouped_chain", "vision_transformer", "ghost"])
def test_gradients_equal_those_of_the_edge_list(name: str) -> None:
    graph, _ = weights(name)
    net = metanetwork()
    found = []
    for exchange in (None, EdgeListExchange(graph)):
        loss = sum(s.square().mul(torch.arange(12.0)).sum() for s in net(graph, exchange=exchange).values())
        found.append(torch.autograd.grad(loss, [p for n, p in net.named_parameters() if "layers" in n]))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


class Unkept(DenseExchange):
    """Keeps no moments, and works on a few rows at a time."""

    def __init__(self, graph: WeightGraph, rows: int) -> None:
        super().__init__(graph, rows)
        self._encoding = type(self._encoding)(**{**vars(self._encoding), "moments": (None,) * len(graph.blocks)})


@pytest.mark.parametrize("rows", [1, 50, 1 << 20])
def test_rows_in_chunks_change_nothing(rows: int) -> None:
    graph, _ = weights("vision_transformer")
    net = metanetwork()
    found = []
    for exchange in (None, Unkept(graph, rows)):
        states = net(graph, exchange=exchange)
        loss = sum(s.pow(3).sum() for s in states.values())
        found.append((states, torch.autograd.grad(loss, list(net.layers.parameters()))))
    assert gap(found[0][0], found[1][0]) <= 1e-12
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


@cache
def trained(seed: int = 0) -> tuple[WeightGraph, Tensor]:
    """A small network with batch norms, a depthwise layer among them, trained on digits; and images."""
    train, _ = digits(seed=0)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for images, labels in [*train, *train, *train]:
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimiser.step()
    net.double().eval()
    images = images.double()
    return WeightGraph.of(mp.trace(net, images[:2])), images


def rescaled(graph: WeightGraph, layer: str, norm: str, seed: int = 0) -> WeightGraph:
    """The same function: a layer's outputs times factors of 0.1 to 10, and the statistics behind them along."""
    tensors = graph.tensors()
    generator = torch.Generator().manual_seed(seed)
    shape = tensors[f"{layer}.weight"].shape
    scale = 10 ** (2 * torch.rand(shape[0], generator=generator, dtype=torch.float64) - 1)
    powers = {f"{layer}.weight": 1, f"{layer}.bias": 1, f"{norm}.running_mean": 1, f"{norm}.running_var": 2}
    for name, power in powers.items():
        if name in tensors:
            tensors[name] = tensors[name] * scale.pow(power).reshape(-1, *[1] * (tensors[name].ndim - 1))
    return graph.with_tensors(tensors)


@pytest.mark.parametrize(("layer", "norm"), [("0", "1"), ("3", "4"), ("6", "7"), ("11", "12")])
def test_scales_that_a_batch_norm_undoes_do_not_show(layer: str, norm: str) -> None:
    graph, images = trained()
    other = rescaled(graph, layer, norm)
    outputs = [g.to_graph().run(None, images) for g in (graph, other)]
    assert oracle.distance(outputs[1], outputs[0]) <= 1e-2, "but for the norm's epsilon the function is the same"
    with torch.no_grad():
        assert gap(metanetwork()(graph), metanetwork()(other)) <= 1e-10


def test_a_scale_that_nothing_undoes_shows() -> None:
    graph, _ = trained()
    for name in ("14.weight", "1.weight", "6.bias"):
        scale = torch.linspace(0.5, 2, len(graph.tensors()[name]), dtype=torch.float64)
        tensor = graph.tensors()[name]
        other = graph.with_tensors({name: tensor * scale.reshape(-1, *[1] * (tensor.ndim - 1))})
        with torch.no_grad():
            assert gap(metanetwork()(graph), metanetwork()(other)) > 1e-3, name


def test_the_canonical_network_computes_the_same() -> None:
    graph, images = trained()
    found = canonical(rescaled(graph, "0", "1"))
    assert oracle.distance(found.to_graph().run(None, images), graph.to_graph().run(None, images)) <= 1e-2
    for name in ("0.weight", "3.weight", "6.weight", "11.weight"):
        rms = found.tensors()[name].flatten(1).square().mean(1)
        assert torch.allclose(rms, torch.ones_like(rms))
    assert torch.equal(found.tensors()["14.weight"], graph.tensors()["14.weight"]), "no norm behind it"
    zero = graph.with_tensors({"0.weight": torch.zeros(8, 1, 3, 3, dtype=torch.float64)})
    assert all(bool(torch.isfinite(t).all()) for t in canonical(zero).tensors().values())
    assert all(bool(torch.isfinite(s).all()) for s in metanetwork()(zero).values())


def test_a_layer_with_another_reader_keeps_its_scale() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head(self.norm(y) + y)

    graph = WeightGraph.of(mp.trace(oracle.alive(Two()).eval(), torch.randn(2, 3, 5, 5)))
    assert all(torch.equal(t, graph.tensors()[n]) for n, t in canonical(graph).tensors().items())


def test_budget_and_observations_enter() -> None:
    graph, _ = weights("resnet")
    net = metanetwork(observed=2)
    sizes = {u.name: u.size for u in graph.units}
    name = next(u.name for u in graph.units if u.free)
    seen = {name: torch.randn(sizes[name], 2, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        plain = net(graph)
        assert list(plain) == [group.name for group in graph.graph.groups]
        assert all(plain[n].shape == (size, 12) for n, size in sizes.items())
        assert gap(plain, net(graph, budget=0.5)) > 1e-2
        assert gap(net(graph, budget=0.25), net(graph, budget=0.5)) > 1e-2
        with_seen = net(graph, observed=seen)
        assert gap(plain, with_seen) > 1e-2
        order = torch.randperm(sizes[name])
        moved = net(reordered(graph, {name: order}), observed={name: seen[name][order]})
        assert float((moved[name] - with_seen[name][order]).abs().max()) <= 1e-10
        assert (
            gap(metanetwork(observed=1)(graph), metanetwork(observed=1)(graph, observed={name: seen[name][:, 0]})) > 0
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, "budget: the part to keep"),
        ({"budget": 1.5}, "not 1.5"),
        ({"budget": float("nan")}, "not nan"),
        ({"observed": {"nobody": torch.zeros(3, 2)}}, "no group nobody"),
        ({"observed": {"0": torch.zeros(5, 2)}}, r"0 must be \[8, 2\], not \[5, 2\]"),
        ({"observed": {"0": torch.zeros(8)}}, r"0 must be \[8, 2\], not \[8\]"),
        ({"observed": {"0": torch.full((8, 2), float("inf"))}}, "not finite"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    graph, _ = trained()
    with pytest.raises(OptionError, match=message):
        metanetwork(observed=2)(graph, **arguments)
    with pytest.raises(OptionError, match="observed: 0 must be"):
        metanetwork()(graph, observed={"0": torch.zeros(8, 1)})
    with pytest.raises(OptionError, match="hidden must be"):
        Metanetwork(hidden=0)


def test_a_value_that_is_not_finite_is_named() -> None:
    graph, _ = trained()
    for value in (float("nan"), float("inf")):
        broken = graph.tensors()["6.bias"].clone()
        broken[3] = value
        with pytest.raises(GraphError, match=r"tensor 6\.bias"):
            metanetwork()(graph.with_tensors({"6.bias": broken}))


def test_features_outside_of_the_range_are_clamped_with_one_warning() -> None:
    small, large = trained()[0], weights("vision_transformer")[0]
    net = Metanetwork(hidden=8, layers=1, observed=1).double()
    name = small.units[1].name
    seen = {name: torch.linspace(0, 1, small.units[1].size)}
    net.widen(small, budget=0.25, observed=seen)
    net.widen(small, budget=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(small, budget=0.3, observed=seen)
        net(small)
    with pytest.warns(UserWarning, match="clamped") as caught:
        beyond = net(small, budget=0.9, observed={name: 5 * seen[name].sign()})
    assert [str(w.message) for w in caught] == [
        "outside of the range the metanetwork was fitted to, clamped: log budget, observed 0"
    ]
    assert gap(beyond, net(small, budget=0.5, observed={name: seen[name].sign()})) <= 1e-6
    with pytest.warns(UserWarning, match="log granularity") as caught:
        net(large)
    assert len(caught) == 1
    net.widen(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(large)
    again = Metanetwork(hidden=8, layers=1, observed=1).double()
    again.load_state_dict(net.state_dict())
    assert gap(net(large), again(large)) == 0.0


def test_seeds_decide_the_weights_and_nothing_else_is_touched() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (Metanetwork(hidden=8, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    graph = single(trained()[0])
    assert gap(one(graph), same(graph)) == 0.0
    assert gap(one(graph), other(graph)) > 1e-2
    assert one.config == {"hidden": 8, "layers": 4, "observed": 0}


def test_networks_without_blocks_or_with_little_to_prune() -> None:
    for net, shape in (
        (nn.Sequential(nn.BatchNorm1d(4), nn.PReLU(4)), (4,)),
        (nn.Linear(3, 2), (3,)),
        (nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)), (3,)),
    ):
        graph = WeightGraph.of(mp.trace(net.double().eval(), torch.randn(2, *shape, dtype=torch.float64)))
        states = metanetwork()(graph)
        assert set(states) == {u.name for u in graph.units}
        assert all(bool(torch.isfinite(s).all()) for s in states.values())
        assert gap(states, metanetwork()(graph, exchange=EdgeListExchange(graph))) <= 1e-12


@cache
def traced(*widths: int) -> WeightGraph:
    layers = [nn.Linear(a, b) for a, b in zip((6, *widths), (*widths, 4), strict=True)]
    return WeightGraph.of(mp.trace(nn.Sequential(*layers), torch.zeros(2, 6)))


def perceptron(widths: tuple[int, ...], seed: int) -> tuple[WeightGraph, dict[str, Tensor]]:
    """A perceptron, and for its hidden units how strongly the units that read them are read themselves.

    With v_o = sum_p w_3[p, o]^2 the target of unit u is log(sum_o w_2[o, u]^2 v_o / sum_o w_2[o, u]^2) about its mean.
    All weights are few and large or small; columns are scaled at random. Nothing at the unit itself tells its target.
    """
    generator = torch.Generator().manual_seed(seed)
    graph = traced(*widths)
    tensors = {}
    for i in range(len(widths) + 1):
        heavy = torch.randn(graph.layout.parts[f"{i}.weight"].shape, generator=generator).pow(3)
        scale = torch.randn(heavy.shape[1], generator=generator).exp()
        tensors[f"{i}.weight"] = heavy / heavy.norm(dim=0) * scale
    squares = [tensors[f"{i}.weight"].square() for i in range(len(widths) + 1)]
    targets = {}
    for i in range(len(widths) - 1):
        heard = (squares[i + 2].sum(0) @ squares[i + 1] / squares[i + 1].sum(0)).log()
        targets[str(i)] = heard - heard.mean()
    return graph.with_tensors(tensors), targets


def error(net: Metanetwork, head: nn.Module, graph: WeightGraph, targets: dict[str, Tensor]) -> Tensor:
    """Mean squared error over the variance of the targets."""
    states = net(graph)
    return torch.stack([(head(states[n])[:, 0] - t).square().mean() / t.var() for n, t in targets.items()]).mean()


@pytest.mark.filterwarnings("ignore:outside of the range:UserWarning")
@pytest.mark.parametrize(("rounds", "steps"), [(0, 40), (2, 200)])
def test_messages_carry_what_neighbours_know_to_networks_never_seen(rounds: int, steps: int) -> None:
    sizes = [(12, 20, 8), (16, 10, 14), (10, 16, 12, 20), (8, 24, 10)]
    zoo = [perceptron(w, i) for i, w in enumerate(6 * sizes)]
    unseen = [perceptron(w, 100 + i) for i, w in enumerate(3 * [(18, 14, 10), (14, 22, 18)])]
    net, head = Metanetwork(hidden=16, layers=rounds, seed=0), nn.Linear(16, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for graph, _ in zoo:
        net.widen(graph)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], 5e-3)
    for step in range(steps):
        optimiser.zero_grad()
        error(net, head, *zoo[step % len(zoo)]).backward()
        optimiser.step()
    with torch.no_grad():
        left = float(torch.stack([error(net, head, *member) for member in unseen]).mean())
    assert (left < 0.5) if rounds else (left > 0.9), left


@pytest.mark.parametrize("name", ["resnet", "grouped_chain", "vision_transformer", "llama_tied", "ghost"])
def test_rewriting_starts_as_the_identity_and_keeps_the_order_of_units(name: str) -> None:
    graph, inputs = weights(name)
    rewriter = Rewriter(12, seed=2).double()
    states = metanetwork()(graph)
    order = orders(graph.graph)
    kept = {n: torch.arange(len(o)) % 2 == 0 for n, o in order.items()}
    same = rewriter(graph, states, kept)
    assert set(same) == {
        p.name for p in (*graph.blocks, *graph.vectors) if graph.graph.tensors[p.name].kind == "parameter"
    }
    assert all(torch.equal(tensor, graph.tensors()[n]) for n, tensor in same.items())
    with torch.no_grad():
        for parameter in rewriter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = reordered(graph, order)
    with torch.no_grad():
        changed = graph.with_tensors(rewriter(graph, states, kept))
        other = rewriter(moved, metanetwork()(moved), {n: k[order[n]] for n, k in kept.items()})
        for n, tensor in reordered(changed, order).tensors().items():
            if n in other:
                assert float((tensor - other[n]).abs().max()) <= 1e-9
        assert oracle.distance(changed.to_graph().run(None, inputs), graph.graph.run(None, inputs)) > 1e-3
        assert gap_of(changed, graph.with_tensors(rewriter(graph, states))) > 1e-4, "the mask enters"


def gap_of(one: WeightGraph, other: WeightGraph) -> float:
    return max(float((one.values[n] - other.values[n]).abs().max()) for n in one.values)


def test_rewriting_stays_within_its_bound() -> None:
    graph, _ = trained()
    rewriter = Rewriter(12, rank=2, ratio=0.05, seed=2).double()
    with torch.no_grad():
        rewriter.at_line.bias.fill_(50.0)
        rewriter.at_output.bias[0] = 50.0
        found = rewriter(graph, metanetwork()(graph))
    for name, tensor in found.items():
        old = graph.tensors()[name]
        added = 0.05 * old.square().mean().sqrt() if len(graph.layout.parts[name].sides) == 1 else 0.0
        bound = 0.05 * old.abs() + added
        assert bool(((tensor - old).abs() <= bound + 1e-12).all())
        assert float((tensor - old).abs().max()) > 0


def test_rewriting_learns_to_make_up_for_a_mask() -> None:
    graph, images = trained()
    images = images[:128]
    kept = {u.name: (torch.arange(u.size) % 3 != 0).double() for u in graph.units if u.free}
    dense = graph.graph.run(None, images).log_softmax(1)

    def divergence(tensors: dict[str, Tensor] | None) -> Tensor:
        found = graph.graph.run(tensors, images, gates=kept).log_softmax(1)
        return nn.functional.kl_div(found, dense, log_target=True, reduction="batchmean")

    rewriter = Rewriter(12, ratio=0.3, seed=2).double()
    with torch.no_grad():
        states, before = metanetwork()(graph), float(divergence(None))
        dense = dense.detach()
    optimiser = torch.optim.Adam(rewriter.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        divergence({**graph.graph.values, **rewriter(graph, states, kept)}).backward()
        optimiser.step()
    with torch.no_grad():
        after = float(divergence({**graph.graph.values, **rewriter(graph, states, kept)}))
    assert after < 0.5 * before, (before, after)


def test_rewriting_names_what_does_not_fit() -> None:
    graph, _ = trained()
    states = metanetwork()(graph)
    rewriter = Rewriter(12).double()
    with pytest.raises(OptionError, match="states"):
        rewriter(graph, dict(list(states.items())[1:]))
    with pytest.raises(OptionError, match="no group nobody"):
        rewriter(graph, states, {"nobody": torch.ones(3)})
    with pytest.raises(OptionError, match="0 has 8 units, not 5"):
        rewriter(graph, states, {"0": torch.ones(5)})
    with pytest.raises(OptionError, match="rewriter"):
        Rewriter(12, ratio=0.0)
