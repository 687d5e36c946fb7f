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
from metaprune.graphs.portable import PortableModule


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
    if isinstance(module, PortableModule) and not kwargs:  # its forward takes any arguments, as one tuple
        shapes = (shapes,)
    training = module.training
    try:
        program = exported(module.eval(), args, kwargs, shapes)
    finally:
        module.train(training)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any = None) -> Any:
    """The `torch.onnx.ONNXProgram` of a module; raises `MetapruneError` without the onnx extra, or when it fails.

    Args:
        module: In eval mode.
        args: Example arguments.
        kwargs: Example keyword arguments.
        shapes: What `torch.onnx.export` takes as `dynamic_shapes`; None when all sizes are as in the example.
    """
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise MetapruneError("ONNX export needs the onnx extra: pip install 'metaprune[onnx]'") from None
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # speaks of an absent torchvision
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        raise MetapruneError(
            f"ONNX export failed: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from error
    finally:
        log.setLevel(level)
