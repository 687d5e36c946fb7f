"""Training of the rewriting head on the outputs of masked networks, without labels.

A step takes a few networks, each with some of its units masked. The head predicts tensors, the masked network runs with
them on a batch, and the loss is KL(dense || masked) over what it is before the head has changed anything. Its gradient
at the predicted tensors is exact; one vector-Jacobian product then takes it through the head, however many batches it
was summed over. Some families are held out, and the weights are kept of the step that serves them best; that may be the
first, at which nothing is rewritten.
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
from metaprune.metanet.ensembles import Course, Curriculum, train
from metaprune.metanet.rewrite_cases import Cases, Making, Shelf
from metaprune.metanet.rewrite_head import RewriteHead
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
        hidden: Width of the units' states.
        layers: Rounds of messages before it is known which units go.
        further: Rounds after that.
        rank: Of what is added to a block.
        ratio: Bound of the change of blocks, see `metaprune.metanet.rewrite.Rewriter`.
        vector_ratio: Bound of the change of vectors.
        refit: Whether rewriting starts from the closed form, `metaprune.dataless.refit_without_data`.
        masks: Masks for each network.
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

    hidden: int = 24
    layers: int = 3
    further: int = 1
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

    @property
    def course(self) -> Course:
        """The training that this asks for."""
        return Course(self.steps, self.every, self.networks, self.rate, self.decay, self.memory, self.clip, end=0.0)

    def head(self, seed: int) -> RewriteHead:
        """The head before it is trained."""
        return RewriteHead(
            self.hidden, self.layers, self.further, self.rank, self.ratio, self.vector_ratio, self.refit, seed
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
        making = Making(course.masks, course.batches, course.size, course.refit, seed)
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
            return torch.stack([_error(function, shelf, *schedule.case(row)) for row in rows.tolist()])[None]

        mask = torch.zeros(1, schedule.rows, dtype=torch.bool)
        for number in seen:
            mask[0, schedule.of(number)] = True
        trained = train(head, errors, mask, course.course, seed, path, digest, schedule.curriculum(), team)
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


def _error(function: Callable[..., Any], shelf: Shelf, number: int, mask: int, batch: int) -> Tensor:
    """The loss of a masked network over the loss before; its gradient reaches the head by one product."""
    cases: Cases = shelf(number)
    found: Mapping[str, Tensor] = function(cases.graph, cases.kept[mask], cases.starts[mask])
    scale = float(cases.before[mask]) + _FLOOR
    moving = {name: value for name, value in found.items() if value.requires_grad}
    leaves = {name: value.detach().requires_grad_(name in moving) for name, value in found.items()}
    loss = cases.loss(leaves, mask, batch) / scale
    if not moving:
        return loss.detach()
    wanted = torch.autograd.grad(loss, [leaves[name] for name in moving], allow_unused=True)
    products = [
        (value * gradient).sum()
        for value, gradient in zip(moving.values(), wanted, strict=True)
        if gradient is not None
    ]
    product = torch.stack([p.double() for p in products]).sum()
    return loss.detach() + product - product.detach()


def _looked_at(
    sources: Sequence[Source], shelf: Shelf, head: RewriteHead, seed: int
) -> tuple[list[int], list[int], dict[str, str]]:
    """Numbers of the networks to train on and of those held out, and why others are left out; takes in features."""
    away = _families_held_out([source.family for source in sources], seed)
    seen, held_out, skipped = [], [], {}
    for number, source in enumerate(sources):
        try:
            cases = shelf(number)
        except (MetapruneError, OSError, RuntimeError, ValueError, LookupError) as error:
            skipped[source.name] = " ".join(str(error).split()) or type(error).__name__
            continue
        if source.family in away:
            held_out.append(number)
        else:
            seen.append(number)
            head.encoder.widen(cases.graph)
    if not seen:
        why = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise MetapruneError(f"zoo: there is no network to learn rewriting on{why}")
    return seen, held_out, skipped


def _families_held_out(families: Sequence[str], seed: int) -> set[str]:
    """A quarter of the families, at least one; none where there is only one."""
    every = sorted(set(families))
    if len(every) < 2:
        return set()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    return {every[i] for i in order[: max(1, round(_HELD_OUT * len(every)))]}


class _Schedule:
    """Which network, mask and batch each row is, and which rows a step and a check look at."""

    def __init__(self, seen: Sequence[int], held_out: Sequence[int], course: RewriteCourse, seed: int) -> None:
        self._course, self._seed = course, seed
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
        self._seen, self._held_out = torch.tensor(seen)[order], torch.tensor(held_out, dtype=torch.long)
        self._each = course.masks * course.batches
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
        masks = torch.arange(0, self._course.masks, max(1, self._course.masks // 3)) * self._course.batches
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
