"""The engines that the benchmarks compare: `prune(model, inputs, note)` halves the width of everything, without hints.

Both rank units by the L2 norm of their weights and keep half of every group.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import main_output, output_layers
from torch import nn

Note = Callable[..., None]


class Refused(Exception):
    """The engine declined on purpose and said why."""


@dataclass
class Result:
    """A pruned network.

    Attributes:
        module: The network.
        kept: Kept positions by tensor name and dimension; None if the engine does not state them.
        facts: What else is worth writing down.
    """

    module: nn.Module
    kept: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


@contextmanager
def timed(note: Note, name: str) -> Any:
    """Notes the CPU seconds of a block."""
    start = time.process_time()
    yield
    note(**{name: round(time.process_time() - start, 4)})


def metaprune(model: nn.Module, inputs: Any, note: Note) -> Result:
    """The public functions `trace` and `prune`; nothing is told about the network."""
    import metaprune

    try:
        with timed(note, "seconds_trace"):
            graph = metaprune.trace(model, inputs)
        with timed(note, "seconds_groups"):
            groups = list(graph.groups)
        pinned = [group for group in groups if group.pinned]
        reasons: dict[str, int] = {}
        for group in pinned:
            reasons[group.reason] = reasons.get(group.reason, 0) + group.size
        note(
            groups=len(groups),
            units=sum(group.size for group in groups),
            units_pinned=sum(group.size for group in pinned),
            pins=dict(sorted(reasons.items(), key=lambda pair: -pair[1])[:6]),
            macs_stated_before=graph.cost().macs,
        )
        with timed(note, "seconds_prune"):
            pruned = metaprune.prune(graph, budget="width=0.5", criterion="magnitude", allocator="uniform")
    except metaprune.MetapruneError as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    facts = {
        "kind": pruned.kind,
        "macs_stated_after": pruned.cost["after"].macs,
        "params_stated_after": pruned.cost["after"].params,
        "notes": [note for note in pruned.notes if "fails the certificate" in note],
    }
    return Result(pruned.module, pruned.kept, facts)


def torch_pruning(model: nn.Module, inputs: Any, note: Note) -> Result:
    """Torch-Pruning's `BasePruner` in place; the output layers are told, as it asks for."""
    import torch_pruning as tp

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    example = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
    with timed(note, "seconds_groups"):
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=output_layers(model),
            output_transform=lambda output: main_output(output).sum(),
            in_channel_groups={},  # fresh ones: the defaults are shared between pruners
            out_channel_groups={},
            num_heads={},
        )
    with timed(note, "seconds_prune"):
        for group in pruner.step(interactive=True):
            group.prune()
    return Result(model)


ENGINES: dict[str, Callable[[nn.Module, Any, Note], Result]] = {"metaprune": metaprune, "torch_pruning": torch_pruning}


def warm(engine: str) -> None:
    """Imports the engine and prunes a tiny network, so that first-use costs fall on no network of the suite."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 13)).eval()
    ENGINES[engine](tiny, (torch.randn(2, 3, 8, 8),), lambda **facts: None)
