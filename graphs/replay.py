"""Values of a graph's nodes on many batches, computed when asked for and dropped after their last use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaprune.graphs.execute import call
from metaprune.graphs.ir import Graph, Meta

Prepare = Callable[[str], None]


class Replay:
    """Runs a graph node by node, on all batches before the next node.

    Args:
        graph: The graph.
        values: Its tensors by name; those changed in place before a node reads them are read changed.
        batches: For each batch, the value of every input node.
        holds: Nodes whose values are kept until `release`, and how many releases each waits for.
        after: Nodes that are computed only once another one is, for each the other's name.
        stops: Nodes before which `prepare` is called.
        prepare: Called with the name of each stop right before it is computed.
        firsts: Nodes whose value on the first batch is kept for good.
    """

    def __init__(
        self,
        graph: Graph,
        values: Mapping[str, Tensor],
        batches: Sequence[Mapping[str, Tensor]],
        holds: Counter[str] | None = None,
        after: Mapping[str, str] | None = None,
        stops: frozenset[str] = frozenset(),
        prepare: Prepare | None = None,
        firsts: frozenset[str] = frozenset(),
    ) -> None:
        self.graph = graph
        self.first: dict[str, Any] = {}
        self._values = values
        self._batches = batches
        self._after = after or {}
        self._stops = stops
        self._prepare = prepare
        self._firsts = firsts
        self._env: dict[str, list[Any]] = {}
        self._done: set[str] = set()
        self._left = Counter({name: len(users) for name, users in graph.users.items()})
        self._left.update(holds or {})

    def compute(self, names: Iterable[str]) -> None:
        """Computes nodes and drops their values, unless they are computed already."""
        for name in names:
            if name not in self._done:
                self._left[name] += 1
                self.get(name)
                self.release(name)

    def get(self, name: str) -> list[Any]:
        """The value of a node on each batch; it must be held or have users that are still to be computed."""
        stack = [name]
        while stack:
            top = stack[-1]
            if top in self._env:
                stack.pop()
                continue
            missing = [ref for ref in self._needs(top) if ref not in self._env]
            if missing:
                stack += missing
                continue
            if top in self._stops and self._prepare is not None:
                self._prepare(top)
            self._compute(top)
            stack.pop()
        return self._env[name]

    def release(self, name: str) -> None:
        """Gives up one hold of a node's value."""
        self._left[name] -= 1
        if not self._left[name]:
            self._env.pop(name, None)

    def function(self, name: str, source: str) -> Callable[[int, Tensor], Any]:
        """A node as a function of a batch's number and of one of the values it reads; the others are computed."""
        node = self.graph.nodes[name]
        others = {ref: self.get(ref) for ref in node.refs() if ref != source}

        def result(batch: int, value: Tensor) -> Any:
            env = {ref: found[batch] for ref, found in others.items()}
            return call(node, {**env, source: value}, self._values)

        return result

    def _needs(self, name: str) -> list[str]:
        waits = [self._after[name]] if name in self._after else []
        return [*self.graph.nodes[name].refs(), *waits]

    def _compute(self, name: str) -> None:
        node = self.graph.nodes[name]
        if node.op == "input":
            self._env[name] = [batch[name] for batch in self._batches]
        elif node.op == "tensor":
            self._env[name] = [self._values[node.args[0]]] * len(self._batches)
        else:
            refs = list(dict.fromkeys(node.refs()))
            read = [self._env[ref] for ref in refs]
            self._env[name] = (
                [call(node, dict(zip(refs, found, strict=True)), self._values) for found in zip(*read, strict=True)]
                if refs
                else [call(node, {}, self._values)] * len(self._batches)
            )
            for ref in refs:
                self.release(ref)
        self._done.add(name)
        if name in self._firsts:
            self.first[name] = self._env[name][0]
        if not self._left[name]:
            del self._env[name]


def peak_bytes(graph: Graph) -> int:
    """Bytes of activations alive at once for one sample, when every node is dropped after its last use."""
    last: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for node in graph.nodes.values():
        last.update(dict.fromkeys(node.refs(), node.name))
        meta = node.meta
        if isinstance(meta, Meta) and node.op != "tensor":
            grows = any(meta.batched)
            sizes[node.name] = torch.Size(meta.shape).numel() * meta.dtype.itemsize // (meta.shape[0] if grows else 1)
    ending: dict[str, list[str]] = {}
    for name, user in last.items():
        ending.setdefault(user, []).append(name)
    alive = peak = 0
    for name in graph.nodes:
        alive += sizes.get(name, 0)
        peak = max(peak, alive)
        alive -= sum(sizes.get(gone, 0) for gone in ending.get(name, ()))
    return max(1, peak)
