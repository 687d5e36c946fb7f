"""Language models, recurrent layers, routing between experts, tied and shared weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, Net, check, conv, images, tokens, vectors

NONE: dict[str, tuple[int, ...]] = {}


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: halves of the head dimension turn together."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of neighbouring pairs."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class LlamaLayer(nn.Module):
    """Grouped queries by expanding keys and values, rotary positions, a gated perceptron."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int, inner: int, pairs: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.pairs = heads, kv_heads, dim, pairs
        self.q = nn.Linear(width, heads * dim, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * dim, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * dim, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.n1, self.n2 = RMSNorm(width), RMSNorm(width)
        frequency = 100.0 ** -(torch.arange(0, dim, 2) / dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(length)[:, None] * self.frequency
        turn = rotated_pairs if self.pairs else rotated
        angle = angle if self.pairs else torch.cat((angle, angle), -1)
        q, k = turn(q, angle.cos(), angle.sin()), turn(k, angle.cos(), angle.sin())
        k, v = self.repeated(k), self.repeated(v)
        weights = q @ k.transpose(2, 3) / self.dim**0.5
        mask = torch.full((length, length), float("-inf")).triu(1)
        y = (weights + mask).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        times = self.heads // self.kv_heads
        return x[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.n1(x))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, tied: bool, pairs: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), RMSNorm(8)
        self.layers = nn.ModuleList(LlamaLayer(8, 4, 2, 4, 12, pairs) for _ in range(depth))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Experts(nn.Module):
    """A router picks two of three experts for each token; their outputs are weighed and added."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = torch.where(chosen == i, weight, 0.0).sum(-1, keepdim=True)
            y = y + share * expert(x)
        return y


class StackedExperts(nn.Module):
    """All experts' weights in one tensor; a dense mixture."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.up = nn.Parameter(torch.zeros(count, width, inner))
        self.down = nn.Parameter(torch.zeros(count, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        h = torch.einsum("btw,ewi->beti", x, self.up).relu()
        return torch.einsum("betw,bte->btw", torch.einsum("betI,eIw->betw", h, self.down), share)


def recurrent(layer: nn.Module, width: int, pick: Callable[[Any], Tensor] = lambda y: y[0]) -> nn.Module:
    """A recurrent layer between two linear ones."""
    return Net(lambda m, x: m.b(pick(m.layer(m.a(x)))), a=nn.Linear(6, 8), layer=layer, b=nn.Linear(width, 3))


class GivenState(nn.Module):
    """A recurrent layer whose first state is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layer, self.head = nn.Linear(6, 8), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x, self.start(x[:, 0]).tanh().unsqueeze(0))[0])


class Cells(nn.Module):
    """Cells called in a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(6, 8), cell, nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Bag(nn.Module):
    """A sum of embeddings, and positions of which only some are used."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(9, 8)
        self.kind, self.head = nn.Parameter(torch.zeros(2, 8)), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kind[1]
        mask = (ids != 0).unsqueeze(-1).to(x.dtype)
        return self.head((x * mask).sum(1) / mask.sum(1).clamp(min=1))


def pooled(kind: str) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 8, mode=kind), nn.ReLU(), nn.Linear(8, 3))


def shared_layers() -> nn.Module:
    """One block used at every depth, a projection shared by two places, and one that only moves data."""
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return Net(
        lambda m, x: m.b((h := (h := m.a(x)) + m.block(h)) + m.block(h)),
        a=nn.Linear(6, 8),
        block=block,
        b=nn.Linear(8, 3),
    )


def autoencoder() -> nn.Module:
    """The decoder's weights are the encoder's, transposed."""
    return Net(
        lambda m, x: F.linear(F.linear(m.a(x), m.w).relu(), m.w.t()),
        a=nn.Linear(6, 8),
        w=nn.Parameter(torch.zeros(5, 8)),
    )


def tied_convolutions() -> nn.Module:
    network = Net(lambda m, x: m.d(m.c(m.b(m.a(x)).relu())), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 2))
    network.c.weight = network.b.weight
    return network


def unused_branch() -> nn.Module:
    network = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3), never=nn.Linear(4, 4))
    network.computed_for_nothing = nn.Linear(8, 2)
    network.body = lambda m, x: (h := m.a(x).relu(), m.computed_for_nothing(h), m.b(h))[2]
    return network


LLAMA = {"ffn": (12, 12), "head_dim": (4, 4), "kv_group": (2, 2), "query_group": (2, 2), "residual": (8,)}

CASES = [
    Case("llama", lambda: Llama(False), tokens(), {**LLAMA, "head_dim": (2, 2, 4, 4)}, ("run time", "output")),
    Case("llama_tied", lambda: Llama(True), tokens(), {**LLAMA, "head_dim": (2, 2, 4, 4)}, ("run time",)),
    Case("llama_pairs", lambda: Llama(False, pairs=True), tokens(), {**LLAMA, "head_dim": (2, 2, 4, 4)}),
    Case(
        "llama_batch_1",
        lambda: Llama(True, depth=1),
        tokens(),
        {k: v[:1] for k, v in LLAMA.items()} | {"head_dim": (2, 4)},
        batch=1,
    ),
    Case(
        "experts",
        lambda: nn.Sequential(nn.Linear(6, 8), Experts(8, 10, 3), nn.Linear(8, 3)),
        vectors(4, 6),
        {"ffn": (10, 10, 10), "residual": (8,)},
        ("topk reorders",),
    ),
    Case(
        "stacked_experts",
        lambda: nn.Sequential(nn.Linear(6, 8), StackedExperts(8, 10, 3), nn.Linear(8, 3)),
        vectors(4, 6),
        {"ffn": (3, 8, 8, 10)},
        ("output",),
    ),
    Case(
        "lstm",
        lambda: recurrent(nn.LSTM(8, 7, batch_first=True), 7),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
        kind="native",
    ),
    Case(
        "lstm_two_layers",
        lambda: recurrent(nn.LSTM(8, 7, 2, batch_first=True, bias=False), 7),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case(
        "lstm_bidirectional",
        lambda: recurrent(nn.LSTM(8, 7, 2, batch_first=True, bidirectional=True, dropout=0.2), 14),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
        kind="native",
    ),
    Case(
        "lstm_last_state",
        lambda: recurrent(nn.LSTM(8, 7, batch_first=True), 7, lambda y: y[1][1][-1]),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case(
        "lstm_sequence_first",
        lambda: Net(
            lambda m, x: m.b(m.l(m.a(x).transpose(0, 1))[0][-1]), a=nn.Linear(6, 8), l=nn.LSTM(8, 7), b=nn.Linear(7, 3)
        ),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case(
        "gru",
        lambda: recurrent(nn.GRU(8, 7, batch_first=True), 7),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
        kind="native",
    ),
    Case(
        "gru_bidirectional",
        lambda: recurrent(nn.GRU(8, 7, 2, batch_first=True, bidirectional=True), 14),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case("gru_given_state", GivenState, vectors(4, 6), {"hidden": (8,)}),
    Case(
        "plain_recurrent",
        lambda: recurrent(nn.RNN(8, 7, batch_first=True), 7),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case(
        "plain_recurrent_relu",
        lambda: recurrent(nn.RNN(8, 7, nonlinearity="relu", batch_first=True), 7),
        vectors(4, 6),
        {"ffn": (8,), "hidden": (7,)},
    ),
    Case("lstm_cells", lambda: Cells(nn.LSTMCell(8, 7)), vectors(4, 6), {"ffn": (8,), "hidden": (7,)}),
    Case("gru_cells", lambda: Cells(nn.GRUCell(8, 7)), vectors(4, 6), {"ffn": (8,), "hidden": (7,)}),
    Case("embedding_bag_by_hand", Bag, tokens(), {"ffn": (8,)}, ("run time",)),
    Case("embedding_bag_sum", lambda: pooled("sum"), tokens(), NONE, ("embedding_bag",)),
    Case("embedding_bag_mean", lambda: pooled("mean"), tokens(), NONE, ("embedding_bag",)),
    Case("shared_block", shared_layers, vectors(4, 6), {"ffn": (12,), "residual": (8,)}, aware=True),
    Case("transposed_weights", autoencoder, vectors(4, 6), {"ffn": (5,)}, ("output",)),
    Case(
        "tied_convolutions",
        tied_convolutions,
        images(4),
        {"channels": (8,)},
    ),
    Case("unused_branch", unused_branch, vectors(6), {"ffn": (8,)}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sequence(case: Case) -> None:
    check(case)
