"""The parts of the benchmark of pretrained networks that need none of them."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in ("pretrained", "pretrained_networks")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_no_photograph_serves_both_sides(bench: dict[str, ModuleType]) -> None:
    networks = bench["pretrained_networks"]
    both = (*networks.RECOVERY_PHOTOS, *networks.TEST_PHOTOS)
    assert len(set(both)) == len(both)


def test_crops_are_what_the_network_reads_and_of_their_photograph(bench: dict[str, ModuleType]) -> None:
    networks = bench["pretrained_networks"]
    photos = [torch.full((3, 90, 120), 20.0), torch.full((3, 130, 70), 200.0)]
    made = networks.crops(photos, 5, 0.3, torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, networks.SIDE, networks.SIDE)
    for number, crop in enumerate(made):
        torch.testing.assert_close(crop, torch.full_like(crop, ((20, 200)[number % 2] - 127) / 128))
    other = networks.varied(made, torch.Generator().manual_seed(0))
    assert other.shape == made.shape
    assert other.abs().max() <= 1
    assert not torch.equal(other, made)


def test_a_harmonic_sound_repeats_at_its_pitch(bench: dict[str, ModuleType]) -> None:
    networks = bench["pretrained_networks"]
    frames, cents = networks.sounds(400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(frames.mean(1), torch.zeros(400), rtol=0, atol=1e-5)
    torch.testing.assert_close(frames.std(1), torch.ones(400))
    period = networks.RATE / (10 * 2 ** (cents / 1200))  # samples
    assert 1600 / 150 <= period.min() < period.max() <= 320
    alike = []
    for frame, length in zip(frames, period.tolist(), strict=True):
        spectrum = torch.fft.rfft(frame, 4 * networks.FRAME)
        shift = torch.exp(2j * torch.pi * torch.fft.rfftfreq(4 * networks.FRAME) * length)
        moved = torch.fft.irfft(spectrum * shift)[: networks.FRAME - 330]  # by one period, exactly
        alike.append(torch.nn.functional.cosine_similarity(moved, frame[: networks.FRAME - 330], dim=0))
    assert torch.stack(alike).median() > 0.9


def test_pitch_is_read_between_bins(bench: dict[str, ModuleType]) -> None:
    networks = bench["pretrained_networks"]
    bins = torch.tensor([10.0, 100.3, 250.5, 340.0])
    answers = torch.exp(-0.5 * (torch.arange(360) - bins[:, None]).square() / 1.25**2)
    expected = networks.FIRST_CENT + 20 * bins
    assert (networks.cents(answers) - expected).abs().max() < 1


def test_rows_are_served_once_per_pass_in_an_order_of_the_seed(bench: dict[str, ModuleType]) -> None:
    rows = bench["pretrained_networks"].Rows({"a": torch.arange(10), "b": torch.arange(10) + 100}, 4)
    passes = [list(rows), list(rows)]
    assert len(rows) == len(passes[0]) == 3
    for batches in passes:
        assert all(torch.equal(batch["a"] + 100, batch["b"]) for batch in batches)
        assert torch.equal(torch.cat([batch["a"] for batch in batches]).sort().values, torch.arange(10))
    assert not torch.equal(passes[0][0]["a"], passes[1][0]["a"])
    rows.generator.manual_seed(3)
    again = next(iter(rows))["a"]
    rows.generator.manual_seed(3)
    assert torch.equal(next(iter(rows))["a"], again)


def test_the_table_has_a_row_for_each_figure_and_its_cost(bench: dict[str, ModuleType]) -> None:
    stages = {
        stage: {"scores": {"share": i / 4, "distance": float(i)}, "cpu_seconds": 2.5 * i}
        for i, stage in enumerate(bench["pretrained"].STAGES)
    }
    row = {"data": "9 sounds", "macs": 0.7, "params": 0.81, "params_before": 1234, "stages": stages}
    text = bench["pretrained"].table({"net": row})
    assert "| net | share | 0.000 | 0.250 | 0.500 | 0.750 |" in text
    assert "| net | distance | 0.000 | 1.000 | 2.000 | 3.000 |" in text
    assert "net: 0.700 of the multiply-adds and 0.81 of 1,234 parameters kept; 9 sounds; 15 CPU seconds" in text
