"""Fresh weights for a network of any form, as if it had never been trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metaprune.evaluation import device_of
from metaprune.graphs import operators
from metaprune.graphs.ir import Graph, Momentum
from metaprune.graphs.structure import Ref

_RUNNING = {"running_mean": 0.0, "running_var": 1.0}


def reinitialised(module: nn.Module, graph: Graph, seed: int = 0) -> nn.Module:
    """A copy of a network with new weights.

    Layers that know how to initialise themselves (`reset_parameters`, as torch's own layers do) do so. All other
    parameters, such as those of a portable network, are set by their shape and use: tensors of two and more
    dimensions are drawn from a normal distribution of variance 2 / fan-in (He et al. 2015, arXiv 1502.01852, eq. 10),
    fan-in being the product of all dimensions but the first; shorter ones become 1 where they multiply (the weight of
    a normalisation, a factor) and 0 elsewhere. Running statistics become those of a standard normal. Other buffers
    stay as they are.

    Args:
        module: The network; it is not changed.
        graph: Its graph, under the module's tensor names: it tells what each tensor is for.
        seed: Of all that is drawn, on the CPU, so that it gives the same weights on every device; the caller's random
            state is left alone.
    """
    fresh = copy.deepcopy(module).cpu()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        done = {id(tensor) for tensor in _reset(fresh)}
        constants = _constants(graph)
        for name, parameter in fresh.named_parameters():
            if id(parameter) in done:
                continue
            if parameter.ndim > 1:
                parameter.normal_(0, math.sqrt(2 / parameter[0].numel()))
            else:
                parameter.fill_(constants.get(name, 0.0))
        for name, buffer in fresh.named_buffers():
            if id(buffer) not in done and name in constants:
                buffer.fill_(constants[name])
    return fresh.to(device_of(module))


def _reset(module: nn.Module) -> Iterator[Tensor]:
    """Has every layer that can initialise itself; yields the tensors of these layers."""
    for layer in module.modules():
        reset: Callable[[], None] | None = getattr(layer, "reset_parameters", None)
        if reset is not None:
            reset()
            yield from layer.parameters(recurse=False)
            yield from layer.buffers(recurse=False)


def _constants(graph: Graph) -> dict[str, float]:
    """What scales and running statistics start from, under all their names; the operators that read them tell."""
    found: dict[str, float] = {}
    for node in graph.nodes.values():
        if node.op in ("input", "tensor"):
            continue
        bound = operators.bind(node.op, node.args, dict(node.kwargs))
        ones = ("weight",) if "eps" in bound else ("self", "other") if node.base == "mul" else ()
        for argument, value in bound.items():
            if isinstance(value, Momentum):
                found[value.counter] = 0.0
            elif isinstance(value, Ref) and graph.nodes[value.name].op == "tensor":
                name = graph.nodes[value.name].args[0]
                if argument in _RUNNING:
                    found[name] = _RUNNING[argument]
                elif argument in ones and graph.tensors[name].kind == "parameter":
                    found[name] = 1.0
    return {alias: start for name, start in found.items() for alias in graph.tensors[name].aliases}
