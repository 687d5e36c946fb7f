"""Families of random small networks for image classification.

A family is a pair of functions: one draws a recipe, plain data that JSON holds, and the other builds the network that
a recipe describes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.metanet.architectures import FAMILIES, Family, Recipe, Shape

LEAST_MACS, MOST_MACS = 100_000, 1_500_000
_TRIES = 1000
_LARGEST, _LONGEST = 1 << 10, 64  # any number and any list of a recipe
_FAILURES = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, ZeroDivisionError)


def draw(family: str, source: random.Random, shape: Shape, classes: int, seed: int = 0) -> tuple[nn.Module, Recipe]:
    """A random network of a family, of `LEAST_MACS` to `MOST_MACS` multiply-adds for one image.

    Args:
        family: Its name in `FAMILIES`.
        source: Of the recipe.
        shape: Of one image.
        classes: Number of logits.
        seed: Of the initial weights.

    Returns:
        The network, and the recipe that `rebuild` makes it from.

    Raises:
        OptionError: An unknown family, or one that has no network of that size for such images.
    """
    kind = _family(family)
    for _ in range(_TRIES):
        recipe = {"shape": list(shape), "classes": classes, **kind.draw(source, shape)}
        if LEAST_MACS <= macs(family, recipe) <= MOST_MACS:
            return rebuild(family, recipe, seed), recipe
    raise OptionError(f"shape: family {family!r} has no network of the wanted size for images of shape {shape}")


def rebuild(family: str, recipe: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The network that a recipe describes, with initial weights drawn from a seed.

    Raises:
        OptionError: An unknown family, or a recipe that describes no network of it.
    """
    kind = _family(family)
    _check(family, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return kind.build(dict(recipe))
        except MetapruneError:
            raise
        except _FAILURES as error:
            raise OptionError(f"recipe: it describes no {family} network ({type(error).__name__}: {error})") from None


def blank(family: str, recipe: Mapping[str, Any]) -> nn.Module:
    """The network that a recipe describes on the meta device: no memory is taken; for errors see `rebuild`."""
    with torch.device("meta"):
        return rebuild(family, recipe)


def macs(family: str, recipe: Mapping[str, Any]) -> int:
    """Multiply-adds of a recipe's network for one image; for errors see `rebuild`."""
    model = blank(family, recipe).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *recipe["shape"], device="meta"))
    return int(counter.get_total_flops() // 2)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise OptionError(f"family: {name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _check(family: str, value: object) -> None:
    """Refuses recipes, which may come from anywhere, that ask for networks of any other order of size."""
    if isinstance(value, Mapping):
        for item in value.values():
            _check(family, item)
    elif isinstance(value, list | tuple) and len(value) <= _LONGEST:
        for item in value:
            _check(family, item)
    elif not (isinstance(value, str | bool) or (isinstance(value, int | float) and 0 <= value <= _LARGEST)):
        raise OptionError(f"recipe: {str(value)[:80]!r} is in no recipe of a {family} network")
