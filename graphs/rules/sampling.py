"""Pooling and resampling: every channel on its own, positions of space made anew."""

from __future__ import annotations

from metaprune.graphs.rules.rule import Rule, signature


def _per_channel(outputs: int = 1) -> Rule:
    return signature("n c *s -> n c *t", "self/input", zero="0", outputs=outputs)


_POOLS = [f"{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg") for d in (1, 2, 3)]
_INDEXED = [
    f"{kind}_pool{d}d{tail}" for kind, tail in (("max", "_with_indices"), ("adaptive_max", "")) for d in (1, 2, 3)
]
_UPSAMPLES = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
).split()

ROWS: dict[str, Rule] = {
    **{f"aten.{name}": _per_channel() for name in _POOLS},
    **{f"aten.{name}": _per_channel(outputs=2) for name in _INDEXED},
    **{f"aten.{name}": _per_channel() for name in _UPSAMPLES},
    "aten.grid_sampler": signature("n c *s, n *i k -> n c *i", "input grid", zero="0", pin="k"),
    "aten.grid_sampler_2d": signature("n c *s, n *i k -> n c *i", "input grid", zero="0", pin="k"),
}
