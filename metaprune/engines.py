"""What runs networks and single operators while they are timed: torch, or onnxruntime."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metaprune.data import Inputs
from metaprune.evaluation import device_of, evaluating
from metaprune.graphs.calls import OperatorCall, callers_arguments
from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.expressible import runs_on_kept
from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph
from metaprune.graphs.native import candidates
from metaprune.graphs.onnx_calls import onnx_models
from metaprune.graphs.onnx_export import export_onnx
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.structure import Ref
from metaprune.graphs.trace import trace
from metaprune.timing import Run, Timing, check_count, timings


def module_of(graph: Graph, incision: Incision) -> nn.Module:
    """What a cut leaves as a module to be timed: the user's own if it runs on edited attributes, else the graph's."""
    args, kwargs = callers_arguments(graph)
    if runs_on_kept(graph, incision):
        for module in candidates(graph, incision):
            with contextlib.suppress(Exception), torch.no_grad():  # it is the user's code, on shapes it may not expect
                module.eval()(*args, **kwargs)
                return module
    return PortableModule(incision.graph, shared=True).eval()


class _Torch:
    """Eager torch: every operator is a call of its own, in a network as well."""

    def is_free(self, call: OperatorCall) -> bool:
        """Whether an operator takes no time as part of a network: never, each is dispatched."""
        return False

    def operators(self, calls: Sequence[OperatorCall]) -> list[Run]:
        """Functions that run each call alone."""
        return [call.bound() for call in calls]

    def empty(self) -> list[OperatorCall]:
        """What shows how much more a call takes alone than as part of a network: nothing, it takes the same."""
        return []

    def network(self, graph: Graph, module: nn.Module) -> Run:
        """A function that runs a module of a graph on the traced example, at the caller's batch size."""
        args, kwargs = callers_arguments(graph)
        return lambda: module(*args, **kwargs)


class _OnnxRuntime:
    """onnxruntime on the CPU, with all its graph optimisations: it folds constants and fuses operators."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def is_free(self, call: OperatorCall) -> bool:
        """Whether an operator takes no time as part of a network: constants are folded, reshapes copy nothing."""
        return call.is_constant or call.is_reshape

    def operators(self, calls: Sequence[OperatorCall]) -> list[Run]:
        """Functions that run each call alone."""
        varying = [[t for t, fixed in zip(c.operands, c.fixed, strict=True) if not fixed] for c in calls]
        return [self._run(model, feeds) for model, feeds in zip(onnx_models(calls), varying, strict=True)]

    def network(self, graph: Graph, module: nn.Module) -> Run:
        """A function that runs a module of a graph on the traced example, at the caller's batch size."""
        args, kwargs = callers_arguments(graph)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_onnx(path, graph, module)
            return self.file(path, [*args, kwargs])

    def file(self, path: Path, inputs: Any) -> Run:
        """An ONNX file on tensors, in the order of its inputs."""
        return self._run(str(path), list(_leaves(inputs)))

    def empty(self) -> list[OperatorCall]:
        """What shows how much more a call takes alone than as part of a network: a model that computes one number."""
        one = torch.ones(1)
        return [OperatorCall("", "aten.neg.default", (Ref("0"),), {}, (one,), (False,), (one,))]

    def _run(self, model: bytes | str, feeds: Sequence[Tensor]) -> Run:
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        try:
            session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            arguments = session.get_inputs()
            if len(arguments) != len(feeds):
                raise OptionError(f"inputs: the ONNX network takes {len(arguments)} tensors, not {len(feeds)}")
            binding = session.io_binding()
            for argument, tensor in zip(arguments, feeds, strict=True):
                binding.bind_cpu_input(argument.name, tensor.detach().contiguous().numpy())
            for output in session.get_outputs():
                binding.bind_output(output.name)
            session.run_with_iobinding(binding)
        except MetapruneError:
            raise
        except Exception as error:  # of its own classes, made in C++, or numpy's for a dtype it lacks
            raise MetapruneError(f"onnxruntime does not run the network: {str(error)[:300]}") from error
        return lambda: session.run_with_iobinding(binding)


Engine: TypeAlias = _Torch | _OnnxRuntime
ENGINES: dict[str, Callable[[int], Engine]] = {"torch": lambda threads: _Torch(), "onnxruntime": _OnnxRuntime}


def engine_called(name: str, threads: int = 1) -> Engine:
    """The engine called `name`; raises `OptionError` for another name or number of threads."""
    check_count("threads", threads)
    if name not in ENGINES:
        raise OptionError(f"engine: {name!r} is none of {', '.join(sorted(ENGINES))}")
    return ENGINES[name](threads)


def measure_latency(
    network: nn.Module | str | Path, inputs: Inputs, engine: str = "torch", threads: int = 1, rounds: int = 5
) -> Timing:
    """Seconds that a network takes for one call, measured end to end.

    On one thread CPU time counts, the first decile over short batches; see `metaprune.timing`.

    Args:
        network: A module, run in eval mode, or an ONNX file.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
        engine: `"torch"`, or `"onnxruntime"`, for which a module is traced and exported first.
        threads: Threads that the engine has.
        rounds: Rounds of eight batches each.

    Raises:
        OptionError: An option has no meaning, an ONNX file is to run in torch, or the inputs do not fit the file.
        MetapruneError: The onnx extra is missing, the network is not on the CPU, or onnxruntime does not run it.
    """
    chosen = engine_called(engine, threads)
    if isinstance(network, nn.Module):
        check_on_cpu(device_of(network))
        with evaluating(network):
            if isinstance(chosen, _Torch):
                return timings([_bound(network, inputs)], threads, rounds)[0]
            run = chosen.network(trace(network, inputs), network)
    elif isinstance(chosen, _Torch):
        raise OptionError("engine: an ONNX file runs in onnxruntime, not in torch")
    else:
        run = chosen.file(Path(network), inputs)
    return timings([run], threads, rounds)[0]


def check_on_cpu(device: torch.device) -> None:
    """Raises `MetapruneError` for a device whose time can not be measured here."""
    if device.type != "cpu":
        raise MetapruneError(f"latency is measured on the CPU, but the network is on device {device}")


@dataclass(frozen=True)
class Machine:
    """What measured times hold for.

    Attributes:
        cpu: Model of the processor.
        cores: Logical processors.
        engine: What runs the network.
        threads: Threads that it has.
        torch: Version.
        onnxruntime: Version, empty where it is not the engine.
    """

    cpu: str
    cores: int
    engine: str
    threads: int
    torch: str
    onnxruntime: str

    @staticmethod
    def here(engine: str, threads: int) -> Machine:
        """This machine."""
        runtime = _onnxruntime().__version__ if engine == "onnxruntime" else ""
        return Machine(_cpu(), os.cpu_count() or 1, engine, threads, torch.__version__, runtime)

    def difference(self, other: Machine) -> str:
        """The first fact in which another machine differs, in words; empty when there is none."""
        for field in fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            if own != others:
                return f"{field.name} {others!r} instead of {own!r}"
        return ""


def _bound(module: nn.Module, inputs: Inputs) -> Run:
    if isinstance(inputs, Mapping):
        return lambda: module(**inputs)
    if isinstance(inputs, tuple | list):
        return lambda: module(*inputs)
    return lambda: module(inputs)


def _cpu() -> str:
    """Model of the processor; where the system does not say, its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MetapruneError("onnxruntime is missing: pip install 'metaprune[onnx]'") from None
    return onnxruntime


def _leaves(inputs: Any) -> Iterator[Tensor]:
    """Tensors of nested inputs, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        yield from _leaves(list(inputs.values()))
    elif isinstance(inputs, list | tuple):
        for item in inputs:
            yield from _leaves(item)
