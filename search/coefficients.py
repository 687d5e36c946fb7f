"""Coefficients of curves where harms do not add up, read off the neighbours of an allocation; and CMA-ES.

The harm that a group does depends on what the others have lost. Near one allocation, though, the loss has a slope for
each group, and a curve times a coefficient can have the same. Frantar and Alistarh (SPDY, ICML 2022, arXiv 2201.13096,
section 3.2) search for the coefficients, by the loss of the allocations that a solver makes of them. A slope comes for
one measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pymoo.algorithms.soo.nonconvex.cmaes import CMAES
from pymoo.core.problem import Problem as Box

from metaprune.search.problem import Counts, Kept

RANGE = 3.0  # of the coefficients' logarithms
_POPULATION = 8
_SIGMA = 0.1  # of the box
_LARGE = 1e30  # the loss of a network that does not run, for arithmetic with it
_TRUST = 0.7  # share of the way from the coefficients that there are to those that were measured; 1 swings to and fro


def neighbours(kept: Kept, levels: Sequence[Kept], curves: Sequence[Counts]) -> Kept:
    """Allocations in which one group has a level less, or one more where it is at its lowest.

    Args:
        kept: Kept counts, shape [groups].
        levels: Kept counts to choose from, ascending, for each group.
        curves: Harm by kept count for each group.

    Returns:
        One row for each group that can change, those first whose curves change most, shape [at most groups, groups].
    """
    rows, changes = [], []
    for group, (count, choices) in enumerate(zip(kept.tolist(), levels, strict=True)):
        others = [*choices[choices < count][-1:], *choices[choices > count][:1]]
        if others:
            rows.append(kept.copy())
            rows[-1][group] = others[0]
            changes.append(-abs(float(curves[group][others[0]] - curves[group][count])))
    order = np.argsort(np.array(changes), kind="stable")
    return np.array(rows, dtype=np.int64).reshape(-1, len(kept))[order]


def corrected(
    logarithms: Counts, curves: Sequence[Counts], kept: Kept, loss: float, others: Kept, losses: Counts
) -> Counts:
    """Coefficients that come nearer to what the loss does around an allocation.

    A group's coefficient is the measured change of the loss over that of its curve, against the median of all groups;
    a change that is not for the worse counts as the least ratio there may be. Curves that are right, up to one factor
    for all of them, have coefficients of 1.

    Args:
        logarithms: Of the coefficients so far, shape [groups].
        curves: Harm by kept count for each group.
        kept: The allocation, shape [groups].
        loss: Its loss, finite.
        others: Allocations that differ from it in one group each, shape [others, groups].
        losses: Their losses, shape [others].

    Returns:
        Logarithms of the coefficients, shape [groups], those of groups that do not differ anywhere as they were.
    """
    changed = (others != kept).argmax(axis=1)
    expected = np.array(
        [curves[g][row[g]] - curves[g][kept[g]] for g, row in zip(changed.tolist(), others, strict=True)]
    )
    told = expected != 0
    ratios = (losses - loss)[told] / expected[told]
    usual = ratios[(ratios > 0) & np.isfinite(ratios)]
    result = logarithms.copy()
    if len(usual):
        measured = np.log(np.clip(ratios / np.median(usual), np.exp(-RANGE), np.exp(RANGE)))
        result[changed[told]] += _TRUST * (measured - result[changed[told]])
    return result


def evolved(losses: Callable[[Counts], Counts], variables: int, seed: int, evaluations: int, spread: float) -> None:
    """CMA-ES (Hansen and Ostermeier 2001) around the origin, by pymoo.

    Args:
        losses: Losses of points, shape [points, variables]; the caller keeps what they tell.
        variables: Number of them.
        seed: Of the draws.
        evaluations: The most points that are asked for.
        spread: Standard deviation to begin with; no coordinate goes beyond five times this.
    """
    edge = spread / (2 * _SIGMA) * np.ones(variables)
    box = Box(n_var=variables, n_obj=1, xl=-edge, xu=edge)
    draw = np.random.default_rng(seed)
    engine = CMAES(
        x0=np.zeros(variables), sigma=_SIGMA, popsize=_POPULATION, randn=lambda *shape: draw.standard_normal(shape)
    )
    engine.setup(box, seed=seed, verbose=False, termination=("n_eval", evaluations))
    engine.options["seed"] = np.nan  # it would go to numpy's global generator, with 0 for the time
    while engine.has_next():
        points = engine.ask()
        if len(points) > evaluations:
            return
        evaluations -= len(points)
        points.set("F", np.minimum(losses(points.get("X")), _LARGE)[:, None])
        engine.tell(infills=points)
