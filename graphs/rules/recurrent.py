"""Recurrent layers: a hidden unit owns a row of every gate, its recurrent column, and its input columns above."""

from __future__ import annotations

from typing import Any

import numpy as np

from metaprune.graphs.flow import Axes, Axis, Flow
from metaprune.graphs.ir import Node
from metaprune.graphs.rules.movement import join
from metaprune.graphs.rules.rule import Bound, Rule, Unmatched
from metaprune.graphs.structure import Ref


def _recurrent(gates: int) -> Rule:
    """LSTM (4 gates), GRU (3) or a plain cell (1), any number of layers, one or two directions, no projection.

    A silenced unit stays at zero: its gates are sigmoid(0) = 1/2 and its candidate tanh(0) = 0, given a zero first
    state.
    """

    def flow(state: Flow, node: Node, bound: Bound) -> list[Axes]:
        if "batch_sizes" in bound:
            raise Unmatched("packed sequences")
        states: tuple[Ref, ...] = bound["hx"] if isinstance(bound["hx"], tuple) else (bound["hx"],)
        params = list(bound["params"])
        op = node.base
        count = 4 if bound["has_biases"] else 2
        directions = 2 if bound["bidirectional"] else 1
        widths = {state.of(ref)[-1].size for ref in states}
        if len(widths) > 1:
            raise Unmatched("a projected state")
        hidden = state.tie([state.of(ref)[-1] for ref in states], op)
        if len(params) != count * directions * bound["num_layers"] or state.of(params[1])[1].size != hidden.size:
            raise Unmatched("a projected state")
        inputs, ref = state.of(bound["input"]), bound["input"]
        state.use(inputs)
        if len(inputs) == 3:
            batch = inputs[0 if bound["batch_first"] else 1]
            state.tie([batch, *(state.of(r)[-2] for r in states)], op)
        state.pin(inputs[1 if len(inputs) == 3 and bound["batch_first"] else 0], f"{op} runs along it")
        feature, place = inputs[-1], len(inputs) - 1
        for layer in range(bound["num_layers"]):
            outs: list[Axis] = []
            for direction in range(directions):
                start = count * (layer * directions + direction)
                own = params[start : start + count]
                hidden = _cell(state, node, own, hidden, feature, (ref, place), gates, op)
                outs.append(hidden)
            silent = all(np.all(state.of(r)[-1].zero) for r in states)
            feature = outs[0] if directions == 1 else join(state, outs, "next to")
            feature = feature.with_zero(silent and _vanishing(state, params))
        if hidden.ids is not None:
            state.atoms.role(hidden.ids, "hidden")
        result = (*inputs[:-1], feature)
        last = tuple((*state.of(r)[:-1], hidden.with_zero(feature.all_zero)) for r in states)
        return [tuple(a if i == len(result) - 1 else a.with_zero(False) for i, a in enumerate(result)), *last]

    return Rule(flow, None, "recurrent", ("input", "params"))


def _vanishing(state: Flow, params: list[Any]) -> bool:
    return all(state.of(p)[0].all_zero for p in params)


def _cell(
    state: Flow,
    node: Node,
    params: list[Any],
    hidden: Axis,
    feature: Axis,
    source: tuple[Ref, int],
    gates: int,
    op: str,
) -> Axis:
    for i, param in enumerate(params):
        axes = state.of(param)
        state.use(axes)
        rows = axes[0]
        if hidden.ids is None:
            state.pin(rows, f"rows of a {op} whose state is {hidden.why}")
        elif rows.ids is None:
            state.pin(hidden, f"rows of a {op} that are {rows.why}")
        else:
            state.atoms.tie(rows.ids, np.tile(hidden.ids, gates))
        if i == 0:
            state.contract(node, [(param, 1, axes[1]), (*source, feature)], op)
        elif i == 1:
            state.contract(node, [(param, 1, axes[1]), (param, 1, hidden)], op)
    return hidden


def _step(gates: int) -> Rule:
    """One step of a recurrent cell: the new state (and the memory of an LSTM) from the input and the old ones."""

    def flow(state: Flow, node: Node, bound: Bound) -> Any:
        states: tuple[Ref, ...] = bound["hx"] if isinstance(bound["hx"], tuple) else (bound["hx"],)
        op = node.base
        old = [state.of(ref) for ref in states]
        inputs, ref = state.of(bound["input"]), bound["input"]
        state.use(inputs)
        if len(inputs) != 2:
            raise Unmatched("an input without a batch dimension")
        batch = state.tie([inputs[0], *(axes[0] for axes in old)], op).with_zero(False)
        hidden = state.tie([axes[-1] for axes in old], op)
        given = [bound.get(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        params = [param for param in given if param is not None]
        _cell(state, node, params, hidden, inputs[-1], (ref, 1), gates, op)
        if hidden.ids is not None:
            state.atoms.role(hidden.ids, "hidden")
        silent = all(axes[-1].all_zero for axes in old) and _vanishing(state, params)
        result = (batch, hidden.with_zero(silent))
        return result if len(states) == 1 else [result] * len(states)

    return Rule(flow, None, "recurrent", ("input", "w_ih", "w_hh"))


ROWS: dict[str, Rule] = {
    "aten.lstm": _recurrent(4),
    "aten.gru": _recurrent(3),
    "aten.rnn_tanh": _recurrent(1),
    "aten.rnn_relu": _recurrent(1),
    "aten.lstm_cell": _step(4),
    "aten.gru_cell": _step(3),
    "aten.rnn_tanh_cell": _step(1),
    "aten.rnn_relu_cell": _step(1),
}
