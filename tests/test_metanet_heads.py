"""The heads by themselves: ranges, curves, the surrogate's invariance and speed, and training that survives a kill."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from metaprune.metanet import ensembles
from metaprune.metanet.describe import Description
from metaprune.metanet.ensembles import Course
from metaprune.metanet.examples import DATA
from metaprune.metanet.figures import explained, spearman
from metaprune.metanet.fitting import allocations_of
from metaprune.metanet.heads import Allocations, Regressor, Scaler, Surrogate, Tables, curve
from metaprune.metanet.schema import Schema


def test_features_are_clamped_to_the_range_that_was_seen() -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [9.0, 9.0]])
    scaler = Scaler(2, 2)
    scaler.learn(values, torch.tensor([[True, True, False], [True, True, True]]))
    far = scaler(torch.tensor([[100.0, -100.0]]))
    assert torch.equal(far[0], torch.tensor([[1.0, -1.0]]))
    assert torch.allclose(far[1], scaler(torch.tensor([[9.0, 1.0]]))[1])
    assert scaler.outside(torch.tensor([[9.1, 0.0]]), ["a", "b"]) == ["b"]
    assert scaler.outside(torch.tensor([[4.0, 5.0]]), ["a", "b"]) == []


def test_curves_are_monotone_and_anchored() -> None:
    found = curve(np.array([0.0, 1.0, 2.0, -1.0, 0.0, -3.0, 5.0]), 1)
    assert np.isinf(found[0])
    assert (np.diff(found[1:]) <= 0).all()
    assert found[-1] == 0
    assert found[1] == found[2] == pytest.approx(np.exp(1.5))
    assert found[5] == pytest.approx(np.exp(-3.0))


def _surrogate(groups: int, size: int, features: int = 6) -> tuple[Surrogate, Tables, Any]:
    draw = torch.Generator().manual_seed(0)
    names = [f"g{i}" for i in range(groups)]
    cuts = {name: torch.randn(size + 1, features, generator=draw) for name in names}
    pulls = {name: torch.randn(size + 1, 32, generator=draw) for name in names}
    falls = {name: np.append(np.linspace(1 + i, 0.1, size), 0.0) for i, name in enumerate(names)}
    model = Surrogate(2, features, draw)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return model, Tables(model, cuts, pulls, falls, falls), (cuts, pulls, falls)


def test_the_surrogate_is_the_same_by_tables_and_whatever_the_order_of_groups() -> None:
    model, tables, (cuts, pulls, falls) = _surrogate(4, 9)
    kept = np.random.default_rng(0).integers(1, 10, (20, 4))
    found = tables(kept)
    turn = [2, 0, 3, 1]
    others = [{f"g{i}": values[f"g{i}"] for i in turn} for values in (cuts, pulls, falls)]
    assert np.allclose(Tables(model, others[0], others[1], others[2], others[2])(kept[:, turn]), found, atol=1e-5)
    described = replace(_described_of(cuts, pulls), sizes=dict.fromkeys(cuts, 9))
    example = _Example(described, torch.from_numpy(kept), torch.ones(len(kept)))
    values, _ = allocations_of(example, DATA, falls, falls)  # type: ignore[arg-type]
    with torch.no_grad():
        assert np.allclose(model(values).numpy(), found, atol=1e-4)
        chosen = torch.tensor([3, 3, 0])
        assert torch.allclose(model(values.taken(chosen)), model(values)[:, chosen], atol=1e-5)
        both = Allocations.joined([values, values.taken(chosen)])
        assert torch.allclose(model(both), torch.cat([model(values), model(values)[:, chosen]], 1), atol=1e-5)


def _described_of(cuts: Any, pulls: Any) -> Any:
    return Description(Schema.of(True), {}, cuts, {}, pulls)


@dataclass(frozen=True)
class _Example:
    one: Any
    joint_kept: Tensor
    joint: Tensor

    @property
    def described(self) -> dict[str, Any]:
        return {DATA: self.one}


def test_ten_thousand_allocations_a_second() -> None:
    _, tables, _ = _surrogate(12, 32, 46)
    kept = np.random.default_rng(0).integers(1, 33, (10_000, 12))
    start = time.process_time()
    tables(kept)
    assert time.process_time() - start < 1


def test_figures() -> None:
    measured = np.array([1.0, 2.0, 3.0, 5.0])
    assert explained([(measured, measured)]) == 1
    assert explained([(np.full(4, measured.mean()), measured)]) == pytest.approx(0)
    assert spearman(np.array([1.0, 3.0, 2.0, 9.0]), measured) == pytest.approx(0.8)
    assert np.isnan(spearman(np.zeros(4), measured))


KILLED = """
import os, signal, torch
from pathlib import Path
from metaprune.metanet import ensembles
from metaprune.metanet.heads import Regressor

def go(path, left):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(200, 5, generator=draw)
    targets = (values[:, :1] * values[:, 1:2]).tanh()
    seen = torch.stack([torch.arange(200) < 150, torch.ones(200, dtype=torch.bool)])
    model = Regressor(2, 5, 1, draw, 16)
    model.learn(values, targets, seen)
    errors = lambda f, rows: (f(values[rows]) - targets[rows]).square().mean(2)
    whole = ensembles.write_atomically
    def write(path, content):
        nonlocal left
        whole(path, content)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if left:
        ensembles.write_atomically = write
    ensembles.train(model, errors, seen, ensembles.Course(60, 10, 32), 0, Path(path), "x")
"""


def test_a_training_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    code = f"{KILLED}\ngo({str(tmp_path / 'a')!r}, 3)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert json.loads(_about(tmp_path / "a"))["step"] == 30
    space: dict[str, Any] = {}
    exec(KILLED, space)
    space["go"](tmp_path / "a", 0)
    space["go"](tmp_path / "b", 0)
    resumed, whole = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert _about(tmp_path / "a") == _about(tmp_path / "b")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def _about(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return str(file.metadata()["about"])


def test_regressors_of_several_members_do_not_touch_each_other() -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    targets = values[:, :1].sin()
    results = []
    for last in (torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)):
        seen = torch.stack([torch.arange(50) < 40, last | (torch.arange(50) < 5)])
        model = Regressor(2, 4, 1, torch.Generator().manual_seed(1), 8)
        model.learn(values, targets, seen)

        def errors(function: Any, rows: Tensor) -> Tensor:
            return (function(values[rows]) - targets[rows]).square().mean(2)

        ensembles.train(model, errors, seen, Course(10, 10, 16), 0)
        results.append({name: value[0] for name, value in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
