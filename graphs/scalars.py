"""Does a native module compute with the numbers the cut graph computes with?

A network may use a size as a number: `h / h.shape[1]`. The traced graph holds the original's number; the user's module,
run on what was kept, computes with another one, and inputs on which that does not show are easily found. So the numbers
that enter elementwise operators are counted in one run of each form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.graphs.execute import execute
from metaprune.graphs.ir import Graph
from metaprune.graphs.reference import evaluated
from metaprune.graphs.structure import put_together

Numbers = Counter[tuple[Any, ...]]
_FILLS = frozenset("full full_like fill scalar_tensor lift_fresh new_full masked_fill".split())

_COPIES = frozenset("clone copy _to_copy".split())  # these come and go with the layout of memory


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers among the arguments of elementwise operators, and those that tensors are filled with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Numbers = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator and notes its numbers."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in _COPIES and (torch.Tag.pointwise in func.tags or name in _FILLS):
            numbers = [*map(_number, args), *map(_number, kwargs.values())]
            self.found[(name, *(n for n in numbers if n is not None))] += 1
        return func(*args, **kwargs)


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    single = isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex() and not value.is_meta
    return float(value) if single and not isinstance(value, nn.Parameter) else None


def counted(run: Callable[[], Any]) -> tuple[Any, Numbers]:
    """What a call returns, and the numbers it computed with."""
    log = _Numbers()
    with torch.no_grad(), log:
        result = run()
    return result, log.found


def _of_module(module: nn.Module, graph: Graph) -> Numbers:
    positional, named = graph.signature.spec
    args = [put_together(a, lambda ref: graph.example[ref.name]) for a in positional]
    kwargs = {k: put_together(v, lambda ref: graph.example[ref.name]) for k, v in named.items()}
    with evaluated(module):
        return counted(lambda: module(*args, **kwargs))[1]


def _of_graph(graph: Graph) -> Numbers:
    return counted(lambda: execute(graph, graph.values, graph.example))[1]


def same_numbers(module: nn.Module, graph: Graph, cut: Graph) -> bool:
    """Whether a native module differs from the original in its numbers just as the cut graph does from the graph.

    What a graph leaves out of its module (dead branches), and how it spells writes in place, is the same before and
    after the cut; so the two differences agree unless a size entered a computation.
    """
    assert graph.source is not None
    try:
        if "_numbers" not in graph.__dict__:
            before, traced = _of_module(graph.source, graph), _of_graph(graph)
            before.subtract(traced)
            graph.__dict__["_numbers"] = before
        after = _of_module(module, graph)
        after.subtract(_of_graph(cut))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
        return False
    left: Numbers = graph.__dict__["_numbers"]
    return all(after[key] == left[key] for key in after.keys() | left.keys())
