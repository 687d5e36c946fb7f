"""Elementwise operators, reductions, products, and what networks take and return."""

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, Net, channelwise, check, conv, images, vectors

NONE: dict[str, tuple[int, ...]] = {}


@dataclasses.dataclass
class Found:
    boxes: Tensor
    scores: Tensor


Pair = namedtuple("Pair", "first second")


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.head = nn.Linear(6, 8), nn.Linear(6, 7), nn.Bilinear(8, 7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.a(x), self.b(x)))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None, power: int = 2) -> Tensor:
        h = self.a(x).abs() ** power * scale
        return self.b(h if shift is None else h + shift)


class Several(nn.Module):
    """Inputs in a list and a dict, one of them used twice and also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, xs: list[Tensor], more: dict[str, Tensor]) -> Any:
        h = self.a(xs[0]) + self.b(xs[1]) + self.a(more["x"])
        return {"y": self.c(h), "same": xs[0], "list": [self.c(h * xs[0].sum(-1, keepdim=True)), (h.sum(-1),)]}


def hidden(body: Any, width: int = 8, into: int = 8, **options: Any) -> dict[str, Any]:
    return {"body": body, "width": width, "into": into, **options}


def perceptron(
    name: str, body: Any, into: int = 8, free: dict[str, tuple[int, ...]] | None = None, **options: Any
) -> Case:
    """An operator between two linear layers on vectors of shape [batch, 4, 6]: `body(network, hidden of width 8)`."""
    children = options.pop("children", dict)
    build = lambda: Net(lambda m, x: m.b(body(m, m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(into, 3), **children())  # noqa: E731
    return Case(name, build, vectors(4, 6), {"ffn": (8,)} if free is None else free, **options)


def returning(name: str, make: Any, free: dict[str, tuple[int, ...]], **options: Any) -> Case:
    """Outputs of every structure: `make(hidden, head of hidden)`."""
    build = lambda: Net(lambda m, x: make(h := m.a(x).relu(), m.b(h)), a=nn.Linear(6, 8), b=nn.Linear(8, 3))  # noqa: E731
    return Case(name, build, vectors(6), free, **options)


def half_precision() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)).to(torch.bfloat16)


ELEMENTWISE = {
    "activations": lambda h: F.silu(h) + F.gelu(h, approximate="tanh") * F.mish(h) - F.hardswish(h) / F.softplus(h),
    "clamped": lambda h: h.clamp(-0.5, 0.7) + h.clamp_min(0.1) * F.relu6(h) + F.hardtanh(h, -0.3, 0.4),
    "bounded_above_zero": lambda h: h.clamp(min=0.2).log() + h.abs().add(1).sqrt() + h.cosh(),
    "powers": lambda h: h**2 + h.pow(3) - h.square() + (1 + h.abs()).rsqrt() + (2.0 + h * h).reciprocal(),
    "trigonometric": lambda h: h.sin() * h.cos() + h.tanh() - torch.atan2(h, h + 3) + h.erf() + h.expm1(),
    "selected": lambda h: torch.where(h > 0, h, 0.3 * h.exp()) + h.masked_fill(h < -0.5, 0.25),
    "extremes": lambda h: torch.maximum(h, -h) - torch.minimum(h, h * 2) + F.threshold(h, 0.1, 0.2),
    "lerp": lambda h: torch.lerp(h, h.relu(), 0.3) + torch.addcmul(h, h, h, value=0.5),
    "cast": lambda h: h.half().float() + h.to(torch.float64).float().type_as(h),
    "dropout": lambda h: F.dropout(F.dropout1d(h, 0.3, False), 0.2, False) + F.alpha_dropout(h, 0.1, False),
    "rounded": lambda h: h + (h * 4).round().detach() / 4 + h.sign() * h.floor() + h.fmod(0.3) + h.remainder(0.3),
}

REDUCTIONS = {
    "sum": lambda h: h.sum(-1, keepdim=True),
    "mean": lambda h: h.mean(-1, keepdim=True),
    "std": lambda h: h.std(-1, keepdim=True),
    "variance_biased": lambda h: h.var(-1, keepdim=True, correction=0),
    "norm": lambda h: h.norm(dim=-1, keepdim=True) + h.norm(p=1, dim=-1, keepdim=True),
    "amax": lambda h: h.amax(-1, keepdim=True) - h.amin(-1, keepdim=True),
    "logsumexp": lambda h: h.logsumexp(-1, keepdim=True),
    "median_of_tokens": lambda h: h.median(1, keepdim=True).values,
    "product_of_tokens": lambda h: h.prod(1, keepdim=True),
}

CASES = [
    *(
        perceptron(f"elementwise_{name}", lambda m, h, f=f: f(h), free={"residual": (8,)})
        for name, f in ELEMENTWISE.items()
    ),
    *(perceptron(f"reduction_{name}", lambda m, h, f=f: h * f(h)) for name, f in REDUCTIONS.items()),
    perceptron("product", lambda m, h: h * (1 + h).prod(-1, keepdim=True), kind="portable"),
    perceptron(
        "entropy",
        lambda m, h: h * (h.softmax(-1) * h.log_softmax(-1)).sum(-1, keepdim=True),
        free=NONE,
        pins=("do not vanish",),
    ),
    perceptron(
        "cumulative", lambda m, h: h.cumsum(-1) * h.cumsum(1) + h.tanh().add(1.5).cumprod(1), free={"residual": (8,)}
    ),
    perceptron("sorted", lambda m, h: h.sort(-1).values, free=NONE, pins=("reorders it at run time",)),
    perceptron("sorted_tokens", lambda m, h: h.sort(1, descending=True)[0]),
    perceptron("topk", lambda m, h: h.topk(3, -1).values, 3, free=NONE, pins=("reorders it at run time",)),
    perceptron("masked_attention_pool", lambda m, h: (h * (h.sum(-1, keepdim=True) > 0)).sum(1)),
    perceptron("triangle", lambda m, h: h.transpose(1, 2).tril(), 4, free=NONE, pins=("triangle",)),
    perceptron(
        "gated", lambda m, h: F.glu(m.wide(h), -1), children=lambda: {"wide": nn.Linear(8, 16)}, free={"ffn": (8, 8)}
    ),
    perceptron(
        "gated_gelu",
        lambda m, h: (lambda a, b: a * F.gelu(b))(*m.wide(h).chunk(2, -1)),
        children=lambda: {"wide": nn.Linear(8, 16)},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "gated_split",
        lambda m, h: (lambda a, b, c: a * b + c)(*m.wide(h).split((8, 8, 8), -1)),
        children=lambda: {"wide": nn.Linear(8, 24)},
        free={"ffn": (8,), "residual": (8,)},
    ),
    perceptron(
        "gated_reshaped",
        lambda m, h: (t := m.wide(h).unflatten(-1, (2, 8)))[..., 0, :] * t[..., 1, :].relu(),
        children=lambda: {"wide": nn.Linear(8, 16)},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "maxout",
        lambda m, h: m.wide(h).unflatten(-1, (8, 2)).amax(-1),
        children=lambda: {"wide": nn.Linear(8, 16)},
        free={"ffn": (2, 8, 8)},
    ),
    perceptron(
        "einsum",
        lambda m, h: torch.einsum("...i,ij->...j", h, m.w),
        children=lambda: {"w": nn.Parameter(torch.ones(8, 8))},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "einsum_repeated",
        lambda m, h: torch.einsum("bti,btj,i->btj", h, m.c(h), m.w),
        children=lambda: {"w": nn.Parameter(torch.ones(8)), "c": nn.Linear(8, 8)},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "matmul_vector", lambda m, h: h * (h @ m.w).unsqueeze(-1), children=lambda: {"w": nn.Parameter(torch.ones(8))}
    ),
    perceptron(
        "matmul_broadcast", lambda m, h: m.w @ h.unsqueeze(1), children=lambda: {"w": nn.Parameter(torch.ones(3, 5, 4))}
    ),
    perceptron(
        "baddbmm",
        lambda m, h: torch.baddbmm(h, m.w.expand(h.shape[0], -1, -1), h),
        children=lambda: {"w": nn.Parameter(torch.ones(1, 4, 4))},
        free={"ffn": (8,)},
    ),
    perceptron(
        "addmm",
        lambda m, h: torch.addmm(m.c, h.flatten(0, 1), m.w).view(-1, 4, 8),
        children=lambda: {"w": nn.Parameter(torch.ones(8, 8)), "c": nn.Parameter(torch.ones(8))},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "outer_product",
        lambda m, h: (h.unsqueeze(-1) * m.c(h).unsqueeze(-2)).flatten(-2),
        64,
        children=lambda: {"c": nn.Linear(8, 8)},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "distance",
        lambda m, h: torch.cdist(h, m.c(h)),
        4,
        children=lambda: {"c": nn.Linear(8, 8)},
        free={"ffn": (8, 8)},
    ),
    perceptron(
        "linear_of_tokens",
        lambda m, h: m.mix(h.transpose(1, 2)).transpose(1, 2),
        children=lambda: {"mix": nn.Linear(4, 4)},
    ),
    perceptron(
        "constant_mask",
        lambda m, h: h * m.mask,
        children=lambda: {"mask": nn.Buffer(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))},
    ),
    perceptron(
        "added_buffer",
        lambda m, h: h + m.code,
        children=lambda: {"code": nn.Buffer(torch.randn(4, 8))},
        free={"ffn": (8,)},
    ),
    perceptron("scalar_parameter", lambda m, h: h * m.s + m.s, children=lambda: {"s": nn.Parameter(torch.ones(()))}),
    # the greatest of what is kept and of the zeros of what is gone: on some inputs, not the greatest of what is kept
    perceptron("greatest", lambda m, h: h * (4 + h.amax(-1, keepdim=True)).sigmoid(), kind="portable"),
    perceptron("fourier", lambda m, h: torch.fft.fft2(h).real, pins=("fft_fft2",)),
    Case("bilinear", Bilinear, vectors(4, 6), {"ffn": (7, 8), "other": (5,)}, kind="native"),
    channelwise("dropout2d", lambda m, h: F.dropout2d(h, 0.5, m.training), free={"channels": (8,)}),
    # inputs
    Case(
        "inputs_keywords",
        Keywords,
        lambda b: {"x": torch.randn(b, 6), "scale": torch.rand(b, 1), "shift": torch.rand(1)},
        {"ffn": (8,)},
    ),
    Case(
        "inputs_keyword_left_out",
        Keywords,
        lambda b: {"x": torch.randn(b, 6), "scale": torch.rand(b, 1)},
        {"ffn": (8,)},
    ),
    Case(
        "inputs_nested",
        Several,
        lambda b: ([torch.randn(b, 6), torch.randn(b, 4)], {"x": torch.randn(b, 6)}),
        {"residual": (8,)},
    ),
    Case(
        "input_twice",
        lambda: Net(
            lambda m, x: m.b(m.a(x) * m.c(x)) + x[:, :3], a=nn.Linear(6, 8), c=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        vectors(6),
        {"ffn": (8,)},
    ),
    Case(
        "input_written",
        lambda: Net(
            lambda m, x: m.b(m.a((y := x.clone()).mul_(2).add_(1)) * y.sum(-1, keepdim=True)),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
        ),
        vectors(6),
        {"ffn": (8,)},
    ),
    # outputs
    returning("output_tuple", lambda h, y: (y, y.softmax(-1)), {"ffn": (8,)}),
    returning("output_list_of_one", lambda h, y: [y], {"ffn": (8,)}),
    returning("output_dict", lambda h, y: {"y": y, "mean": h.mean(-1), "none": None}, {"ffn": (8,)}),
    returning("output_ordered_dict", lambda h, y: OrderedDict(y=y, energy=h.square().sum(-1)), {"ffn": (8,)}),
    returning("output_dataclass", lambda h, y: Found(y, y.sigmoid()), {"ffn": (8,)}),
    returning("output_named_tuple", lambda h, y: Pair(y, {"deep": (y * 2, [y + 1])}), {"ffn": (8,)}),
    returning("output_features", lambda h, y: (y, h), NONE, pins=("the network's output",)),
    returning("output_class", lambda h, y: (y, y.argmax(-1), y > 0), {"ffn": (8,)}),
    returning("output_scalar", lambda h, y: y.square().mean(), {"ffn": (3, 8)}),
    Case("bfloat16", half_precision, lambda b: torch.randn(b, 3, 6, 6, dtype=torch.bfloat16), {"channels": (8,)}),
    Case(
        "float64",
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
        lambda b: torch.randn(b, 6, dtype=torch.float64),
        {"ffn": (8,)},
    ),
    Case(
        "batch_of_one_only",
        lambda: Net(lambda m, x: m.b(m.a(x.reshape(1, 24)).relu()), a=nn.Linear(24, 8), b=nn.Linear(8, 3)),
        lambda b: torch.randn(1, 4, 6),
        {"ffn": (8,)},
        batch=1,
    ),
    Case(
        "sizes_from_shape",
        lambda: Net(
            lambda m, x: m.b(m.a(x) * (h := m.a(x)).shape[-2] + h.new_zeros(h.shape[0], 1, 8)),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
        ),
        vectors(4, 6),
        {"residual": (8,)},
    ),
    Case(
        "two_images",
        lambda: Net(
            lambda m, x: m.b(torch.cat([m.a(x), F.interpolate(m.a(F.avg_pool2d(x, 2)), x.shape[2:])], 1)),
            a=conv(3, 8),
            b=conv(16, 4),
        ),
        images(),
        {"channels": (8,)},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(case: Case) -> None:
    check(case)
