"""Proof that a pruned network equals the masked original, in float64, or the reason it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import nn

from metaprune.graphs import structure
from metaprune.graphs.errors import CertificateError, MetapruneError
from metaprune.graphs.incision import Incision
from metaprune.graphs.ir import Graph
from metaprune.graphs.reference import Channels, Weights, names_of, run_exact
from metaprune.graphs.rms import parameter_behind
from metaprune.graphs.structure import Ref

TOLERANCE = 1e-9
_NORMS = ("layer_norm", "group_norm")
_SCALES = (1.0, 3.0)  # of the noise in each draw of inputs


@dataclass(frozen=True)
class Certificate:
    """What was measured on one pruned network.

    Attributes: wiring: Largest relative difference to the original with silenced parameters, statistics of layer and
        group norms taken over kept channels on both sides. function: The same without that allowance: 0 where the cut
        is exact as it stands. outputs: Number of output tensors compared. inputs: Number of random inputs. revived:
        Tensors too dead to prove anything (zeros, constants), replaced by random values on both sides.
        altered: A tensor that is not the kept part of the original's; nothing was run then.
    """

    wiring: float
    function: float
    outputs: int
    inputs: int
    revived: tuple[str, ...] = ()
    altered: str = ""

    @property
    def ok(self) -> bool:
        """Whether the wiring is exact."""
        return self.wiring <= TOLERANCE

    def summary(self) -> str:
        """One line for people."""
        if self.altered:
            return f"NOT certified: tensor {self.altered} is not the kept part of the original's"
        verdict = "certified" if self.ok else "NOT certified"
        errors = f"wiring {self.wiring:.1e}, function {self.function:.1e}"
        return f"{verdict}: {errors}, {self.inputs} inputs, {self.outputs} outputs"


class Prover:
    """Compares candidates with the masked original; the reference is computed once."""

    def __init__(self, graph: Graph, incision: Incision, seed: int = 0) -> None:
        if graph.source is None:
            raise CertificateError("a graph without its network can not be certified; trace the network itself")
        if any(value.is_meta for value in (*graph.values.values(), *graph.example.values())):
            raise CertificateError("a network without weights (meta device) can not be certified; pass certify=False")
        self._graph = graph
        self._incision = incision
        self._canonical = {alias: info.name for info in graph.tensors.values() for alias in info.aliases}
        self._revived: dict[str, torch.Tensor] = {}
        self._revive(seed)
        self._leaves = [self._draw(seed + i, scale) for i, scale in enumerate(_SCALES)]
        self._jitter = False
        scrambled = self._scrambled(seed + len(_SCALES))
        if scrambled is not None and self._runs_on(scrambled):
            self._leaves.append(scrambled)
        rows = min((x.shape[0] for x in graph.example.values() if x.ndim), default=1)
        self._inputs = len(self._leaves) * rows
        self._jitter = False
        self._aware = self._norms()
        self._wiring = self._reference(self._aware)
        self._function = self._reference({}) if self._aware else self._wiring

    def certify(self, module: nn.Module) -> Certificate:
        """Measures one candidate.

        First every tensor is compared with the part of the original it claims to be; then outputs are compared on
        random inputs, once with the weights as they are and once with biases and other vectors moved at random, so
        that no error hides behind a unit that happens to be silent.
        """
        altered = self._altered(module)
        if altered:
            return Certificate(math.inf, math.inf, 0, 0, tuple(self._revived), altered)
        names = names_of(module, self._canonical)
        found = self._run(module, names, self._cut_weight, {}, "the pruned network does not run")
        wiring, function = _distance(found, self._wiring), _distance(found, self._function)
        return Certificate(wiring, function, len(found[0]), self._inputs, tuple(self._revived))

    def _altered(self, module: nn.Module) -> str:
        """The first tensor of a candidate that is not the kept part of the original's; empty when all are."""
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for info in self._graph.tensors.values():
            original = self._graph.values[info.name]
            if original.is_meta:
                continue
            expected = self._incision.carry(info.name, original)
            for name in info.aliases:
                if name not in own:
                    continue
                value = own[name].detach()
                if value.shape != expected.shape or value.dtype != expected.dtype:
                    return name
                scaled = name in self._incision.scales
                close = torch.allclose(value, expected, rtol=1e-5) if scaled else torch.equal(value, expected)
                if not close and not bool(torch.isnan(expected).any()):
                    return name
        return ""

    # ---- the two sides

    def _reference(self, channels: Mapping[str, Channels]) -> list[list[torch.Tensor]]:
        source = self._graph.source
        assert source is not None
        names = names_of(source, self._canonical)
        return self._run(source, names, self._masked_weight, channels, "the network can not be run in float64")

    def _run(
        self, module: nn.Module, names: Mapping[int, str], weights: Weights, channels: Mapping[str, Channels], what: str
    ) -> list[list[torch.Tensor]]:
        """Outputs on every draw of inputs, the later ones with jittered vectors."""
        results = []
        try:
            for number, leaves in enumerate(self._leaves):
                self._jitter = number > 0
                results.append(run_exact(module, self._call(leaves), names, weights, channels))
        except MetapruneError:
            raise
        except Exception as error:
            text = str(error).splitlines() or [""]
            raise CertificateError(f"{what}: {type(error).__name__}: {text[0]}") from error
        return results

    def _full_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        full = self._revived.get(name, self._graph.values.get(name, tensor)).detach()
        if not full.is_floating_point():
            return full
        full = full.to(torch.float64, copy=True)  # the caller may change it
        if self._jitter and self._moves(name, full):
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            noise = torch.randn(full.shape, generator=generator, dtype=torch.float64).to(full.device)
            full = full + noise * (0.2 * full.abs().mean() + 0.02)
        return full

    def _moves(self, name: str, full: torch.Tensor) -> bool:
        """Whether the second draw moves a tensor: vectors that are cut, except variances."""
        return full.ndim == 1 and name in self._incision.kept and not name.endswith("running_var")

    def _masked_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        full = self._full_weight(name, tensor)
        dims = self._incision.kept.get(name, {})
        if not dims or name.endswith("running_var") or not full.is_floating_point():
            return full
        for dim, index in dims.items():
            gone = torch.ones(full.shape[dim], dtype=torch.bool)
            gone[torch.from_numpy(index)] = False
            full.index_fill_(dim, gone.nonzero().flatten().to(full.device), 0.0)
        return full

    def _cut_weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A candidate's own tensor; where the original is revived, rescaled or moved, the cut of that."""
        if name in self._revived or name in self._incision.scales:
            return self._incision.carry(name, self._full_weight(name, tensor))
        if self._jitter and name in self._graph.values and self._moves(name, self._graph.values[name]):
            return self._incision.carry(name, self._full_weight(name, tensor))
        return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()

    # ---- inputs, live weights, norms

    def _call(self, leaves: Mapping[str, torch.Tensor]) -> Callable[[nn.Module], Any]:
        positional, named = self._graph.signature.spec

        def find(ref: Ref) -> torch.Tensor:
            return leaves[ref.name]

        def call(module: nn.Module) -> Any:
            args = [structure.put_together(a, find) for a in positional]
            return module(*args, **{k: structure.put_together(v, find) for k, v in named.items()})

        return call

    def _draw(self, seed: int, scale: float) -> dict[str, torch.Tensor]:
        """Random inputs like the example: noise on floats, every row of integers rolled by another amount."""
        generator = torch.Generator().manual_seed(seed)
        leaves: dict[str, torch.Tensor] = {}
        for name, value in self._graph.example.items():
            value = value.detach()
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
                leaves[name] = value.double() + scale * noise
            elif value.ndim > 1 and value.dtype is not torch.bool:
                leaves[name] = torch.stack([row.roll(seed + i, -1) for i, row in enumerate(value)])
            else:
                leaves[name] = value
        return leaves

    def _scrambled(self, seed: int) -> dict[str, torch.Tensor] | None:
        """Truth values and whole numbers drawn anew, within the range of the example; None where there are none."""
        generator = torch.Generator().manual_seed(seed)
        leaves = self._draw(seed, 1.0)
        discrete = [name for name, value in leaves.items() if not (value.is_floating_point() or value.is_complex())]
        for name in discrete:
            value = leaves[name]
            low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
            high = 1 if value.dtype is torch.bool else high
            high += 3 * (low == high and value.device.type == "cpu")
            drawn = torch.randint(low, high + 1, value.shape, generator=generator)
            leaves[name] = drawn.to(value.device, value.dtype)
        return leaves if discrete else None

    def _runs_on(self, leaves: Mapping[str, torch.Tensor]) -> bool:
        """Whether the network takes an input and answers with finite values; made-up indices may be out of range."""
        source = self._graph.source
        assert source is not None
        try:
            found = run_exact(source, self._call(leaves), names_of(source, self._canonical), self._masked_weight, {})
        except Exception:
            return False
        return all(bool(torch.isfinite(value).all()) for value in found)

    def _revive(self, seed: int) -> None:
        """Replaces parameters that hide errors: constant ones, and those with slices that are exactly zero."""
        for info in self._graph.tensors.values():
            if info.kind != "parameter" or info.name not in self._incision.kept:
                continue
            value = self._graph.values[info.name].detach()
            if not value.is_floating_point() or value.numel() < 2:
                continue
            low, high = map(float, torch.aminmax(value))
            constant, tiny = low == high, max(-low, high) < 1e-3
            if not (constant or tiny or _has_zero_slice(value)):
                continue
            generator = torch.Generator().manual_seed(seed + crc32(info.name.encode()))
            random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.ndim > 1:
                random = random / max(1.0, value[0].numel() ** 0.5)
            else:
                random = (1.0 + 0.3 * random) if constant and float(value.flatten()[0]) != 0 else 0.5 * random
            self._revived[info.name] = random.to(value.device)

    def _norms(self) -> dict[str, Channels]:
        """Kept channels of every layer and group norm that the cut touches, by the name of its weight."""
        found: dict[str, Channels] = {}
        for node in self._graph.nodes.values():
            if node.base not in _NORMS:
                continue
            for ref in node.refs():
                name, _ = parameter_behind(self._graph, Ref(ref))
                dims = self._incision.kept.get(name, {}) if name else {}
                if name and dims:
                    found[name] = {d: torch.from_numpy(index) for d, index in dims.items()}
        return found


def _has_zero_slice(value: torch.Tensor) -> bool:
    if not bool((value == 0).any()):
        return False
    if value.ndim == 1:
        return True
    return any(bool((value.transpose(0, d).flatten(1) == 0).all(1).any()) for d in range(min(2, value.ndim)))


def _distance(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> float:
    """Largest difference relative to the largest value; infinite for other shapes or values that are not finite."""
    worst = 0.0
    for values, references in zip(found, expected, strict=True):
        if len(values) != len(references):
            return math.inf
        for value, reference in zip(values, references, strict=True):
            if value.shape != reference.shape:
                return math.inf
            if not value.is_floating_point():
                worst = max(worst, 0.0 if torch.equal(value, reference) else math.inf)
                continue
            if not value.numel():
                continue
            scale = float(reference.abs().max())
            difference = float((value - reference).abs().max())
            if not math.isfinite(difference) or not math.isfinite(scale):
                both = torch.equal(torch.isfinite(value), torch.isfinite(reference))
                finite = torch.isfinite(value) & torch.isfinite(reference)
                if not both or not bool(finite.any()):
                    return math.inf
                scale = float(reference[finite].abs().max())
                difference = float((value[finite] - reference[finite]).abs().max())
            worst = max(worst, difference / max(scale, 1e-30))
    return worst
