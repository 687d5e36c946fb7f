"""The published objective: the penalty and its gradient, training with it, and networks rewritten before any cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.metanet.group_sparsity import group_sparsity
from metaprune.metanet.pruner import MetaPruner
from metaprune.metanet.rewrite_head import RewriteHead
from metaprune.metanet.rewrite_training import RewriteCourse, Source, trained_head
from metaprune.metanet.weight_graph import WeightGraph
from tests.support.little_zoo import graph_of, images, pruner_of_zoo, task_of

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo is trained once

COURSE = RewriteCourse(
    objective="group_sparsity", sparsity=0.1, hidden=8, layers=1, batches=2, size=64, steps=12, every=6, rate=1e-2,
    memory=0.8, aggregation="pna",
)  # fmt: skip


def by_hand(alpha: float) -> tuple[float, dict[str, Tensor]]:
    """Penalty and gradient of the residual network, from the names of its layers."""
    values = {name: value.detach().double() for name, value in graph_of("residual-0").values.items()}
    # groups: channels of the first layer, of the sum, and inside the block; each (tensor, dimension) that goes along
    members = [
        [("0.weight", 0), ("1.weight", 0), ("3.weight", 1)],
        [("3.weight", 0), ("4.weight", 0), ("6.conv1.weight", 1), ("6.conv2.weight", 0), ("6.bn2.weight", 0),
         ("9.weight", 1)],
        [("6.conv1.weight", 0), ("6.bn1.weight", 0), ("6.conv2.weight", 1)],
    ]  # fmt: skip
    total, gradients = 0.0, {name: torch.zeros_like(value) for name, value in values.items()}
    for group in members:
        size = values[group[0][0]].shape[group[0][1]]
        norms = [sum(float(values[n].select(d, u).square().sum()) for n, d in group) ** 0.5 for u in range(size)]
        for unit, norm in enumerate(norms):
            factor = alpha ** ((max(norms) - norm) / (max(norms) - min(norms)))
            total += 0.5 * factor * norm**2
            for name, dim in group:
                gradients[name].select(dim, unit).add_(factor * values[name].select(dim, unit))
    return total, gradients


@pytest.mark.parametrize("alpha", [16.0, 1.0])
def test_penalty_and_gradient_are_those_of_the_formula(alpha: float) -> None:
    graph = WeightGraph.of(graph_of("residual-0"))
    tensors = {
        name: graph.graph.values[name].detach().double().requires_grad_()
        for name, info in graph.graph.tensors.items()
        if info.kind == "parameter"
    }
    penalty = group_sparsity(graph, tensors, alpha)
    expected, gradients = by_hand(alpha)
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-10)
    found = torch.autograd.grad(penalty, list(tensors.values()), allow_unused=True)
    for name, gradient in zip(tensors, found, strict=True):
        given = torch.zeros_like(gradients[name]) if gradient is None else gradient
        assert torch.allclose(given, gradients[name], rtol=1e-9, atol=1e-12), name


def test_units_of_equal_norms_are_decayed_alike() -> None:
    graph = WeightGraph.of(graph_of("plain-0"))
    ones = {name: torch.ones_like(value) for name, value in graph.graph.values.items()}
    energy = sum(float(ones[name].numel()) * times for name, times in (("0.weight", 1), ("2.weight", 2)))
    assert float(group_sparsity(graph, ones)) == pytest.approx(0.5 * (energy + ones["6.weight"].numel()))


def test_training_lowers_the_penalty_and_keeps_the_task() -> None:
    names = ("residual-0", "residual-1", "chain-0", "chain-1")
    sources = [Source(name, "one", lambda name=name: task_of(name)) for name in names]  # type: ignore[misc]
    head, about = trained_head(sources, COURSE, 0, None)
    assert not head.config["refit"]
    assert (len(about["seen"]), len(about["held out"])) == (3, 1)  # of one family alone a network is held out
    assert about["history"][-1][1] < about["history"][0][1]
    assert about["history"][-1][2] < about["history"][0][2]
    name = about["held out"][0]
    graph, test = graph_of(name), images()[1]
    tensors = head.rewritten(graph, mp.Plan({}, graph.fingerprint))
    with torch.no_grad():
        before, after = (float(group_sparsity(WeightGraph.of(graph), own)) for own in ({}, tensors))
    assert after < before
    pruner = MetaPruner(pruner_of_zoo().predictors, pruner_of_zoo().card, None, None, head)
    module = pruner.rewrite(graph)
    with torch.no_grad():
        assert float((module(test.images) - graph.run(tensors, test.images)).abs().max()) < 1e-4
    task = replace(task_of(name), model=module)
    assert task.score() > task_of(name).score() - 0.1
    pruned = mp.prune(module, test.images[:1], budget="macs=0.6")  # and so on, as with any network
    assert pruned.certificate is not None
    own, plain = (p.prune(graph, budget="macs=0.6") for p in (pruner, pruner_of_zoo()))  # it is not for a given plan
    assert own.plan.provenance["rewritten"] == plain.plan.provenance["rewritten"]


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(OptionError, match="group_sparsity"):
        pruner_of_zoo().rewrite(graph_of("plain-0"))
    with pytest.raises(OptionError, match="objective"):
        RewriteCourse(objective="size")
    with pytest.raises(OptionError, match="objective"):
        RewriteHead(objective="size")
    with pytest.raises(OptionError, match="sparsity"):
        RewriteCourse(sparsity=-1.0)
