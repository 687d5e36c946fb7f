"""A network that was looked at once: predicted curves, ranked units, and plans for as many budgets as are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metaprune import criteria
from metaprune.graphs.ir import Graph
from metaprune.judge import Judge
from metaprune.metanet.describe import Description
from metaprune.metanet.heads import Tables
from metaprune.metanet.predictor import Curves
from metaprune.planning import Posed
from metaprune.ranking import Scores, unit_scores
from metaprune.search.allocate import find as find_allocator
from metaprune.search.allocate import uniform
from metaprune.search.exchange import exchanged
from metaprune.search.problem import Counts, Kept, least_kept
from metaprune.search.refinement import refine
from metaprune.selection import Choice, nearest, reranked
from metaprune.statistics import Statistics

CLOSED, PLAIN, COMPENSATED, SURROGATE = "closed form", "plain curves", "compensated curves", "surrogate"
REFINED = "refined"


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a pruner made of a network in one pass.

    Attributes:
        graph: The network.
        data: Calibration data, None where there are none.
        scores: Scores of all units.
        description: The network's features.
        plain: Predicted loss of cutting each group alone, by group, shape [size + 1].
        compensated: The same after least squares.
        surrogate: Predicts losses of whole allocations; None without data, or where it was not fitted.
        seed: Of what is drawn.
        judge: Measures plans, where there are data.
    """

    graph: Graph
    data: Any
    scores: Scores
    description: Description
    plain: Curves
    compensated: Curves
    surrogate: Tables | None
    seed: int
    judge: Judge | None

    def candidates(self, posed: Posed) -> dict[str, Choice]:
        """Different allocations for one budget by name: that of the closed form first, and those that are predicted.

        The dynamic program on predicted curves is exact for losses that add up. Where there are data, so that least
        squares follow, it solves for the compensated curves too; and where there is a surrogate, that judges exchanges
        between groups from each of these answers and from equal widths.

        Raises:
            BudgetInfeasible: No legal allocation is within the budget.
        """
        plain = posed.problem(replace(self.scores, curves=None))
        closed = criteria.find(self.scores.criterion).additive
        found = {CLOSED: find_allocator("cost" if closed else "global")(plain)}
        settled = posed.budget.width is not None or plain.excess(plain.sizes) <= 1
        if len(posed.free) and not settled:
            curves = {PLAIN: self.plain} if self.data is None else {PLAIN: self.plain, COMPENSATED: self.compensated}
            for name, own in curves.items():
                found[name] = find_allocator("dp")(posed.problem(replace(self.scores, curves=own)))
            if self.surrogate is not None:
                narrowed = replace(plain, minimum=least_kept(plain))
                starts = [*found.values(), uniform(narrowed)]
                ends = [exchanged(narrowed, lambda kept: self.losses(posed, kept), start) for start in starts]
                for number, (kept, _) in enumerate(sorted(ends, key=lambda end: end[1]), 1):
                    found[f"{SURROGATE} {number}"] = kept
        different: dict[tuple[int, ...], str] = {}
        for name, kept in found.items():
            different.setdefault(tuple(kept.tolist()), name)
        return {name: Choice(name, plain.scores, np.array(kept, dtype=np.int64)) for kept, name in different.items()}

    def chosen(
        self, posed: Posed, choices: Mapping[str, Choice], judge: Judge, rounds: int
    ) -> tuple[Choice, dict[str, float]]:
        """The best choice by measurement, and what was measured, by name.

        The choices are measured, then allocations to which what was measured points (`metaprune.search.refinement`),
        and the best of all with its units ranked by their norms too, which has to be clearly better.

        Args:
            posed: The budget.
            choices: What `candidates` found.
            judge: Measures.
            rounds: Of refinement, at most; 0 for none.
        """
        best, losses = nearest(posed.groups, list(choices.values()), judge)
        if rounds:
            scores = best.scores
            problem = posed.problem(replace(self.scores, curves=None))

            def measured(kept: Kept) -> Counts:
                return np.array(judge.distortions([Choice("", scores, own).keep(posed.groups) for own in kept]))

            known = {tuple(choice.kept.tolist()): losses[choice.name] for choice in choices.values()}
            narrowed = replace(problem, minimum=least_kept(problem))
            further = refine(narrowed, lambda kept: self.losses(posed, kept), measured, known, rounds)
            for number, (kept, loss) in enumerate(further.items(), 1):
                name = f"{REFINED} {number}"
                if loss < losses[best.name]:
                    best = Choice(name, scores, np.array(kept, dtype=np.int64))
                losses[name] = loss
        by_norm, _ = unit_scores(self.graph, posed.groups, "magnitude")
        criterion = self.scores.criterion
        best, others = reranked(posed.groups, best, losses[best.name], criterion, by_norm, judge)
        return best, losses | others

    def losses(self, posed: Posed, kept: Kept) -> Counts:
        """Predicted losses in nats of allocations of the groups that may shrink, shape [allocations, free].

        The surrogate's members have to agree: their deviation counts on top of their mean, so that a search does not
        end where one of them is wrong. Without a surrogate curves are added up, with data the compensated ones.
        """
        names = list(self.description.sizes)
        whole = np.tile(np.array(list(self.description.sizes.values()), dtype=np.int64), (len(kept), 1))
        whole[:, [names.index(group.name) for group in posed.groups]] = kept
        if self.surrogate is not None:
            members = self.surrogate(whole)
            found: Counts = np.exp(members.mean(0) + members.std(0))
            return found
        curves = self.plain if self.data is None else self.compensated
        total: Counts = np.stack([curves[name][whole[:, i]] for i, name in enumerate(names)]).sum(0)
        return total

    def predicted(self, posed: Posed, choices: Mapping[str, Choice]) -> dict[str, float]:
        """The predicted loss of each choice."""
        kept = np.array([choice.kept for choice in choices.values()], dtype=np.int64).reshape(len(choices), -1)
        return dict(zip(choices, self.losses(posed, kept).tolist(), strict=True))


def scored(graph: Graph, criterion: str, statistics: Statistics | None) -> Scores:
    """Scores of all units by a criterion that looks at gate gradients or at the weights alone."""
    weights = criteria.Weights({n: graph.values[n] for n, info in graph.tensors.items() if info.kind == "parameter"})
    evidence = criteria.Evidence(weights, statistics)
    row = criteria.find(criterion)
    free = [group for group in graph.groups if not group.pinned]
    units = {group.name: row.function(group, evidence).double().numpy() for group in free}
    return Scores(criterion, units, 0 if statistics is None else statistics.samples)
