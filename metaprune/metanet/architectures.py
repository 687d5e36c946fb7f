"""The table of families: what each draws at random, and the network that it builds of it.

The architectures are those of the papers named below, at a thousandth of their size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from metaprune.metanet import blocks
from metaprune.metanet.blocks import activation, convolution, feed_forward, normalised, patches, pooled_classifier

Recipe: TypeAlias = dict[str, Any]
Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
        draw: Draws what is specific to a network of the kind, for images of a shape.
        build: The network of a recipe, which has `shape` and `classes` besides.
    """

    draw: Callable[[random.Random, Shape], Recipe]
    build: Callable[[Recipe], nn.Module]


# ---- convolutions in a row


def _draw_plain(source: random.Random, shape: Shape) -> Recipe:
    depth = source.randint(3, 6)
    down = source.sample(range(depth), 2)
    return {
        "norm": source.choice(("batch", "none")),
        "act": source.choice(("relu", "relu", "gelu")),
        "widths": _rising(source, depth, 8, 48),
        "kernels": [source.choice((3, 3, 5)) for _ in range(depth)],
        "strides": [2 if layer in down else 1 for layer in range(depth)],
    }


def _build_plain(recipe: Recipe) -> nn.Module:
    """Convolutions, some with stride, and the mean of the last one's positions."""
    width, layers = recipe["shape"][0], []
    for outputs, kernel, stride in zip(recipe["widths"], recipe["kernels"], recipe["strides"], strict=True):
        layers.append(convolution(width, outputs, kernel, recipe["norm"], recipe["act"], stride))
        width = outputs
    return nn.Sequential(*layers, *pooled_classifier(width, recipe["classes"]))


def _draw_vgg(source: random.Random, shape: Shape) -> Recipe:
    return {
        "norm": source.choice(("batch", "batch", "none")),
        "act": "relu",
        "stages": _stages(source, 2, (1, 2), (8, 40)),
        "hidden": source.choice((24, 32, 48, 64)),
    }


def _build_vgg(recipe: Recipe) -> nn.Module:
    """Stages of 3 x 3 convolutions, each pooled at its end, then two linear layers (arXiv 1409.1556)."""
    width, height, breadth = recipe["shape"]
    layers: list[nn.Module] = []
    for outputs, depth in recipe["stages"]:
        for _ in range(depth):
            layers.append(convolution(width, outputs, 3, recipe["norm"], recipe["act"]))
            width = outputs
        layers.append(nn.MaxPool2d(2))
        height, breadth = height // 2, breadth // 2
    head = [nn.Linear(width * height * breadth, recipe["hidden"]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Linear(recipe["hidden"], recipe["classes"]))


# ---- residual networks


def _draw_staged(source: random.Random, shape: Shape) -> Recipe:
    return {
        "norm": "batch",
        "act": source.choice(("relu", "relu", "silu")),
        "stages": _stages(source, source.randint(2, 3), (1, 3), (6, 40)),
    }


def _draw_narrowing(source: random.Random, shape: Shape) -> Recipe:
    return _draw_staged(source, shape) | {"factor": source.choice((2, 4))}


def _draw_grouped(source: random.Random, shape: Shape) -> Recipe:
    groups = source.choice((2, 4, 8))
    recipe = _draw_staged(source, shape)
    stages = [[-(-width // (2 * groups)) * 2 * groups, depth] for width, depth in recipe["stages"]]
    return recipe | {"stages": stages, "groups": groups}


def _draw_gated(source: random.Random, shape: Shape) -> Recipe:
    return _draw_staged(source, shape) | {"reduction": source.choice((2, 4))}


def _build_staged(recipe: Recipe, block: Callable[[Recipe, int, int, int], nn.Module]) -> nn.Module:
    """A stem, then stages of blocks of which all but the first stage's begin with stride 2 (arXiv 1512.03385)."""
    width = recipe["stages"][0][0]
    layers: list[nn.Module] = [convolution(recipe["shape"][0], width, 3, recipe["norm"], recipe["act"])]
    for number, (outputs, depth) in enumerate(recipe["stages"]):
        for place in range(depth):
            layers.append(block(recipe, width, outputs, 2 if number and not place else 1))
            width = outputs
    return nn.Sequential(*layers, *pooled_classifier(width, recipe["classes"]))


def _joined(recipe: Recipe, body: nn.Module, inputs: int, outputs: int, stride: int) -> nn.Module:
    """A body with its shortcut, projected where the shapes differ, and the activation of the sum."""
    same = stride == 1 and inputs == outputs
    shortcut = None if same else convolution(inputs, outputs, 1, recipe["norm"], stride=stride)
    return nn.Sequential(blocks.Residual(body, shortcut), activation(recipe["act"]))


def _basic(recipe: Recipe, inputs: int, outputs: int, stride: int) -> nn.Module:
    norm, act = recipe["norm"], recipe["act"]
    body: list[nn.Module] = [
        convolution(inputs, outputs, 3, norm, act, stride),
        convolution(outputs, outputs, 3, norm),
    ]
    if "reduction" in recipe:
        body.append(blocks.SqueezeExcite(outputs, max(2, outputs // recipe["reduction"])))
    return _joined(recipe, nn.Sequential(*body), inputs, outputs, stride)


def _narrowing(recipe: Recipe, inputs: int, outputs: int, stride: int) -> nn.Module:
    """1 x 1, 3 x 3, 1 x 1 with fewer channels in the middle, which may be grouped (arXiv 1611.05431)."""
    norm, act, groups = recipe["norm"], recipe["act"], recipe.get("groups", 1)
    middle = max(2, outputs // recipe["factor"]) if groups == 1 else outputs // 2
    body = nn.Sequential(
        convolution(inputs, middle, 1, norm, act),
        convolution(middle, middle, 3, norm, act, stride, groups),
        convolution(middle, outputs, 1, norm),
    )
    return _joined(recipe, body, inputs, outputs, stride)


def _pre_activated(recipe: Recipe, inputs: int, outputs: int, stride: int) -> nn.Module:
    """Normalisation and activation before each convolution, nothing after the sum (arXiv 1603.05027)."""
    act = recipe["act"]
    body = nn.Sequential(
        *normalised("batch", inputs),
        activation(act),
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        *normalised("batch", outputs),
        activation(act),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
    )
    same = stride == 1 and inputs == outputs
    return blocks.Residual(body, None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False))


def _draw_inverted(source: random.Random, shape: Shape) -> Recipe:
    return {
        "norm": "batch",
        "act": source.choice(("relu", "silu")),
        "stages": _stages(source, source.randint(2, 3), (1, 3), (8, 28)),
        "expansion": source.choice((2, 3, 4)),
        "kernel": source.choice((3, 5)),
    }


def _inverted(recipe: Recipe, inputs: int, outputs: int, stride: int) -> nn.Module:
    """Expansion, depthwise convolution and linear projection, summed where shapes allow (arXiv 1801.04381)."""
    norm, act, hidden = recipe["norm"], recipe["act"], inputs * recipe["expansion"]
    body = nn.Sequential(
        convolution(inputs, hidden, 1, norm, act),
        convolution(hidden, hidden, recipe["kernel"], norm, act, stride, groups=hidden),
        convolution(hidden, outputs, 1, norm),
    )
    return blocks.Residual(body) if stride == 1 and inputs == outputs else body


def _draw_next(source: random.Random, shape: Shape) -> Recipe:
    return {
        "act": "gelu",
        "stages": _stages(source, 2, (1, 3), (10, 32)),
        "expansion": source.choice((2, 3, 4)),
        "kernel": source.choice((5, 7)),
        "scale": source.choice((0.1, 1.0)),
    }


def _build_next(recipe: Recipe) -> nn.Module:
    """Depthwise convolution, layer norm and a feed-forward part per block (Liu et al. 2022, arXiv 2201.03545)."""
    width = recipe["stages"][0][0]
    layers: list[nn.Module] = [nn.Conv2d(recipe["shape"][0], width, 3, 1, 1)]
    for number, (outputs, depth) in enumerate(recipe["stages"]):
        if number:
            layers += [_norm_of_images(width), nn.Conv2d(width, outputs, 2, 2)]
            width = outputs
        layers += [_next_block(recipe, width) for _ in range(depth)]
    return nn.Sequential(*layers, _norm_of_images(width), *pooled_classifier(width, recipe["classes"]))


def _next_block(recipe: Recipe, width: int) -> nn.Module:
    kernel = recipe["kernel"]
    body = nn.Sequential(
        nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width),
        blocks.Permute(0, 2, 3, 1),
        nn.LayerNorm(width),
        *feed_forward(width, recipe["expansion"] * width, recipe["act"]),
        blocks.LayerScale(width, recipe["scale"]),
        blocks.Permute(0, 3, 1, 2),
    )
    return blocks.Residual(body)


def _norm_of_images(width: int) -> nn.Module:
    return nn.Sequential(blocks.Permute(0, 2, 3, 1), nn.LayerNorm(width), blocks.Permute(0, 3, 1, 2))


def _draw_dense(source: random.Random, shape: Shape) -> Recipe:
    stages = source.randint(2, 3)
    return {
        "norm": "batch",
        "act": "relu",
        "stem": source.randint(8, 20),
        "growth": [source.randint(6, 16) for _ in range(stages)],
        "depths": [source.randint(1, 3) for _ in range(stages)],
    }


def _build_dense(recipe: Recipe) -> nn.Module:
    """Every layer adds channels to those before it; halved in number and size between stages (arXiv 1608.06993)."""
    norm, act, width = recipe["norm"], recipe["act"], recipe["stem"]
    layers: list[nn.Module] = [nn.Conv2d(recipe["shape"][0], width, 3, 1, 1, bias=False)]
    for number, (growth, depth) in enumerate(zip(recipe["growth"], recipe["depths"], strict=True)):
        if number:
            layers += [*normalised(norm, width), activation(act), nn.Conv2d(width, width // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            width //= 2
        for _ in range(depth):
            grown = nn.Conv2d(width, growth, 3, 1, 1, bias=False)
            layers.append(blocks.Concatenated(nn.Sequential(*normalised(norm, width), activation(act), grown)))
            width += growth
    return nn.Sequential(
        *layers, *normalised(norm, width), activation(act), *pooled_classifier(width, recipe["classes"])
    )


# ---- tokens


def _draw_vit(source: random.Random, shape: Shape) -> Recipe:
    heads = source.choice((2, 3, 4))
    return {
        "act": "gelu",
        "patch": source.choice((2, 3)),
        "heads": heads,
        "width": heads * source.choice((6, 8, 10, 12)),
        "expansion": source.choice((2, 3, 4)),
        "depth": source.randint(1, 4),
        "class_token": source.random() < 0.5,
    }


def _build_vit(recipe: Recipe) -> nn.Module:
    """Attention and a feed-forward part per block on patches of the image (arXiv 2010.11929)."""
    (channels, height, breadth), width, patch = recipe["shape"], recipe["width"], recipe["patch"]
    tokens = (height // patch) * (breadth // patch)
    layers = [*patches(channels, width, patch), blocks.Positions(tokens, width, recipe["class_token"])]
    for _ in range(recipe["depth"]):
        layers.append(blocks.Residual(nn.Sequential(nn.LayerNorm(width), blocks.Attention(width, recipe["heads"]))))
        layers.append(_mixed_width(recipe, width))
    pool = blocks.FirstToken() if recipe["class_token"] else blocks.MeanToken()
    return nn.Sequential(*layers, nn.LayerNorm(width), pool, nn.Linear(width, recipe["classes"]))


def _draw_mixer(source: random.Random, shape: Shape) -> Recipe:
    return {
        "act": "gelu",
        "patch": source.choice((2, 3)),
        "width": source.randint(12, 40),
        "hidden": source.randint(12, 48),
        "expansion": source.choice((2, 3)),
        "depth": source.randint(1, 4),
    }


def _build_mixer(recipe: Recipe) -> nn.Module:
    """Feed-forward parts over tokens and over channels in turn (Tolstikhin et al. 2021, arXiv 2105.01601)."""
    (channels, height, breadth), width, patch = recipe["shape"], recipe["width"], recipe["patch"]
    tokens, turn = (height // patch) * (breadth // patch), (0, 2, 1)
    layers = patches(channels, width, patch)
    for _ in range(recipe["depth"]):
        over_tokens = feed_forward(tokens, recipe["hidden"], recipe["act"])
        mixed = nn.Sequential(nn.LayerNorm(width), blocks.Permute(*turn), *over_tokens, blocks.Permute(*turn))
        layers += [blocks.Residual(mixed), _mixed_width(recipe, width)]
    return nn.Sequential(*layers, nn.LayerNorm(width), blocks.MeanToken(), nn.Linear(width, recipe["classes"]))


def _mixed_width(recipe: Recipe, width: int) -> nn.Module:
    hidden = recipe["expansion"] * width
    return blocks.Residual(nn.Sequential(nn.LayerNorm(width), *feed_forward(width, hidden, recipe["act"])))


def _draw_mlp(source: random.Random, shape: Shape) -> Recipe:
    return {
        "norm": source.choice(("batch", "layer", "none")),
        "act": source.choice(("relu", "gelu")),
        "widths": [source.randint(48, 320) for _ in range(source.randint(2, 4))],
    }


def _build_mlp(recipe: Recipe) -> nn.Module:
    channels, height, breadth = recipe["shape"]
    norms: dict[str, Callable[[int], list[nn.Module]]] = {
        "batch": lambda n: [nn.BatchNorm1d(n)],
        "layer": lambda n: [nn.LayerNorm(n)],
        "none": lambda n: [],
    }
    layers, width = [], channels * height * breadth
    for outputs in recipe["widths"]:
        layers += [nn.Linear(width, outputs), *norms[recipe["norm"]](outputs), activation(recipe["act"])]
        width = outputs
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, recipe["classes"]))


# ---- drawing


def _rising(source: random.Random, count: int, least: int, most: int) -> list[int]:
    """Widths from least to most, mostly rising with depth: sorted, one of them then drawn again."""
    widths = sorted(source.randint(least, most) for _ in range(count))
    widths[source.randrange(count)] = source.randint(least, most)
    return widths


def _stages(source: random.Random, count: int, depth: tuple[int, int], width: tuple[int, int]) -> list[list[int]]:
    """Pairs of width and depth."""
    return [[each, source.randint(*depth)] for each in _rising(source, count, *width)]


def _staged(block: Callable[[Recipe, int, int, int], nn.Module]) -> Callable[[Recipe], nn.Module]:
    return lambda recipe: _build_staged(recipe, block)


FAMILIES: dict[str, Family] = {
    "plain": Family(_draw_plain, _build_plain),
    "vgg": Family(_draw_vgg, _build_vgg),
    "residual": Family(_draw_staged, _staged(_basic)),
    "bottleneck": Family(_draw_narrowing, _staged(_narrowing)),
    "preactivation": Family(_draw_staged, _staged(_pre_activated)),
    "mobilenet": Family(_draw_inverted, _staged(_inverted)),
    "densenet": Family(_draw_dense, _build_dense),
    "resnext": Family(_draw_grouped, _staged(_narrowing)),
    "squeeze_excite": Family(_draw_gated, _staged(_basic)),
    "convnext": Family(_draw_next, _build_next),
    "vit": Family(_draw_vit, _build_vit),
    "mixer": Family(_draw_mixer, _build_mixer),
    "mlp": Family(_draw_mlp, _build_mlp),
}
