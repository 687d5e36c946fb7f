"""The portable form: a graph as an `nn.Module` with the original names, call signature and output structure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from metaprune.graphs.execute import Watch, bind_inputs, execute
from metaprune.graphs.gates import Gates
from metaprune.graphs.incision import alive_units
from metaprune.graphs.ir import Graph, Training


class PortableModule(nn.Module):
    """Runs a graph with tensors of its own.

    It trains, switches between `train()` and `eval()` (batch norms and dropout follow), deep-copies, and can be
    exported again.

    Args:
        graph: The graph.
        shared: Whether its tensors are used as they are; else the module trains copies.
    """

    def __init__(self, graph: Graph, shared: bool = False) -> None:
        super().__init__()
        self._graph = Graph(graph.nodes, graph.tensors, graph.signature, {}, None, {}, graph.batch, graph.notes)
        self._watch: Watch | None = None
        self._places: dict[str, tuple[str, str]] = {}
        for info in graph.tensors.values():
            value = graph.values[info.name].detach()
            value = value if shared else value.clone()
            tensor: Any = nn.Parameter(value, requires_grad=info.requires_grad) if info.kind == "parameter" else value
            for alias in info.aliases:
                self._register(alias, tensor, info.persistent)
            self._places[info.name] = _split(info.name)
        self._counters = self._batch_counters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network as it was traced; raises `OptionError` for another call."""
        return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Mapping[str, Any], gates: Gates | None = None) -> Any:
        leaves = bind_inputs(self._graph, args, kwargs)
        if self.training:
            for name in self._counters:
                self._tensor(name).add_(1)
        return execute(self._graph, _Live(self), leaves, gates, self.training, self._watch)

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
        for node in self._graph.nodes.values():
            if any(isinstance(arg, Training) for arg in node.args):
                for name in node.refs():
                    source = self._graph.nodes[name]
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
    form = PortableModule(dataclasses.replace(graph, values=values_of(graph, module)), shared=True)
    trained = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    for name, parameter in form.named_parameters():
        parameter.requires_grad_(trained[name])
    return form


def watch_with(module: PortableModule, watch: Watch | None) -> None:
    """Has `watch` see the value of every node of each forward pass from now on; None for no one."""
    module._watch = watch


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


class GatedModule(nn.Module):
    """A network at full width of which some units are masked: hard gates, 0 or 1, multiply them.

    The masked network computes what the cut one would, on dense storage: which units are masked may change at any
    time, and a unit that comes back has the weights it had. Which units are masked follows the module to its device,
    and is no part of its state dict.

    Attributes:
        network: The network without gates; its tensors are those of this module.
    """

    def __init__(self, graph: Graph, straight_through: bool = False) -> None:
        """Starts with every unit open.

        Args:
            graph: The network; its tensors are copied.
            straight_through: Whether the gradient passes a gate as if it were open (Bengio et al. 2013, arXiv
                1308.3432, section 3.2), so that what computes a masked unit is trained too.
        """
        super().__init__()
        self.network = PortableModule(graph)
        self.network._graph.coupling = graph.coupling  # of the same nodes
        self._straight_through = straight_through
        self._open = {group.name: f"open{i}" for i, group in enumerate(graph.groups) if not group.pinned}
        device = next((value.device for value in graph.values.values()), None)
        for group, name in self._open.items():  # truth values: no change of dtype and no average touches them
            every = torch.ones(graph.group(group).size, dtype=torch.bool, device=device)
            self.register_buffer(name, every, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the masked network as it was traced; raises `OptionError` for another call."""
        return self.network._run(args, kwargs, self._gates())

    @property
    def values(self) -> Mapping[str, torch.Tensor]:
        """The tensors as they are now, by their names in the graph; see `Graph.with_values`."""
        return _Live(self.network)

    def mask(self, keep: Mapping[str, Iterable[int]]) -> None:
        """Masks the units that `keep` leaves out and opens all others.

        Args:
            keep: For each group of which units are masked, the numbers of those that stay, as in a `Plan`.

        Raises:
            PlanError: A group is unknown or pinned, a unit does not exist, or a group would lose all its units.
        """
        chosen = {name: tuple(units) for name, units in keep.items()}
        alive_units(self.network._graph, chosen)  # the checks of a cut
        for group, name in self._open.items():
            is_open = self.get_buffer(name)
            is_open.fill_(group not in chosen)
            is_open[list(chosen.get(group, ()))] = True

    def _gates(self) -> Gates | None:
        """Gates of the next call, in the widest dtype of the network's own: norms divide by their sum."""
        floats = [tensor.dtype for tensor in self.network.parameters() if tensor.dtype.is_floating_point]
        dtype = functools.reduce(torch.promote_types, floats, torch.float32)
        gates = {group: self.get_buffer(name).to(dtype) for group, name in self._open.items()}
        return Gates(self.network._graph.coupling, gates, self._straight_through) if gates else None


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
