"""Heads fitted on a tiny zoo on digits: families held out, resuming, and what a zoo may be."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metaprune.graphs.errors import MetapruneError, OptionError
from metaprune.graphs.ir import Graph
from metaprune.metanet import ensembles
from metaprune.metanet.crossfit import folds
from metaprune.metanet.ensembles import Course
from metaprune.metanet.examples import DATA, WEIGHTS
from metaprune.metanet.fitting import fit
from tests.support.little_zoo import (
    COURSE,
    SAMPLES,
    ZOO,
    LittleLabels,
    LittleMember,
    LittleZoo,
    folder_of_fit,
    labels_of,
    plain_layers,
    pruner_of_zoo,
    same,
    task_of,
)

pytestmark = pytest.mark.xdist_group("little zoo")  # one process: the zoo and its fit are expensive


def test_the_loss_falls_and_families_held_out_are_reported() -> None:
    card = pruner_of_zoo().card
    assert [name for name, _ in card["zoo"]["networks"]] == list(ZOO)
    for sight, heads in ((DATA, {"curves", "ablation", "joint"}), (WEIGHTS, {"curves", "ablation"})):
        assert set(card["validation"][sight]) == heads
        for found in card["validation"][sight].values():
            seen = [row[1] for row in found["history"]]
            assert seen[-1] < seen[0]
            assert found["steps"] in [row[0] for row in found["history"]]
    curves = card["validation"][DATA]["curves"]["compensated"]
    assert set(curves["r2 by family"]) == {"plain", "chain", "residual"}
    assert curves["networks"] == 6
    assert curves["r2"] > 0  # on families that the heads have never seen, from four networks in sixty steps
    assert card["validation"][DATA]["joint"]["spearman within networks"] > 0.6


def test_families_are_held_out_whole() -> None:
    parts = [LittleMember(f"n{i}", family, None) for i, family in enumerate("abcab")]  # type: ignore[arg-type]
    assert folds(parts) == (frozenset({0, 3}), frozenset({1, 4}), frozenset({2}), frozenset())  # type: ignore[arg-type]
    alone = [replace(part, family="") for part in parts[:3]]
    assert folds(alone) == (frozenset({0}), frozenset({1}), frozenset({2}), frozenset())  # type: ignore[arg-type]
    assert folds(alone[:1]) == (frozenset(),)  # type: ignore[arg-type]


class _Stopped(Exception):
    pass


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"labels": 0, "writes": 0}
    undisturbed = pruner_of_zoo()
    shutil.copytree(folder_of_fit() / "examples", tmp_path / "examples")
    next((tmp_path / "examples").iterdir()).write_bytes(b"damaged")

    class Counted(LittleZoo):
        def labels(self, name: str) -> LittleLabels:
            calls["labels"] += 1
            return labels_of(name)

    def write(path: Path, content: bytes) -> None:
        calls["writes"] += 1
        if calls["writes"] == 5:  # in the second head
            raise _Stopped
        whole(path, content)

    whole = ensembles.write_atomically
    monkeypatch.setattr(ensembles, "write_atomically", write)
    with pytest.raises(_Stopped):
        fit(Counted(), out=tmp_path, course=COURSE, members=2, samples=SAMPLES)
    resumed = fit(Counted(), out=tmp_path, course=COURSE, members=2, samples=SAMPLES)
    assert calls["labels"] == 1  # all other networks, and what had been trained, were found in the folder
    assert same(resumed, undisturbed)
    assert resumed.card["validation"] == undisturbed.card["validation"]
    with pytest.raises(OptionError, match="written by another fit"):
        fit(Counted(), out=tmp_path, course=replace(COURSE, rate=1e-3), members=2, samples=SAMPLES)


def test_a_broken_member_is_skipped_and_an_empty_zoo_refused() -> None:
    broken = task_of("plain-0")
    model = nn.Sequential(*plain_layers((6, 8), False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    model[0].weight.data[0, 0, 0, 0] = float("nan")

    class Broken(LittleZoo):
        def __iter__(self) -> Iterator[LittleMember]:
            yield LittleMember("bad", "plain", replace(broken, model=model))
            yield from super().__iter__()

        def labels(self, name: str) -> LittleLabels:
            return replace(labels_of(name), joint=torch.full((10,), torch.nan)) if name == ZOO[1] else labels_of(name)

    short = Course(steps=2, every=1, batch=8)
    with pytest.warns(UserWarning, match="is skipped") as seen:
        pruner = fit(Broken(ZOO[:3]), course=short, members=1, samples=SAMPLES)
    assert [str(w.message).split()[1] for w in seen] == ["bad", ZOO[1]]
    assert set(pruner.card["zoo"]["skipped"]) == {"bad", ZOO[1]}
    assert "not finite" in pruner.card["zoo"]["skipped"]["bad"]
    assert [name for name, _ in pruner.card["zoo"]["networks"]] == [ZOO[0], ZOO[2]]
    with pytest.raises(MetapruneError, match="no network to fit on"):
        fit([])
    with pytest.raises(OptionError, match="a Task or an object"):
        fit([3])
    with pytest.raises(OptionError, match="two networks are called"):
        fit(LittleZoo((ZOO[0], ZOO[0])), course=short, samples=SAMPLES)
    for options in ({"heads": ("rewrite",)}, {"heads": ("joint",)}, {"members": 0}, {"states": 4}, {"seed": "x"}):
        with pytest.raises(OptionError):
            fit(LittleZoo(), **options)  # type: ignore[arg-type]


def test_tasks_alone_are_a_zoo_and_are_measured() -> None:
    measured = []

    def measure(graph: Graph, data: Any) -> LittleLabels:
        measured.append(graph)
        return labels_of(ZOO[0])

    pruner = fit([task_of(ZOO[0])], ("curves",), course=Course(2, 1, 8), members=1, samples=SAMPLES, measure=measure)
    assert len(measured) == 1
    assert pruner.card["zoo"]["networks"] == [["network-0", ""]]
    assert pruner.predictors[DATA].joint is None
    assert pruner.card["validation"][DATA]["curves"]["plain"]["r2"] is None  # nothing could be held out
