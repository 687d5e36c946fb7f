"""Attention: fused and separate projections, torch's own layers, windows, biases, and other ways to mix tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, Net, check, images, vectors


class Fused(nn.Module):
    """One projection for queries, keys and values, split by a reshape; the softmax written out."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=bias)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class Chunked(nn.Module):
    """One projection, chunked; the fused attention operator with a causal mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(batch, length, -1))


class Separate(nn.Module):
    """Three projections; fewer heads of keys and values than of queries; another context."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int, v_dim: int, context: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.v_dim = heads, kv_heads, dim, v_dim
        self.q, self.k = nn.Linear(width, heads * dim), nn.Linear(context, kv_heads * dim)
        self.v, self.o = nn.Linear(context, kv_heads * v_dim), nn.Linear(heads * v_dim, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k = self.k(y).unflatten(-1, (self.kv_heads, self.dim)).transpose(1, 2)
        v = self.v(y).unflatten(-1, (self.kv_heads, self.v_dim)).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        return self.o(z.transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Projections and products by einsum, the ellipsis included."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(heads, width, dim)) for _ in range(3))
        self.o = nn.Parameter(torch.zeros(heads, dim, width))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("...tw,hwd->...htd", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).div(self.dim**0.5).softmax(-1)
        return torch.einsum("bhts,bhsd,hdw->btw", weights, v, self.o)


class Biased(nn.Module):
    """Relative position bias from a table, one column for each head."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        offset = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + side - 1
        self.register_buffer("offset", offset[..., 0] * (2 * side - 1) + offset[..., 1], persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)
        weights = weights + self.table[self.offset.view(-1)].view(length, length, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            weights = weights.view(batch // windows, windows, self.heads, length, length) + mask[None, :, None]
            weights = weights.view(-1, self.heads, length, length)
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class Shifted(nn.Module):
    """A shifted-window block over images of [batch, side, side, width]."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm, self.attention = nn.LayerNorm(width), Biased(width, heads, window)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        count = (side // window) ** 2
        self.register_buffer("mask", torch.where(torch.rand(count, window**2, window**2) < 0.3, -100.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w, n = self.window, height // self.window
        h = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        h = h.view(batch, n, w, n, w, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)
        h = self.attention(h, self.mask).view(batch, n, n, w, w, -1).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(h.reshape(batch, height, width, -1), (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, pre-norm blocks, a head on the class token."""

    def __init__(self, width: int = 8, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 10, width))
        parts = {"n1": nn.LayerNorm, "a": lambda w: Fused(w, heads, w // heads), "n2": nn.LayerNorm, "m": mlp}
        self.blocks = nn.ModuleList(nn.ModuleDict({k: f(width) for k, f in parts.items()}) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = x + block["a"](block["n1"](x))
            x = x + block["m"](block["n2"](x))
        return self.head(self.norm(x)[:, 0])


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, width))


class CrossCovariance(nn.Module):
    """Attention over channels instead of tokens, with normalised queries and keys and a temperature for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(batch, length, width))


class Linear(nn.Module):
    """Linear attention: keys and values are summed over tokens first."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2, keepdim=True).transpose(-2, -1))
        return self.proj(z.transpose(1, 2).flatten(2))


class TalkingHeads(nn.Module):
    """Heads are mixed by a linear map before the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mix = heads, nn.Linear(heads, heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class QueryNorm(nn.Module):
    """Queries and keys normalised over the head dimension, with a bias that falls with distance."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.q, self.k, self.v = (nn.Linear(width, heads * dim) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-3), nn.RMSNorm(dim, eps=1e-3)
        self.o = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, self.dim)) for layer in (self.q, self.k, self.v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        places = torch.arange(x.shape[1])
        bias = -(places[None] - places[:, None]).abs() * 0.5
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Token mixing: a perceptron over the tokens, another over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.n2(x))


class NonLocal(nn.Module):
    """Attention between the positions of an image."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1)
        self.o = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        y = v @ torch.bmm(q.transpose(1, 2), k).softmax(-1).transpose(1, 2)
        return x + self.o(y.view(-1, v.shape[1], *x.shape[2:]))


def attend(layer: nn.Module, **options: Any) -> nn.Module:
    """nn.MultiheadAttention as a network of one or two inputs."""
    return Attend(layer, **options)


class Attend(nn.Module):
    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        y = x if y is None else y
        return self.layer(x, y, y, **self.options)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layer(x, memory)


def stacked(layer: nn.Module, width: int = 8) -> nn.Module:
    """A layer between an embedding and a head, so that its width is free."""
    return nn.Sequential(nn.Linear(6, width), layer, nn.Linear(width, 3))


def two(*shapes: tuple[int, ...]) -> Any:
    return lambda batch: tuple(torch.randn(batch, *shape) for shape in shapes)


CASES = [
    Case(
        "fused",
        lambda: stacked(Fused(8, 3, 4)),
        vectors(5, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (3,)},
        kind="native",
    ),
    Case("fused_pinned_width", lambda: Fused(8, 3, 4, bias=False), vectors(5, 8), {"head_dim": (4,), "heads": (3,)}),
    Case("chunked", lambda: stacked(Chunked(8, 2)), vectors(5, 6), {"ffn": (8, 8), "head_dim": (4, 4), "heads": (2,)}),
    Case("separate", lambda: Separate(8, 2, 2, 4, 6, 7), two((5, 8), (3, 7)), {"head_dim": (4, 6), "heads": (2,)}),
    Case(
        "grouped_queries",
        lambda: Separate(8, 6, 2, 4, 6, 7),
        two((5, 8), (3, 7)),
        {"head_dim": (4, 6), "kv_group": (2,), "query_group": (3,)},
    ),
    Case(
        "multi_query",
        lambda: Separate(8, 4, 1, 4, 6, 7),
        two((5, 8), (3, 7)),
        {"head_dim": (4, 6), "query_group": (4,)},
    ),
    Case("einsum", lambda: stacked(Einsum(8, 2, 4)), vectors(5, 6), {"ffn": (8, 8), "head_dim": (4, 4), "heads": (2,)}),
    Case(
        "multihead",
        lambda: stacked(
            nn.Sequential(
                attend(nn.MultiheadAttention(8, 2, batch_first=True), need_weights=False), Net(lambda m, x: x[0])
            )
        ),
        vectors(5, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (2,)},
    ),
    Case(
        "multihead_weights",
        lambda: attend(nn.MultiheadAttention(8, 2, batch_first=True)),
        vectors(5, 8),
        {"head_dim": (4,)},
        pins=("mean mixes its positions",),
    ),
    Case(
        "multihead_weights_of_heads",
        lambda: attend(nn.MultiheadAttention(8, 2, batch_first=True), average_attn_weights=False),
        vectors(5, 8),
        {"head_dim": (4,)},
        ("output",),
    ),
    Case(
        "multihead_cross",
        lambda: attend(nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True), need_weights=False),
        two((4, 8), (3, 5)),
        {"head_dim": (4, 4), "heads": (2,)},
    ),
    Case(
        "multihead_sequence_first",
        lambda: Net(
            lambda m, x: m.a(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)[0].transpose(
                0, 1
            ),
            a=nn.MultiheadAttention(8, 2),
        ),
        vectors(5, 8),
        {"head_dim": (4, 4), "heads": (2,)},
    ),
    Case(
        "multihead_bias_kv",
        lambda: attend(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True), need_weights=False),
        vectors(5, 8),
        {"head_dim": (4,), "heads": (2,)},
    ),
    Case(
        "encoder_layer",
        lambda: stacked(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)),
        vectors(5, 6),
        {"ffn": (12,), "head_dim": (4,), "heads": (2,), "residual": (8,)},
        aware=True,
    ),
    Case(
        "encoder_layer_norm_first",
        lambda: stacked(nn.TransformerEncoderLayer(8, 2, 12, norm_first=True, activation="gelu", batch_first=True)),
        vectors(5, 6),
        {"ffn": (12,), "head_dim": (4,), "heads": (2,), "residual": (8,)},
        aware=True,
    ),
    Case("decoder_layer", Decoder, two((4, 8), (3, 8)), {"ffn": (12,), "head_dim": (4, 4), "heads": (2, 2)}),
    Case(
        "relative_bias",
        lambda: stacked(Biased(8, 2, 3)),
        vectors(9, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (2,)},
    ),
    Case(
        "shifted_windows",
        lambda: Net(
            lambda m, x: m.head(m.block(m.embed(x))).mean((1, 2)),
            embed=nn.Linear(3, 8),
            block=Shifted(8, 2, 4, 2, 1),
            head=nn.Linear(8, 3),
        ),
        vectors(4, 4, 3),
        {"ffn": (12,), "head_dim": (4,), "heads": (2,), "residual": (8,)},
        aware=True,
    ),
    Case(
        "vision_transformer",
        VisionTransformer,
        images(),
        {"ffn": (12, 12), "head_dim": (4, 4), "heads": (2, 2), "residual": (8,)},
        aware=True,
        kind="native",
    ),
    Case(
        "cross_covariance",
        lambda: stacked(CrossCovariance(8, 2)),
        vectors(5, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (2,)},
    ),
    Case(
        "linear_attention",
        lambda: stacked(Linear(8, 2, 4)),
        vectors(5, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (2,)},
        pins=("matmul sums over values",),
    ),
    Case(
        "talking_heads",
        lambda: stacked(TalkingHeads(8, 2)),
        vectors(5, 6),
        {"ffn": (8, 8), "head_dim": (4,), "heads": (2,)},
    ),
    Case("query_norm", lambda: QueryNorm(8, 2, 4), vectors(5, 8), {"head_dim": (4, 4), "heads": (2,)}),
    Case(
        "mixer",
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(6, 8), b=Mixer(5, 8), c=nn.Linear(8, 3)),
        vectors(5, 6),
        {"ffn": (6, 12), "residual": (8,)},
        aware=True,
    ),
    Case(
        "non_local",
        lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Conv2d(3, 8, 1), b=NonLocal(8, 4), c=nn.Conv2d(8, 3, 1)),
        images(4),
        {"channels": (4, 4), "residual": (8,)},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    check(case)
