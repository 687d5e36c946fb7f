"""Single operators as ONNX models: what torch's exporter makes of each call, apart from the network around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metaprune.graphs.calls import OperatorCall
from metaprune.graphs.errors import MetapruneError
from metaprune.graphs.onnx_export import exported

if TYPE_CHECKING:
    import onnx


def onnx_models(calls: Sequence[OperatorCall]) -> list[bytes]:
    """One serialised ONNX model per call.

    Operands that vary are inputs, in the order of the call; fixed ones are initialisers, as they are in a network. All
    calls are exported together, side by side, and taken apart again: an export costs more than what it exports.

    Raises:
        MetapruneError: The onnx extra is missing, or an operator, which is named, has no ONNX form.
    """
    try:
        return _exported(calls)
    except MetapruneError as error:
        if len(calls) == 1:
            raise MetapruneError(f"operator {calls[0].op}: {error}") from error
        half = len(calls) // 2
        return onnx_models(calls[:half]) + onnx_models(calls[half:])


def _exported(calls: Sequence[OperatorCall]) -> list[bytes]:
    # Copies, because one tensor in two places would be exported as one input.
    operands = tuple(operand.detach().clone() for call in calls for operand in call.operands)
    model = exported(_SideBySide(calls).eval(), operands, {}).model_proto
    inputs, outputs = list(model.graph.input), list(model.graph.output)
    if len(inputs) != len(operands) or len(outputs) != sum(len(call.results) for call in calls):
        raise MetapruneError("the ONNX form has other operands or results")
    parts = _Parts(model)
    found = []
    for call in calls:
        count, results = len(call.operands), len(call.results)
        found.append(parts.model(call, inputs[:count], outputs[:results]).SerializeToString())
        del inputs[:count], outputs[:results]
    return found


class _SideBySide(nn.Module):
    """Runs calls that have nothing to do with each other, on the operands of all of them."""

    def __init__(self, calls: Sequence[OperatorCall]) -> None:
        super().__init__()
        self._calls = calls

    def forward(self, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        start = 0
        for call in self._calls:
            end = start + len(call.operands)
            value = call.bound(operands[start:end])()
            results += [value] if isinstance(value, torch.Tensor) else [t for t in value if t is not None]
            start = end
        return tuple(results)


class _Parts:
    """Takes an ONNX model apart, from outputs back to inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._makers = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def model(self, call: OperatorCall, inputs: Iterable[Any], outputs: Iterable[Any]) -> onnx.ModelProto:
        """The model of one call."""
        import onnx

        chosen, constants = self._behind([output.name for output in outputs])
        model = onnx.ModelProto(ir_version=self._model.ir_version)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = "call"
        model.graph.node.extend(self._model.graph.node[i] for i in chosen)
        model.graph.initializer.extend(self._constants[name] for name in constants)
        model.graph.output.extend(outputs)
        for value, operand, fixed in zip(inputs, call.operands, call.fixed, strict=True):
            if fixed:
                model.graph.initializer.append(onnx.numpy_helper.from_array(operand.detach().numpy(), value.name))
            else:
                model.graph.input.append(value)
        return model

    def _behind(self, names: list[str]) -> tuple[list[int], list[str]]:
        """Nodes and constants that values follow from: numbers of nodes in order, names of constants."""
        nodes: set[int] = set()
        constants: list[str] = []
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in self._constants and name not in constants:
                constants.append(name)
            maker = self._makers.get(name)
            if maker is not None and maker not in nodes:
                nodes.add(maker)
                waiting += self._model.graph.node[maker].input
        return sorted(nodes), constants
