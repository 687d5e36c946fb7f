"""A network of the construct suite, and everything that must hold once it is pruned to half its width."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import metaprune as mp
from tests.support import oracle


class Net(nn.Module):
    """Named children and a forward pass given as a function of the module and its input."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **children: Any) -> None:
        super().__init__()
        self.body = body
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        """Runs the function."""
        return self.body(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the extent."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def images(size: int = 6, channels: int = 3) -> Callable[[int], Tensor]:
    """A batch of images."""
    return lambda batch: torch.randn(batch, channels, size, size)


def vectors(*shape: int) -> Callable[[int], Tensor]:
    """A batch of tensors of a shape."""
    return lambda batch: torch.randn(batch, *shape)


def tokens(length: int = 5, vocabulary: int = 11) -> Callable[[int], Tensor]:
    """A batch of token numbers."""
    return lambda batch: torch.randint(vocabulary, (batch, length))


@dataclass(frozen=True)
class Case:
    """One construct.

    Attributes:
        name: Name of the test.
        build: Makes the network.
        inputs: Makes an example of a batch size.
        free: The prunable groups: for each kind the sizes.
        pins: Parts of reasons that pinned groups must give.
        aware: Whether layer and group norms take their statistics over kept channels, so that
            `function` is not exact.
        kind: `native` or `portable` where that matters.
        batch: Batch size of the example that is traced.
        tolerance: Relative, in float64; casts to lower precision inside a network need more.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    free: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pins: tuple[str, ...] = ()
    aware: bool = False
    kind: str = ""
    batch: int = 2
    tolerance: float = 1e-9

    def __str__(self) -> str:
        return self.name


def channelwise(name: str, body: Callable[[Any, Tensor], Any], into: int = 8, **options: Any) -> Case:
    """An operator between two convolutions: `body(network, features)` of shape [batch, 8, 6, 6] gives `into` channels.

    Unless `free` says otherwise the eight channels can all be pruned on their own.
    """
    children = options.pop("children", dict)
    options.setdefault("free", {"channels": (8,)})

    def build() -> nn.Module:
        return Net(
            lambda m, x: m.tail(body(m, m.stem(x))).mean((2, 3)), stem=conv(3, 8), tail=conv(into, 4), **children()
        )

    return Case(name, build, images(), **options)


def prune(case: Case) -> tuple[nn.Module, mp.Pruned]:
    """The case's network with live weights, and what half its width is."""
    torch.manual_seed(0)
    network = oracle.alive(case.build())
    return network, mp.prune(network, case.inputs(case.batch), budget="width=0.5", allocator="uniform")


def free_groups(graph: Any) -> dict[str, tuple[int, ...]]:
    """Sizes of the prunable groups by kind, ascending."""
    found: dict[str, list[int]] = {}
    for group in graph.groups:
        if not group.pinned and group.size > group.minimum:
            found.setdefault(group.kind, []).append(group.size)
    return {kind: tuple(sorted(sizes)) for kind, sizes in sorted(found.items())}


def check(case: Case) -> None:
    """Prunes to half the width and checks everything that must hold; see the assertions."""
    torch.manual_seed(0)
    network = oracle.alive(case.build())
    inputs = case.inputs(case.batch)
    state, flags = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    attributes = _attributes(network)

    graph = mp.trace(network, inputs)
    assert free_groups(graph) == {kind: tuple(sorted(sizes)) for kind, sizes in sorted(case.free.items())}
    reasons = [group.reason for group in graph.groups if group.pinned]
    for part in case.pins:
        assert any(part in reason for reason in reasons), f"no pin says {part!r}: {reasons}"

    pruned = mp.prune(graph, budget="width=0.5", allocator="uniform")
    assert not [note for note in pruned.notes if "kept whole" in note]
    assert not case.kind or pruned.kind == case.kind
    assert pruned.certificate is not None
    assert pruned.certificate.wiring <= 1e-9
    assert case.aware or pruned.certificate.function <= 1e-9
    for group in graph.groups:
        units = pruned.plan.keep.get(group.name, range(group.size))
        half = group.size if group.pinned else max(group.minimum, int(0.5 * group.size + 0.5))
        assert len(units) == half, group

    error, change = oracle.difference(network, pruned.module, pruned.kept, case.inputs(3), case.aware)
    assert error <= case.tolerance
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pruned.module, network)]
    assert sizes == [pruned.cost["after"].params, pruned.cost["before"].params]
    if case.free:
        assert sizes[0] < sizes[1]
        assert change > 1e-4, "a cut that changes nothing proves nothing"

    with torch.no_grad():
        again = oracle.flat(oracle.call(pruned.module.eval(), case.inputs(5)))
        wanted = oracle.flat(oracle.call(copy.deepcopy(network).eval(), case.inputs(5)))
    for tensor, before in zip(again, wanted, strict=True):
        assert tensor.shape == before.shape
        assert tensor.dtype == before.dtype
    _check_gradients(network, pruned.module, case.inputs(5))

    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert flags == [m.training for m in network.modules()]
    assert attributes == _attributes(network)


def _attributes(network: nn.Module) -> dict[str, Any]:
    """Numbers and tuples that layers keep about themselves."""
    plain = (bool, int, float, str, tuple)
    return {f"{path}.{k}": v for path, m in network.named_modules() for k, v in vars(m).items() if isinstance(v, plain)}


def _check_gradients(network: nn.Module, pruned: nn.Module, inputs: Any) -> None:
    """In training mode, parameters that learn in the original learn in the pruned network."""
    expected = _gradients(copy.deepcopy(network), inputs)
    found = _gradients(copy.deepcopy(pruned), inputs)
    assert {n for n, g in found.items() if g is not None} == {n for n, g in expected.items() if g is not None}
    for name, gradient in expected.items():
        if gradient is not None and float(gradient.abs().max()) > 1e-4:
            other = found[name]
            assert other is not None
            assert bool(torch.isfinite(other).all()), name
            assert bool((other != 0).any()), name


def _gradients(module: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    module.train()
    generator = torch.Generator().manual_seed(0)
    outputs = [t for t in oracle.flat(oracle.call(module, inputs)) if t.is_floating_point()]
    sum((t.double() * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in module.named_parameters()}
