"""The portable form: a graph as an `nn.Module` with the original names, call signature and output structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metaprune.graphs.execute import Watch, bind_inputs, execute
from metaprune.graphs.ir import Graph, Training


class PortableModule(nn.Module):
    """Runs a graph with tensors of its own.

    It trains, switches between `train()` and `eval()` (batch norms and dropout follow), deep-copies, and can be
    exported again.

    Attributes:
        graph: The graph, without values.
        watch: Sees the value of every node of each forward pass, when there is one.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = Graph(graph.nodes, graph.tensors, graph.signature, {}, None, {}, graph.batch, graph.notes)
        self.watch: Watch | None = None
        self._places: dict[str, tuple[str, str]] = {}
        for info in graph.tensors.values():
            value = graph.values[info.name].detach()
            tensor: Any = nn.Parameter(value, requires_grad=info.requires_grad) if info.kind == "parameter" else value
            for alias in info.aliases:
                self._register(alias, tensor, info.persistent)
            self._places[info.name] = _split(info.name)
        self._counters = self._batch_counters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network as it was traced; raises `OptionError` for another call."""
        leaves = bind_inputs(self.graph, args, kwargs)
        if self.training:
            for name in self._counters:
                self._tensor(name).add_(1)
        return execute(self.graph, _Live(self), leaves, training=self.training, watch=self.watch)

    def _tensor(self, name: str) -> torch.Tensor:
        path, leaf = self._places[name]
        found: torch.Tensor = getattr(self.get_submodule(path), leaf)
        return found

    def _register(self, name: str, tensor: Any, persistent: bool) -> None:
        path, leaf = _split(name)
        module: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor, persistent=persistent)

    def _batch_counters(self) -> list[str]:
        """Step counters of the batch norms that follow the network's mode."""
        found: list[str] = []
        for node in self.graph.nodes.values():
            if any(isinstance(arg, Training) for arg in node.args):
                for name in node.refs():
                    source = self.graph.nodes[name]
                    if source.op == "tensor" and source.args[0].endswith("running_mean"):
                        found.append(source.args[0].removesuffix("running_mean") + "num_batches_tracked")
        return [name for name in dict.fromkeys(found) if name in self._places]


def values_of(graph: Graph, module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a graph reads, by name, as a module made from it holds them now; it may lack constants."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
    return {name: own[name].detach() if name in own else value.to(device) for name, value in graph.values.items()}


def sharing(graph: Graph, module: nn.Module) -> PortableModule:
    """The portable form of a module made from the graph, on the module's own tensors: to train one trains both."""
    form = PortableModule(dataclasses.replace(graph, values=values_of(graph, module)))
    trained = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    for name, parameter in form.named_parameters():
        parameter.requires_grad_(trained[name])
    return form


class _Live(Mapping[str, torch.Tensor]):
    """The module's tensors as they are now, by name."""

    def __init__(self, module: PortableModule) -> None:
        self._module = module

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._module._tensor(name)

    def __iter__(self) -> Any:
        return iter(self._module._places)

    def __len__(self) -> int:
        return len(self._module._places)


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
