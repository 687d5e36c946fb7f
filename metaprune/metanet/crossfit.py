"""Cross-validation in one training: each head has members for every family held out, and members that see all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from metaprune.metanet.ensembles import Course, Trained, train
from metaprune.metanet.examples import Example
from metaprune.metanet.heads import Regressor, Surrogate

_FOLDS = 5  # where all networks are of one family
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Setting:
    """What all heads of a fit share.

    Attributes:
        examples: The networks.
        folds: By fold the numbers of the examples held out; the last holds none out.
        members: Members for each fold.
        course: How to train.
        seed: Of weights and batches.
        out: Folder for checkpoints.
    """

    examples: tuple[Example, ...]
    folds: tuple[frozenset[int], ...]
    members: int
    course: Course
    seed: int
    out: Path | None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what was measured on the examples, and of the names of their features."""
        text = hashlib.sha256()
        for example in self.examples:
            features = {sight: described.schema.digest for sight, described in example.described.items()}
            text.update(repr((example.name, example.family, dict(example.minima), features)).encode())
            for tensor in (example.joint_kept, example.joint, *example.ablation.values(), *example.plain.values()):
                text.update(tensor.contiguous().numpy().tobytes())
        return text.hexdigest()

    @cached_property
    def held_out(self) -> Mapping[str, list[int]]:
        """Numbers of the examples that were held out, by family; empty where nothing was."""
        found: dict[str, list[int]] = {}
        for held in self.folds[:-1]:
            for number in sorted(held):
                found.setdefault(self.examples[number].family, []).append(number)
        return found

    def seen(self, owner: Tensor) -> Tensor:
        """Whether each member is trained on rows of some examples, shape [members of all folds, rows]."""
        masks = []
        for held in self.folds:
            mask = torch.tensor([i not in held for i in range(len(self.examples))])[owner]
            masks += [mask] * self.members
        return torch.stack(masks)

    def of_fold(self, model: Model, fold: int) -> Model:
        """The members of one fold, as a model of their own."""
        first = fold % len(self.folds) * self.members
        return _some(model, slice(first, first + self.members))

    def fold_of(self, example: int) -> int:
        """The fold that holds an example out; the last where none does."""
        return next((i for i, held in enumerate(self.folds) if example in held), len(self.folds) - 1)

    def train(
        self, name: str, model: nn.Module, errors: Callable[[Callable[..., Tensor], Tensor], Tensor], seen: Tensor
    ) -> Trained:
        """Trains a head, with a checkpoint of its name."""
        path = None if self.out is None else self.out / "training" / f"{name}.safetensors"
        about = (name, self.digest, self.members, self.seed, asdict(self.course), [sorted(f) for f in self.folds])
        return train(
            model, errors, seen, self.course, self.seed, path, hashlib.sha256(repr(about).encode()).hexdigest()
        )


def folds(examples: Sequence[Example]) -> tuple[frozenset[int], ...]:
    """Numbers of the examples held out together, family by family; of one family alone parts of it; last, none."""
    families = sorted({example.family for example in examples})
    if len(families) > 1:
        held = [frozenset(i for i, e in enumerate(examples) if e.family == family) for family in families]
    else:
        count = min(_FOLDS, len(examples)) if len(examples) > 1 else 0
        held = [frozenset(range(fold, len(examples), count)) for fold in range(count)]
    return (*held, frozenset())


def _some(model: Model, members: slice) -> Model:
    """A model of some of the members."""
    values = {name: value[members].clone() for name, value in model.state_dict().items()}
    count = len(next(iter(values.values())))
    draw = torch.Generator()
    made: nn.Module
    if isinstance(model, Regressor):
        made = Regressor(count, model.scaler.mean.shape[1], model.centre.shape[1], draw)
    else:
        assert isinstance(model, Surrogate)
        made = Surrogate(count, model.scaler.mean.shape[1] - 2, draw)
    made.load_state_dict(values)
    return made  # type: ignore[return-value]
