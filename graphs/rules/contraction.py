"""Operators that multiply and sum: convolutions, linear maps, matrix products, einsum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched, signature
from metaprune.graphs.structure import Ref

if TYPE_CHECKING:
    from metaprune.graphs.surgery import Cut


def _groups(flow: Flow, node: Node, bound: Bound) -> dict[str, int]:
    return {"g": int(bound["groups"])}


def _conv_groups(cut: Cut, node: Node, bound: Bound) -> Bound:
    """The number of groups is the input's channels over the channels of one group."""
    channels = cut.size(bound["input"], -1 - (len(cut.shape(bound["weight"])) - 2))
    per_group = cut.size(bound["weight"], 1)
    return {**bound, "groups": channels // per_group}


def _transposed_groups(cut: Cut, node: Node, bound: Bound) -> Bound:
    channels = cut.size(node, -1 - (len(cut.shape(bound["weight"])) - 2))
    return {**bound, "groups": channels // cut.size(bound["weight"], 1)}


def _convolution() -> Rule:
    grouped = signature(
        "n (g c) *s, (g o) c *k, (g o) -> n (g o) *t",
        "input weight bias",
        zero="0*1+2",
        macs="out 1[1:]",
        rewrite=_conv_groups,
        sizes=_groups,
        pin="*k",
        roles="g=conv_group o=channels",
    )
    single = signature(
        "n c *s, o c *k, o -> n o *t",
        "input weight bias",
        zero="0*1+2",
        macs="out 1[1:]",
        pin="*k",
        roles="o=channels",
    )

    def flow(state: Flow, node: Node, bound: Bound) -> Axes:
        if len(state.of(bound["input"])) != len(state.of(bound["weight"])):
            raise Unmatched("an input without a batch dimension")
        rule = grouped if bound["groups"] != 1 else single
        axes: Axes = rule.flow(state, node, bound)
        return axes

    def rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
        return _conv_groups(cut, node, bound) if bound["groups"] != 1 else bound

    return Rule(flow, rewrite, "out 1[1:]", ("input", "weight", "bias"))


def _transposed() -> Rule:
    rule = signature(
        "n (g c) *s, (g c) o *k, (g o) -> n (g o) *t",
        "input weight bias",
        zero="0*1+2",
        sizes=_groups,
        pin="*k",
        roles="g=conv_group o=channels",
    )

    def rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
        return _transposed_groups(cut, node, bound) if bound["groups"] != 1 else bound

    return Rule(rule.flow, rewrite, "0 1[1:]", rule.operands)


def _general() -> Rule:
    """`aten.convolution`: transposed or not by an argument."""
    forward, transposed = _convolution(), _transposed()

    def flow(state: Flow, node: Node, bound: Bound) -> Axes:
        axes: Axes = (transposed if bound["transposed"] else forward).flow(state, node, bound)
        return axes

    def rewrite(cut: Cut, node: Node, bound: Bound) -> Bound:
        chosen = transposed if bound["transposed"] else forward
        assert chosen.rewrite is not None
        result: Bound = chosen.rewrite(cut, node, bound)
        return result

    return Rule(flow, rewrite, "out 1[1:]", ("input", "weight", "bias"))


def _matmul(state: Flow, node: Node, bound: Bound) -> Axes:
    """`torch.matmul`: vectors, matrices, and batches that broadcast."""
    left, right = bound["self"], bound["other" if "other" in bound else "mat2"]
    a, b = state.of(left), state.of(right)
    state.use(a)
    state.use(b)
    state.contract(
        node, [(left, len(a) - 1, a[-1]), (right, max(0, len(b) - 2), b[-2] if len(b) > 1 else b[0])], "matmul"
    )
    rows = [a[-2].with_zero(a[-2].zero)] if len(a) > 1 else []
    columns = [b[-1].with_zero(b[-1].zero)] if len(b) > 1 else []
    batch = broadcast(state, [a[:-2], b[:-2]], "matmul")
    if state.is_activation(left) and state.is_activation(right):
        _attention_roles(state, batch, [a[-1], *columns])
    for ref, free in ((left, rows), (right, columns)):
        if not state.is_activation(ref) and free and free[0].ids is not None:
            state.atoms.role(free[0].ids, "ffn")
    return (*batch, *rows, *columns)


def _batched(text: str, operands: str, zero: str) -> Rule:
    """A product of batches of matrices, the batch first in both operands."""
    rule = signature(text, operands, zero, "out 0[-1]")
    first, second = operands.split()[:2]

    def flow(state: Flow, node: Node, bound: Bound) -> Axes:
        axes: Axes = rule.flow(state, node, bound)
        if state.is_activation(bound[first]) and state.is_activation(bound[second]):
            _attention_roles(state, axes[:1], [state.of(bound[first])[-1], axes[-1]])
        return axes

    return Rule(flow, None, rule.macs, rule.operands)


def _attention_roles(state: Flow, batch: Iterable[Axis], features: Iterable[Axis]) -> None:
    """In a batched product of two activations, batch axes that can be pruned are heads with the features inside."""
    heads = [axis for axis in batch if axis.ids is not None]
    for axis in heads:
        state.atoms.role(axis.ids, "heads")  # type: ignore[arg-type]
    for axis in features:
        if heads and axis.ids is not None:
            state.atoms.role(axis.ids, "head_dim")


def broadcast(state: Flow, operands: list[Axes], op: str) -> Axes:
    """Axes of a product of operands that broadcast against each other from the right; zero when one operand is."""
    rank = max((len(axes) for axes in operands), default=0)
    out: list[Axis] = []
    for position in range(rank):
        here = [axes[position - rank + len(axes)] for axes in operands if position - rank + len(axes) >= 0]
        size = max(axis.size for axis in here)
        full = [axis for axis in here if axis.size == size]
        tied = state.tie(full, op)
        zero = full[0].zero
        for axis in full[1:]:
            zero = zero | axis.zero
        out.append(tied.with_zero(zero))
    return tuple(out)


def _einsum(state: Flow, node: Node, bound: Bound) -> Axes:
    equation = bound["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted({c for c in inputs if c.isalpha()})
        output = ("..." if "..." in inputs else "") + "".join(c for c in letters if inputs.count(c) == 1)
    operands = bound["tensors"]
    patterns: list[list[str]] = []
    for term, operand in zip(terms, operands, strict=True):
        rank = len(state.of(operand))
        head, dots, tail = term.partition("...")
        count = rank - len(head) - len(tail)
        patterns.append([*head, *(f".{count - 1 - i}" for i in range(count if dots else 0)), *tail])
    dotted = max((p for p in patterns), key=lambda p: sum(c.startswith(".") for c in p))
    head, dots, tail = output.partition("...")
    out = [*head, *([c for c in dotted if c.startswith(".")] if dots else []), *tail]
    uses: dict[str, list[tuple[Ref, int, Axis]]] = {}
    for pattern, operand in zip(patterns, operands, strict=True):
        axes = state.of(operand)
        state.use(axes)
        for dim, (letter, axis) in enumerate(zip(pattern, axes, strict=True)):
            uses.setdefault(letter, []).append((operand, dim, axis))
    result: dict[str, Axis] = {}
    for letter, where in uses.items():
        size = max(axis.size for *_, axis in where)
        where = [use for use in where if use[2].size == size]
        if letter in out:
            tied = state.tie([axis for *_, axis in where], "einsum")
            zero = where[0][2].zero
            for *_, axis in where[1:]:
                zero = zero | axis.zero
            result[letter] = tied.with_zero(zero)
        else:
            state.contract(node, where, "einsum")
    _einsum_roles(state, dict(zip(operands, patterns, strict=True)), uses, out)
    return tuple(result[letter] for letter in out)


def _einsum_roles(
    state: Flow, patterns: dict[Ref, list[str]], uses: dict[str, list[tuple[Ref, int, Axis]]], out: list[str]
) -> None:
    """As in a linear map for a parameter's letters, as in a batched product where two activations meet."""
    active = [set(pattern) for operand, pattern in patterns.items() if state.is_activation(operand)]
    weights = [set(pattern) for operand, pattern in patterns.items() if not state.is_activation(operand)]
    axis = {letter: where[0][2] for letter, where in uses.items()}
    for letter in set(out).intersection(*weights[:1]):
        if axis[letter].ids is not None:
            state.atoms.role(axis[letter].ids, "ffn")  # type: ignore[arg-type]
    if len(active) == 2:
        passed_on = set(out).union(*weights)
        heads = active[0] & active[1] & passed_on
        _attention_roles(state, [axis[k] for k in heads], [axis[k] for k in (active[0] | active[1]) - heads])


ROWS: dict[str, Rule] = {
    **{f"aten.{name}": _convolution() for name in ("conv1d", "conv2d", "conv3d")},
    **{f"aten.{name}": _transposed() for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    "aten.convolution": _general(),
    "aten.linear": signature("*b i, o i, o -> *b o", "input weight bias", "0*1+2", "out 0[-1]", roles="o=ffn"),
    "aten.mm": Rule(_matmul, None, "out 0[-1]", ("self", "mat2")),
    "aten.bmm": _batched("h a i, h i b -> h a b", "self mat2", "0*1"),
    "aten.addmm": signature("a i, i b, b -> a b", "mat1 mat2 self", "0*1+2", "out 0[-1]", roles="b=ffn"),
    "aten.baddbmm": _batched("h a i, h i b, h a b -> h a b", "batch1 batch2 self", "0*1+2"),
    "aten._grouped_mm": signature("s i, e i o, e -> s o", "self mat2 offs", "0*1", "out 0[-1]", pin="e", roles="o=ffn"),
    "transformers.grouped_mm_fallback": signature(
        "s i, e i o, e -> s o", "input weight offs", "0*1", "out 0[-1]", pin="e", roles="o=ffn"
    ),
    "aten.mv": signature("a i, i -> a", "self vec", "0*1", "out 0[-1]"),
    "aten.dot": signature("i, i -> ", "self tensor", "0*1", "0"),
    "aten.outer": signature("a, b -> a b", "self vec2", "0*1"),
    "aten.bilinear": signature("*b i, *b j, o i j, o -> *b o", "input1 input2 weight bias", "0*1*2+3", "out 2[1:]"),
    "aten.matmul": Rule(_matmul, None, "out 0[-1]", ("self", "other")),
    "aten.einsum": Rule(_einsum, None, "einsum", ("tensors",)),
    "aten.embedding": signature("v d, *i -> *i d", "weight indices", "0", pin="v", roles="d=ffn"),
    "aten.linalg_vecdot": signature("*b i, *b i -> *b", "x y", "0*1", "0"),
}
