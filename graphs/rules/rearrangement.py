"""Operators that move values between channels and positions in space, and windows that slide over an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metaprune.graphs.flow import Axes, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def _pin_space(state: Flow, axes: Axes) -> None:
    for axis in axes:
        state.pin(axis, "a position in space")


def _pixel_shuffle(state: Flow, node: Node, bound: Bound) -> Axes:
    """Blocks of r * r channels become one channel: they go together."""
    axes, block = state.of(bound["self"]), bound["upscale_factor"] ** 2
    _pin_space(state, axes[-2:])
    size = axes[-3].size // block
    channels = state.coarse(axes[-3], np.repeat(np.arange(size), block), size)
    return (*axes[:-3], channels, *(state.fixed(n, "a position in space") for n in node.shape[-2:]))


def _pixel_unshuffle(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, block = state.of(bound["self"]), bound["downscale_factor"] ** 2
    channels = axes[-3].take(np.repeat(np.arange(axes[-3].size), block))
    _pin_space(state, axes[-2:])
    return (*axes[:-3], channels, *(state.fixed(n, "a position in space") for n in node.shape[-2:]))


def _channel_shuffle(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, groups = state.of(bound["self"]), bound["groups"]
    outer, inner = state.split(axes[1], (groups, axes[1].size // groups), "channel_shuffle")
    return (axes[0], state.merge((inner, outer), "channel_shuffle"), *axes[2:])


def _shuffle_groups(cut: Cut, node: Node, bound: Bound) -> Bound:
    groups = bound["groups"]
    return {**bound, "groups": cut.factor(bound["self"], 1, (groups, cut.old_size(bound["self"], 1) // groups), 0)}


def _im2col(state: Flow, node: Node, bound: Bound) -> Axes:
    """Every channel becomes a block of channels, one for each position under the kernel."""
    axes = state.of(bound["self"])
    _pin_space(state, axes[-2:])
    block = node.shape[-2] // axes[-3].size
    channels = axes[-3].take(np.repeat(np.arange(axes[-3].size), block))
    return (*axes[:-3], channels, state.fixed(node.shape[-1], "a position in space"))


def _col2im(state: Flow, node: Node, bound: Bound) -> Axes:
    axes, size = state.of(bound["self"]), node.shape[-3]
    _pin_space(state, axes[-1:])
    channels = state.coarse(axes[-2], np.repeat(np.arange(size), axes[-2].size // size), size)
    return (*axes[:-2], channels, *(state.fixed(n, "a position in space") for n in node.shape[-2:]))


def _unfold(state: Flow, node: Node, bound: Bound) -> Axes:
    axes = list(state.of(bound["self"]))
    d = bound["dimension"] % len(axes)
    state.pin(axes[d], "a window slides over it")
    axes[d] = state.fixed(node.shape[d], "a window slides over it")
    return (*axes, state.fixed(node.shape[-1], "a position in a window"))


ROWS: dict[str, Rule] = {
    "aten.pixel_shuffle": Rule(_pixel_shuffle),
    "aten.pixel_unshuffle": Rule(_pixel_unshuffle),
    "aten.channel_shuffle": Rule(_channel_shuffle, _shuffle_groups),
    "aten.native_channel_shuffle": Rule(_channel_shuffle, _shuffle_groups),
    "aten.im2col": Rule(_im2col),
    "aten.col2im": Rule(_col2im),
    "aten.unfold": Rule(_unfold),
}
