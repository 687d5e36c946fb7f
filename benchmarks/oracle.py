"""Judges a pruning engine: does the pruned network compute the original with the removed weights at zero?

The oracle belongs to no engine. It works in four steps.

1. `randomise` gives every tensor distinct, live values, so that nothing hides behind a zero-initialised gain.
2. `kept_positions` learns which positions of each tensor survived: as the engine states them, or found again by value.
   Either way each tensor is compared bit for bit with the stated slice of the original.
3. `masked` builds the *original* network with everything else set to zero.
4. `judge` compares the outputs of both in float64, on the example and on a second input.

Two differences are legitimate, because a smaller network cannot avoid them, and give the verdict `exact_aware` instead
of `exact`: normalisations may take their statistics over the kept channels only, and the 1/sqrt(d) that
`scaled_dot_product_attention` derives from the width of the queries may be held fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from allowances import FixedScale, KeptStatistics, plain_attention, with_kept_norms
from random_weights import BATCH
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]
Positions = dict[str, list[Tensor]]  # tensor name -> kept positions of every dimension
# Whose statistics are taken over the kept channels (`layer` and group norms, `rms` norms, norms `written` by hand; with
# `silent`, kept means heard), and whether the `scale` of attention is held fixed; fewest first.
ALLOWANCES = [
    text.split()
    for text in (
        "", "layer", "scale", "layer rms", "layer written", "layer scale", "layer silent", "layer rms written",
        "layer rms scale", "layer rms silent", "layer written scale", "layer rms written scale",
    )
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under every name they have."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in found.items()}


def kept_positions(
    original: nn.Module, pruned: nn.Module, stated: Mapping[str, Any] | None = None
) -> tuple[Positions, set[str], list[str], list[str]]:
    """Which positions of each tensor survived.

    Args:
        original: The network before.
        pruned: The network after.
        stated: Tensor name to `{dimension: positions}`, if the engine states them; else they are found by value.

    Returns:
        Positions of every tensor that changed; the names among them whose values were rescaled (one-dimensional tensors
        with stated positions only); tensors that are no slice of the original; tensors that are gone.
    """
    before, after = tensors(original), tensors(pruned)
    stated = _for_all_names(before, stated or {})
    positions: Positions = {}
    rescaled: set[str] = set()
    unmatched = []
    for name, old in before.items():
        if name not in after:
            continue
        new = after[name]
        if name in stated:
            dims = stated[name]
            keep = [torch.as_tensor(dims[d]).long() if d in dims else torch.arange(n) for d, n in enumerate(old.shape)]
        elif same(old, new):
            continue
        else:
            found = find_slice(old, new)
            if found is None:
                unmatched.append(name)
                continue
            keep = found
        expected = old
        for dim, index in enumerate(keep):
            expected = expected.index_select(dim, index)
        if expected.shape != new.shape or not (same(expected, new) or (old.ndim == 1 and name in stated)):
            unmatched.append(name)
            continue
        positions[name] = keep
        if not same(expected, new):
            rescaled.add(name)
    return positions, rescaled, unmatched, [name for name in before if name not in after]


def _for_all_names(before: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """What is stated of one name of a tied tensor holds for its other names."""
    known = [name for name in stated if name in before and before[name].numel()]
    by_tensor = {before[name].data_ptr(): stated[name] for name in known}
    found = {}
    for name, tensor in before.items():
        dims = stated.get(name, by_tensor.get(tensor.data_ptr()) if tensor.numel() else None)
        if dims is not None:
            found[name] = dict(dims) if isinstance(dims, Mapping) else dict(enumerate(dims))
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equality of shape and bits (a NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def find_slice(old: Tensor, new: Tensor, anchors: int = 4) -> list[Tensor] | None:
    """Positions per dimension at which `new` sits in `old`, read from the values; None if there are none.

    Anchor elements are located by a value that occurs once. From there each dimension is a line in either tensor, and
    the position of a line's element is where all anchors agree. The caller verifies the whole slice.
    """
    if not old.is_floating_point() or old.ndim != new.ndim or not new.numel() or not old.ndim:
        return None
    if any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
        return None
    generator = torch.Generator().manual_seed(0)
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []
    for _ in range(4 * anchors):
        here = [int(torch.randint(n, (1,), generator=generator)) for n in new.shape]
        hits = (old == new[tuple(here)]).nonzero()
        if len(hits) == 1:
            pairs.append((here, hits[0].tolist()))
        if len(pairs) == anchors:
            break
    if not pairs:
        return None
    keep = []
    for dim in range(old.ndim):
        agree = torch.ones(new.shape[dim], old.shape[dim], dtype=torch.bool)
        for here, there in pairs:
            agree &= _line(new, here, dim)[:, None] == _line(old, there, dim)[None]
        if not agree.any(1).all():
            return None
        keep.append(agree.to(torch.uint8).argmax(1))
    return keep


def _line(tensor: Tensor, point: Sequence[int], dim: int) -> Tensor:
    return tensor[tuple(slice(None) if d == dim else i for d, i in enumerate(point))]


@torch.no_grad()
def masked(original: nn.Module, positions: Positions) -> nn.Module:
    """The original network with everything but the kept positions set to zero; running statistics stay."""
    model = copy.deepcopy(original)
    for name, keep in positions.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, BATCH) and attribute.startswith("running_"):
            continue
        old = getattr(module, attribute).detach()
        stays = torch.ones(old.shape, dtype=torch.bool)
        for dim, index in enumerate(keep):
            line = torch.zeros(old.shape[dim], dtype=torch.bool)
            line[index] = True
            stays &= line.view([-1 if d == dim else 1 for d in range(old.ndim)])
        new = torch.where(stays, old, 0)  # a tensor of its own: names that were tied may have been cut apart
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(new, requires_grad=False)
        else:
            module._buffers[attribute] = new
    return model


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Calls a network with a tuple of arguments or a dict of named ones."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def convert(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Changes every tensor of the inputs."""
    if isinstance(inputs, dict):
        return {key: change(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return tuple(change(value) if isinstance(value, Tensor) else value for value in inputs)


def other(tensor: Tensor) -> Tensor:
    """Another input of the same kind: noise on numbers, a turn of token ids, masks as they are."""
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(1)
        return tensor + 0.5 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return tensor.roll(1, -1) if tensor.ndim and tensor.dtype != torch.bool else tensor


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest magnitude of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@torch.no_grad()
def judge(
    original: nn.Module,
    pruned: nn.Module,
    inputs: Inputs,
    out: Callable[[Any], Tensor],
    stated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The verdict on a pruned network.

    Args:
        original: The randomised network before.
        pruned: What the engine returned.
        inputs: Example inputs.
        out: The tensor to compare, from a network's output.
        stated: Kept positions by tensor name and dimension, if the engine states them.

    Returns:
        A dict with `verdict`: `exact` (equal to the masked original), `exact_aware` (equal with the `allowance`
        listed), `inexact` (runs, right shapes, another function), `nothing_pruned`, `unmatched` (a tensor is no slice
        of the original), `shape_changed` (of the output), `degenerate` (the output shows not the pruning or not the
        input), `oracle_failed` (a network does not run in float64, nor in float32).
    """
    positions, rescaled, unmatched, gone = kept_positions(original, pruned, stated)
    report: dict[str, Any] = {"tensors_cut": len(positions), "tensors_rescaled": len(rescaled), "gone": gone[:5]}
    if unmatched:
        return report | {"verdict": "unmatched", "unmatched": unmatched[:5]}
    cut = [name for name, keep in positions.items() if any(map(_shorter, keep, tensors(original)[name].shape))]
    if not cut:
        return report | {"verdict": "nothing_pruned"}
    for dtype, tolerance in TOLERANCE.items():
        try:
            with plain_attention():
                found = _compare(original, pruned, positions, rescaled, inputs, out, dtype, tolerance)
            return report | found | {"dtype": str(dtype)}
        except Exception as error:  # a network may refuse float64; the reason is kept, float32 is tried
            report[f"failed_{dtype}"] = f"{type(error).__name__}: {error}"[:300]
    return report | {"verdict": "oracle_failed"}


def _shorter(keep: Tensor, size: int) -> bool:
    return len(keep) < size


def _compare(
    original: nn.Module,
    pruned: nn.Module,
    positions: Positions,
    rescaled: set[str],
    inputs: Inputs,
    out: Callable[[Any], Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> dict[str, Any]:
    dense, small = (copy.deepcopy(model).to(dtype).eval() for model in (original, pruned))
    first = convert(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    both = (first, convert(first, other))
    reference = masked(dense, positions)

    def errors(wanted: nn.Module, allowance: Sequence[str]) -> list[float]:
        found = []
        for x in both:
            with FixedScale() if "scale" in allowance else nullcontext():
                small_y = out(call(small, x))
                kept_only = KeptStatistics("rms" in allowance, "silent" in allowance)
                with kept_only if "layer" in allowance else nullcontext():
                    found.append(distance(small_y, out(call(wanted, x))))
        return found

    whole, cut = out(call(dense, first)), out(call(small, first))
    if whole.shape != cut.shape:
        return {"verdict": "shape_changed", "shapes": [list(whole.shape), list(cut.shape)]}
    if not torch.isfinite(whole).all():
        return {"verdict": "degenerate", "why": "the original's output is not finite"}
    report = {
        "effect_of_pruning": distance(out(call(reference, first)), whole),
        "effect_of_input": distance(out(call(small, both[1])), cut),
    }
    effect = min(report.values())
    best: tuple[float, Sequence[str]] = (float("inf"), [])
    by_hand = with_kept_norms(copy.deepcopy(reference), dense, positions, rescaled)
    for allowance in ALLOWANCES:
        error = max(errors(by_hand if "written" in allowance else reference, allowance))
        if not allowance:
            report["error_plain"] = error
        best = min(best, (error, allowance), key=lambda pair: pair[0])
        if error < tolerance:
            report["error"] = error
            alive = effect > 1000 * max(error, 1e-12)  # both effects stand out from rounding
            verdict = "exact_aware" if allowance else "exact"
            return report | {"verdict": verdict if alive else "degenerate", "allowance": allowance}
    closest = best[0] if best[0] < float("inf") else None
    return report | {"verdict": "inexact", "error": closest, "allowance": list(best[1])}
