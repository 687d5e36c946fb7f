"""Training of the rewriting head on the outputs of masked networks, without labels.

A step takes a few networks, each with some of its units masked. The head predicts tensors, the masked network runs with
them on a batch, and the loss is KL(dense || masked) over what it is before the head has changed anything. Its gradient
at the predicted tensors is exact; one vector-Jacobian product then takes it through the head, however many batches it
was summed over. Some families are held out, and the weights are kept of the step that serves them best; that may be the
first, at which nothing is rewritten.

The other objective, `"group_sparsity"`, is that of metanetworks as they were published (Liu et al. 2025, arXiv
2506.12041): nothing is masked, and the loss is that of the task plus a penalty that makes the weakest units of each
group weaker, so that a network is rewritten first, then trained on and pruned as usual.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.metanet.engine import AGGREGATIONS, MEAN
from metaprune.metanet.ensembles import Course, Curriculum, train
from metaprune.metanet.group_sparsity import group_sparsity
from metaprune.metanet.rewrite_cases import Cases, Making, Shelf
from metaprune.metanet.rewrite_head import COMPENSATION, OBJECTIVES, SPARSITY, RewriteHead
from metaprune.metanet.team import Team
from metaprune.task import Task

_FLOOR = 0.1  # nats that are added to the loss before, so that masks which cost nothing weigh little
_HELD_OUT = 0.25  # of the families
_JUDGED = 12  # networks of each kind that checks look at
_TURNOVER = 8  # the networks at hand change by one of so many parts from one check to the next


@dataclass(frozen=True)
class RewriteCourse:
    """How the rewriting head is built and trained.

    Attributes:
        objective: `"compensation"` or `"group_sparsity"`, see the module.
        sparsity: Weight of the penalty of group sparsity, where the task's loss counts 1.
        hidden: Width of the units' states.
        layers: Rounds of messages before it is known which units go.
        further: Rounds after that.
        aggregation: Of the first rounds, `"mean"` or `"pna"`.
        rank: Of what is added to a block.
        ratio: Bound of the change of blocks, see `metaprune.metanet.rewrite.Rewriter`.
        vector_ratio: Bound of the change of vectors.
        refit: Whether compensation starts from the closed form, `metaprune.dataless.refit_without_data`.
        masks: Masks for each network, for compensation.
        batches: Batches of samples for each network.
        size: Samples in each of these.
        steps: Steps of training.
        every: Steps between checks on families held out, and between checkpoints.
        networks: Networks in each step, with a mask and a batch each.
        rate: Learning rate of AdamW; it warms up until the first check and falls along a half cosine.
        decay: Its weight decay.
        memory: Decay of the running mean of the weights, which is what is kept.
        clip: Greatest norm of a gradient.
        held: Networks that are held in memory.
    """

    objective: str = COMPENSATION
    sparsity: float = 0.1
    hidden: int = 24
    layers: int = 3
    further: int = 1
    aggregation: str = MEAN
    rank: int = 4
    ratio: float = 0.1
    vector_ratio: float = 0.1
    refit: bool = True
    masks: int = 8
    batches: int = 4
    size: int = 128
    steps: int = 2000
    every: int = 250
    networks: int = 2
    rate: float = 3e-3
    decay: float = 0.01
    memory: float = 0.99
    clip: float = 1.0
    held: int = 128

    def __post_init__(self) -> None:
        for name in ("masks", "batches", "size", "steps", "every", "networks", "held"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{name}: a positive whole number is needed, not {value!r}")
        if self.objective not in OBJECTIVES:
            raise OptionError(f"objective: {self.objective!r} is none of {', '.join(OBJECTIVES)}")
        if not self.sparsity >= 0:
            raise OptionError(f"sparsity: a weight of at least 0 is needed, not {self.sparsity!r}")
        if self.aggregation not in AGGREGATIONS:
            raise OptionError(f"aggregation: {self.aggregation!r} is none of {', '.join(AGGREGATIONS)}")

    def making(self, seed: int) -> Making:
        """What each network is trained on."""
        whole = self.objective == SPARSITY
        return Making(1 if whole else self.masks, self.batches, self.size, self.refit and not whole, seed, whole)

    @property
    def course(self) -> Course:
        """The training that this asks for."""
        return Course(self.steps, self.every, self.networks, self.rate, self.decay, self.memory, self.clip, end=0.0)

    def head(self, seed: int) -> RewriteHead:
        """The head before it is trained."""
        return RewriteHead(
            self.hidden,
            self.layers,
            self.further,
            self.rank,
            self.ratio,
            self.vector_ratio,
            self.making(seed).refit,
            self.objective,
            self.aggregation,
            seed,
        )


@dataclass(frozen=True)
class Source:
    """A network of a zoo, and how to come by it.

    Attributes:
        name: Its name.
        family: Its family.
        task: Gives its task.
    """

    name: str
    family: str
    task: Callable[[], Task]


def trained_head(
    sources: Sequence[Source], course: RewriteCourse, seed: int, out: Path | None, team: Team | None = None
) -> tuple[RewriteHead, dict[str, Any]]:
    """A rewriting head that was trained on some networks, and how it does on families held out.

    Args:
        sources: The networks.
        course: How.
        seed: Of every random choice.
        out: Folder for checkpoints and for what is known of the networks; a training that was killed goes on from
            there to the same bits. None for a temporary one.
        team: Processes that do this together; each holds a share of the networks of a step.

    Raises:
        MetapruneError: No network can be trained on.
        OptionError: The folder belongs to another training.
    """
    team = team or Team()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        making = course.making(seed)
        shelf = Shelf([s.name for s in sources], [s.task for s in sources], making, folder / "masks", course.held)
        head = course.head(seed)
        with team.leader_first():
            seen, held_out, skipped = _looked_at(sources, shelf, head, seed)
        schedule = _Schedule(seen, held_out, course, seed)
        path = None if out is None else out / "training" / "rewrite.safetensors"
        names = [(sources[i].name, sources[i].family) for i in (*seen, *held_out)]
        text = repr((names, asdict(course), seed, head.encoder.mean.tolist(), head.encoder.spread.tolist()))
        digest = hashlib.sha256(text.encode()).hexdigest()

        def errors(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
            cases = [schedule.case(row) for row in rows.tolist()]
            return torch.stack([_error(function, course, shelf(n), mask, batch) for n, mask, batch in cases])[None]

        own = torch.zeros(1, schedule.rows, dtype=torch.bool)
        for number in seen:
            own[0, schedule.of(number)] = True
        trained = train(head, errors, own, course.course, seed, path, digest, schedule.curriculum(), team)
    about = {
        **asdict(course),
        "parameters": sum(p.numel() for p in head.parameters()),
        "seen": [sources[i].name for i in seen],
        "held out": [sources[i].name for i in held_out],
        "skipped": skipped,
        "history": trained.history,
        "step": trained.step,
    }
    return head.requires_grad_(False), about


def _loss(course: RewriteCourse, cases: Cases, tensors: Mapping[str, Tensor], mask: int, batch: int) -> Tensor:
    """What a network costs with some tensors: see the module."""
    if course.objective == SPARSITY:
        return cases.task_loss(tensors, batch) + course.sparsity * group_sparsity(cases.graph, tensors)
    return cases.loss(tensors, mask, batch) / (float(cases.before[mask]) + _FLOOR)


def _error(function: Callable[..., Any], course: RewriteCourse, cases: Cases, mask: int, batch: int) -> Tensor:
    """The loss with the tensors that a function predicts; its gradient reaches the function by one product."""
    found: Mapping[str, Tensor] = function(cases.graph, cases.kept[mask], cases.starts[mask])
    moving = {name: value for name, value in found.items() if value.requires_grad}
    leaves = {name: value.detach().requires_grad_(name in moving) for name, value in found.items()}
    loss = _loss(course, cases, leaves, mask, batch).double()
    if not moving:
        return loss.detach()
    wanted = torch.autograd.grad(loss, [leaves[name] for name in moving], allow_unused=True)
    pairs = zip(moving.values(), wanted, strict=True)
    product = torch.stack([(value * own).sum().double() for value, own in pairs if own is not None]).sum()
    return loss.detach() + product - product.detach()


def _looked_at(
    sources: Sequence[Source], shelf: Shelf, head: RewriteHead, seed: int
) -> tuple[list[int], list[int], dict[str, str]]:
    """Numbers of the networks to train on and of those held out, and why others are left out; takes in features."""
    away = _held_out([source.family for source in sources], seed)
    seen, held_out, skipped = [], [], {}
    for number, source in enumerate(sources):
        try:
            cases = shelf(number)
        except (MetapruneError, OSError, RuntimeError, ValueError, LookupError) as error:
            skipped[source.name] = " ".join(str(error).split()) or type(error).__name__
            continue
        if number in away:
            held_out.append(number)
        else:
            seen.append(number)
            head.encoder.widen(cases.graph)
    if not seen:
        why = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise MetapruneError(f"zoo: there is no network to learn rewriting on{why}")
    return seen, held_out, skipped


def _held_out(families: Sequence[str], seed: int) -> set[int]:
    """Numbers of the networks of a quarter of the families, at least one; of one family alone a quarter of it."""
    kinds = families if len(set(families)) > 1 else [str(number) for number in range(len(families))]
    every = sorted(set(kinds))
    if len(every) < 2:
        return set()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    away = {every[i] for i in order[: max(1, round(_HELD_OUT * len(every)))]}
    return {number for number, kind in enumerate(kinds) if kind in away}


class _Schedule:
    """Which network, mask and batch each row is, and which rows a step and a check look at."""

    def __init__(self, seen: Sequence[int], held_out: Sequence[int], course: RewriteCourse, seed: int) -> None:
        self._course, self._seed = course, seed
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
        self._seen, self._held_out = torch.tensor(seen)[order], torch.tensor(held_out, dtype=torch.long)
        self._masks = course.making(seed).masks
        self._each = self._masks * course.batches
        self.rows = self._each * (max((*seen, *held_out)) + 1)

    def of(self, number: int) -> slice:
        """The rows of a network."""
        return slice(number * self._each, (number + 1) * self._each)

    def case(self, row: int) -> tuple[int, int, int]:
        """Network, mask and batch of a row."""
        number, rest = divmod(row, self._each)
        return (number, *divmod(rest, self._course.batches))

    def curriculum(self) -> Curriculum:
        """Steps draw from the networks at hand; checks look at the same masks of the same networks each time."""
        some = [self._seen[:_JUDGED], self._held_out[:: max(1, len(self._held_out) // _JUDGED)]]
        masks = torch.arange(0, self._masks, max(1, self._masks // 3)) * self._course.batches
        judged = (torch.cat(some)[:, None] * self._each + masks).flatten()
        return Curriculum(self._rows_of, judged, 64)

    def _rows_of(self, step: int) -> Tensor:
        """Of each step a network, a mask and a batch; at any time no more networks take part than are held."""
        course, most = self._course, len(self._seen)
        held = min(most, course.held)
        start = (step // course.every) * max(1, held // _TURNOVER) if held < most else 0
        draw = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**63)
        place = (start + torch.randint(held, (course.networks,), generator=draw)) % most
        return self._seen[place] * self._each + torch.randint(self._each, (course.networks,), generator=draw)
