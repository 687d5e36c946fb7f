"""Graph heads on a tiny zoo on digits: what they compute, what they are trained on, resuming, saving."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.metanet import ensembles
from metaprune.metanet.crossfit import Setting, folds
from metaprune.metanet.encoder_training import GraphCourse, fitted, grouped, measured
from metaprune.metanet.ensembles import Course, train
from metaprune.metanet.examples import WEIGHTS, Example, Making, gather
from metaprune.metanet.fitting import fit
from metaprune.metanet.graph_head import LOSSES, GraphHead, Subject
from metaprune.metanet.heads import FLOOR
from metaprune.metanet.labels import Labels, measure
from metaprune.metanet.pruner import MetaPruner
from metaprune.metanet.schema import Schema
from metaprune.metanet.weight_graph import WeightGraph

COURSE = GraphCourse(hidden=8, layers=1, epochs=8, rate=1e-2, memory=0.9)
HEADS = Course(steps=20, every=10, batch=32)
SAMPLES = 64


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def _dense(*widths: int) -> nn.Sequential:
    pairs = zip((64, *widths), widths, strict=False)
    return nn.Sequential(nn.Flatten(), *[layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())])


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "dense-0": lambda: nn.Sequential(_dense(7, 6), nn.Linear(6, 10)),
    "dense-1": lambda: nn.Sequential(_dense(9), nn.Linear(9, 10)),
    "convolution-0": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)
    ),
    "residual-0": lambda: nn.Sequential(_dense(8), _Residual(8), nn.Linear(8, 10)),
}


@dataclass(frozen=True)
class _Member:
    name: str
    family: str
    task: mp.Task


@cache
def _task(name: str) -> mp.Task:
    torch.manual_seed(list(NETWORKS).index(name))
    train_data, test = mp.digits(size=64, seed=0)

    def objective(logits: Tensor, inputs: object, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    model = NETWORKS[name]()
    mp.train(model, train_data, objective, mp.Settings(epochs=1, lr=0.05), 0)
    return mp.Task(model.eval(), test.images[:1], [next(iter(train_data))], test)


class _Zoo:
    def __iter__(self) -> Iterator[_Member]:
        return (_Member(name, name.split("-")[0], _task(name)) for name in NETWORKS)

    def labels(self, name: str) -> Labels:
        return _labels(name)


@cache
def _labels(name: str) -> Labels:
    task = _task(name)
    return measure(mp.trace(task.model, task.inputs), task.train, plans=4)


@cache
def _examples() -> tuple[tuple[Example, ...], Mapping[str, WeightGraph]]:
    graphs: dict[str, WeightGraph] = {}

    def keep(name: str, graph: Graph) -> None:
        graphs[name] = WeightGraph.of(graph)

    found, skipped = gather(_Zoo(), Making(lambda graph, data: _labels(""), 0, SAMPLES), look=keep)
    assert not skipped
    return tuple(found), graphs


def _subject(name: str) -> tuple[Example, Subject]:
    examples, graphs = _examples()
    example = next(own for own in examples if own.name == name)
    return example, Subject(graphs[name], example.described[WEIGHTS], example.order[WEIGHTS])


def _setting(examples: tuple[Example, ...] | None = None, out: Path | None = None) -> Setting:
    found = _examples()[0] if examples is None else examples
    return Setting(found, folds(found), 1, HEADS, 0, out)


@cache
def _fitted() -> tuple[GraphHead, tuple[Example, ...], dict[str, object]]:
    return fitted(_setting(), WEIGHTS, _examples()[1], COURSE)


@cache
def _pruner() -> MetaPruner:
    return fit(_Zoo(), seed=0, encoder="graph", graph=COURSE, course=HEADS, members=1, samples=SAMPLES)


def test_a_cut_is_read_from_what_stays_and_what_goes() -> None:
    _, subject = _subject("residual-0")
    head = GraphHead(len(subject.described.schema.unit), 8, 2, seed=3)
    head.spread[:], head.centre[:] = torch.tensor([2.0, 3.0, 0.5]), torch.tensor([-4.0, -1.0, -2.0])
    nn.init.normal_(head.line.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = head(subject)
        states = head.encoder(subject.graph, observed=subject.described.units)
        at = len(subject.turns)
        read = subject.cuts_of(found[at:].view(-1, LOSSES))
        for name, units in subject.units_of(found[:at]).items():
            assert torch.allclose(units, head.unit(states[name])[:, 0] * 2 - 4, atol=1e-5)
            size = len(units)
            for kept in range(1, size):
                gone, stay = subject.order[name][: size - kept], subject.order[name][size - kept :]
                lost = (units[gone].exp().sum().clamp_min(FLOOR).log() + 1) / 3
                numbers = torch.stack([lost, torch.tensor(kept / size).log(), torch.tensor(1 - kept / size).log()])
                pooled = torch.cat([states[name][gone].mean(0), states[name][stay].mean(0), numbers])
                expected = (head.line(numbers) + head.cut(pooled)) * head.spread[1:] + head.centre[1:]
                assert torch.allclose(read[name][kept], expected, atol=1e-4)


def test_targets_stand_where_the_predictions_do() -> None:
    for name in NETWORKS:
        example, subject = _subject(name)
        found = measured(example, subject)
        at = len(subject.turns)
        cuts = subject.cuts_of(found[at:].view(-1, LOSSES))
        for group, units in subject.units_of(found[:at]).items():
            losses = example.ablation[group].clamp_min(FLOOR).log().float()  # of dead units too
            assert torch.allclose(units, losses)
            levels = example.levels[group].tolist()
            known = cuts[group].isfinite().all(1)
            assert sorted(levels) == known.nonzero().flatten().tolist()
            for level, plain, fine in zip(levels, example.plain[group], example.compensated[group], strict=True):
                expected = [math.log(max(float(value), FLOOR)) for value in (plain, fine)]
                assert cuts[group][level].tolist() == pytest.approx(expected, abs=1e-5)


def test_families_are_held_out_whole_in_a_few_folds() -> None:
    families = [frozenset({3 * i, 3 * i + 1, 3 * i + 2}) if i % 2 else frozenset({3 * i}) for i in range(13)]
    found = grouped(families)
    assert len(found) == 4
    assert sorted(i for fold in found for i in fold) == sorted(i for family in families for i in family)
    assert all(any(family <= fold for fold in found) for family in families)
    assert max(map(len, found)) - min(map(len, found)) <= 3
    assert grouped([]) == ()
    assert set(grouped(families[:2])) == set(families[:2])


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    course = Course(steps=110, every=10, rate=2.0, end=0.25)
    assert course.rate_at(4) == pytest.approx(1.0)
    for step in (10, 35, 60, 85, 109):
        half = 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert course.rate_at(step) == pytest.approx(2.0 * (0.25 + 0.75 * half))
    assert {replace(course, end=1.0).rate_at(step) for step in range(9, 110)} == {2.0}
    for wrong in ({"clip": 0.0}, {"end": 2.0}):
        with pytest.raises(OptionError):
            Course(**wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="epochs"):
        GraphCourse(epochs=0)


def test_training_is_that_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(6, 3, generator=draw), 10 * torch.randn(6, generator=draw)
    model = nn.Linear(3, 1)
    other = copy.deepcopy(model)

    def errors(function: Callable[..., Tensor], rows: Tensor) -> Tensor:
        return (function(inputs[rows])[:, 0] - targets[rows]).square()[None]

    course = Course(steps=12, every=3, batch=2, rate=0.1, decay=0.1, memory=0.9, clip=0.5, end=0.0)
    train(model, errors, torch.ones(1, 6, dtype=torch.bool), course, 5)
    optimizer = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.1)
    mean = copy.deepcopy(other)
    for step in range(12):
        draw.manual_seed(5 * 1_000_003 + step)
        rows = torch.randint(6, (2,), generator=draw)
        optimizer.param_groups[0]["lr"] = course.rate_at(step)
        optimizer.zero_grad()
        torch.autograd.backward(errors(other, rows).mean())
        gradients = [parameter.grad for parameter in other.parameters() if parameter.grad is not None]
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        assert norm > 0.5
        for gradient in gradients:
            gradient.mul_(0.5 / norm)
        optimizer.step()
        for average, value in zip(mean.parameters(), other.parameters(), strict=True):
            average.data += (1 - min(0.9, (step + 1) / (step + 10))) * (value.data - average.data)
    assert torch.allclose(model.weight, mean.weight, atol=1e-5)


def test_the_loss_falls_and_predictions_become_features() -> None:
    head, examples, about = _fitted()
    for training in about["trainings"]:  # type: ignore[attr-defined]
        history = [row[1] for row in training["history"]]
        assert history[-1] < 0.75 * history[0]
    for before, after in zip(_examples()[0], examples, strict=True):
        one, two = before.described[WEIGHTS], after.described[WEIGHTS]
        assert two.schema == Schema.of(False).with_graph() != one.schema
        for name in one.sizes:
            assert two.cuts[name].shape[1] == len(two.schema.cut)
            assert two.units[name].shape[1] == len(two.schema.unit)
            assert torch.equal(two.cuts[name][:, :-LOSSES], one.cuts[name])
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_no_head_sees_labels_of_the_networks_it_reads() -> None:
    examples, graphs = _examples()
    held = next(fold for fold in grouped(_setting().folds[:-1]) if 0 in fold)
    assert {examples[i].family for i in held} == {"dense"}

    def other(example: Example) -> Example:
        ablation = {name: 100 * losses.flip(0) + 1 for name, losses in example.ablation.items()}
        plain = {name: 50 * losses + 3 for name, losses in example.plain.items()}
        return replace(example, ablation=ablation, plain=plain)

    changed = tuple(other(own) if i in held else own for i, own in enumerate(examples))
    _, found, _ = fitted(_setting(changed), WEIGHTS, graphs, COURSE)
    for i, (one, two) in enumerate(zip(_fitted()[1], found, strict=True)):
        for what in ("cuts", "units"):
            mine, theirs = (getattr(own.described[WEIGHTS], what) for own in (one, two))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine) == (i in held)


class _Stopped(Exception):
    pass


def test_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, whole = [0], ensembles.write_atomically

    def write(path: Path, content: bytes) -> None:
        writes[0] += 1
        if writes[0] == 20:  # in the second head
            raise _Stopped
        whole(path, content)

    monkeypatch.setattr(ensembles, "write_atomically", write)
    with pytest.raises(_Stopped):
        fitted(_setting(out=tmp_path), WEIGHTS, _examples()[1], COURSE)
    assert len(list((tmp_path / "training").iterdir())) == 2
    head, examples, about = fitted(_setting(out=tmp_path), WEIGHTS, _examples()[1], COURSE)
    expected, undisturbed, told = _fitted()
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in expected.state_dict().items())
    assert about == told
    for one, two in zip(undisturbed, examples, strict=True):
        units = two.described[WEIGHTS].units
        assert all(torch.equal(own, units[name]) for name, own in one.described[WEIGHTS].units.items())
    with pytest.raises(OptionError, match="written by another fit"):
        fitted(_setting(out=tmp_path), WEIGHTS, _examples()[1], replace(COURSE, rate=1e-3))


@pytest.mark.filterwarnings("ignore:outside the range of the zoo")  # four networks span no wide range
def test_a_pruner_carries_its_graph_head(tmp_path: Path) -> None:
    pruner, path = _pruner(), tmp_path / "x.safetensors"
    pruner.save(path)
    again = MetaPruner.load(path)
    task = _task("residual-0")
    graph = mp.trace(task.model, task.inputs)
    one, two = pruner.encode(graph), again.encode(graph)
    assert one.description.schema == Schema.of(False).with_graph()
    for name in one.plain:
        assert (one.plain[name][1:] == two.plain[name][1:]).all()
        assert (one.compensated[name][1:] == two.compensated[name][1:]).all()
    mine, theirs = (own.predictors[WEIGHTS].ablations(one.description) for own in (pruner, again))
    assert all((mine[name] == theirs[name]).all() for name in mine)
    pruned = again.prune(graph, budget="macs=0.6")
    assert pruned.certificate is not None
    assert pruned.certificate.ok
    assert pruned.plan.reached["macs"] <= 0.6
    told = again.card["validation"]
    assert set(told[WEIGHTS]) == {"curves", "ablation", "graph"}
    assert told[WEIGHTS]["graph"]["curves"]["plain"]["networks"] == len(NETWORKS)
    assert set(told[WEIGHTS]["graph"]["ablation"]["r2 by family"]) == {"dense", "convolution", "residual"}


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    _pruner().save(path)
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["card"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    for change in ({"hidden": 9}, {"depth": 3}, {"hidden": 0}):
        other = copy.deepcopy(card)
        other["graphs"][WEIGHTS] |= change
        path.write_bytes(save_tensors(tensors, {"card": json.dumps(other)}))
        with pytest.raises(LoadError, match="graph head is damaged"):
            MetaPruner.load(path)
    path.write_bytes(save_tensors(tensors, {"card": json.dumps({**card, "graphs": {}})}))
    with pytest.raises(LoadError, match="other features"):
        MetaPruner.load(path)
    path.write_bytes(save_tensors(tensors, {"card": json.dumps(card)}))
    monkeypatch.setattr("metaprune.metanet.schema.GRAPH_UNIT", ("something else",))
    with pytest.raises(LoadError, match="other features"):
        MetaPruner.load(path)
    for options in ({"encoder": "mlp"}, {"graph": COURSE}, {"encoder": "graph", "states": 3}):
        with pytest.raises(OptionError):
            fit(_Zoo(), **options)  # type: ignore[arg-type]
