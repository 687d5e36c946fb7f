"""The demo end to end, and the checks it rests on."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import metaprune as mp
from metaprune import demo

pytestmark = pytest.mark.xdist_group("demo")  # one process: the fixture is expensive


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Result, Path]:
    out = tmp_path_factory.mktemp("demo")
    return demo.run(out), out


def test_the_demo_keeps_its_promises(finished: tuple[demo.Result, Path]) -> None:
    result, out = finished
    assert result.dense.accuracy > 0.97
    assert result.pruned.accuracy > result.dense.accuracy - 0.02
    assert result.cut < result.pruned.accuracy
    assert 0.23 < result.pruned.macs / result.dense.macs <= 0.25
    assert result.pruned.parameters < result.dense.parameters / 2
    assert result.pruned.size < result.dense.size / 2
    assert result.wiring < 1e-9
    assert result.onnx < 1e-5
    assert result.dense.size == (out / "dense.onnx").stat().st_size
    half, quarter, eighth = result.one_pass.values()
    assert half > result.dense.accuracy - 0.02
    assert quarter > result.cut + 0.1  # without a training step
    assert eighth > 0.5


def test_the_demo_counts_parameters_and_macs_as_torch_does(finished: tuple[demo.Result, Path]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    result, out = finished
    for model, figures in ((demo.ResNet(), result.dense), (mp.load(out / "pruned"), result.pruned)):
        assert figures.parameters == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, 1, 8, 8))
        assert 2 * figures.macs == counter.get_total_flops()


def test_a_reloaded_network_that_differs_is_an_error(finished: tuple[demo.Result, Path]) -> None:
    folder = finished[1] / "pruned"
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = mp.load(folder).eval()(images)
    with pytest.raises(mp.MetapruneError, match="other outputs after reloading"):
        demo.check_reload(folder, images, expected * (1 + 1e-6))
    with pytest.raises(mp.MetapruneError, match="failed in a new process"):
        demo.check_reload(finished[1] / "nothing", images, expected)


def test_an_exported_network_that_differs_is_an_error(finished: tuple[demo.Result, Path]) -> None:
    folder = finished[1]
    images = torch.randn(3, 1, 8, 8)  # another batch size than the example's
    with torch.no_grad():
        expected = mp.load(folder / "pruned").eval()(images)
    assert demo.check_onnx(folder / "pruned.onnx", images, expected) < 1e-5
    with pytest.raises(mp.MetapruneError, match="other outputs in onnxruntime"):
        demo.check_onnx(folder / "pruned.onnx", images, expected + 0.01 * expected.abs().max())


def test_the_table_shows_the_measured_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense = demo.Figures(0.99, 1000, 2000, 0.002, 4000)
    pruned = demo.Figures(0.98, 500, 500, 0.001, 1000)
    monkeypatch.setattr(demo, "run", lambda *args, **options: demo.Result(dense, 0.4, pruned, 1e-15, 1e-7, {0.5: 0.97}))
    text = io.StringIO()
    demo.show(Console(file=text, width=120), tmp_path)
    rows = {line.split("│")[1].strip(): line for line in text.getvalue().splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["MACs"].split("│")[2:5]] == ["2,000", "500", "25.0%"]
    assert [cell.strip() for cell in rows["latency of 64 (ms)"].split("│")[2:5]] == ["2.000", "1.000", "50.0%"]
    assert [cell.strip() for cell in rows["accuracy"].split("│")[2:5]] == ["99.0%", "98.0%", "40.0% before recovery"]
    assert "one pass, no training: 97.0% at 0.5 of the MACs" in text.getvalue()


def test_the_residual_network_adds_its_shortcut() -> None:
    torch.manual_seed(0)
    block = demo.Block(6, 6, 1).eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(block(x), x.relu())
    assert demo.ResNet()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.nightly
def test_the_command_takes_less_than_a_minute(tmp_path: Path) -> None:
    start = time.perf_counter()
    command = [Path(sys.executable).with_name("metaprune"), "demo", "--out", "artefacts", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 60
    assert "reloaded in a new process: equal to the bit" in done.stdout
    assert (tmp_path / "artefacts" / "pruned" / "manifest.json").exists()
