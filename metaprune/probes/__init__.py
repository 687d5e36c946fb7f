"""Probes: read-only reports on what pruning did or would do. None of them changes a network that it is given.

Every report lists itself as plain data for a table or JSON, one dict per row: `report.rows()`.
"""

from metaprune.probes.collapsing import Collapse, Remainder, collapse
from metaprune.probes.control import Scratch, scratch
from metaprune.probes.fidelity import RankFidelity, rank_fidelity
from metaprune.probes.widths import Ablated, Ablation, PqiCurve, PqiPoint, ablation, pqi_curve

__all__ = [
    "Ablated",
    "Ablation",
    "Collapse",
    "PqiCurve",
    "PqiPoint",
    "RankFidelity",
    "Remainder",
    "Scratch",
    "ablation",
    "collapse",
    "pqi_curve",
    "rank_fidelity",
    "scratch",
]
