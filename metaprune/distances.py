"""How far the outputs of a changed network are from the dense network's, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from metaprune.graphs import structure
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Graph, Meta

LOGITS = "kl"
SQUARED = "mse"
WORST = "worst"
KINDS = (LOGITS, SQUARED, WORST)


def distortion(outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Distance of a network's outputs to those of the dense network.

    Where the first output is one row of logits per sample, the divergence KL(dense || pruned) of their softmax for
    each sample, shape [batch]; otherwise the squared error of all outputs over the dense ones' squares, shape [1].
    """
    if is_logits(dense[0]):
        mine, theirs = outputs[0].double(), dense[0].double()
        return F.kl_div(mine.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(1)
    return relative_error(outputs, dense)


def relative_error(outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Squared error of all outputs over the dense ones' squares, shape [1]."""
    error, size = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for a, b in zip(outputs, dense, strict=True):
        error += (a.double() - b.double()).square().sum().cpu()
        size += b.double().square().sum().cpu()
    return error / size.clamp_min(torch.finfo(torch.float64).tiny)


def squared_error(graph: Graph, outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Mean squared error over all elements of a sample's floating-point outputs, shape [batch].

    Outputs of a network whose batch can not change are those of one sample, shape [1].
    """
    total: Tensor | None = None
    count = 0
    for meta, mine, theirs in zip(_float_outputs(graph), outputs, dense, strict=True):
        rows = _by_sample(meta, mine.double() - theirs.double())
        error = rows.square().sum(1).cpu()
        total = error if total is None else total + error
        count += rows.shape[1]
    assert total is not None  # `metaprune.calibration.outputs_in` sees to it
    return total / max(1, count)


def over_samples(values: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Distances over samples, the last axis: the greatest for the worst case, else the mean."""
    found: NDArray[np.float64] = values.max(-1) if kind == WORST else values.mean(-1)
    return found


def is_logits(output: Tensor) -> bool:
    """Whether a network's first output is one row of logits per sample."""
    return output.ndim == 2 and output.shape[1] > 1


def kinds_of(graph: Graph, kinds: Sequence[str] | None = None) -> tuple[str, ...]:
    """The kinds of distance that are asked for, or all that a network has; raises `OptionError` for others."""
    meta = next(iter(_float_outputs(graph)), None)
    logits = meta is not None and len(meta.shape) == 2 and meta.shape[1] > 1
    if kinds is None:
        return KINDS if logits else KINDS[1:]
    if not isinstance(kinds, Sequence):
        raise OptionError(f"kinds: names are needed, not {kinds!r}")
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise OptionError(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
        if kind == LOGITS and not logits:
            raise OptionError(f"kinds: {kind!r} needs one row of logits per sample as the network's first output")
    if not chosen:
        raise OptionError("kinds: at least one is needed")
    return tuple(kind for kind in KINDS if kind in chosen)


def _float_outputs(graph: Graph) -> list[Meta]:
    """Shape and dtype of the floating-point outputs, in order."""
    metas = [graph.nodes[name].meta for name in structure.refs(graph.signature.output)]
    return [meta for meta in metas if isinstance(meta, Meta) and meta.dtype.is_floating_point]


def _by_sample(meta: Meta, value: Tensor) -> Tensor:
    """A value as one row per sample, shape [batch, elements]; one row where it does not grow with the batch."""
    if True not in meta.batched:
        return value.reshape(1, -1)
    return value.movedim(meta.batched.index(True), 0).flatten(1) if value.ndim > 1 else value.reshape(-1, 1)
