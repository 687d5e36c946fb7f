"""The shape of a row in the operator table, and the einsum-like signatures most rows consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    form = _Signature(
        operands=tuple(operands.split()),
        patterns=tuple(_tokens(part) for part in left.split(",")),
        result=_tokens(right),
        zero=[term.split("*") for term in zero.split("+")] if zero else [],
        sizes=sizes,
        pin=frozenset(pin.split()),
        roles=dict(item.split("=") for item in roles.split()),
        statistics=frozenset(statistics.split()),
        mix=frozenset(mix.split()),
        outputs=outputs,
    )
    return Rule(form.flow, rewrite, macs, form.operands)


@dataclass(frozen=True)
class _Use:
    """An operand's axis, or a factor of it, that stands under a letter."""

    number: int
    ref: Ref
    dim: int
    axis: Axis


@dataclass(frozen=True)
class _Result:
    """The result as it takes shape: its tokens, what was found for its letters, and which letters lost positions."""

    shape: tuple[int, ...]
    tokens: list[tuple[str, ...]]
    found: dict[str, Axis] = field(default_factory=dict)
    restricted: set[str] = field(default_factory=set)

    @property
    def letters(self) -> set[str]:
        """All letters of the tokens."""
        return {letter for token in self.tokens for letter in token}


@dataclass(frozen=True)
class _Signature:
    """A parsed signature; the attributes are the arguments of `signature`."""

    operands: tuple[str, ...]
    patterns: tuple[list[tuple[str, ...]], ...]
    result: list[tuple[str, ...]]
    zero: list[list[str]]
    sizes: Callable[[Flow, Node, Bound], dict[str, int]] | None
    pin: frozenset[str]
    roles: Mapping[str, str]
    statistics: frozenset[str]
    mix: frozenset[str]
    outputs: int

    def flow(self, state: Flow, node: Node, bound: Bound) -> Any:
        """See `Rule.flow`."""
        given = {i: _operand(bound, name) for i, name in enumerate(self.operands)}
        present = {i: value for i, value in given.items() if isinstance(value, Ref)}
        uses = self._uses(state, node, bound, present)
        first = node.meta if self.outputs == 1 else node.meta[0]  # type: ignore[index]
        shape = first.shape  # type: ignore[union-attr]
        result = _Result(shape, _expand(self.result, len(shape)))
        for letter, where in uses.items():
            self._role(state, letter, where)
            if letter in result.letters:
                self._keep(state, node, letter, where, set(present), result)
            else:
                self._consume(state, node, letter, where, result)
        out = _composed(state, node, result)
        return out if self.outputs == 1 else [out] * self.outputs

    def _uses(self, state: Flow, node: Node, bound: Bound, present: Mapping[int, Ref]) -> dict[str, list[_Use]]:
        """Where each letter stands, in the order of the operands."""
        known = dict(self.sizes(state, node, bound)) if self.sizes else {}
        uses: dict[str, list[_Use]] = {}
        for i, ref in present.items():
            axes = state.of(ref)
            state.use(axes)
            pattern = _expand(self.patterns[i], len(axes))
            if len(pattern) != len(axes):
                raise Unmatched(f"operand {self.operands[i]} has {len(axes)} dimensions")
            for dim, (token, axis) in enumerate(zip(pattern, axes, strict=True)):
                parts = _factors(state, token, axis, known, node.base)
                state.use(parts)
                for letter, part in zip(token, parts, strict=True):
                    uses.setdefault(letter, []).append(_Use(i, ref, dim, part))
        return uses

    def _role(self, state: Flow, letter: str, where: list[_Use]) -> None:
        """Notes what the units of a letter are."""
        role, use = self.roles.get(_family(letter)), where[0]
        if role and use.axis.ids is not None:
            whole = state.of(use.ref)[use.dim].size == use.axis.size
            state.atoms.role(use.axis.ids, "channels" if role == "conv_group" and whole else role)

    def _keep(
        self, state: Flow, node: Node, letter: str, where: list[_Use], present: set[int], result: _Result
    ) -> None:
        """A letter that the result has: one axis of all its operands."""
        if _family(letter) in self.mix:
            result.found[letter] = _mixed(state, node, where)
            result.restricted.add(letter)
            return
        tied = state.tie([use.axis for use in where], node.base)
        axes = {use.number: use.axis for use in where}
        result.found[letter] = tied.with_zero(_zero(self.zero, present, axes))
        if _family(letter) in self.statistics:
            state.statistics(node, where[0].ref, where[0].dim)

    def _consume(self, state: Flow, node: Node, letter: str, where: list[_Use], result: _Result) -> None:
        """A letter that the result lacks: pinned, filled up again, or summed over."""
        family = _family(letter)
        if family in self.pin:
            for use in where:
                state.pin(use.axis, "" if family.startswith("*") else "addressed by numbers at run time")
        elif len(where) == 1:
            (use,) = where
            twin = letter.replace("*s", "*t")
            filled = use.axis.ids is not None and state.fill(node, use.ref, use.dim, node.base)
            if filled and twin in result.letters:
                place = next(d for d, token in enumerate(result.tokens) if token == (twin,))
                if result.shape[place] == use.axis.size:
                    result.found[twin] = use.axis.with_zero(False)
                    result.restricted.add(twin)
        else:
            state.contract(node, [(use.ref, use.dim, use.axis) for use in where], node.base)


def _composed(state: Flow, node: Node, result: _Result) -> tuple[Axis, ...]:
    """The axes of the result from what was found for its letters; what was not is fixed."""
    op = node.base
    out: list[Axis] = []
    for dim, token in enumerate(result.tokens):
        made = [result.found.get(letter) for letter in token]
        if len(token) == 1:
            out.append(made[0] or state.fixed(result.shape[dim], f"made by {op}"))
        else:
            left_over = result.shape[dim] // max(1, prod(p.size for p in made if p is not None))
            full = [p or state.fixed(left_over, f"made by {op}") for p in made]
            out.append(state.merge(full, op))
        if result.restricted.intersection(token):
            state.restricted.setdefault(node.name, set()).add(dim)
    return tuple(out)


def _family(letter: str) -> str:
    """A letter without the number that a star gave it."""
    return letter.rstrip("0123456789")


def _operand(bound: Bound, name: str) -> Any:
    """The argument called `name`; `a/b` is the one of the two that the overload has."""
    return next((bound[n] for n in name.split("/") if n in bound), None)


def _mixed(state: Flow, node: Node, where: list[_Use]) -> Axis:
    """An axis the result keeps although its positions enter each other: every operand is filled up."""
    tied = state.tie([use.axis for use in where], node.base)
    for use in where:
        if use.axis.ids is not None:
            state.fill(node, use.ref, use.dim, node.base)
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
