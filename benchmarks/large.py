"""Large networks: a language model of a billion parameters on the meta device, and a graph of 10,000 operators.

    python benchmarks/large.py --out benchmarks/results/large.json     (transformers' model needs the `bench` extra)

Each part runs in a process of its own, whose peak memory is reported. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaprune as mp

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
CERTIFIED = "own llama, 1.1 billion, certified"
GOALS = {"seconds": 30.0, "peak_mib": 2048.0}


class RmsNorm(nn.Module):
    """Root-mean-square norm, spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, width]."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Layer(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        head_dim = WIDTH // HEADS
        self.head_dim = head_dim
        self.before, self.between = RmsNorm(), RmsNorm()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * head_dim, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, tokens, width]; cos, sin: [tokens, head_dim]."""

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], -1, self.head_dim).transpose(1, 2)

        def rotated(y: Tensor) -> Tensor:
            half = y.shape[-1] // 2
            return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

        y = self.before(x)
        q, k, v = rotated(heads(self.q(y))), rotated(heads(self.k(y))), heads(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Language(nn.Module):
    """A decoder of 1.1 billion parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm, self.head = RmsNorm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("cos", torch.ones(16, WIDTH // HEADS))
        self.register_buffer("sin", torch.ones(16, WIDTH // HEADS))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, tokens]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))


class Deep(nn.Module):
    """Residual blocks of five operators."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.up = nn.ModuleList([nn.Linear(12, 16) for _ in range(blocks)])
        self.down = nn.ModuleList([nn.Linear(16, 12) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 8]."""
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + 0.5 * down(torch.relu(up(x)))
        return self.head(x)


def own_llama() -> tuple[nn.Module, Any]:
    """The hand-written decoder."""
    with torch.device("meta"):
        return Language(), torch.zeros(2, 16, dtype=torch.long)


def llama_with_weights() -> tuple[nn.Module, Any]:
    """The hand-written decoder with random weights: 4.4 GB of them."""
    torch.manual_seed(0)
    return Language().eval(), torch.randint(0, VOCABULARY, (2, 16))


def transformers_llama() -> tuple[nn.Module, Any]:
    """The same sizes in transformers' `LlamaForCausalLM`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        return model, {"input_ids": torch.zeros(2, 16, dtype=torch.long), "use_cache": False}


def ten_thousand() -> tuple[nn.Module, Any]:
    """A chain of 2,000 residual blocks: 10,000 operators."""
    return Deep(2000), torch.randn(2, 8)


PARTS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "own llama, 1.1 billion, meta device": own_llama,
    "transformers llama, 1.1 billion, meta device": transformers_llama,
    "10,000 operators": ten_thousand,
    CERTIFIED: llama_with_weights,
}


def measure(name: str) -> dict[str, Any]:
    """CPU seconds of each stage and the peak of resident memory of this process."""
    torch.set_num_threads(1)
    mp.plan(mp.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(2, 4)), budget="width=0.5")
    model, inputs = PARTS[name]()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    marks = [time.process_time()]
    graph = mp.trace(model, inputs)
    marks.append(time.process_time())
    groups = graph.groups
    marks.append(time.process_time())
    plan = mp.plan(graph, budget="macs=0.5")
    marks.append(time.process_time())
    pruned = mp.apply(graph, plan, certify=name == CERTIFIED)
    marks.append(time.process_time())
    stages = [round(b - a, 2) for a, b in pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "operators": sum(node.op not in ("input", "tensor") for node in graph.nodes.values()),
        "groups": len(groups),
        "free_groups": sum(not group.pinned for group in groups),
        "macs_kept": round(plan.reached["macs"], 4),
        "wiring": pruned.certificate.wiring if pruned.certificate else None,
        **dict(zip(("trace_seconds", "groups_seconds", "plan_seconds", "apply_seconds"), stages, strict=True)),
        "seconds": round(marks[3] - marks[0], 2),
        "peak_mib": round(peak, 1),
        "peak_mib_before": round(idle, 1),
    }


def main() -> int:
    """Runs every part in its own process; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", help="run one part here and print it as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/large.json")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.part)))
        return 0
    rows: dict[str, Any] = {}
    for name in PARTS:
        done = subprocess.run([sys.executable, __file__, "--part", name], capture_output=True, text=True, check=False)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        rows[name] = json.loads(last[0]) if done.returncode == 0 else {"error": "".join(last)}
        print(f"{name}: {rows[name]}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "goals": GOALS, "parts": rows}, indent=1) + "\n")
    llamas = [row for name, row in rows.items() if "meta device" in name]
    return int(any(row.get(key, float("inf")) > goal for row in llamas for key, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
