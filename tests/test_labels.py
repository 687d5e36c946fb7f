"""Labels: against networks cut by hand, least squares by numpy, and each other."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import metaprune as mp
from metaprune.curvature import RIDGE
from metaprune.data import Batches
from metaprune.evaluation import predict
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.losses import cross_entropy
from metaprune.metanet import labels as module
from metaprune.metanet.families import rebuild
from metaprune.metanet.labels import LEAST, MOST, Labels, measure
from metaprune.metanet.sources import source
from metaprune.ranking import score
from tests.support.layers import cut_to, refitted

RECIPES = {
    "plain": {"norm": "batch", "act": "relu", "widths": [8, 10, 9], "kernels": [3, 3, 3], "strides": [2, 1, 2]},
    "mlp": {"norm": "none", "act": "relu", "widths": [20, 12]},
}
SEED, PLANS = 3, 5
FIT = module.SAMPLES // 2


@functools.cache
def trained(family: str) -> tuple[nn.Module, Batches]:
    given = source("digits")
    model = rebuild(family, {"shape": [1, 8, 8], "classes": 10, **RECIPES[family]}, SEED)
    settings = mp.Settings(epochs=2, lr=3e-3, optimizer="adamw")
    mp.train(model, given.task(model).train, lambda logits, _, labels: cross_entropy(logits, labels), settings)
    return model.eval(), given.calibration


@functools.cache
def measured(family: str) -> tuple[Graph, Labels]:
    model, data = trained(family)
    graph = mp.trace(model, data.images[:1])
    return graph, measure(graph, data, plans=PLANS, seed=SEED)


def divergence(mine: Tensor, dense: Tensor) -> float:
    """KL(dense || mine) of the softmax in the words of its definition, mean over samples."""
    p, q = dense.double().softmax(1), mine.double().softmax(1)
    return float((p * (p.log() - q.log())).sum(1).mean())


def by_hand(family: str, network: nn.Module) -> float:
    """How far a network is from the dense one on the samples that are measured on."""
    model, data = trained(family)
    with torch.no_grad():
        return divergence(predict(network, data.images[FIT:]), predict(model, data.images[FIT:]))


@pytest.mark.parametrize("family", RECIPES)
def test_ablation_is_the_divergence_of_the_network_without_the_unit(family: str) -> None:
    graph, labels = measured(family)
    assert list(labels.sizes.items()) == [(g.name, g.size) for g in graph.groups if not g.pinned]
    for name, size in labels.sizes.items():
        assert labels.ablation[name].shape == (size,)
        for unit in range(0, size, 3):
            keep = {name: tuple(u for u in range(size) if u != unit)}
            assert labels.ablation[name][unit] == pytest.approx(by_hand(family, cut_to(graph, keep).module), rel=1e-3)


@pytest.mark.parametrize("family", RECIPES)
def test_plain_is_the_divergence_of_one_group_cut_in_the_order_of_the_criterion(family: str) -> None:
    graph, labels = measured(family)
    _, data = trained(family)
    scores = score(graph, "fisher_block", [data.images[:FIT]], SEED).units
    for place, (name, size) in enumerate(labels.sizes.items()):
        assert (np.diff(scores[name][labels.order[name].numpy()]) >= 0).all()
        levels = labels.levels[name].tolist()
        assert levels[0] == size - 1
        assert levels[-1] == graph.group(name).minimum
        assert labels.plain[name][0] == pytest.approx(float(labels.ablation[name][labels.order[name][0]]), rel=1e-9)
        for i, kept in enumerate(levels):
            counts = list(labels.sizes.values())
            counts[place] = kept
            keep = labels.keep(counts)
            assert set(keep[name]) == set(labels.order[name][size - kept :].tolist())
            assert labels.plain[name][i] == pytest.approx(by_hand(family, cut_to(graph, keep).module), rel=1e-3)


def test_compensated_is_least_squares_of_the_reader_on_the_other_half() -> None:
    graph, labels = measured("mlp")
    model, data = trained("mlp")
    assert isinstance(model, nn.Sequential)
    first, reader, last = (layer for layer in model if isinstance(layer, nn.Linear))
    name = next(g.name for g in graph.groups if any(s.tensor == "1.weight" and s.dim == 0 for s in g.slices))
    with torch.no_grad():
        hidden = first(data.images.flatten(1)).relu().double()
        for i, kept in enumerate(labels.levels[name].tolist()):
            stays = labels.order[name][-kept:].sort().values
            weight = reader.weight.double().T
            fitted, _ = refitted(hidden[:FIT], weight, stays.tolist(), RIDGE, shifted=True)
            full = torch.zeros_like(weight)
            full[stays] = torch.from_numpy(fitted)
            bias = reader.bias.double() + hidden[:FIT].mean(0) @ (weight - full)
            mine = last.weight.double() @ (hidden[FIT:] @ full + bias).relu().T
            found = divergence(mine.T + last.bias.double(), predict(model, data.images[FIT:]))
            assert labels.compensated[name][i] == pytest.approx(found, rel=1e-3)
    assert labels.compensated[name].sum() < labels.plain[name].sum()


@pytest.mark.parametrize("family", RECIPES)
def test_joint_is_the_divergence_after_apply_and_reconstruct(family: str) -> None:
    graph, labels = measured(family)
    _, data = trained(family)
    for plan in (0, PLANS - 1):
        cut = cut_to(graph, labels.keep(labels.joint_kept[plan].tolist()))
        fitted = mp.reconstruct(cut, [data.images[:FIT]], seed=SEED)
        assert labels.joint[plan] == pytest.approx(by_hand(family, fitted.module), rel=1e-3)
        assert by_hand(family, cut.module) > 1.2 * labels.joint[plan]


def test_random_allocations_spread_over_the_budgets_and_keep_to_what_is_legal() -> None:
    graph, _ = measured("plain")
    _, data = trained("plain")
    labels = measure(graph, [data.images[:4]], plans=40, seed=1)
    costs = graph.coupling.costs
    counts = np.tile(costs.sizes, (40, 1))
    free = [i for i, group in enumerate(graph.groups) if not group.pinned]
    counts[:, free] = labels.joint_kept
    share = costs.evaluate("macs", counts) / costs.evaluate("macs", costs.sizes[None])
    assert LEAST * 0.7 <= share.min() < 0.2
    assert 0.35 < share.max() <= MOST
    assert len({tuple(row) for row in labels.joint_kept.tolist()}) > 15
    by_cost = labels.joint_kept[torch.from_numpy(share.argsort())], torch.from_numpy(share.argsort() % 4)
    falls = [
        float((counts[:-1] > counts[1:]).any(1).double().mean())  # some group keeps fewer at a larger budget
        for counts in (by_cost[0][by_cost[1] == spread] for spread in (0, 3))
    ]
    assert falls[0] < 0.5 < falls[1]  # the path of one ranking, and allocations all over the place


def test_equal_seeds_give_equal_labels_and_leave_random_state_alone() -> None:
    graph, _ = measured("mlp")
    _, data = trained("mlp")
    before = torch.get_rng_state()
    a, b, other = (measure(graph, [data.images[:64]], plans=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a.ablation[name], b.ablation[name]) for name in a.sizes)
    assert torch.equal(a.joint, b.joint)
    assert not torch.equal(a.joint_kept, other.joint_kept)
    assert measure(graph, [data.images[:8]], plans=0).joint_kept.shape == (0, len(a.sizes))


def test_labels_round_trip_to_the_bit(tmp_path: Path) -> None:
    _, labels = measured("plain")
    labels.save(tmp_path / "a")
    Labels.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Labels.load(tmp_path / "a")
    assert again.sizes == labels.sizes
    assert torch.equal(again.joint_kept, labels.joint_kept)
    for name in labels.sizes:
        assert torch.equal(again.order[name], labels.order[name])
        assert torch.equal(again.compensated[name], labels.compensated[name])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    _, labels = measured("mlp")
    path = tmp_path / "labels"
    labels.save(path)
    content = path.read_bytes()
    with pytest.raises(LoadError, match="can not be read"):
        Labels.load(tmp_path / "none")
    path.write_bytes(content[:-5])
    with pytest.raises(LoadError, match="damaged"):
        Labels.load(path)
    path.write_bytes(content)
    tensors, sizes = load_file(path), list(labels.sizes.items())
    for changed, header, said in [
        ({"joint": tensors["joint"] - 100}, {"schema": 1, "sizes": sizes}, "joint: a divergence"),
        ({"order.0": tensors["order.0"] * 0}, {"schema": 1, "sizes": sizes}, "order"),
        ({"levels.1": tensors["levels.1"].flip(0)}, {"schema": 1, "sizes": sizes}, "levels"),
        ({"joint_kept": tensors["joint_kept"] + 99}, {"schema": 1, "sizes": sizes}, "joint_kept"),
        ({"plain.0": tensors["plain.0"][:2]}, {"schema": 1, "sizes": sizes}, "plain"),
        ({}, {"schema": 2, "sizes": sizes}, "schema 1"),
        ({}, {"schema": 1, "sizes": [*sizes, ("more", 3)]}, "order.2"),
        ({}, ["labels"], "damaged"),
    ]:
        save_file(tensors | changed, path, {"labels": json.dumps(header)})
        with pytest.raises(LoadError, match=said):
            Labels.load(path)


def test_what_can_not_be_measured_is_refused() -> None:
    graph, _ = measured("mlp")
    _, data = trained("mlp")
    with pytest.raises(OptionError, match="plans"):
        measure(graph, data, plans=-1)
    with pytest.raises(OptionError, match="two samples"):
        measure(graph, [data.images[:1]])
    with pytest.raises(OptionError, match="logits"):
        measure(mp.trace(nn.Conv2d(1, 4, 3), data.images[:1]), data)
    with pytest.raises(OptionError, match="no group"):
        measure(mp.trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), data.images[:1]), data)
