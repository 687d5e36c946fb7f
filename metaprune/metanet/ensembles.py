"""Training of many small networks at once, each on the rows it may see, stopped where those that it may not see say.

Every choice is a function of the seed and the step, and every checkpoint holds all that the next step depends on, so a
run that was killed goes on to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.func import functional_call

from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.metanet.team import Team

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Course:
    """How ensembles are trained.

    Attributes:
        steps: The most steps.
        every: Steps between checks on rows held out, and between checkpoints.
        batch: Rows of a step.
        rate: Learning rate of AdamW, after as many steps of warming up as there are between checks.
        decay: Its weight decay.
        memory: Decay of the running mean of the weights, which is what is judged and kept.
        clip: Greatest norm of a gradient, over all members; None for any.
        end: Part of the rate that is left in the end, fallen to along a half cosine after warming up.
    """

    steps: int = 800
    every: int = 50
    batch: int = 256
    rate: float = 2e-3
    decay: float = 1.0
    memory: float = 0.98
    clip: float | None = None
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{name}: a positive whole number is needed, not {value!r}")
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"clip: a positive number is needed, not {self.clip!r}")
        if not 0 <= self.end <= 1:
            raise OptionError(f"end: a part of the rate from 0 to 1 is needed, not {self.end!r}")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warming = min(1.0, (step + 1) / self.every)
        passed = min(1.0, max(0, step - self.every) / max(1, self.steps - self.every))
        return self.rate * warming * (self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * passed)))


@dataclass(frozen=True)
class Curriculum:
    """Which rows a training looks at, where that is not any row in a step and all of them in a check.

    Attributes:
        rows_of: The rows of a step, counted from 0.
        judged: The rows that checks look at.
        batch: So many of them at a time.
    """

    rows_of: Callable[[int], Tensor]
    judged: Tensor
    batch: int


@dataclass
class Trained:
    """What a training came to.

    Attributes:
        history: For each check the step, the mean loss on rows seen, and on rows held out where there are any; with a
            curriculum from step 0 on.
        step: The step whose weights were kept: that of the least loss held out, else the last.
    """

    history: list[list[float]] = field(default_factory=list)
    step: int = 0


def train(
    model: nn.Module,
    errors: Callable[[Callable[..., Tensor], Tensor], Tensor],
    seen: Tensor,
    course: Course,
    seed: int,
    path: Path | None = None,
    digest: str = "",
    curriculum: Curriculum | None = None,
    team: Team | None = None,
) -> Trained:
    """Trains all members of a model; it is left with the weights that are kept.

    Args:
        model: All of its parameters have a leading dimension of members, unless there is one member.
        errors: Squared errors of a function like `model.forward` on numbered rows, in units of the targets' variance,
            shape [members, rows].
        seen: Whether each member is trained on a row, shape [members, rows]; the others of its rows are held out.
        course: How.
        seed: Of the batches.
        path: Checkpoint to go on from and to write to.
        digest: Of all that the training depends on.
        curriculum: Which rows; by default `course.batch` rows drawn from the seed, and all rows in checks.
        team: Processes that share the rows of each step and of each check; all call this alike.

    Raises:
        OptionError: The checkpoint is of another training, or the rows of a step can not be shared equally.
        LoadError: It is damaged.
    """
    team = team or Team()
    run = _Run(model, errors, seen, course, curriculum or _any_rows(seen, course, seed), team)
    if path is not None and path.exists():
        run.read(path, digest)
    elif curriculum is not None:
        run.check()
    while run.step < course.steps:
        run.advance()
        if run.step % course.every == 0 or run.step == course.steps:
            run.check()
            if path is not None and team.leads:
                run.write(path, digest)
    team.wait()
    model.load_state_dict({**model.state_dict(), **run.best})
    return run.trained


def _any_rows(seen: Tensor, course: Course, seed: int) -> Curriculum:
    def rows_of(step: int) -> Tensor:
        draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        return torch.randint(seen.shape[1], (course.batch,), generator=draw)

    return Curriculum(rows_of, torch.arange(seen.shape[1]), 8 * course.batch)


class _Run:
    """A training in progress."""

    def __init__(
        self,
        model: nn.Module,
        errors: Callable[[Callable[..., Tensor], Tensor], Tensor],
        seen: Tensor,
        course: Course,
        curriculum: Curriculum,
        team: Team,
    ) -> None:
        self.step = 0
        self.trained = Trained()
        self.best: Values = {}
        self._model, self._errors, self._seen, self._course = model, errors, seen, course
        self._curriculum, self._team = curriculum, team
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._mean = {name: value.detach().clone() for name, value in self._weights.items()}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), course.rate, weight_decay=course.decay, foreach=True
        )

    def advance(self) -> None:
        """One step: each member's mean error on the rows of the batch that it may see."""
        course = self._course
        rows = self._team.share_equally(self._curriculum.rows_of(self.step))
        weight = self._seen[:, rows].float()
        loss = (self._errors(self._model, rows) * weight).sum(1) / weight.sum(1).clamp_min(1)
        self._optimizer.param_groups[0]["lr"] = course.rate_at(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())  # members share no parameter, so the sum trains each on its own loss
        for value in self._weights.values():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad  # no row of this step reaches it
        self._team.average([value.grad for value in self._weights.values() if value.grad is not None])
        if course.clip is not None:
            nn.utils.clip_grad_norm_(self._weights.values(), course.clip)
        self._optimizer.step()
        self.step += 1
        keep = min(course.memory, self.step / (self.step + 9))  # a short memory while little is there to remember
        for name, value in self._weights.items():
            self._mean[name].lerp_(value.detach(), 1 - keep)

    def check(self) -> None:
        """Judges the mean weights, and keeps them if they are the best so far."""
        totals = torch.zeros(2, len(self._seen), dtype=torch.float64)
        counts = torch.zeros_like(totals)
        with torch.no_grad():
            for rows in torch.split(self._team.share(self._curriculum.judged), self._curriculum.batch):
                found = self._errors(self._judged, rows).double()
                for kind, mask in enumerate((self._seen[:, rows], ~self._seen[:, rows])):
                    totals[kind] += (found * mask).sum(1)
                    counts[kind] += mask.sum(1)
        self._team.add([totals, counts])
        means = [
            float((t[c > 0] / c[c > 0]).mean()) for t, c in zip(totals, counts, strict=True) if bool((c > 0).any())
        ]
        before = min((row[-1] for row in self.trained.history), default=float("inf"))
        if len(means) == 1 or means[-1] < before:
            self.trained.step = self.step
            self.best = {name: value.clone() for name, value in self._mean.items()}
        self.trained.history.append([self.step, *means])

    def _judged(self, *inputs: object) -> Tensor:
        found: Tensor = functional_call(self._model, self._mean, inputs)
        return found

    def write(self, path: Path, digest: str) -> None:
        """Writes all that the next step depends on, atomically."""
        tensors = {f"weight/{name}": value.detach() for name, value in self._weights.items()}
        tensors |= {f"mean/{name}": value for name, value in self._mean.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for name, weight in self._weights.items():
            state = self._optimizer.state[weight]
            tensors |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
        about = {"digest": digest, "step": self.step, "best": self.trained.step, "history": self.trained.history}
        write_atomically(path, save_tensors(tensors, {"about": json.dumps(about)}))

    def read(self, path: Path, digest: str) -> None:
        """Goes on from a checkpoint."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LoadError(f"{path}: damaged: {error}") from None
        if about.get("digest") != digest:
            raise OptionError(f"out: {path.name} was written by another fit: other networks, options or seed")
        self.step, self.trained = about["step"], Trained(about["history"], about["best"])
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[f"weight/{name}"])
                self._mean[name].copy_(tensors[f"mean/{name}"])
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"first/{name}"],
                    "exp_avg_sq": tensors[f"second/{name}"],
                }
        self.best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
