"""Fits the heads on a zoo: families held out one at a time say how long to train and how good the predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metaprune.graphs.errors import OptionError, check_seed
from metaprune.graphs.ir import Graph
from metaprune.metanet import figures
from metaprune.metanet.crossfit import Setting, folds
from metaprune.metanet.describe import Encoder
from metaprune.metanet.encoder_training import GraphCourse, fitted
from metaprune.metanet.ensembles import Course
from metaprune.metanet.examples import DATA, SIGHTS, WEIGHTS, Example, Making, Measure, gather
from metaprune.metanet.examples import members as zoo_members
from metaprune.metanet.graph_head import LOSSES
from metaprune.metanet.heads import Allocations, Regressor, Surrogate, curve, logarithm, overall_features, parts_of
from metaprune.metanet.labels import measure as measured_labels
from metaprune.metanet.predictor import ABLATION, CURVES, JOINT, Curves, Predictor, logarithms, losses
from metaprune.metanet.pruner import MetaPruner
from metaprune.metanet.rewrite_training import RewriteCourse, Source, trained_head
from metaprune.metanet.team import Team
from metaprune.metanet.weight_graph import WeightGraph
from metaprune.statistics import SAMPLES
from metaprune.task import Task
from metaprune.training import Progress

HEADS = (CURVES, JOINT)
REWRITE = "rewrite"
GRAPH = "graph"
GRAPH_SIGHTS = (WEIGHTS,)
"""Where graph heads are used. On 24 networks of 13 families they added nothing to features of data."""
MEMBERS = 3


def fit(
    zoo: Iterable[Any],
    heads: Sequence[str] = HEADS,
    out: str | Path | None = None,
    seed: int = 0,
    *,
    samples: int = SAMPLES,
    members: int = MEMBERS,
    course: Course | None = None,
    encoder: Encoder | Literal["graph"] | None = None,
    states: int = 0,
    graph: GraphCourse | None = None,
    rewriting: RewriteCourse | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> MetaPruner:
    """Learns from networks on which it was measured what pruning costs, for networks that nobody has measured.

    Every head is fitted with all families but one, for each family, and with all of them, in one training; its length
    is that which serves the families held out best, so the figures on them are of a choice of one number among a few
    that was made on them too. The surrogate learns from curves that were predicted by heads that had not seen the
    network's family, as it will have to use such curves.

    Processes that `torchrun` started, joined in torch's default process group, share the work of the head `"rewrite"`;
    all of them call this alike, with a folder that all of them see, and get the same pruner.

    Args:
        zoo: Tasks, or objects with `name`, `family` and `task`. Labels are taken from the zoo's `labels(name)` where it
            has that and it returns some, else they are measured.
        heads: `"curves"`: losses of cutting single groups, plain and compensated, and of silencing single units;
            `"joint"`: loss of a whole allocation after least squares; `"rewrite"`: weights that make up for units that
            go, where there are no data, see `metaprune.metanet.rewrite_training`. That one goes through the zoo a
            second time.
        out: Folder in which features, labels and checkpoints are kept. A fit that was killed, called again with the
            same arguments, goes on and gives what it would have given, to the bit.
        seed: Of every random choice.
        samples: Samples that features are of, at most.
        members: Networks in each ensemble.
        course: How long and how fast heads are trained.
        encoder: `"graph"` for graph heads, which are trained here and whose predictions are features of the predictor
            that looks at the weights alone; all networks are held in memory then. Or a function that gives further
            states of the units, shape [size, states] by group, as features.
        states: Width of what such a function gives.
        graph: How graph heads are built and trained.
        rewriting: How the head `"rewrite"` is built and trained.
        measure: Function of a graph and data that labels a network; by default `metaprune.metanet.labels.measure`.
        progress: Called after each network with the number done and that of all, 0 where it is not known.

    Raises:
        MetapruneError: The zoo is empty, or nothing in it can be used; members that can not are skipped with a warning,
            and named in the card of what is returned.
        OptionError: An option has no meaning, or `out` belongs to another fit.
    """
    wired, function = encoder == GRAPH, None if isinstance(encoder, str) else encoder
    if isinstance(encoder, str) and not wired:
        raise OptionError(f"encoder: {GRAPH!r} or a function is needed, not {encoder!r}")
    if graph is not None and not wired:
        raise OptionError(f"graph: it is for encoder={GRAPH!r} alone")
    chosen = _checked(heads, seed, samples, members, function, states)
    if rewriting is not None and REWRITE not in chosen:
        raise OptionError(f"rewriting: it is for the head {REWRITE!r} alone")
    if REWRITE in chosen and isinstance(zoo, Iterator):
        raise OptionError("zoo: it is gone through twice; give a list or a zoo, not an iterator")
    folder, team = None if out is None else Path(out), Team.here()
    if team.size > 1 and folder is None:
        raise OptionError("out: processes that fit together need a folder that all of them see")
    measure = measure or partial(measured_labels, seed=seed)
    making = Making(measure, seed, samples, function, states)
    networks: dict[str, WeightGraph] = {}

    def keep(name: str, network: Graph) -> None:
        networks[name] = WeightGraph.of(network)

    with team.leader_first():
        stored = None if folder is None else folder / "examples"
        examples, skipped = gather(zoo, making, stored, progress, keep if wired else None)
        setting = Setting(tuple(examples), folds(examples), members, course or Course(), seed, folder)
        predictors, validation, graphs = {}, {}, {}
        for sight in SIGHTS:
            own, about = setting, {}
            if wired and sight in GRAPH_SIGHTS:
                graphs[sight], read, trained = fitted(setting, sight, networks, graph or GraphCourse())
                own = replace(setting, examples=read)
                about = {GRAPH: {**trained, **_by_graphs(own, sight)}}
            predictors[sight], found = _fitted(own, sight, JOINT in chosen and sight == DATA)
            validation[sight] = {**found, **about}
    rewriter, about_rewriting = None, None
    if REWRITE in chosen:
        sources = _sources(zoo, [example.name for example in examples])
        out_of_it = None if folder is None else folder / REWRITE
        rewriter, about_rewriting = trained_head(sources, rewriting or RewriteCourse(), seed, out_of_it, team)
    card = {
        "heads": list(chosen),
        "zoo": {"networks": [[e.name, e.family] for e in examples], "digest": setting.digest, "skipped": skipped},
        "validation": validation,
        "seed": seed,
        "samples": samples,
        "members": members,
        "states": states,
        "course": asdict(setting.course),
    }
    if about_rewriting is not None:
        card[REWRITE] = about_rewriting
    return MetaPruner(predictors, card, function, graphs, rewriter)


def _sources(zoo: Iterable[Any], names: Sequence[str]) -> list[Source]:
    """The networks by name; one that the zoo can open by name is not held in the meantime."""
    by_name = getattr(zoo, "member", None)
    return [
        Source(name, family, opened if by_name is None else partial(_task_of, by_name, name))
        for name, family, opened in zoo_members(zoo)
        if name in names
    ]


def _task_of(member: Callable[[str], Any], name: str) -> Task:
    found: Task = member(name).task
    return found


def _by_graphs(setting: Setting, sight: str) -> dict[str, Any]:
    """How graph heads do by themselves on families held out."""
    curves, units = [], []
    for example in setting.examples:
        described = example.described[sight]
        cuts = {name: own[:, -LOSSES:].double().numpy() for name, own in described.cuts.items()}
        plain, compensated = (
            {name: curve(own[:, kind], example.minima[name]) for name, own in cuts.items()} for kind in range(LOSSES)
        )
        curves.append((plain, compensated))
        units.append({name: own[:, -1].double().numpy() for name, own in described.units.items()})
    return {CURVES: figures.of_curves(setting, curves), ABLATION: figures.of_ablation(setting, units)}


def _checked(
    heads: Sequence[str], seed: int, samples: int, members: int, encoder: Encoder | None, states: int
) -> tuple[str, ...]:
    chosen = (heads,) if isinstance(heads, str) else tuple(heads)
    for head in chosen:
        if head not in (*HEADS, REWRITE):
            raise OptionError(f"heads: {head!r} is none of {', '.join((*HEADS, REWRITE))}")
    if CURVES not in chosen:
        raise OptionError(f"heads: {CURVES!r} is needed, as all others build on it")
    check_seed(seed)
    for option, value, least in (("samples", samples, 1), ("members", members, 1), ("states", states, 0)):
        if type(value) is not int or value < least:
            raise OptionError(f"{option}: a whole number of at least {least} is needed, not {value!r}")
    if (encoder is None) != (states == 0):
        raise OptionError("states: the width of an encoder's states, and 0 without an encoder")
    return chosen


def _fitted(setting: Setting, sight: str, joint: bool) -> tuple[Predictor, dict[str, Any]]:
    """The heads of one sight, and how they do on families held out."""
    described = [example.described[sight] for example in setting.examples]
    schema = described[0].schema
    curves, about_curves = _regressor(setting, f"{sight}-{CURVES}", *_curve_rows(setting.examples, sight))
    ablation, about_ablation = _regressor(setting, f"{sight}-{ABLATION}", *_unit_rows(setting.examples, sight))
    final = len(setting.folds) - 1
    predicted, silenced = [], []
    for number, example in enumerate(setting.examples):
        fold = setting.fold_of(number)
        predicted.append(losses(setting.of_fold(curves, fold), described[number], example.minima))
        silenced.append(logarithms(setting.of_fold(ablation, fold), described[number]))
    validation = {
        CURVES: {**about_curves, **figures.of_curves(setting, predicted)},
        ABLATION: {**about_ablation, **figures.of_ablation(setting, silenced)},
    }
    surrogate = None
    if joint:
        allocations = [allocations_of(e, sight, *own) for e, own in zip(setting.examples, predicted, strict=True)]
        every, about = _surrogate(setting, f"{sight}-{JOINT}", allocations)
        validation[JOINT] = {**about, **figures.of_joint(setting, every, allocations)}
        surrogate = setting.of_fold(every, final)
    return Predictor(schema, setting.of_fold(curves, final), setting.of_fold(ablation, final), surrogate), validation


def _curve_rows(examples: Sequence[Example], sight: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets and example of every measured cut; those of a network that gave no number are left out."""
    values, targets, owner = [], [], []
    for number, example in enumerate(examples):
        for name, levels in example.levels.items():
            found = torch.stack([example.plain[name], example.compensated[name]], dim=1)
            use = torch.isfinite(found).all(1) & (levels < len(example.ablation[name]))
            values.append(example.described[sight].cuts[name][levels[use].long()])
            targets.append(logarithm(found[use]))
            owner += [number] * int(use.sum())
    return torch.cat(values), torch.cat(targets), torch.tensor(owner)


def _unit_rows(examples: Sequence[Example], sight: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets and example of every unit that was silenced."""
    values, targets, owner = [], [], []
    for number, example in enumerate(examples):
        for name, found in example.ablation.items():
            use = torch.isfinite(found)
            values.append(example.described[sight].units[name][use])
            targets.append(logarithm(found[use])[:, None])
            owner += [number] * int(use.sum())
    return torch.cat(values), torch.cat(targets), torch.tensor(owner)


def _regressor(
    setting: Setting, name: str, values: Tensor, targets: Tensor, owner: Tensor
) -> tuple[Regressor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(setting.seed)
    seen = setting.seen(owner)
    model = Regressor(len(seen), values.shape[1], targets.shape[1], generator)
    model.learn(values, targets, seen)

    def errors(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
        gaps = (function(values[rows]) - targets[rows]) / model.spread[:, None]
        return gaps.square().mean(2)

    trained = setting.train(name, model, errors, seen)
    return model, {"rows": len(values), "steps": trained.step, "history": trained.history}


def allocations_of(example: Example, sight: str, plain: Curves, compensated: Curves) -> tuple[Allocations, Tensor]:
    """Features of the allocations that were measured on a network, and the logarithms of their losses."""
    described = example.described[sight]
    use = torch.isfinite(example.joint)
    kept = example.joint_kept[use]
    names = list(described.sizes)
    parts = torch.stack(
        [parts_of(described.cuts[n], plain[n], compensated[n])[kept[:, i]] for i, n in enumerate(names)], dim=1
    )
    pull = torch.stack([described.pulls[name][kept[:, i]] for i, name in enumerate(names)]).sum(0)
    columns = [
        torch.from_numpy(np.stack([own[n][kept[:, i].numpy()] for i, n in enumerate(names)], axis=1))
        for own in (plain, compensated)
    ]
    sizes = torch.tensor(list(described.sizes.values()))
    overall = overall_features(columns[0], columns[1], 0.5 * pull.square().mean(1), kept / sizes)
    owner = torch.arange(len(kept)).repeat_interleave(len(names))
    return Allocations(parts.flatten(0, 1), owner, overall), logarithm(example.joint[use])


def _surrogate(
    setting: Setting, name: str, found: Sequence[tuple[Allocations, Tensor]]
) -> tuple[Surrogate, dict[str, Any]]:
    every = Allocations.joined([values for values, _ in found])
    targets = torch.cat([target for _, target in found])
    owner = torch.tensor([number for number, (_, target) in enumerate(found) for _ in target])
    generator = torch.Generator().manual_seed(setting.seed)
    seen = setting.seen(owner)
    model = Surrogate(len(seen), every.parts.shape[1] - 2, generator)
    model.learn(every, targets, seen)

    def errors(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
        return ((function(every.taken(rows)) - targets[rows]) / model.spread).square()

    trained = setting.train(name, model, errors, seen)
    return model, {"rows": len(targets), "steps": trained.step, "history": trained.history}
