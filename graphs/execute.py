"""The one executor: runs a graph functionally and differentiably, with gates on units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from metaprune.graphs import operators, structure
from metaprune.graphs.errors import OptionError
from metaprune.graphs.gates import Gates, gated_call
from metaprune.graphs.ir import Graph, Momentum, Node, Training
from metaprune.graphs.structure import Ref

Watch = Callable[[Node, Any], None]


def run(
    graph: Graph,
    params: Mapping[str, torch.Tensor] | None,
    inputs: Any,
    gates: Mapping[str, torch.Tensor] | None = None,
    training: bool = False,
) -> Any:
    """Runs a network on inputs of the structure it was traced with.

    Args:
        graph: The graph.
        params: Tensors by name; those not given are the graph's own.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
        gates: For some groups one factor per unit, shape [size]. A gate multiplies its unit wherever the network sums
            over it, so 0 is a unit that is cut, 1 one that stays, and anything between is a differentiable mixture.
            Layer and group norms weigh their statistics by the gates, as the cut network takes them over the kept
            units.
        training: Whether batch norms use batch statistics and dropout drops.

    Returns:
        The network's output, in its original structure.
    """
    leaves = input_leaves(graph, inputs)
    values = dict(graph.values) if params is None else {**graph.values, **params}
    return execute(graph, values, leaves, Gates(graph.coupling, gates) if gates else None, training)


def execute(
    graph: Graph,
    values: Mapping[str, torch.Tensor],
    leaves: Mapping[str, torch.Tensor],
    gates: Gates | None = None,
    training: bool = False,
    watch: Watch | None = None,
    known: Mapping[str, Any] | None = None,
) -> Any:
    """Runs a graph on values of its input nodes; see `run`.

    `watch` sees every node's value. Nodes whose values are `known` are not computed.
    """
    known = known or {}
    env: dict[str, Any] = {}
    last = _last_uses(graph)
    for node in list(graph.nodes.values()):
        if node.name in known:
            env[node.name] = known[node.name]
        elif node.op == "input":
            env[node.name] = leaves[node.name]
        elif node.op == "tensor":
            env[node.name] = values[node.args[0]]
        elif gates is not None and node.name in gates.sites:
            env[node.name] = gated_call(node, gates, *arguments(node, env, values, training))
        else:
            env[node.name] = call(node, env, values, training)
        if watch is not None:
            watch(node, env[node.name])
        for name in last.get(node.name, ()):
            del env[name]
    return structure.put_together(graph.signature.output, lambda ref: env[ref.name])


def input_leaves(graph: Graph, inputs: Any) -> dict[str, torch.Tensor]:
    """Tensors of a call by input node; raises `OptionError` when the call does not fit the traced one."""
    if isinstance(inputs, Mapping):
        return bind_inputs(graph, (), inputs)
    return bind_inputs(graph, inputs if isinstance(inputs, (tuple, list)) else (inputs,), {})


def bind_inputs(graph: Graph, args: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of `f(*args, **kwargs)` by input node."""
    names, (positional, named) = graph.signature.names, graph.signature.spec
    expected = {names[i] if i < len(names) else str(i): spec for i, spec in enumerate(positional)} | dict(named)
    given = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)} | dict(kwargs)
    leaves: dict[str, torch.Tensor] = {}
    for name, spec in expected.items():
        if name not in given:
            if spec is None or not any(True for _ in structure.refs(spec)):
                continue
            raise OptionError(f"inputs: argument {name} is missing")
        _match(spec, given[name], name, leaves)
    extra = [name for name in given if name not in expected and given[name] is not None]
    if extra:
        raise OptionError(f"inputs: argument {extra[0]} was not part of the traced call")
    return leaves


def _match(spec: Any, value: Any, path: str, leaves: dict[str, torch.Tensor]) -> None:
    if isinstance(spec, Ref):
        if not isinstance(value, torch.Tensor):
            raise OptionError(f"inputs: {path} must be a tensor, not {type(value).__name__}")
        leaves[spec.name] = value
    elif isinstance(spec, structure.Record):
        for key, item in spec.items.items():
            _match(item, value[key] if isinstance(value, Mapping) else getattr(value, key), f"{path}.{key}", leaves)
    elif isinstance(spec, structure.Sequence):
        if not isinstance(value, (list, tuple)) or len(value) != len(spec.items):
            raise OptionError(f"inputs: {path} must hold {len(spec.items)} values")
        for i, item in enumerate(spec.items):
            _match(item, value[i], f"{path}[{i}]", leaves)


def call(node: Node, env: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], training: bool = False) -> Any:
    """What an operator's node gives, from the values of the nodes it reads."""
    args, kwargs = arguments(node, env, tensors, training)
    return operators.resolve(node.op)(*args, **kwargs)


def arguments(
    node: Node, env: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], training: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """What an operator's node is called with, from the values of the nodes it reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, Ref):
            return env[value.name]
        if isinstance(value, Training):
            return training
        if isinstance(value, Momentum):
            return value.value(tensors, training)
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return [plain(a) for a in node.args], {k: plain(v) for k, v in node.kwargs.items()}


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """For each node, the values nobody reads after it."""
    cached: dict[str, list[str]] | None = graph.__dict__.get("_last")
    if cached is None:
        cached, seen = {}, set(structure.refs(graph.signature.output))
        for node in reversed(list(graph.nodes.values())):
            for name in dict.fromkeys(node.refs()):
                if name not in seen:
                    seen.add(name)
                    cached.setdefault(node.name, []).append(name)
            if node.name not in seen:
                seen.add(node.name)
        graph.__dict__["_last"] = cached
    return cached
