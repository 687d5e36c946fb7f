"""Greedy generation with a key-value cache: pruned decoders against their masked originals, token by token.

    python benchmarks/generate.py --out benchmarks/results/generate.json        (needs the `bench` extra)

Tiny random decoders of transformers are pruned to half their width; the module that comes back generates 20 tokens from
several prompts, and so does a copy of the original in which all removed parameter slices are zero. Float64, so that
equal means equal. Exit code 1 if a token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import metaprune as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NEW = 20
BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped queries": ("Llama", {}),
    "llama, multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1}),
    "llama, tied embedding": ("Llama", {"tie_word_embeddings": True}),
    "llama, explicit head_dim": ("Llama", {"head_dim": 16}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, multi-head, head_dim": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 12, "num_hidden_layers": 3},
    ),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
}


def make(family: str, options: dict[str, Any]) -> nn.Module:
    """A randomly initialised decoder with live weights, in float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE | options)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 1.5 / value.shape[-1] ** 0.5)
            else:
                value.uniform_(0.5, 1.5) if "norm" in name else value.normal_(0, 0.3)
    return model


def tokens(model: nn.Module, prompt: Tensor) -> Tensor:
    """What the model says greedily, its cache on, shape [batch, prompt + 20]."""
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    mask = torch.ones_like(prompt)
    return generate(
        prompt, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True
    )


def judge(family: str, options: dict[str, Any], budget: str) -> dict[str, Any]:
    """Prunes one model and compares its tokens with the masked original's."""
    from tests.support.random_oracle import masked

    model = make(family, options)
    start = time.process_time()
    pruned = mp.prune(model, {"input_ids": torch.randint(2, 97, (2, 8)), "use_cache": False}, budget=budget)
    seconds = time.process_time() - start
    reference = masked(model, pruned.kept)
    counts = [sum(p.numel() for p in m.parameters()) for m in (pruned.module, model)]
    same = total = changed = 0
    if pruned.kind == "native":
        for seed, length in ((0, 5), (1, 8), (2, 12)):
            prompt = torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(seed))
            found, expected, dense = (tokens(m, prompt)[:, length:] for m in (pruned.module, reference, model))
            same += int((found == expected).sum())
            changed += int((dense != expected).sum())
            total += expected.numel()
    kinds = {
        group.kind for group in mp.trace(model, {"input_ids": torch.randint(2, 97, (2, 8))}).groups if not group.pinned
    }
    return {
        "kind": pruned.kind,
        "tokens": total,
        "equal": same,
        "differ_from_dense": changed,
        "distinct_tokens": int(found.unique().numel()) if total else 0,
        "parameters_removed_percent": round(100 * (1 - counts[0] / counts[1]), 1),
        "kinds": sorted(kinds),
        "notes": [note for note in pruned.notes if "kept whole" in note],
        "seconds": round(seconds, 2),
    }


def main() -> int:
    """Runs all cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="width=0.5")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/generate.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name, (family, extra) in CASES.items():
        try:
            rows[name] = judge(family, extra, options.budget)
        except mp.MetapruneError as error:
            rows[name] = {"kind": "refused", "tokens": 0, "equal": 0, "error": str(error)[:300]}
        print(f"{name:36s} {rows[name]}", flush=True)
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "budget": options.budget,
        "cases": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    right = [row for row in rows.values() if row["kind"] == "native" and row["equal"] == row["tokens"]]
    print(f"{len(right)} of {len(rows)} native with all tokens equal")
    return int(any(row["equal"] != row["tokens"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
