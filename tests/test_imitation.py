"""Imitation: one step against a loss written out by hand, outputs of every kind, no label and no statistics touched."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.calibration import Unlabelled, inputs_of
from metaprune.datasets import digits
from metaprune.losses import cross_entropy
from metaprune.training import Settings, train

SMALL_STEPS = Settings(epochs=6, lr=3e-3, optimizer="adamw")


@dataclasses.dataclass
class States:
    """What an encoder returns, as libraries of language models do."""

    states: Tensor
    pooled: Tensor
    length: Tensor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two residual blocks over a whole digit, and scores of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two, self.head = nn.Linear(64, 16), Block(16), Block(16), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.embed(images.flatten(1)))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A block of attention over the rows of a digit, some of which a mask leaves out; dropout as pretrained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.pool = nn.Linear(8, 16), Block(16), nn.Linear(16, 12)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, rows: Tensor, mask: Tensor) -> States:
        x = self.embed(rows)
        parts = [part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        seen = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None, :] > 0)
        x = self.block(x + self.out(seen.transpose(1, 2).flatten(2)))
        return States(x, torch.tanh(self.pool(self.dropout(x).mean(1))), mask.sum(1))


class Tags(nn.Module):
    """Ten probabilities that need not add up to one, behind batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.body(images).mean((2, 3))))


def trained(model: nn.Module, epochs: int = 3) -> nn.Module:
    data, _ = digits()
    settings = Settings(epochs=epochs, lr=5e-3, optimizer="adamw")

    def objective(scores: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return cross_entropy(scores.logit() if isinstance(model, Tags) else scores, labels)

    train(model, data, objective, settings)
    return model.eval()


def residual() -> nn.Module:
    torch.manual_seed(0)
    return trained(Residual())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def tags() -> nn.Module:
    torch.manual_seed(0)
    return trained(Tags())


def images(held_out: bool = False) -> list[Tensor]:
    return list(digits()[held_out].images[:448].split(64))


def rows(held_out: bool = False) -> list[dict[str, Tensor]]:
    mask = (torch.arange(8) < 6).long().expand(64, 8).contiguous()
    return [{"rows": batch[:, 0], "mask": mask} for batch in images(held_out)]


def floats(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [output.states, output.pooled]


def distances(dense: nn.Module, student: nn.Module, batches: list[Any]) -> list[float]:
    """Squared error of each output in units of the dense network's mean square, over all batches."""
    with torch.no_grad():
        pairs = [
            (floats(dense(**b)), floats(student(**b)))
            if isinstance(b, dict)
            else (floats(dense(b)), floats(student(b)))
            for b in batches
        ]
    return [
        float(sum((a[i] - b[i]).square().sum() for a, b in pairs) / sum(a[i].square().sum() for a, _ in pairs))
        for i in range(len(pairs[0][0]))
    ]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_one_step_follows_the_gradient_of_the_loss_written_out() -> None:
    model, batch = residual(), images()[0]
    pruned = mp.prune(model, batch[:2], budget="width=0.5")
    settings = Settings(epochs=1, lr=0.01, momentum=0, weight_decay=0, warmup=0, precision="float32")
    found = mp.recover(pruned, [batch], recipe="imitate", settings=settings).module
    keep = torch.from_numpy(pruned.kept["head.weight"][1])
    student, ends = pruned.module, []
    for network in (model, student):
        for block in (network.one, network.two):
            block.register_forward_hook(lambda module, args, output: ends.append(output))
    wanted, answer = model(batch).detach(), student(batch)
    loss = (answer - wanted).square().sum() / wanted.square().sum()
    for mine, dense in zip(ends[2:], ends[:2], strict=True):
        theirs = dense[:, keep].detach()
        loss = loss + (mine - theirs).square().sum() / theirs.square().sum() / 2
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    for (name, before), gradient in zip(student.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found.get_parameter(name), before - 0.01 * gradient, rtol=1e-4, atol=1e-7)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], list[Any]]]] = {
    "class scores": (residual, images),
    "states with a mask": (encoder, rows),
    "probabilities": (tags, images),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_output_is_followed_on_inputs_never_seen(case: str) -> None:
    build, batches = CASES[case]
    model = build()
    pruned = mp.prune(model, batches(False)[0], budget="macs=0.5")
    recovered = mp.recover(pruned, batches(False), recipe="imitate", settings=SMALL_STEPS)
    before, after = (distances(model, p.module, batches(True)) for p in (pruned, recovered))
    assert all(late < 0.5 * early for early, late in zip(before, after, strict=True)), (before, after)
    assert "imitated, without labels" in recovered.notes[-2]


def test_labels_are_neither_needed_nor_looked_at() -> None:
    model = residual()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")
    loaders: list[Any] = [
        images(),
        [(batch, torch.full((len(batch),), math.nan)) for batch in images()],
        [[batch] for batch in images()],
        mp.Task(
            model, images()[0], [(batch, torch.zeros(len(batch)).long()) for batch in images()], [(images()[0], 0)]
        ),
    ]
    plain, *others = (mp.recover(pruned, loader, recipe="imitate", epochs=1).module for loader in loaders)
    assert not same(plain, pruned.module)
    assert all(same(plain, other) for other in others)


def test_pairs_are_arguments_or_inputs_and_labels() -> None:
    one, two = mp.trace(residual(), images()[0]), mp.trace(encoder(), rows()[0])
    a, b = images()[0], rows()[0]
    labels = torch.zeros(64)
    assert inputs_of(one, (a, labels))[0] is a
    assert inputs_of(one, a)[0] is a
    pair = (b["rows"], b["mask"])
    assert inputs_of(two, pair)[0] is pair
    assert inputs_of(two, (pair, labels))[0] is pair
    assert inputs_of(two, (b, labels))[0] is b
    assert [(i is b, len(zeros)) for i, zeros in Unlabelled(two, [b, (b, labels)])] == [(True, 64)] * 2


def test_a_loader_is_shuffled_by_the_seed() -> None:
    model = residual()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")
    data = mp.Batches(torch.cat(images()), torch.zeros(448), 64, shuffle=True)
    one, two, other = (mp.recover(pruned, data, recipe="imitate", epochs=1, seed=s).module for s in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)


def test_the_student_is_trained_as_it_is_used() -> None:
    model = tags()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")
    recovered = mp.recover(pruned, images(), recipe="imitate", settings=SMALL_STEPS).module
    for name, buffer in pruned.module.named_buffers():
        assert torch.equal(recovered.get_buffer(name), buffer)
    assert not any(module.training for module in recovered.modules())
    encoding = encoder()  # a network that nothing is cut from is left as it is, dropout or not
    plan = dataclasses.replace(mp.plan(mp.trace(encoding, rows()[0]), "macs=0.5"), keep={})
    whole = mp.apply(mp.trace(encoding, rows()[0]), plan)
    settings = Settings(epochs=1, weight_decay=0, precision="float32")
    imitated = mp.recover(whole, rows(), recipe="imitate", settings=settings).module
    for name, value in encoding.state_dict().items():
        torch.testing.assert_close(imitated.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_another_teacher_is_followed_or_named() -> None:
    model = residual()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")

    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -model(x)  # type: ignore[no-any-return]

    far = dataclasses.replace(SMALL_STEPS, epochs=20, lr=0.01)
    led = mp.recover(pruned, images(), teacher=Negative(), recipe="imitate", settings=far).module
    assert distances(Negative(), led, images(True))[0] < 0.5 < 1 < distances(model, led, images(True))[0]
    two = mp.prune(encoder(), rows()[0], budget="macs=0.5")
    with pytest.raises(mp.MetapruneError, match=r"teacher: shape \(64, 7\) does not fit the student's \(64, 10\)"):
        mp.recover(pruned, images(), teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), recipe="imitate")
    with pytest.raises(mp.MetapruneError, match="teacher: 1 outputs do not fit the student's 2"):
        mp.recover(two, rows(), teacher=_First(encoder()), recipe="imitate")


class _First(nn.Module):
    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        return self.encoding(rows, mask).states  # type: ignore[no-any-return]


def test_a_network_without_numbers_to_follow_is_named() -> None:
    class Decided(Residual):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).argmax(1)

    pruned = mp.prune(Decided(), images()[0], budget="macs=0.5")
    with pytest.raises(mp.MetapruneError, match="imitate: the network gives no floating-point output to follow"):
        mp.recover(pruned, images(), recipe="imitate", epochs=1)


def test_without_labels_least_squares_comes_first_by_default() -> None:
    model = residual()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")
    recovered = mp.recover(pruned, images(), settings=SMALL_STEPS)
    explicit = mp.recover(pruned, images(), recipe="least_squares+imitate", settings=SMALL_STEPS)
    assert same(recovered.module, explicit.module)
    assert "fitted by least squares" in recovered.notes[-3]


def _spent() -> Iterator[Tensor]:
    yield from images()


@pytest.mark.parametrize(
    ("loader", "recipe", "message"),
    [
        (images, "kd", "recipe: 'kd' needs labels, so a Task; without, choose from absorb, imitate, least_squares"),
        (images, "recalibrate+finetune", "recipe: 'finetune' needs labels, so a Task"),
        (lambda: "noise", "imitate", r"task: batches are needed \(a loader or a list\), not a str"),
        (lambda: images()[0], "imitate", r"task: batches are needed \(a loader or a list\), not a Tensor"),
        (lambda: rows()[0], "imitate", r"task: batches are needed \(a loader or a list\), not a dict"),
        (_spent, "imitate", "task: an iterator is empty after one pass"),
        (lambda: [], "imitate", "task: no batches"),
        (lambda: [("a", "b")], "imitate", "data: a batch holds no tensor"),
    ],
)
def test_what_is_no_unlabelled_data_is_named(loader: Callable[[], Any], recipe: str, message: str) -> None:
    torch.manual_seed(0)
    pruned = mp.prune(Residual(), images()[0], budget="macs=0.5")
    with pytest.raises(mp.MetapruneError, match=message):
        mp.recover(pruned, loader(), recipe=recipe)


def test_epochs_are_those_of_the_settings_unless_they_contradict() -> None:
    torch.manual_seed(0)
    pruned = mp.prune(Residual(), images()[0], budget="macs=0.5")
    steps: list[int] = []

    def count(done: int, total: int) -> None:
        steps.append(total)

    for options in ({}, {"epochs": 1}, {"settings": Settings(epochs=2)}, {"settings": Settings(epochs=2), "epochs": 2}):
        mp.recover(pruned, images(), recipe="imitate", progress=count, **options)  # type: ignore[arg-type]
    assert [steps.count(7 * epochs) for epochs in (3, 1, 2)] == [21, 7, 28]
    with pytest.raises(mp.MetapruneError, match="epochs: 5 and the 2 of settings contradict each other"):
        mp.recover(pruned, images(), recipe="imitate", epochs=5, settings=Settings(epochs=2))


def test_recalibration_needs_neither_labels_nor_logits() -> None:
    class Pair(Tags):
        def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"tags": super().forward(images)}

    torch.manual_seed(0)
    model = Pair().eval()
    pruned = mp.prune(model, images()[0], budget="macs=0.5")
    recovered = mp.recover(pruned, images(), recipe="recalibrate").module
    seen = torch.cat(images())
    with torch.no_grad():
        first = torch.nn.functional.conv2d(seen, recovered.body[0].weight, recovered.body[0].bias)
    torch.testing.assert_close(recovered.body[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
