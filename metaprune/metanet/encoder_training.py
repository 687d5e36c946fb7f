"""Training of graph heads, so that what they say of a zoo's networks is said by one that has not seen the family.

A head that is fitted on what another has said of its own training networks trusts it too much: there it is better than
it will be elsewhere (stacked generalisation, Wolpert 1992). So the families are parted into a few folds, one graph head
is trained without each, and every network is read by the one that has not seen it; a last one, trained on all, reads
networks outside the zoo. Only predictions are comparable between these heads, their hidden states are not, hence it is
predictions that are handed on as features. As everywhere in stacking, what heads learn from other families was said by
graph heads that may have seen the family held out; what they are judged on was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaprune.graphs.errors import OptionError
from metaprune.metanet.crossfit import Setting
from metaprune.metanet.ensembles import Course, train
from metaprune.metanet.examples import Example
from metaprune.metanet.graph_head import HIDDEN, LAYERS, LOSSES, GraphHead, Subject
from metaprune.metanet.heads import logarithm
from metaprune.metanet.weight_graph import WeightGraph

FOLDS = 4
"""At most so many graph heads are trained for validation."""


@dataclass(frozen=True)
class GraphCourse:
    """How graph heads are built and trained.

    Attributes:
        hidden: Width of the units' states.
        layers: Rounds of messages.
        epochs: Passes over the training networks, one network at a time.
        rate: Learning rate of AdamW.
        decay: Its weight decay.
        memory: Decay of the running mean of the weights, which is what is kept.
        clip: Greatest norm of a gradient.
    """

    hidden: int = HIDDEN
    layers: int = LAYERS
    epochs: int = 40
    rate: float = 3e-3
    decay: float = 0.1
    memory: float = 0.99
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "epochs"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{name}: a positive whole number is needed, not {value!r}")

    def of(self, networks: int) -> Course:
        """The course for some number of networks: a tenth of it warms up, the rate then falls along a half cosine."""
        steps = max(1, self.epochs * networks)
        every = max(1, steps // 10)
        return Course(steps, every, 1, self.rate, self.decay, self.memory, self.clip, 0.0)


def grouped(folds: Iterable[frozenset[int]], most: int = FOLDS) -> tuple[frozenset[int], ...]:
    """Folds joined to at most `most`, of about equal size."""
    bins = [set[int]() for _ in range(most)]
    for fold in sorted(folds, key=lambda own: (-len(own), sorted(own))):
        min(bins, key=len).update(fold)
    return tuple(frozenset(own) for own in bins if own)


def measured(example: Example, subject: Subject) -> Tensor:
    """What was measured on a network in the order of `GraphHead.forward`, not a number where nothing was.

    All are logarithms of losses, those below `metaprune.metanet.heads.FLOOR` as of it: dead units lose nothing.
    """
    sizes = subject.described.sizes
    units = {name: _finite(example.ablation[name]) for name in sizes}
    cuts = {name: torch.full((size + 1, LOSSES), torch.nan) for name, size in sizes.items()}
    for name, levels in example.levels.items():
        found = _finite(torch.stack([example.plain[name], example.compensated[name]], 1))
        below = levels < sizes[name]
        cuts[name][levels[below].long()] = found[below]
    return torch.cat([*units.values(), *(own.flatten() for own in cuts.values())])


def _finite(losses: Tensor) -> Tensor:
    return torch.where(losses.isfinite(), logarithm(losses), torch.nan)


def fitted(
    setting: Setting,
    sight: str,
    graphs: Mapping[str, WeightGraph],
    course: GraphCourse,
) -> tuple[GraphHead, tuple[Example, ...], dict[str, Any]]:
    """Trains the graph heads of one sight.

    Args:
        setting: The networks, the folds and the folder for checkpoints.
        sight: Which features are observed.
        graphs: The networks by name.
        course: How.

    Returns:
        The head that has seen all networks; the examples with features that heads add which have not seen them, where
        anything could be held out; and how training went.
    """
    subjects = [Subject(graphs[e.name], e.described[sight], e.order[sight]) for e in setting.examples]
    targets = [measured(e, subject) for e, subject in zip(setting.examples, subjects, strict=True)]
    folds = (*grouped(setting.folds[:-1]), frozenset[int]())
    read: dict[int, Example] = {}
    about = []
    for number, held in enumerate(folds):
        seen = [i for i in range(len(subjects)) if i not in held]
        head, history = _trained(setting, f"{sight}-graph-{number}", subjects, targets, seen, course)
        about.append({"held out": sorted(setting.examples[i].name for i in held), "history": history})
        for i in sorted(held) if held else [i for i in seen if i not in read]:
            example = setting.examples[i]
            read[i] = replace(example, described={**example.described, sight: head.read(subjects[i])})
    found = {"parameters": sum(p.numel() for p in head.parameters()), "trainings": about, **asdict(course)}
    return head.requires_grad_(False), tuple(read[i] for i in range(len(subjects))), found


def _trained(
    setting: Setting,
    name: str,
    subjects: Sequence[Subject],
    targets: Sequence[Tensor],
    seen: Sequence[int],
    course: GraphCourse,
) -> tuple[GraphHead, list[list[float]]]:
    """A head trained on some of the networks, whose measured values alone it is given."""
    own = [subjects[i] for i in seen]
    wanted = [targets[i] for i in seen]
    head = GraphHead(own[0].described.units[next(iter(own[0].described.units))].shape[1], course.hidden, course.layers,
                     setting.seed)  # fmt: skip
    head.learn(own, wanted)

    def errors(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
        return torch.stack([_error(head, function(own[i]), wanted[i], len(own[i].turns)) for i in rows.tolist()])[None]

    path = None if setting.out is None else setting.out / "training" / f"{name}.safetensors"
    about = (name, setting.digest, [setting.examples[i].name for i in seen], setting.seed, asdict(course))
    digest = hashlib.sha256(repr((about, own[0].described.schema.digest)).encode()).hexdigest()
    every = torch.ones(1, len(own), dtype=torch.bool)
    return head, train(head, errors, every, course.of(len(own)), setting.seed, path, digest).history


def _error(head: GraphHead, predicted: Tensor, wanted: Tensor, units: int) -> Tensor:
    """Mean squared error on units, plus that on cuts, in variances of the targets."""
    known = wanted.isfinite()
    gaps = torch.where(known, predicted - wanted.nan_to_num(), 0.0)
    spread = torch.cat([head.spread[:1].expand(units), head.spread[1:].repeat((len(wanted) - units) // LOSSES)])
    squares = (gaps / spread).square()
    parts = ((squares[:units], known[:units]), (squares[units:], known[units:]))
    return torch.stack([own.sum() / mask.sum().clamp_min(1) for own, mask in parts]).sum()
