"""Calibration data: samples, batches for the input nodes of a graph, and noise where there are no data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from metaprune.data import Loader
from metaprune.graphs.errors import OptionError, check_seed
from metaprune.graphs.execute import execute, input_leaves
from metaprune.graphs.ir import Graph, Meta
from metaprune.graphs.structure import put_together, take_apart

NOISE = "noise"
Leaves: TypeAlias = dict[str, Tensor]
"""Values of a graph's input nodes, by node."""

ROWS, ROWS_PER_COLUMN = 16384, 8
"""Rows that second moments are taken over: so many, or so many for each column if those are more."""


def samples_of(graph: Graph, data: Any, seed: int = 0) -> Iterator[Any]:
    """Single samples, inputs of batch one, without end for noise.

    Of a network that insists on a batch of several, that batch is one sample; what a batch of data has beyond a
    multiple of it is left out.

    Args:
        graph: The network they are for.
        data: Batches of inputs or of (inputs, labels); `"noise"` for standard normal inputs of the traced shapes.
        seed: Of the noise.

    Raises:
        OptionError: The data are of another kind, a batch holds no tensor, or noise is asked for integer inputs.
    """
    if isinstance(data, str) and data == NOISE:
        yield from _noise(graph, seed)
        return
    if isinstance(data, (Tensor, str)) or not isinstance(data, Iterable):
        raise OptionError(f"data: batches are needed (a loader or a list) or 'noise', not {type(data).__name__}")
    rows = fixed_batch(graph) or 1
    for batch in data:
        inputs, size = inputs_of(graph, batch)
        for first in range(0, size - rows + 1, rows):
            yield _sample(inputs, slice(first, first + rows), size)


def inputs_of(graph: Graph, batch: Any) -> tuple[Any, int]:
    """The inputs of a batch, which may be a pair of inputs and labels, and the number of its samples.

    A pair is (inputs, labels) for a network of one argument, and where its first half is no tensor itself.

    Raises:
        OptionError: The batch holds no tensor.
    """
    positional, named = graph.signature.spec
    arguments = len(positional) + len(named)
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    inputs = batch[0] if pair and (arguments == 1 or not isinstance(batch[0], Tensor)) else batch
    leaves = tensors_in(inputs)
    if not leaves:
        raise OptionError("data: a batch holds no tensor")
    return inputs, len(leaves[0])


class Unlabelled:
    """A loader of inputs, or of (inputs, labels), as one of (inputs, zeros): no label is passed on.

    Attributes:
        generator: The loader's own source of randomness, if it has one.
    """

    def __init__(self, graph: Graph, loader: Loader) -> None:
        self.generator = getattr(loader, "generator", None)
        self._graph = graph
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self._loader:
            inputs, size = inputs_of(self._graph, batch)
            yield inputs, torch.zeros(size)


def repeatable(data: Any) -> Any:
    """Data that can be gone through twice: an iterator's batches in a list, all else as it is."""
    return list(data) if isinstance(data, Iterator) else data


def batches_of(graph: Graph, data: Any, size: int, samples: int, seed: int = 0) -> list[Leaves]:
    """Batches of at most `size` samples, as values of the graph's input nodes on the graph's device.

    Raises:
        OptionError: See `samples_of`; or there are no samples, or they do not fit the network.
    """
    return joined(graph, leaves_of(graph, data, samples, seed), size)


def leaves_of(graph: Graph, data: Any, samples: int, seed: int = 0) -> list[Leaves]:
    """The first samples, at most so many, as values of the graph's input nodes; for errors see `batches_of`."""
    if type(samples) is not int or samples < 1:
        raise OptionError(f"samples: must be a positive whole number, not {samples!r}")
    check_seed(seed)
    rows = fixed_batch(graph) or 1
    leaves = [input_leaves(graph, s) for s in islice(samples_of(graph, data, seed), max(1, samples // rows))]
    if not leaves:
        enough = "" if rows == 1 else f" in batches of {rows} at least, which the network insists on"
        raise OptionError(f"data: there are no samples{enough}")
    _check_fit(graph, leaves[0])
    return leaves


def joined(graph: Graph, leaves: Sequence[Leaves], size: int) -> list[Leaves]:
    """Samples put together to batches of at most `size`, on the graph's device; for errors see `batches_of`.

    Those of a network that insists on its batch stay as they are.
    """
    size = 1 if fixed_batch(graph) else size
    device = next((value.device for value in graph.values.values()), torch.device("cpu"))
    found = []
    for first in range(0, len(leaves), size):
        part = leaves[first : first + size]
        found.append({name: _joined(graph, name, [leaf[name] for leaf in part]).to(device) for name in part[0]})
    return found


def fixed_batch(graph: Graph) -> int:
    """Batch that a network insists on; 0 when any will do."""
    metas = [node.meta for node in graph.nodes.values() if node.op == "input" and isinstance(node.meta, Meta)]
    if any(any(meta.batched) for meta in metas):
        return 0
    return max((meta.shape[0] for meta in metas if meta.shape), default=1)


def share_of_rows(width: int, parts: int, rows: int = ROWS, rows_per_column: int = ROWS_PER_COLUMN) -> int:
    """Rows that each of several parts of the data gives to second moments of so many columns.

    All parts together give `rows`, or `rows_per_column` for each column where that is more.
    """
    return -(-max(rows, rows_per_column * width) // parts)


def some_rows(count: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """Numbers, in order, of at most `most` rows out of `count`, drawn at random; None for all rows."""
    if count <= most:
        return None
    return torch.randperm(count, generator=generator)[:most].sort().values.to(device)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    found: list[Tensor] = []
    take_apart(value, found.append, lambda _, other: None)
    return found


def floats_in(value: Any) -> list[Tensor]:
    """All floating-point tensors of a nested value, in order."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def outputs_in(output: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output; raises `OptionError` when there are none."""
    found = floats_in(output)
    if not found:
        raise OptionError("data: the network gives no floating-point output")
    return found


def _check_fit(graph: Graph, leaves: Leaves) -> None:
    """Raises `OptionError` for a sample that is unlike the traced ones, and that the network does not run on."""
    if all(_alike(graph.nodes[name].meta, value) for name, value in leaves.items()):
        return
    if any(value.is_meta for value in graph.values.values()):
        return
    (batch,) = joined(graph, [leaves], 1)
    try:
        with torch.no_grad():
            execute(graph, graph.values, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        text = " ".join(str(error).split())
        raise OptionError(f"data: a sample does not fit the network that was traced: {text}") from error


def _alike(meta: object, value: Tensor) -> bool:
    """Whether a value has the type and the shape of the traced one, but for dimensions that are free."""
    if not isinstance(meta, Meta) or meta.dtype != value.dtype or len(meta.shape) != value.ndim:
        return False
    free = meta.batched or (False,) * value.ndim
    return all(any_ or a == b for a, b, any_ in zip(meta.shape, value.shape, free, strict=True))


def _joined(graph: Graph, name: str, values: list[Tensor]) -> Tensor:
    meta = graph.nodes[name].meta
    rows = values[0].ndim > 0 and (not isinstance(meta, Meta) or not meta.batched or meta.batched[0])
    if not rows or (len(values) > 1 and values[0].shape[1:] != values[-1].shape[1:]):
        if len(values) > 1 and rows:
            raise OptionError("data: the samples are of different shapes")
        return values[0]
    return torch.cat(values)


def _sample(inputs: Any, rows: slice, size: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[rows] if inputs.ndim and len(inputs) == size else inputs
    if isinstance(inputs, Mapping):
        return {key: _sample(value, rows, size) for key, value in inputs.items()}
    return tuple(_sample(value, rows, size) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _noise(graph: Graph, seed: int) -> Iterator[Any]:
    """Standard normal inputs, one sample at a time, in the structure of the traced call."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in graph.example.items():
        if not value.is_floating_point():
            raise OptionError(f"data: noise can not stand for input {name} of type {value.dtype}")

    def draw(name: str) -> Tensor:
        example, meta = graph.example[name], graph.nodes[name].meta
        batched = isinstance(meta, Meta) and meta.batched and meta.batched[0]
        shape = (1, *example.shape[1:]) if batched else tuple(example.shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(example.device, example.dtype)

    positional, named = graph.signature.spec
    while True:
        if named:
            names = dict(zip(graph.signature.names, positional, strict=False)) | dict(named)
            yield {key: put_together(value, lambda ref: draw(ref.name)) for key, value in names.items()}
        else:
            yield tuple(put_together(value, lambda ref: draw(ref.name)) for value in positional)
