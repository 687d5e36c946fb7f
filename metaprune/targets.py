"""Networks named on the command line: `module:function`, or a folder written by `Pruned.save`."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metaprune.data import Inputs
from metaprune.graphs import saved as stored
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Meta
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.structure import Ref, put_together
from metaprune.task import Task


def build(target: str) -> tuple[nn.Module, Inputs]:
    """The network and the example inputs that a `module:function` stands for.

    The module is imported and the function called without arguments: only name code you trust.

    Args:
        target: Import name of a module and name of a function in it that returns `(model, inputs)`.

    Raises:
        OptionError: There is no such module or function, it fails, or it returns something else.
    """
    return _network(target, _made(target))


def build_with_data(target: str) -> tuple[nn.Module, Inputs, Any]:
    """As `build`, but the function may return a task; last are the batches that it is trained on, without one None."""
    made = _made(target)
    if isinstance(made, Task):
        return made.model, made.inputs, made.train
    return (*_network(target, made), None)


def task(target: str) -> Task:
    """The task that a `module:function` returns; see `build`, as for the errors raised."""
    made = _made(target)
    if not isinstance(made, Task):
        raise OptionError(f"{target} must return a metaprune.Task, not {type(made).__name__}")
    return made


def saved(folder: str) -> tuple[nn.Module, Inputs]:
    """The network in a folder written by `Pruned.save`, and the inputs it was traced with, in the caller's batch size.

    Raises:
        LoadError: The folder is damaged or something else.
    """
    graph = stored.load(Path(folder)).graph
    args, kwargs = graph.signature.spec

    def example(ref: Ref) -> Tensor:
        value, meta = graph.example[ref.name], graph.nodes[ref.name].meta
        if isinstance(meta, Meta) and meta.batched and meta.batched[0]:
            return value[: round(len(value) * graph.batch)]  # tracing may have doubled it
        return value

    inputs: dict[str, Any] = {name: put_together(value, example) for name, value in kwargs.items()}
    return PortableModule(graph).eval(), inputs or tuple(put_together(value, example) for value in args)


def _network(target: str, made: Any) -> tuple[nn.Module, Inputs]:
    match made:
        case (nn.Module() as model, (Tensor() | tuple() | dict()) as inputs):
            return model, inputs
    raise OptionError(f"{target} must return (model, inputs): an nn.Module and a tensor, tuple or dict")


def _made(target: str) -> Any:
    """What a `module:function` returns."""
    found = _function(target)
    try:
        return found()
    except MetapruneError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise OptionError(f"{target} failed with {type(error).__name__}: {error}") from error


def _function(target: str) -> Callable[[], Any]:
    module, colon, function = target.partition(":")
    if not (module and colon and function):
        raise OptionError(f"{target!r} is neither MODULE:FUNCTION nor a saved folder")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # importing runs the user's code
        raise OptionError(f"{target}: module {module!r} can not be imported ({_said(error)})") from error
    if not callable(found):
        raise OptionError(f"{target}: module {module!r} has no function {function!r}")
    return found  # type: ignore[no-any-return]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
