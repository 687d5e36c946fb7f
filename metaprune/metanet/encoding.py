"""What the metanetwork is told about a network: features of unit sets, tensors and positions, and scaled weights.

All features are free of units: logarithms to base ten, relative depths, shares, and ratios to a tensor's root mean
square. None depends on the order of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

from metaprune.graphs.coupling import ROLES
from metaprune.graphs.errors import GraphError
from metaprune.metanet.canonical import canonical
from metaprune.metanet.layout import Part, UnitSet
from metaprune.metanet.reading import ARGUMENTS, FAMILIES
from metaprune.metanet.weight_graph import WeightGraph

SET = ("log size", "log granularity", "first depth", "last depth", "log MAC share of a unit", "free")
TENSOR = ("log outputs", "log inputs", "log kernel", "depth", "log MAC share", "log rms")
POSITION = ("relative mean", "log relative rms")
_LEAST = 1e-8  # below it a logarithm stops
_FAINT = 1e-4  # the same for a position's part of a tensor
_KEPT = 1 << 16  # elements of a block up to which its moments are kept whatever its kernel
ROWS = 1 << 20  # elements of a block that are worked on at a time


@dataclass(frozen=True, eq=False)
class Encoding:
    """Features and weights of one network; T counts blocks, then vectors.

    Attributes:
        sets: Features `SET` of the unit sets, shape [S, 6].
        kinds: Their kinds as indices into the graph's roles, shape [S].
        sizes: Their sizes, shape [S].
        tensors: Features `TENSOR`, shape [T, 6].
        families: Of the operators that read them, as indices, shape [T].
        arguments: The arguments they are, as indices, shape [T].
        outputs: Features `POSITION` of all blocks' outputs, shape [positions, 2].
        inputs: The same of all blocks' inputs.
        lines: The same of all vectors.
        blocks: Weights of the blocks in front of norms brought to unit rms by output, [C_out, C_in, K] each.
        at_outputs: For each position of all blocks' outputs ||w||_2, ||w||_1 and ||w||_2^2 over the weights that meet
            there, 1 for weights of zero, shape [positions, 3].
        at_inputs: The same of all blocks' inputs.
        moments: For blocks where they are few, the sums of w, |w| and w^2 over K, shape [3, C_out, C_in].
    """

    sets: Tensor
    kinds: Tensor
    sizes: Tensor
    tensors: Tensor
    families: Tensor
    arguments: Tensor
    outputs: Tensor
    inputs: Tensor
    lines: Tensor
    blocks: tuple[Tensor, ...]
    at_outputs: Tensor
    at_inputs: Tensor
    moments: tuple[Tensor | None, ...]


@torch.no_grad()
def encode(graph: WeightGraph) -> Encoding:
    """Reads a network once; what it gives serves any number of forward passes.

    Raises:
        GraphError: A tensor that units own holds a value that is not finite.
    """
    graph = canonical(graph)
    parts = [*graph.blocks, *graph.vectors]
    values = [_real(graph.values[part.name]) for part in parts]
    stats = [_Statistics.of(part.name, value) for part, value in zip(parts, values, strict=True)]
    count = len(graph.blocks)
    kinds = [ROLES.index(units.kind) for units in graph.units]
    return Encoding(
        torch.tensor([_of_set(units) for units in graph.units], dtype=torch.float64).reshape(-1, len(SET)),
        torch.tensor(kinds, dtype=torch.long),
        torch.tensor([units.size for units in graph.units], dtype=torch.long),
        torch.tensor([_of_tensor(*pair) for pair in zip(parts, stats, strict=True)], dtype=torch.float64).reshape(
            -1, len(TENSOR)
        ),
        torch.tensor([FAMILIES.index(part.reading.family) for part in parts], dtype=torch.long),
        torch.tensor([ARGUMENTS.index(part.reading.argument) for part in parts], dtype=torch.long),
        _stacked([s.rows for s in stats[:count]]),
        _stacked([s.columns for s in stats[:count]]),
        _stacked([s.rows for s in stats[count:]]),
        tuple(values[:count]),
        _stacked([s.at_rows for s in stats[:count]], 3),
        _stacked([s.at_columns for s in stats[:count]], 3),
        tuple(moments(v) if v.shape[2] > 2 or v.numel() <= _KEPT else None for v in values[:count]),
    )


def moments(value: Tensor) -> Tensor:
    """Sums of w, |w| and w^2 over the kernel of a block [R, C, K]; shape [3, R, C]."""
    if value.shape[2] == 1:
        flat = value[..., 0]
        return torch.stack((flat, flat.abs(), flat.square()))
    ones = value.new_ones(value.shape[2], 1)
    parts = [
        torch.stack([(part @ ones)[..., 0] for part in (rows, rows.abs(), rows.square())])
        for rows in torch.split(value, max(1, ROWS // (value.shape[1] * value.shape[2])))
    ]
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Of one tensor seen as [R, C, K]: its rms, and of its rows and columns the features `POSITION` and the norms."""

    rms: float
    rows: Tensor
    columns: Tensor
    at_rows: Tensor
    at_columns: Tensor

    @staticmethod
    def of(name: str, value: Tensor) -> _Statistics:
        """Sums rows a chunk at a time.

        Raises:
            GraphError: The tensor holds a value that is not finite.
        """
        value = value if value.ndim == 3 else value[:, None]
        count, width, kernel = value.shape
        columns = value.new_zeros(3, width, dtype=torch.float64)
        rows = []
        for part in torch.split(value, max(1, ROWS // (width * kernel))):
            powers = moments(part).double()  # [3, rows, C]
            rows.append(powers.sum(2))
            columns += powers.sum(1)
        by_row = torch.cat(rows, 1)
        rms = float(by_row[2].sum() / max(1, value.numel())) ** 0.5
        if not torch.isfinite(torch.tensor(rms)):
            raise GraphError(f"tensor {name} holds a value that is not finite")
        return _Statistics(
            rms,
            _of_position(by_row, width * kernel, rms),
            _of_position(columns, count * kernel, rms),
            _norms(by_row),
            _norms(columns),
        )


def _of_set(units: UnitSet) -> list[float]:
    sizes = [log10(units.size), log10(units.granularity)]
    return [*sizes, units.first, units.last, log10(max(units.share, _LEAST)), float(units.free)]


def _of_tensor(part: Part, stats: _Statistics) -> list[float]:
    outputs, inputs = (len(stats.rows), len(stats.columns))
    kernel = max(1, torch.Size(part.shape).numel() // (outputs * inputs))
    sizes = [log10(outputs), log10(inputs), log10(kernel)]
    return [*sizes, part.reading.depth, log10(max(part.reading.share, _LEAST)), log10(max(stats.rms, _LEAST))]


def _of_position(sums: Tensor, count: int, rms: float) -> Tensor:
    """Mean and log rms of each position in units of the tensor's rms, from sums of w, |w| and w^2 over `count`."""
    scale = rms or 1.0
    mean = sums[0] / (count**0.5 * scale)
    spread = (sums[2] / count).sqrt() / scale
    return torch.stack([mean, spread.clamp_min(_FAINT).log10()], 1)


def _norms(sums: Tensor) -> Tensor:
    """The norms ||w||_2, ||w||_1 and ||w||_2^2 from sums of w, |w| and w^2 [3, positions]; 1 where all is zero."""
    norms = torch.stack([sums[2].sqrt(), sums[1], sums[2]], 1)
    return norms.where(norms > 0, 1.0)


def _stacked(tables: Sequence[Tensor], width: int = len(POSITION)) -> Tensor:
    return torch.cat([torch.zeros(0, width, dtype=torch.float64), *(table.cpu() for table in tables)])


def _real(value: Tensor) -> Tensor:
    """Complex numbers as pairs along the kernel; other tensors in floating point."""
    if value.is_complex():
        value = torch.view_as_real(value).flatten(-2)
    return value if value.is_floating_point() else value.double()
