"""The shape of a row in the operator table, and the einsum-like signatures most rows consist of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from metaprune.graphs.flow import Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut

Bound = dict[str, Any]


class Unmatched(Exception):
    """A rule does not cover this form of its operator."""


@dataclass(frozen=True)
class Rule:
    """One operator.

    Attributes: flow: Gives the axes of the result and records ties, contractions and pins. rewrite: For operators
        with sizes among their arguments: the call after a cut (new arguments, or the `Ref` that replaces its value).
        None: the call stays as it is. macs: Multiply-adds, as sums of products of shapes: `"out 1[1:] + 0"` is
        numel(out) * prod(operand 1's shape from dimension 1) + numel(operand 0). Empty: none. operands: Names of its
        tensor arguments in the order the signature and `macs` count them.
    """

    flow: Callable[[Flow, Node, Bound], Any]
    rewrite: Callable[[Cut, Node, Bound], Any] | None = None
    macs: str = ""
    operands: tuple[str, ...] = ()


def signature(
    text: str,
    operands: str,
    zero: str = "",
    macs: str = "",
    rewrite: Callable[[Cut, Node, Bound], Any] | None = None,
    sizes: Callable[[Flow, Node, Bound], dict[str, int]] | None = None,
    pin: str = "",
    roles: str = "",
    statistics: str = "",
    mix: str = "",
    outputs: int = 1,
) -> Rule:
    """A rule from an axis signature such as `"n c *s, o c *k, o -> n o *t"`.

    The same letter in two operands is one axis; a letter that the result lacks is summed over; `*s` stands for the
    remaining dimensions; `(g c)` is an axis that is the product of two. A letter that only one operand has, and the
    result has not, is
    mixed: its positions are filled up with zeros again before the operator runs.

    Args: text: The signature. operands: Argument names of the tensor operands, in order; absent ones (None) are
        skipped. zero: When the result vanishes with its unit: terms joined by `+` must all vanish, in a term `0*1`
        one operand is enough. `1!` is a factor that counts as non-zero when absent. macs: See `Rule.macs`. rewrite:
        See `Rule.rewrite`. sizes: Sizes of letters that shapes alone do not tell. pin: Letters that can not shrink:
        starred ones are kernel extents, the others are addressed at run time. roles: What letters are, `"h=heads
        d=head_dim"`. statistics: Letters over whose kept positions the operator takes statistics. mix: Letters that
        the result keeps but whose positions enter each other. outputs: Number of results, all of the same axes.
    """
    left, right = (part.strip() for part in text.split("->"))
    patterns = [_tokens(part) for part in left.split(",")]
    result = _tokens(right)
    names = tuple(operands.split())
    terms = [term.split("*") for term in zero.split("+")] if zero else []
    role_of = dict(item.split("=") for item in roles.split())

    def flow(state: Flow, node: Node, bound: Bound) -> Any:
        op = node.base
        known = dict(sizes(state, node, bound)) if sizes else {}
        uses: dict[str, list[tuple[int, Ref, int, Axis]]] = {}
        given = {i: _operand(bound, name) for i, name in enumerate(names)}
        present = {i for i, value in given.items() if isinstance(value, Ref)}
        for i in sorted(present):
            ref = given[i]
            axes = state.of(ref)
            state.use(axes)
            pattern = _expand(patterns[i], len(axes))
            if len(pattern) != len(axes):
                raise Unmatched(f"operand {names[i]} has {len(axes)} dimensions")
            for dim, (token, axis) in enumerate(zip(pattern, axes, strict=True)):
                parts = _factors(state, token, axis, known, op)
                state.use(parts)
                for letter, part in zip(token, parts, strict=True):
                    uses.setdefault(letter, []).append((i, ref, dim, part))
        first = node.meta if outputs == 1 else node.meta[0]  # type: ignore[index]
        out_shape = first.shape  # type: ignore[union-attr]
        out_tokens = _expand(result, len(out_shape))
        wanted = {letter for token in out_tokens for letter in token}
        found: dict[str, Axis] = {}
        restricted: set[str] = set()
        for letter, where in uses.items():
            family = letter.rstrip("0123456789")
            axis = where[0][3]
            if family in role_of and axis.ids is not None:
                whole = state.of(where[0][1])[where[0][2]].size == axis.size
                grouped = role_of[family] == "conv_group" and whole
                state.atoms.role(axis.ids, "channels" if grouped else role_of[family])
            if letter in wanted and family in mix.split():
                found[letter] = _mixed(state, node, [(ref, dim, axis) for _, ref, dim, axis in where], op)
                restricted.add(letter)
            elif letter in wanted:
                tied = state.tie([axis for *_, axis in where], op)
                found[letter] = tied.with_zero(_zero(terms, present, {i: axis for i, _, _, axis in where}))
                if family in statistics.split():
                    _, ref, dim, _ = where[0]
                    state.statistics(node, ref, dim)
            elif family in pin.split():
                for *_, axis in where:
                    state.pin(axis, "" if family.startswith("*") else "addressed by numbers at run time")
            elif len(where) == 1:
                _, ref, dim, axis = where[0]
                twin = letter.replace("*s", "*t")
                if axis.ids is not None and state.fill(node, ref, dim, op) and twin in wanted:
                    place = next(d for d, token in enumerate(out_tokens) if token == (twin,))
                    if out_shape[place] == axis.size:
                        found[twin] = axis.with_zero(False)
                        restricted.add(twin)
            else:
                state.contract(node, [(ref, dim, axis) for _, ref, dim, axis in where], op)
        out: list[Axis] = []
        for dim, token in enumerate(out_tokens):
            made = [found.get(letter) for letter in token]
            if len(token) == 1:
                out.append(made[0] or state.fixed(out_shape[dim], f"made by {op}"))
            else:
                left_over = out_shape[dim] // max(1, prod(p.size for p in made if p is not None))
                full = [p or state.fixed(left_over, f"made by {op}") for p in made]
                out.append(state.merge(full, op))
            if restricted.intersection(token):
                state.restricted.setdefault(node.name, set()).add(dim)
        return tuple(out) if outputs == 1 else [tuple(out)] * outputs

    return Rule(flow, rewrite, macs, names)


def _operand(bound: Bound, name: str) -> Any:
    """The argument called `name`; `a/b` is the one of the two that the overload has."""
    return next((bound[n] for n in name.split("/") if n in bound), None)


def _mixed(state: Flow, node: Node, where: list[tuple[Ref, int, Axis]], op: str) -> Axis:
    """An axis the result keeps although its positions enter each other: every operand is filled up."""
    tied = state.tie([axis for *_, axis in where], op)
    for ref, dim, axis in where:
        if axis.ids is not None:
            state.fill(node, ref, dim, op)
    return tied.with_zero(False)


def _tokens(text: str) -> list[tuple[str, ...]]:
    tokens: list[tuple[str, ...]] = []
    for piece in text.replace("(", " ( ").replace(")", " ) ").split():
        if piece == "(":
            tokens.append(("(",))
        elif piece == ")":
            start = max(i for i, t in enumerate(tokens) if t == ("(",))
            group = tuple(t[0] for t in tokens[start + 1 :])
            tokens[start:] = [group]
        else:
            tokens.append((piece,))
    return tokens


def _expand(tokens: list[tuple[str, ...]], rank: int) -> list[tuple[str, ...]]:
    """Tokens with the star replaced by as many numbered ones as the rank asks for, counted from the right."""
    at = next((i for i, token in enumerate(tokens) if token[0].startswith("*")), None)
    if at is None:
        return tokens
    count = rank - len(tokens) + 1
    star = tokens[at][0]
    return [*tokens[:at], *((f"{star}{count - 1 - i}",) for i in range(count)), *tokens[at + 1 :]]


def _factors(state: Flow, token: tuple[str, ...], axis: Axis, known: dict[str, int], op: str) -> tuple[Axis, ...]:
    if len(token) == 1:
        known.setdefault(token[0], axis.size)
        return (axis,)
    rest = axis.size // prod(known.get(letter, 1) for letter in token)
    sizes = [known.setdefault(letter, rest) for letter in token]
    return state.split(axis, sizes, op)


def _zero(terms: list[list[str]], present: set[int], axes: dict[int, Axis]) -> Any:
    if not terms:
        return np.False_
    result: Any = np.True_
    for term in terms:
        indices = [int(factor.rstrip("!")) for factor in term]
        if not present.intersection(indices):
            if any(factor.endswith("!") for factor in term):
                return np.False_
            continue
        one: Any = np.False_
        for i in indices:
            if i in axes:
                one = one | np.asarray(axes[i].zero)
        result = result & one
    return result
