"""How well the metanetwork predicts networks of families left out, by the size of the zoo that it was fitted on.

python benchmarks/metanet_sizes.py --zoo runs/zoo     # results/metanet_sizes.json and the README's table
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metanet import UNSEEN, case_of, unseen
from report import provenance, put_table

import metaprune as mp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "metanet_sizes.json"
SIZES = (15, 30, 60, 120)
FLOOR = 1e-6
"""Losses in nats below this count as this."""


class First:
    """The first members of a zoo, without those of families left out."""

    def __init__(self, zoo: mp.Zoo, size: int) -> None:
        self.labels = zoo.labels
        self._zoo, self._names = zoo, set(list(zoo.facts)[:size])

    def __iter__(self) -> Any:
        for name in sorted(self._names):
            if self._zoo.facts[name]["family"] not in UNSEEN:
                yield self._zoo.member(name)


def judged(zoo: mp.Zoo, pruner: mp.MetaPruner) -> dict[str, float]:
    """R2 of the logarithms of losses of all cuts of the networks left out, and of the worst of them."""
    found: dict[str, list[tuple[Any, Any]]] = {"plain": [], "compensated": []}
    for name in unseen(zoo):
        case, labels = case_of(zoo, name), zoo.labels(name)
        assert labels is not None
        encoded = pruner.encode(case.graph, data=case.calibration, seed=case.seed)
        for what, pairs in found.items():
            curves, measured = getattr(encoded, what), getattr(labels, what)
            mine = np.concatenate([curves[group][levels.numpy()] for group, levels in labels.levels.items()])
            theirs = np.concatenate([measured[group].numpy() for group in labels.levels])
            use = np.isfinite(mine) & np.isfinite(theirs)
            pairs.append((np.log(np.maximum(mine[use], FLOOR)), np.log(np.maximum(theirs[use], FLOOR))))
    result = {what: _explained(pairs) for what, pairs in found.items()}
    return result | {f"{what}, worst": min(_explained([pair]) for pair in pairs) for what, pairs in found.items()}


def _explained(pairs: list[tuple[Any, Any]]) -> float:
    mine, theirs = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return float(1 - ((mine - theirs) ** 2).sum() / ((theirs - theirs.mean()) ** 2).sum())


def main() -> None:
    """Fits on zoos of growing size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "metanet-sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    zoo = mp.Zoo.open(options.zoo)
    rows = []
    for size in SIZES:
        path = options.out / f"pruner-{size}.safetensors"
        if not path.exists():
            options.out.mkdir(parents=True, exist_ok=True)
            mp.fit(First(zoo, size), heads="curves", out=options.out / f"fit-{size}").save(path)
        pruner = mp.MetaPruner.load(path)
        rows.append({"size": size, "fitted on": len(pruner.card["zoo"]["networks"]), **judged(zoo, pruner)})
        print(rows[-1], flush=True)
    about = provenance("python benchmarks/metanet_sizes.py", ("torch-geometric",))
    RESULTS.write_text(json.dumps({**about, "unseen": UNSEEN, "networks": len(unseen(zoo)), "rows": rows}, indent=1))
    kinds = ("plain", "compensated")
    lines = ["| networks fitted on | " + " | ".join(f"R2, {kind} (worst network)" for kind in kinds) + " |"]
    lines += ["|---|---|---|"]
    for row in rows:
        cells = [f"{row[kind]:.3f} ({row[f'{kind}, worst']:.2f})" for kind in kinds]
        lines.append(f"| {row['fitted on']} | " + " | ".join(cells) + " |")
    put_table("metanet-sizes", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
