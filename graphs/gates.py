"""Gates: one factor per unit, applied where the network sums over the unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metaprune.graphs import operators
from metaprune.graphs.errors import OptionError
from metaprune.graphs.ir import Node
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.coupling import Coupling
    from metaprune.graphs.flow import Site


class Gates:
    """Gate values of a graph's groups, spread over the axes they act on.

    Args:
        coupling: The analysis of the graph.
        gates: For some groups one factor per unit, shape [size].
        straight_through: Whether the gradient passes a gate unchanged, as if it were 1.
    """

    def __init__(self, coupling: Coupling, gates: Mapping[str, torch.Tensor], straight_through: bool = False) -> None:
        pieces: list[torch.Tensor] = []
        reference = next(iter(gates.values()))
        touched = set()
        for name, gate in gates.items():
            group = coupling.by_name(name)
            if gate.shape != (group.size,):
                raise OptionError(f"gates: group {name} has {group.size} units, its gate shape {tuple(gate.shape)}")
            touched.add(coupling.number(name))
        for group in coupling.groups:
            pieces.append(gates[group.name] if group.name in gates else reference.new_ones(group.size))
        starts = torch.tensor([0, *(g.size for g in coupling.groups)]).cumsum(0)
        owner, rank = torch.from_numpy(coupling.owner), torch.from_numpy(coupling.rank)
        place = torch.where(owner >= 0, starts[owner.clamp(min=0)] + rank, starts[-1])
        self._all = torch.cat([*pieces, reference.new_ones(1)])[place.to(reference.device)]
        self.straight_through = straight_through
        self._coupling = coupling
        self._spread: dict[int, torch.Tensor | None] = {}
        self._touched = np.array(sorted(touched))
        self.sites: dict[str, list[Site]] = coupling.flow.sites

    @property
    def nodes(self) -> list[str]:
        """Nodes that a gate acts on."""
        acting = (name for name, sites in self.sites.items() if any(self._acts(site) for site in sites))
        return list(acting)

    def along(self, name: str, dim: int) -> torch.Tensor | None:
        """Gate at each position of a value's axis, shape [size]; None where no gate acts."""
        axis = self._coupling.flow.axes[name][dim]
        if axis.ids is None:
            return None
        key = id(axis.ids)
        if key not in self._spread:
            result: torch.Tensor | None = None
            for units in self._coupling.units(axis):
                if not np.isin(self._coupling.owner[units[units >= 0]], self._touched).any():
                    continue
                found = torch.from_numpy(units).to(self._all.device)
                factor = torch.where(found >= 0, self._all[found.clamp(min=0)], self._all.new_ones(()))
                result = factor if result is None else result * factor
            self._spread[key] = result
        return self._spread[key]

    def _acts(self, site: Site) -> bool:
        return self.along(site.arg, site.dim) is not None


def gated_call(node: Node, gates: Gates, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Runs one node with its operands gated along the axes it sums over."""
    statistics: torch.Tensor | None = None
    for site in gates.sites[node.name]:
        gate = gates.along(site.arg, site.dim)
        if gate is None:
            continue
        if site.statistics:
            statistics = gate
            continue
        through = gates.straight_through
        args = [_multiplied(raw, value, site, gate, through) for raw, value in zip(node.args, args, strict=True)]
        kwargs = {k: _multiplied(node.kwargs[k], v, site, gate, through) for k, v in kwargs.items()}
    if statistics is None:
        return operators.resolve(node.op)(*args, **kwargs)
    bound = operators.bind(node.op, tuple(args), kwargs)
    return (_group_norm if "num_groups" in bound else _layer_norm)(bound, statistics)


def _multiplied(raw: Any, value: Any, site: Site, gate: torch.Tensor, through: bool) -> Any:
    if isinstance(raw, Ref) and raw.name == site.arg and isinstance(value, torch.Tensor):
        shape = [1] * value.ndim
        shape[site.dim] = -1
        gated = value * gate.to(value.dtype).reshape(shape)
        return value + (gated - value).detach() if through else gated
    if isinstance(raw, tuple):
        return [_multiplied(r, v, site, gate, through) for r, v in zip(raw, value, strict=True)]
    return value


def _layer_norm(bound: dict[str, Any], gate: torch.Tensor) -> torch.Tensor:
    """Layer norm whose mean and variance weigh every position of the last axis by its gate."""
    x: torch.Tensor = bound["input"]
    if len(bound["normalized_shape"]) != 1:
        raise OptionError("gates: a layer norm over several axes can not be gated")
    weight = (gate / gate.sum()).to(x.dtype)
    mean = (x * weight).sum(-1, keepdim=True)
    variance = ((x - mean).square() * weight).sum(-1, keepdim=True)
    y = (x - mean) * (variance + bound["eps"]).rsqrt()
    y = y * bound["weight"] if bound.get("weight") is not None else y
    bias: torch.Tensor | None = bound.get("bias")
    result: torch.Tensor = y if bias is None else y + bias
    return result


def _group_norm(bound: dict[str, Any], gate: torch.Tensor) -> torch.Tensor:
    """Group norm whose statistics weigh every channel of a group by its gate."""
    x: torch.Tensor = bound["input"]
    groups = bound["num_groups"]
    y = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)  # [batch, groups, channels, positions]
    weight = gate.to(x.dtype).reshape(1, groups, -1, 1)
    weight = weight / (weight.sum(2, keepdim=True).clamp_min(1e-12) * y.shape[-1])
    mean = (y * weight).sum((2, 3), keepdim=True)
    variance = ((y - mean).square() * weight).sum((2, 3), keepdim=True)
    y = ((y - mean) * (variance + bound["eps"]).rsqrt()).reshape(x.shape)
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = y * bound["weight"].reshape(shape) if bound.get("weight") is not None else y
    bias: torch.Tensor | None = bound.get("bias")
    result: torch.Tensor = y if bias is None else y + bias.reshape(shape)
    return result
