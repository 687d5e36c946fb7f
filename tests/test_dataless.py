"""Fits without data: what is exact is exact, norms keep the data's statistics, and accuracy comes back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp
from metaprune.dataless import _natural, drawn, refit_without_data
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from tests.support.little_zoo import graph_of, images

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo is trained once


def masked(graph: Graph, tensors: dict[str, Tensor] | None, keep: dict[str, tuple[int, ...]], x: Tensor) -> Tensor:
    gates = {name: torch.zeros(graph.group(name).size) for name in keep}
    for name, units in keep.items():
        gates[name][list(units)] = 1
    with torch.no_grad():
        found: Tensor = graph.run(tensors, x, gates)
    return found


def with_twins(norm: bool, seed: int = 0) -> nn.Sequential:
    """A network whose hidden channels come in pairs of equal ones, with statistics that no drawn input would give."""
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(width) for width in (8, 8)]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norms[0] if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        norms[1] if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
        for batch_norm in norms:
            for name, low, high in (
                ("weight", 0.5, 2.0), ("bias", -0.5, 0.5), ("running_mean", -0.3, 0.3), ("running_var", 0.2, 3.0),
            ):  # fmt: skip
                values = torch.empty(4).uniform_(low, high)
                getattr(batch_norm, name).copy_(torch.cat([values, values]))
        if norm:  # the second of each pair reads with the opposite order of twins: equal all the same
            model[3].weight[4:] = model[3].weight[:4].roll(4, 1)
    return model


@pytest.mark.parametrize("norm", [True, False])
def test_a_unit_that_has_a_twin_is_made_up_for_exactly_whatever_the_data(norm: bool) -> None:
    model = with_twins(norm)
    x = images()[0].images[:32]
    graph = mp.trace(model, x[:1])
    hidden = next(group for group in graph.groups if not group.pinned)
    plan = Plan({hidden.name: (0, 1, 2, 3)}, graph.fingerprint)
    dense = model(x).detach()
    tensors = refit_without_data(graph, plan)
    before = float((masked(graph, None, dict(plan.keep), x) - dense).norm() / dense.norm())
    after = float((masked(graph, tensors, dict(plan.keep), x) - dense).norm() / dense.norm())
    assert before > 0.02
    assert after < 0.02 * before


def test_what_goes_is_untouched_and_the_cut_is_certified() -> None:
    graph, x = graph_of("residual-0"), images()[1].images[:64]
    own = {name: value.detach().clone() for name, value in graph.values.items()}
    plan = mp.plan(graph, "macs=0.4")
    state = torch.get_rng_state()
    tensors = refit_without_data(graph, plan, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, own[name]) for name, value in graph.values.items())
    again, other = refit_without_data(graph, plan, seed=3), refit_without_data(graph, plan, seed=4)
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())
    assert any(not torch.equal(value, other[name]) for name, value in tensors.items())
    pruned = mp.apply(graph.with_values(tensors), plan)
    for name, value in tensors.items():
        gone = torch.ones_like(value, dtype=torch.bool)
        index = [torch.arange(size) for size in value.shape]
        for dim, positions in pruned.kept.get(name, {}).items():
            index[dim] = torch.from_numpy(positions)
        gone[torch.meshgrid(*index, indexing="ij")] = False
        assert torch.equal(value[gone], own[name][gone])
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    with torch.no_grad():
        gap = pruned.module(x) - masked(graph, tensors, dict(plan.keep), x)
    assert float(gap.abs().max()) < 1e-4
    assert refit_without_data(graph, Plan({}, graph.fingerprint)) == {}


@pytest.mark.parametrize("name", ["plain-1", "chain-0", "residual-0"])
def test_outputs_come_nearer_to_the_dense_ones_on_data_that_it_has_not_seen(name: str) -> None:
    graph, x = graph_of(name), images()[1].images
    plan = mp.plan(graph, "macs=0.5")
    with torch.no_grad():
        dense = graph.run(None, x).log_softmax(1)

    def divergence(tensors: dict[str, Tensor] | None) -> float:
        found = masked(graph, tensors, dict(plan.keep), x).log_softmax(1)
        return float(F.kl_div(found, dense, log_target=True, reduction="batchmean"))

    assert divergence(refit_without_data(graph, plan)) < 0.7 * divergence(None)


def test_half_of_the_drawn_images_have_the_spectrum_of_natural_ones() -> None:
    noise = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    found = _natural(noise)
    assert abs(float(found.var()) - 1) < 0.2
    power = torch.fft.fft2(found.double()).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16, rel=0.4)
    assert float(power[3, 4] / power[6, 8]) == pytest.approx(4, rel=0.4)
    assert torch.equal(_natural(noise[:, 0, 0]), noise[:, 0, 0])
    graph = graph_of("plain-0")
    leaves = drawn(graph, 64, 0)
    roughness = [float(v.diff(dim=-1).square().mean()) for leaf in leaves for v in leaf.values()]
    assert sum(roughness[::2]) < 0.5 * sum(roughness[1::2])


def test_inputs_that_can_not_be_drawn_are_refused() -> None:
    graph = mp.trace(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(),
                     torch.zeros(2, 4, dtype=torch.long))  # fmt: skip
    with pytest.raises(OptionError, match="noise can not stand for input"):
        refit_without_data(graph, mp.plan(graph, "macs=0.6"))


def test_prune_fits_without_data_when_asked() -> None:
    model, x = with_twins(True), images()[0].images[:32]
    graph = mp.trace(model, x[:1])
    cut = mp.prune(graph, budget="macs=0.5")
    fitted = mp.prune(graph, budget="macs=0.5", reconstruct=True)
    tensors = refit_without_data(graph, cut.plan)
    assert fitted.plan.keep == cut.plan.keep
    assert fitted.certificate is not None
    assert fitted.certificate.ok
    with torch.no_grad():
        assert torch.allclose(fitted.module(x), masked(graph, tensors, dict(cut.plan.keep), x), atol=1e-4)
    assert "rewritten" not in cut.plan.provenance
    assert "rewritten for this plan without data" in fitted.notes[-1]
