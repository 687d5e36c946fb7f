"""The public functions: trace, plan, apply, prune, load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.calibration import repeatable
from metaprune.curves import Sensitivity
from metaprune.dataless import digest, refit_without_data
from metaprune.graphs import native, onnx_export, saved
from metaprune.graphs.certificate import Certificate, Prover
from metaprune.graphs.cost import Cost, counted
from metaprune.graphs.errors import CertificateError, LoadError, MetapruneError, OptionError, PlanError
from metaprune.graphs.execute import execute
from metaprune.graphs.expressible import runs_on_kept
from metaprune.graphs.incision import Incision, Kept
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.graphs.portable import PortableModule
from metaprune.graphs.reference import evaluated
from metaprune.graphs.scalars import Numbers, same_numbers
from metaprune.graphs.scalars import counted as counted_numbers
from metaprune.graphs.structure import take_apart
from metaprune.graphs.surgery import cut
from metaprune.graphs.trace import trace as _trace
from metaprune.latency import LatencyTable
from metaprune.planning import make_plan, uses_data
from metaprune.reconstruction import reconstruct as fit_weights

_PORTABLE_NOTE = (
    "portable form: batch norm and dropout follow train() and eval(); other behaviour that exists only in training "
    "(stochastic depth, attention dropout) is not in an eval trace"
)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network.

    Attributes:
        module: The smaller network.
        plan: What was cut.
        certificate: The proof, None if it was not asked for.
        cost: Cost `before` and `after`.
        kind: `native` (a copy of the user's own module) or `portable` (the graph as a module).
        kept: Kept positions by tensor name and dimension.
        notes: What the user should know.
        graph: The cut graph.
        original: The graph that was cut; it shares the original network's tensors.
    """

    module: nn.Module
    plan: Plan
    certificate: Certificate | None
    cost: Mapping[str, Cost]
    kind: str
    kept: Kept
    notes: tuple[str, ...]
    graph: Graph
    original: Graph

    def save(self, directory: str | Path) -> None:
        """Writes the portable form and the plan; `metaprune.load` reads them. The manifest comes last."""
        saved.save(_path("directory", directory), self.graph, self.module, self.plan)

    def export_onnx(self, path: str | Path) -> None:
        """Writes an ONNX file with a dynamic batch through `torch.onnx.export`."""
        try:
            onnx_export.export_onnx(_path("path", path), self.graph, self.module)
        except OSError as error:
            raise MetapruneError(f"{path}: can not be written: {error.strerror or error}") from error


def trace(model: Any, inputs: Any = None, dynamic: Mapping[int | str, Sequence[int]] | None = None) -> Graph:
    """Turns a network into a `Graph`.

    Args:
        model: An `nn.Module`, `fx.GraphModule` or `ExportedProgram`; it is never changed.
        inputs: An example input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        dynamic: Further dynamic dimensions by argument, such as `{"input_ids": (1,)}`; the batch always is.

    Raises:
        TraceError: The network can not be exported, or does not accept the inputs.
    """
    return _trace(model, inputs, dynamic)


def plan(
    graph: Graph,
    budget: str = "macs=0.5",
    criterion: str | Sensitivity | None = None,
    allocator: str | None = None,
    data: Any = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    only: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    latency: LatencyTable | None = None,
) -> Plan:
    """Decides what stays.

    Args:
        graph: The network.
        budget: What is kept: `"macs=0.5"`, `"params=0.3"`, `"bytes=0.5"`, `"latency=0.6"`, several joined by commas,
            or `"width=0.5"` (that fraction of every group). A cost is never exceeded and falls short by at most 2 % or
            one unit.
        criterion: How units are scored; see `metaprune.criteria.CRITERIA`. By default `"fisher_block"` when there are
            data, else `"magnitude"`. Or curves of `metaprune.sensitivity`, which also say how units are ranked;
            allocators that work on curves find them, by method `"anchored"` with `compensate`, where there are data and
            no criterion is named, and add up the scores of units for one that is. Curves have no scores of single
            units, so with them the allocators `"global"`, `"sap"` and `"cost"` are refused.
        allocator: How many units each group keeps: `"uniform"`, `"global"`, `"sap"` (more is taken from groups whose
            scores are uneven), `"cost"` (importance removed per cost removed, for scores that add up), `"erk"`,
            `"lamp"` and `"precrop"` (after densities of layers, see `metaprune.search.baselines`), `"random"`; by
            curves of what lost units cost each group, `"dp"` (dynamic program), `"milp"` (integer program; for several
            budgets at once and for dense topologies) and `"lagrange"` (in milliseconds), all of which note in
            `plan.provenance["solver"]` how far from the least summed cost they may be (HiGHS, behind `"milp"`, stops
            after four seconds by the clock, so its answer to a large problem may depend on the machine's load), and
            `"spdy"` (the curves' weights are searched by the loss that pruned networks are measured to have);
            `"refined"` (what curves or scores say is corrected by the losses of up to twenty pruned networks, and the
            units of the best are ranked by their norms too); or
            `"measured"` (several allocations, with units ranked by the criterion and by their norms; each is cut and
            fitted on some of the data, and the one nearest to the dense network on others is taken). By default
            `"measured"` when there are data and no criterion is named, `"dp"` for curves, `"cost"` for `"fisher"` and
            `"fisher_block"`, else `"global"`.
        data: Batches of inputs or of (inputs, labels) for criteria and allocators that look at data; at most
            256 samples are scored by, and 500 measured with. Where neither looks at them they are refused.
        round_to: Kept channel counts are multiples of this.
        protect: Globs of groups or tensors that stay whole.
        only: Globs of the groups or tensors that may shrink; empty for all.
        kinds: Kinds of groups that may shrink; None for all.
        seed: Seed of criteria and allocators that draw, and of the widths that operators are timed at.
        latency: Table of measured operators, for a latency budget and for the latency that the plan says it reaches.
            A latency budget without a table times the operators here and now, in torch on one thread; which machine
            and engine the times are of is in the plan's provenance. The budget is held by the polynomial that is
            fitted to the times, see `LatencyTable.terms`; the provenance has what the table itself predicts for the
            plan, which differs where an engine is slow at odd widths.

    Raises:
        BudgetInfeasible: No legal plan reaches the budget; `attainable` is the least fraction.
        OptionError: An option has no meaning.
    """
    _check("graph", graph, Graph)
    if latency is not None:
        _check("latency", latency, LatencyTable)
    return make_plan(graph, budget, criterion, allocator, data, round_to, protect, only, kinds, seed, latency)


def apply(graph: Graph, plan: Plan, certify: bool = True) -> Pruned:
    """Cuts a network and proves the cut.

    Args:
        graph: The network the plan was made for.
        plan: What stays.
        certify: Whether to prove equality with the masked original (see `Certificate`).

    Raises:
        PlanError: The plan is of another network, or names what does not exist.
        CertificateError: The cut network differs from the masked original; nothing is returned.
    """
    _check("graph", graph, Graph)
    _check("plan", plan, Plan)
    if plan.graph and plan.graph != graph.fingerprint:
        raise PlanError("the plan was made for another network: its axis table differs")
    graph.check_finite()
    incision = cut(graph, plan.keep)
    cost = {"before": graph.cost(), "after": counted(incision.graph)}
    prover = Prover(graph, incision) if certify else None
    module, kind, certificate = _hand_back(graph, incision, prover)
    notes = [*graph.notes, *([_PORTABLE_NOTE] if kind == "portable" else [])]
    return Pruned(module, plan, certificate, cost, kind, incision.kept, tuple(notes), incision.graph, graph)


def prune(
    model: Any,
    inputs: Any = None,
    budget: str = "macs=0.5",
    criterion: str | Sensitivity | None = None,
    allocator: str | None = None,
    data: Any = None,
    round_to: int = 1,
    protect: Iterable[str] = (),
    only: Iterable[str] = (),
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    certify: bool = True,
    reconstruct: bool | None = None,
    latency: LatencyTable | None = None,
) -> Pruned:
    """Traces, plans and applies in one call; see those. A `Graph` is accepted for `model`.

    Should a cut fail its certificate, the groups at fault are found by bisection, kept whole with a note, and the
    plan is made again.

    With `data` the default is the closed-form core: units are chosen by `criterion="fisher_block"` and
    `allocator="measured"`, and the weights of what remains are fitted to the dense network's responses by
    `metaprune.reconstruct`, all without labels and without training. The certificate is of the cut, before the weights
    are fitted. Data that neither the criterion nor the fit would look at are refused.

    Without data weights can be fitted too, with `reconstruct=True`: to what the dense network answers to drawn inputs
    that its batch norms vouch for, see `metaprune.refit_without_data`. The certificate is of the fitted network then.

    Args, beyond those of `trace`, `plan` and `apply`: reconstruct: Whether weights are fitted; by default when there
        are data.
    """
    if reconstruct is None:
        reconstruct = data is not None
    if data is not None:
        data = repeatable(data)
    planned_on = data if uses_data(criterion, allocator) or not reconstruct else None
    graph = model if isinstance(model, Graph) else trace(model, inputs)

    def planned(whole: Sequence[str]) -> Plan:
        return plan(graph, budget, criterion, allocator, planned_on, round_to, whole, only, kinds, seed, latency)

    pruned = carried_out(graph, planned, protect, certify)
    if not reconstruct:
        return pruned
    if data is None:
        return rewritten(pruned, refit_without_data(graph, pruned.plan, seed=seed), seed)
    return fit_weights(pruned, data, seed=seed)


def rewritten(pruned: Pruned, tensors: Mapping[str, Tensor], seed: int = 0) -> Pruned:
    """The same cut with other values of the network, certified where that was.

    Args:
        pruned: A cut.
        tensors: Values that were found for its plan without data, by name, in their full shapes; the plan's provenance
            gets their digest.
        seed: Of what was drawn to find them.
    """
    changed = replace(pruned.plan, provenance={**pruned.plan.provenance, "rewritten": digest(tensors)})
    found = apply(pruned.original.with_values(tensors), changed, pruned.certificate is not None)
    notes = [*(note for note in pruned.notes if note not in found.notes), *found.notes]
    return replace(found, notes=(*notes, f"{len(tensors)} tensors rewritten for this plan without data (seed {seed})"))


def carried_out(
    graph: Graph, planned: Callable[[Sequence[str]], Plan], protect: Iterable[str] = (), certify: bool = True
) -> Pruned:
    """Applies a plan; where its certificate fails, makes it again with the groups at fault kept whole.

    Args:
        graph: The network.
        planned: Gives the plan that keeps groups and tensors whole that match some globs.
        protect: Globs to begin with.
        certify: Whether to prove the cut.

    Raises:
        CertificateError: The cut fails, and no groups can be found that are at fault.
    """
    protected = [protect] if isinstance(protect, str) else list(protect)
    blamed: list[str] = []
    while True:
        made = planned([*protected, *map(_literal, blamed)])
        try:
            pruned = apply(graph, made, certify)
        except CertificateError:
            found = _culprits(graph, made)
            if not found:
                raise
            blamed += found
            continue
        notes = [f"group {name} is kept whole: cutting it fails the certificate" for name in blamed]
        return replace(pruned, notes=(*notes, *pruned.notes))


def load(directory: str | Path, into: nn.Module | None = None) -> nn.Module:
    """Reads a saved network.

    Args: directory: What `Pruned.save` wrote. into: A fresh, unpruned module of the original class: the cut is
        replayed on a copy of it and the saved weights are put in. Without it the portable form is returned.

    Raises:
        LoadError: The folder is truncated, inconsistent or hostile.
        PlanError: `into` is another network.
    """
    stored = saved.load(_path("directory", directory))
    try:
        portable = PortableModule(stored.graph).eval()
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise LoadError(f"{directory}: damaged: {type(error).__name__}: {error}") from None
    if into is None:
        return portable
    graph = trace(into, stored.inputs)
    if stored.plan.graph != graph.fingerprint:
        raise PlanError("into: the module is not the network this folder was made from")
    incision = cut(graph, stored.plan.keep)
    saved_values = {name: v for name, v in stored.graph.values.items() if name in incision.graph.values}
    incision.graph.values.update(saved_values)
    expected = _flat(execute(stored.graph, stored.graph.values, stored.graph.example))
    for module in native.candidates(graph, incision, whole=True) if runs_on_kept(graph, incision) else ():
        if _run_alike(module, stored.graph, expected) is not None and same_numbers(module, graph, incision.graph):
            return module
    raise MetapruneError("into: no native form of this module equals the saved network; load it without `into`")


def _check(option: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise OptionError(f"{option}: a {kind.__name__} is needed, not a {type(value).__name__}")


def _path(option: str, value: str | Path) -> Path:
    if not isinstance(value, (str, Path)):
        raise OptionError(f"{option}: a path is needed, not a {type(value).__name__}")
    return Path(value)


def _literal(name: str) -> str:
    """A glob that matches one name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _hand_back(graph: Graph, incision: Incision, prover: Prover | None) -> tuple[nn.Module, str, Certificate | None]:
    """The first verified form: native candidates, then the portable one."""
    portable = PortableModule(incision.graph).eval()
    reference = _reference_output(incision.graph)
    if reference is not None and runs_on_kept(graph, incision):
        expected, numbers = reference
        for module in native.candidates(graph, incision):
            found = _run_alike(module, incision.graph, expected)
            if found is None or (found != numbers and not same_numbers(module, graph, incision.graph)):
                continue
            certificate = None if prover is None else _try(prover, module)
            if prover is None or (certificate is not None and certificate.ok):
                return module, "native", certificate
    if prover is None:
        return portable, "portable", None
    certificate = prover.certify(portable)
    if not certificate.ok:
        raise CertificateError(f"the pruned network is not the masked original ({certificate.summary()})")
    return portable, "portable", certificate


def _try(prover: Prover, module: nn.Module) -> Certificate | None:
    try:
        return prover.certify(module)
    except CertificateError:  # the module's own code does not run on edited attributes
        return None


def _reference_output(graph: Graph) -> tuple[list[torch.Tensor], Numbers] | None:
    """Output of the cut graph on the traced example, and the numbers it computes with; None on the meta device."""
    if any(value.is_meta for value in graph.values.values()):
        return None
    with torch.no_grad():
        try:
            output, numbers = counted_numbers(lambda: execute(graph, graph.values, graph.example))
            return _flat(output), numbers
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CertificateError(f"the cut network does not run: {error}") from error


def _flat(output: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    take_apart(output, found.append, lambda _, value: None)
    return found


def _run_alike(module: nn.Module, graph: Graph, expected: list[torch.Tensor]) -> Numbers | None:
    """The numbers a native module computes with, if it gives the graph's output on the traced example."""
    from metaprune.graphs.structure import put_together

    positional, named = graph.signature.spec
    try:
        with evaluated(module):
            args = [put_together(a, lambda ref: graph.example[ref.name]) for a in positional]
            kwargs = {k: put_together(v, lambda ref: graph.example[ref.name]) for k, v in named.items()}
            output, numbers = counted_numbers(lambda: module(*args, **kwargs))
            found = _flat(output)
    except Exception:  # see _try
        return None
    return numbers if len(found) == len(expected) and all(map(_close, found, expected)) else None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    numbers = b[b.isfinite()].abs()
    scale = float(numbers.max()) if numbers.numel() else 0.0
    tolerance = 50 * torch.finfo(a.dtype).eps ** 0.75
    return bool(torch.allclose(a, b, rtol=0.0, atol=max(scale, 1e-30) * tolerance, equal_nan=True))


def _culprits(graph: Graph, plan: Plan) -> list[str]:
    """Groups whose cut fails the certificate, by bisection of the plan's edits."""

    def fails(names: Sequence[str]) -> bool:
        incision = cut(graph, {name: plan.keep[name] for name in names})
        try:
            return not Prover(graph, incision).certify(PortableModule(incision.graph).eval()).ok
        except CertificateError:
            return True

    def search(names: Sequence[str]) -> Iterator[str]:
        if not fails(names):
            return
        if len(names) == 1:
            yield names[0]
            return
        half = len(names) // 2
        if not half:
            return
        found = [*search(names[:half]), *search(names[half:])]
        yield from found or names

    return list(search(list(plan.keep)))
