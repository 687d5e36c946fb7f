"""The arms of the accuracy benchmark: ways to a smaller network, and ways to spend a training allowance on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import fashion
import torch
from accuracy_case import DENSE_EPOCHS, SAMPLES, Arm, Case, Made, Steps
from accuracy_peer import HALF, group_norm, group_norm_sparse
from torch import nn

import metaprune as mp

ON_DATA = {"taylor", "fisher", "fisher_block", "obspa"}
SHORT = 1 / 6
"""Share of a training after which the network is scored, besides before it and at its end."""
PEER = "Torch-Pruning"
"""What the names of that library's arms begin with."""


def planned(criterion: str, allocator: str, least_squares: bool = False) -> Arm:
    """Our own plans: batch norms recalibrated, or the weights fitted by least squares."""

    def arm(case: Case, budget: float) -> Made:
        given = case.calibration if criterion in ON_DATA else None
        plan = mp.plan(case.graph, f"macs={budget}", criterion, allocator, given, seed=case.seed)
        pruned = mp.apply(case.graph, plan)
        if least_squares:
            pruned = mp.reconstruct(pruned, case.calibration, seed=case.seed)
        else:
            mp.recalibrate(pruned.module, case.calibration)
        return handed_back(pruned)

    return arm


def _obspa(noise: bool) -> Arm:
    """OBSPA's scores and weight update, calibrated on images or on noise; batch norms on images."""

    def arm(case: Case, budget: float) -> Made:
        data: Any = "noise" if noise else case.calibration
        plan = mp.plan(case.graph, f"macs={budget}", "obspa", "global", data, seed=case.seed)
        pruned = mp.obs_update(mp.apply(case.graph, plan), data, SAMPLES, case.seed)
        mp.recalibrate(pruned.module, case.calibration)
        return handed_back(pruned)

    return arm


def handed_back(pruned: mp.Pruned) -> Made:
    """What an arm hands back for one of our own cuts."""
    return Made(pruned.module, pruned.cost["after"].macs, pruned.cost["after"].params, pruned)


def _closed_form(case: Case, budget: float) -> Made:
    """What `metaprune.prune` does by default when it has data."""
    return handed_back(mp.prune(case.graph, budget=f"macs={budget}", data=case.calibration, seed=case.seed))


CLOSED_FORM = "closed form (default)"
REFINED = "block Fisher, refined + least squares"
WITHOUT_TRAINING: dict[str, Arm] = {
    "random, uniform": planned("random", "uniform"),
    "L2, uniform": planned("magnitude", "uniform"),
    "L2 over mean": planned("magnitude", "global"),
    "L2 over maximum": planned("magnitude_max", "global"),
    "Taylor": planned("taylor", "global"),
    "Torch-Pruning, local": group_norm(global_=False),
    "Torch-Pruning, global": group_norm(global_=True),
    "Fisher, cost": planned("fisher", "cost"),
    "block Fisher, cost": planned("fisher_block", "cost"),
    "OBSPA with its update, real images": _obspa(noise=False),
    "OBSPA with its update, noise": _obspa(noise=True),
    "L2, uniform + least squares": planned("magnitude", "uniform", True),
    "L2 over mean + least squares": planned("magnitude", "global", True),
    "Taylor + least squares": planned("taylor", "global", True),
    "OBSPA + least squares": planned("obspa", "global", True),
    "Fisher, cost + least squares": planned("fisher", "cost", True),
    "block Fisher, cost + least squares": planned("fisher_block", "cost", True),
    CLOSED_FORM: _closed_form,
}

ZERO_STEPS: dict[str, Arm] = {**WITHOUT_TRAINING, REFINED: planned("fisher_block", "refined", True)}
"""Those, and one whose allocation takes some twenty fits."""


@dataclass(frozen=True)
class Trained:
    """A way to spend the allowance of `DENSE_EPOCHS`, all of it after the cut unless said.

    Attributes:
        start: Where the network comes from.
        recipe: A rung of `metaprune.recover`, with the dense network as teacher, which is paid for; "finetune" trains
            on the labels alone.
        fresh: Whether the weights are drawn anew first.
        epochs: Passes over the data, in place of what the allowance pays for.
        before: Share of the allowance that `start` spent on the dense network.
    """

    start: Arm
    recipe: str = "finetune"
    fresh: bool = False
    epochs: int | None = None
    before: float = 0.0

    def per_image(self, case: Case, macs: int) -> int:
        """Multiply-adds of training on one image: three for each of the network that is trained, one for a teacher."""
        return 3 * macs + (0 if self.recipe == "finetune" else case.macs)

    def steps(self, case: Case, macs: int) -> int:
        """Steps after the cut for a network of so many multiply-adds."""
        if self.epochs is not None:
            return self.epochs * len(case.train)
        dense = (1 - self.before) * DENSE_EPOCHS * len(case.train)  # steps of the dense network
        return round(dense * 3 * case.macs / self.per_image(case, macs))

    def spent(self, case: Case, macs: int) -> float:
        """All training, in epochs of the dense network."""
        after = self.steps(case, macs) * self.per_image(case, macs) / (3 * case.macs * len(case.train))
        return self.before * DENSE_EPOCHS + after


_CLOSED = WITHOUT_TRAINING[CLOSED_FORM]
TUNED = "closed form, fine-tuned"
WITH_TRAINING: dict[str, Trained] = {
    "from scratch, equal FLOPs": Trained(_CLOSED, fresh=True),
    "from scratch, equal epochs": Trained(_CLOSED, fresh=True, epochs=fashion.EPOCHS),
    "random, uniform, fine-tuned": Trained(WITHOUT_TRAINING["random, uniform"]),
    "L2, uniform, fine-tuned": Trained(WITHOUT_TRAINING["L2, uniform"]),
    "L2 over mean, fine-tuned": Trained(WITHOUT_TRAINING["L2 over mean"]),
    "Taylor, fine-tuned": Trained(WITHOUT_TRAINING["Taylor"]),
    "Torch-Pruning, local, fine-tuned": Trained(WITHOUT_TRAINING["Torch-Pruning, local"]),
    "Torch-Pruning, global, fine-tuned": Trained(WITHOUT_TRAINING["Torch-Pruning, global"]),
    "Torch-Pruning, sparse learning, local, fine-tuned": Trained(group_norm_sparse(global_=False), before=HALF),
    "Torch-Pruning, sparse learning, global, fine-tuned": Trained(group_norm_sparse(global_=True), before=HALF),
    TUNED: Trained(_CLOSED),
    "closed form, kd_standardised": Trained(_CLOSED, "kd_standardised"),
    "closed form, kd_features": Trained(_CLOSED, "kd_features"),
}
TABLES: dict[str, dict[str, Arm | Trained]] = {"none": {**WITHOUT_TRAINING}, "equal FLOPs": {**WITH_TRAINING}}
DEFAULTS = {"none": CLOSED_FORM, "equal FLOPs": TUNED}
"""The arm of each table that a user gets who asks for nothing; all others are compared with it."""


def measured(arm: Arm | Trained, case: Case, budget: float) -> dict[str, Any]:
    """What an arm makes of a case: scores, costs and CPU seconds, those of scoring left out."""
    start = time.process_time()
    made = (arm.start if isinstance(arm, Trained) else arm)(case, budget)
    seconds = made.seconds + time.process_time() - start
    facts = {"dense": case.score, "macs": made.macs / case.macs, "params": made.params / case.graph.cost().params}
    if isinstance(arm, Trained):
        scores, training = _train(arm, case, made)
        facts |= {"steps": arm.steps(case, made.macs), "dense_epochs": round(arm.spent(case, made.macs), 4), **scores}
        seconds += training
    else:
        facts["score"] = mp.evaluate(made.module, case.test)
    return {**facts, "cpu_seconds": round(seconds, 2)}


def _train(arm: Trained, case: Case, made: Made) -> tuple[dict[str, float], float]:
    """Trains; the scores after the cut, after a short recovery and in the end, and the CPU seconds without scoring."""
    module = made.module.to(memory_format=torch.channels_last)  # kernels too, or each step lays them out anew
    if arm.fresh:
        _draw_weights(module, case.seed)
    scores = {"score_cut": mp.evaluate(module, case.test)}
    loader = Steps(case.train, arm.steps(case, made.macs))
    scoring = 0.0

    def watch(network: nn.Module, done: int) -> None:
        nonlocal scoring
        if done == max(1, round(SHORT * len(loader))):
            start = time.process_time()
            scores["score_short"] = mp.evaluate(network, case.test)
            scoring = time.process_time() - start

    start = time.process_time()
    if arm.recipe == "finetune":
        mp.train(
            module,
            loader,
            fashion.objective,
            fashion.settings(1),
            case.seed,
            progress=lambda done, _: watch(module, done),
        )
    else:
        assert made.pruned is not None
        task = mp.Task(case.model, case.test.images[:2], loader, case.calibration)
        module = mp.recover(
            made.pruned, task, recipe=arm.recipe, epochs=1, seed=case.seed, watch=lambda net, done, _: watch(net, done)
        ).module
    seconds = time.process_time() - start - scoring
    return {**scores, "score": mp.evaluate(module, case.test)}, seconds


def _draw_weights(module: nn.Module, seed: int) -> None:
    """New weights for every layer of a network that consists of torch's own."""
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
