"""To ONNX: a pruned module through torch's exporter, parameter names kept, batch dynamic."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaprune.graphs import structure
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.ir import Graph


def export_onnx(path: Path, graph: Graph, module: nn.Module) -> None:
    """Writes an ONNX file; raises `MetapruneError` when the onnx extra is missing or the export fails."""
    positional, named = graph.signature.spec
    find: Any = lambda ref: graph.example[ref.name]  # noqa: E731
    args = tuple(structure.put_together(a, find) for a in positional)
    kwargs = {k: structure.put_together(v, find) for k, v in named.items()}
    batch = torch.export.Dim.AUTO

    def dims(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] > 1 else None

    shapes: Any = {k: dims(v) for k, v in kwargs.items()} if kwargs else tuple(dims(a) for a in args)
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise MetapruneError("ONNX export needs the onnx extra: pip install 'metaprune[onnx]'") from None
    training = module.training
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # speaks of an absent torchvision
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), args, kwargs=kwargs, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        raise MetapruneError(
            f"ONNX export failed: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from error
    finally:
        log.setLevel(level)
        module.train(training)
    assert program is not None
    program.save(str(path))
