"""Families of random networks: each can be traced, pruned and trained, and is made again from its recipe."""

import json
import random

import pytest
import torch

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.metanet import families
from metaprune.metanet.architectures import FAMILIES

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_of_every_family_trace_have_groups_and_are_made_again_from_their_recipe(family: str) -> None:
    before = torch.get_rng_state()
    model, recipe = families.draw(family, random.Random(1), SHAPE, 10, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    for seed in (5, 6):
        again = families.rebuild(family, json.loads(json.dumps(recipe)), seed).state_dict()
        assert (seed == 5) == all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    graph = mp.trace(model, torch.zeros(1, *SHAPE))
    assert families.LEAST_MACS <= families.macs(family, recipe) <= families.MOST_MACS
    assert graph.cost().macs == pytest.approx(families.macs(family, recipe), rel=0.02)
    assert sum(group.size - group.minimum for group in graph.groups if not group.pinned) > 15
    loss = torch.nn.functional.cross_entropy(model(torch.randn(4, *SHAPE)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_recipes_differ_and_cover_what_a_family_may_be() -> None:
    recipes = [FAMILIES["plain"].draw(random.Random(seed), SHAPE) for seed in range(50)]
    assert len({json.dumps(recipe) for recipe in recipes}) == 50
    assert {recipe["norm"] for recipe in recipes} == {"batch", "none"}
    assert {len(recipe["widths"]) for recipe in recipes} == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("unheard", {}, "family"),
        ("mlp", {"widths": [10]}, "describes no mlp"),
        ("mlp", {"shape": [1, 8, 8], "classes": 10, "norm": "batch", "act": "relu", "widths": [1 << 40]}, "no recipe"),
        ("mlp", {"shape": [1, 8, 8], "classes": 10, "norm": "batch", "act": "exp", "widths": [10]}, "act"),
        ("plain", {"shape": [1, 8, 8], "classes": -1, "norm": "batch", "act": "relu", "widths": [1]}, "no recipe"),
    ],
)
def test_recipes_that_describe_nothing_are_refused(family: str, recipe: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        families.rebuild(family, recipe)
