"""The native form: a copy of the user's own module, tensors and attributes edited. It counts once it is verified."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph, Meta

Edit = tuple[str, str, Any]
_ATTEMPTS = 8

_SHAPES: tuple[tuple[type[nn.Module], tuple[tuple[str, str, int], ...]], ...] = (
    (nn.Linear, (("out_features", "weight", 0), ("in_features", "weight", 1))),
    (nn.Embedding, (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1))),
    (nn.modules.batchnorm._NormBase, (("num_features", "weight", 0), ("num_features", "running_mean", 0))),
    (nn.GroupNorm, (("num_channels", "weight", 0),)),
    (nn.PReLU, (("num_parameters", "weight", 0),)),
    (
        nn.Bilinear,
        (("out_features", "weight", 0), ("in1_features", "weight", 1), ("in2_features", "weight", 2)),
    ),
    (nn.RNNBase, (("hidden_size", "weight_hh_l0", 1), ("input_size", "weight_ih_l0", 1))),
    (nn.MultiheadAttention, (("embed_dim", "out_proj.weight", 0),)),
)  # attribute, tensor, dimension: what torch's own layers say of their tensors


def candidates(graph: Graph, incision: Incision, whole: bool = False) -> Iterator[nn.Module]:
    """Native modules to be verified; an attribute that could mean two sizes gives several.

    Args:
        graph: The graph of the original.
        incision: The cut.
        whole: Whether tensors that were not cut come from the incision's graph too, not from the original.
    """
    source = graph.source
    if source is None:
        return
    base, choices = _attributes(source, incision)
    keys = list(choices)
    for values in islice(product(*(choices[key] for key in keys)), _ATTEMPTS):
        module = _copy(graph, source, incision, whole)
        edits = [*base, *((path, name, value) for (path, name), value in zip(keys, values, strict=True))]
        for path, name, value in edits:
            object.__setattr__(module.get_submodule(path), name, value)
        yield module


def _copy(graph: Graph, source: nn.Module, incision: Incision, whole: bool) -> nn.Module:
    """A deep copy whose tensors are the cut ones; the big ones are never copied whole.

    What was not cut is copied from the source, unless the graph holds other weights (see `Graph.with_values`).
    """
    memo: dict[int, Any] = {}
    copies: dict[int, torch.Tensor] = {}
    tensors = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        other = whole or graph.values.get(name) is not tensor
        if (other or name in incision.kept) and name in incision.graph.values and id(tensor) not in memo:
            cut = incision.graph.values[name]
            if name not in incision.kept:  # the graph's own tensor: one copy for all the names it has
                cut = _once(copies, cut)
            memo[id(tensor)] = (
                nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
            )
    return copy.deepcopy(source, memo)


def _once(copies: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """The copy of a tensor, made when it is asked for first."""
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone()
    return copies[id(tensor)]


def _attributes(source: nn.Module, incision: Incision) -> tuple[list[Edit], dict[tuple[str, str], list[Any]]]:
    """Edits that are certain, and attributes with several possible values."""
    base: list[Edit] = []
    choices: dict[tuple[str, str], list[Any]] = {}
    literals: dict[str, dict[Any, list[Any]]] = {}
    for path, old, new in incision.literals:
        while True:
            found = literals.setdefault(path, {}).setdefault(old, [])
            if new not in found:
                found.append(new)
            if not path:
                break
            path = path.rpartition(".")[0]
    for path, module in source.named_modules():
        known = {}
        for kind, rows in _SHAPES:
            if isinstance(module, kind):
                known.update(_from_shapes(path, rows, incision.kept))
        if isinstance(module, nn.modules.batchnorm._NormBase) and "num_features" not in known:
            known |= _bare_features(path, incision.graph)
        for name, value in known.items():
            base.append((path, name, value))
        if isinstance(module, nn.modules.conv._ConvNd):
            base += _convolution(path, module, incision.kept)
        own = literals.get(path, {})
        for name, value in list(vars(module).items()):
            if (
                name.startswith("_")
                or name in known
                or name == "training"
                or isinstance(module, nn.modules.conv._ConvNd)
            ):
                continue
            new = own.get((None, name), []) if value is None else _replaced(value, own)
            if len(new) == 1:
                base.append((path, name, new[0]))
            elif new:
                choices[(path, name)] = new
    return base, choices


def _replaced(value: Any, literals: Mapping[Any, list[Any]]) -> list[Any]:
    """What an attribute's value may become: numbers and tuples of numbers that the forward pass used."""
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        return literals.get(value, [])
    if isinstance(value, tuple) and value and all(type(v) is int for v in value) and any(v in literals for v in value):
        return [tuple(literals.get(v, [v])[0] for v in value)]
    return []


def _from_shapes(path: str, rows: tuple[tuple[str, str, int], ...], kept: Mapping[str, Any]) -> dict[str, int]:
    prefix = f"{path}." if path else ""
    return {name: len(kept[prefix + t][d]) for name, t, d in rows if d in kept.get(prefix + t, {})}


def _bare_features(path: str, cut: Graph) -> dict[str, int]:
    """Features of a norm without tensors: the channels of what it gives."""
    made = (node for node in cut.nodes.values() if node.module == path and isinstance(node.meta, Meta))
    return next(({"num_features": node.shape[1]} for node in made if node.base.endswith("_norm")), {})


def _convolution(path: str, module: nn.Module, kept: Mapping[str, Any]) -> list[Edit]:
    """Channels and groups of a convolution from the shape its weight has now."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    dims = kept.get(f"{path}.weight" if path else "weight", {})
    weight = module._parameters.get("weight")  # a parametrised weight would be computed, and may change buffers
    if weight is None:
        return []
    shape = list(weight.shape)
    for d, index in dims.items():
        shape[d] = len(index)
    if not dims:
        return []
    transposed = module.transposed
    if module.groups == 1:
        groups = 1
    elif 0 in dims:
        per_group = weight.shape[0] // module.groups
        groups = len(torch.unique(torch.from_numpy(dims[0]) // per_group))
    else:
        groups = module.groups
    first, second = shape[0], shape[1] * groups
    outputs, inputs = (second, first) if transposed else (first, second)
    return [(path, "groups", groups), (path, "in_channels", inputs), (path, "out_channels", outputs)]
