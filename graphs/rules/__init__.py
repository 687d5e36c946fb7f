"""What operators do to axes. One row per operator; a missing row is inferred by dye tracing, never assumed."""

from __future__ import annotations

from metaprune.graphs import operators
from metaprune.graphs.rules import (
    attention,
    contraction,
    creation,
    movement,
    normalisation,
    pointwise,
    rearrangement,
    recurrent,
    reduction,
    sampling,
    selection,
)
from metaprune.graphs.rules.rule import Rule

TABLE: dict[str, Rule] = (
    contraction.ROWS
    | attention.ROWS
    | normalisation.ROWS
    | reduction.ROWS
    | sampling.ROWS
    | movement.ROWS
    | rearrangement.ROWS
    | selection.ROWS
    | creation.ROWS
    | recurrent.ROWS
    | pointwise.ROWS
)


def lookup(op: str) -> Rule | None:
    """The rule of an operator by full name, else of its family; None if it has to be inferred."""
    base = op.rpartition(".")[0]
    found = TABLE.get(op) or TABLE.get(base)
    if found is None and operators.is_pointwise(op):
        return pointwise.RULE
    return found
