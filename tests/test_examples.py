"""Every example runs as a user would run it, and says what it promises."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_a_test_for_every_example() -> None:
    tested = {"prune_and_save.py", "groups_of_a_transformer.py", "recover_digits.py", "one_pass.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_prune_and_save(tmp_path: Path) -> None:
    assert "reloaded equal: True" in run("prune_and_save.py", tmp_path, "saved")
    assert (tmp_path / "saved").is_dir()


def test_groups_of_a_transformer(tmp_path: Path) -> None:
    out = run("groups_of_a_transformer.py", tmp_path)
    assert "residual" in out
    kept = [int(line.split()[-3]) for line in out.splitlines() if line.endswith("units stay")]
    assert kept
    assert sum(kept) < 256 + 64 + 64


def test_recover_digits(tmp_path: Path) -> None:
    lines = [line.split() for line in run("recover_digits.py", tmp_path).splitlines()]
    rows = {name: float(score.rstrip("%")) for name, score in lines}
    assert rows["dense"] > 95
    assert rows["pruned"] < rows["recovered"]
    assert rows["recovered"] > rows["dense"] - 3


def test_one_pass(tmp_path: Path) -> None:
    lines = [line.split() for line in run("one_pass.py", tmp_path).splitlines()]
    scores = {line[0]: float(line[1].rstrip("%")) for line in lines if line[1].endswith("%")}
    assert list(scores) == ["dense", "macs=0.5", "macs=0.25", "macs=0.125"]
    assert scores["dense"] > 95
    assert scores["macs=0.5"] > scores["dense"] - 5  # without a step of training
    assert scores["macs=0.125"] > scores["dense"] - 15
    found = [(float(line[1].rstrip(",")), float(line[2].rstrip("%"))) for line in lines if line[0] == "error"]
    assert len(found) >= 3
    assert found == sorted(found)
    assert [macs for _, macs in found] == sorted((macs for _, macs in found), reverse=True)
