"""The command line: real processes, real modules in the current directory, exit codes and messages."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import metaprune as mp
from metaprune import cli
from metaprune.cli import app

NETWORKS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )
    return model, torch.randn(1, 3, 8, 8)

def broken():
    raise ValueError("no weights\\nhere")

def half():
    return nn.Linear(2, 2)

def misfit():
    return nn.Linear(4, 2), torch.randn(1, 3)

not_a_function = 3
"""
COSTS = ("macs_per_unit", "params_per_unit")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    (tmp_path / "my_typo.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_networks", None)
    del sys.modules["my_networks"]
    return tmp_path


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed console script, in a new process."""
    script = Path(sys.executable).with_name("metaprune")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run([script, *arguments], capture_output=True, text=True, env=environment)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_prune_in_a_process_saves_what_prune_in_python_gives(workplace: Path) -> None:
    done = shell("prune", "my_networks:small", "--budget", "macs=0.5", "--out", "half", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    import my_networks

    model, inputs = my_networks.small()
    pruned = mp.prune(model, inputs, budget="macs=0.5")
    assert report["before"]["macs"] == pruned.cost["before"].macs
    assert report["after"] == dataclasses.asdict(pruned.cost["after"])
    assert 0.4 < report["after"]["macs"] / report["before"]["macs"] <= 0.5
    assert report["certificate"]["ok"] is True
    assert report["certificate"]["wiring"] < 1e-9
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(mp.load(workplace / "half")(x), pruned.module.eval()(x))


def test_inspect_lists_every_group_with_its_cost() -> None:
    code, out, _ = run("inspect", "my_networks:small", "--json")
    assert code == 0
    report = json.loads(out)
    rows = {row["name"]: row for row in report["groups"]}
    free = [row for row in rows.values() if not row["pinned"]]
    assert sorted(row["size"] for row in free) == [16, 32]
    first = next(row for row in free if row["size"] == 16)
    # One channel of the first convolution: 3 * 9 MACs at 64 positions, and 32 * 9 at 36 positions in the next.
    assert first["macs_per_unit"] == 27 * 64 + 32 * 9 * 36
    assert first["params_per_unit"] == 27 + 1 + 2 + 32 * 9
    assert report["cost"]["params"] == 448 + 32 + 4640 + 165
    pinned = [row for row in rows.values() if row["pinned"]]
    assert pinned
    assert all(row["reason"] for row in pinned)
    assert not any(row["reason"] for row in free)


def test_inspect_prints_a_table_with_reasons() -> None:
    code, out, _ = run("inspect", "my_networks:small")
    assert code == 0
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    rows = json.loads(run("inspect", "my_networks:small", "--json")[1])["groups"]
    costs = [["" if row[key] is None else f"{row[key]:,}" for key in COSTS] for row in rows]
    expected = [[r["name"], r["kind"], str(r["size"]), *cost, r["reason"]] for r, cost in zip(rows, costs, strict=True)]
    assert shown == expected


def test_a_saved_folder_is_accepted_in_place_of_a_function() -> None:
    assert run("prune", "my_networks:small", "--budget", "width=0.5", "--out", "half")[0] == 0
    first = json.loads(run("inspect", "half", "--json")[1])
    assert sorted(row["size"] for row in first["groups"] if not row["pinned"]) == [8, 16]
    code, out, _ = run("prune", "half", "--budget", "width=0.5", "--out", "quarter", "--json")
    assert code == 0
    assert json.loads(out)["before"] == first["cost"]
    second = json.loads(run("inspect", "quarter", "--json")[1])
    assert sorted(row["size"] for row in second["groups"] if not row["pinned"]) == [4, 8]


def test_options_reach_the_plan(workplace: Path) -> None:
    names = {row["size"]: row["name"] for row in json.loads(run("inspect", "my_networks:small", "--json")[1])["groups"]}
    common = ("prune", "my_networks:small", "--budget", "width=0.5", "--allocator", "uniform")

    def sizes(*options: str) -> list[int]:
        out = f"out{len(list(workplace.iterdir()))}"
        code, _, error = run(*common, "--out", out, *options)
        assert code == 0, error
        rows = json.loads(run("inspect", out, "--json")[1])["groups"]
        return sorted(row["size"] for row in rows if not row["pinned"])

    assert sizes() == [8, 16]
    assert sizes("--protect", names[16]) == [16, 16]
    assert sizes("--only", names[16]) == [8, 32]
    assert all(size % 6 == 0 for size in sizes("--round-to", "6"))


def test_an_uncertified_cut_says_so() -> None:
    code, out, _ = run("prune", "my_networks:small", "--budget", "macs=0.5", "--out", "half", "--no-certify")
    assert code == 0
    assert "not certified" in out
    code, out, _ = run("prune", "my_networks:small", "--budget", "macs=0.5", "--out", "again", "--no-certify", "--json")
    assert json.loads(out)["certificate"] is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_networks", "'my_networks' is neither MODULE:FUNCTION nor a saved folder"),
        ("my_networks:", "neither MODULE:FUNCTION nor a saved folder"),
        ("no_such_module:f", "module 'no_such_module' can not be imported (ModuleNotFoundError"),
        ("my_typo:f", "module 'my_typo' can not be imported (ModuleNotFoundError: No module named 'no_such_package')"),
        ("my_networks:absent", "module 'my_networks' has no function 'absent'"),
        ("my_networks:not_a_function", "module 'my_networks' has no function 'not_a_function'"),
        ("my_networks:broken", "my_networks:broken failed with ValueError: no weights here"),
        ("my_networks:half", "my_networks:half must return (model, inputs)"),
        ("my_networks:misfit", ""),
        (".", ""),
    ],
)
def test_a_bad_target_is_one_line_and_exit_code_2(target: str, message: str) -> None:
    code, out, error = run("inspect", target)
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--budget", "macs=2"], "macs"),
        (["--budget", "speed=0.5"], "speed"),
        (["--budget", "macs=0.000001"], "macs"),
        (["--criterion", "magic"], "magic"),
        (["--allocator", "magic"], "magic"),
        (["--only", "no_such_group"], "no_such_group"),
        (["--kinds", "magic"], "magic"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(workplace: Path, options: list[str], word: str) -> None:
    given = options if "--budget" in options else ["--budget", "macs=0.5", *options]
    code, out, error = run("prune", "my_networks:small", "--out", "half", *given)
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert not (workplace / "half").exists()


def test_debug_shows_the_traceback() -> None:
    done = shell("inspect", "my_networks:broken", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert 'raise ValueError("no weights' in done.stderr
    with pytest.raises(mp.MetapruneError, match="no weights"):
        run("inspect", "my_networks:broken", "--debug")


def test_bad_usage_is_exit_code_2() -> None:
    done = shell("prune", "my_networks:small")
    assert done.returncode == 2
    assert "--budget" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("prune", "my_networks:small", "--budget", "macs=0.5", "--out", "x", "--round-to", "0")[0] == 2


def test_an_output_that_can_not_be_written_is_exit_code_2(workplace: Path) -> None:
    (workplace / "taken").write_text("mine")
    common = ("prune", "my_networks:small", "--budget", "macs=0.5", "--out")
    assert run(*common, "taken")[0] == 2
    code, out, error = run(*common, "taken/inside")
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert "taken" in error
    assert (workplace / "taken").read_text() == "mine"


def test_names_are_not_taken_for_markup(workplace: Path) -> None:
    (workplace / "odd.py").write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Sequential()\n"
        "    model.add_module('[red]', torch.nn.Linear(4, 8))\n"
        "    model.add_module('[/red]', torch.nn.Linear(8, 2))\n"
        "    return model, torch.randn(2, 4)\n"
    )
    code, out, _ = run("inspect", "odd:build")
    assert code == 0
    assert "[red]" in out


def test_a_warning_is_one_line_without_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("outside the range", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "warning: outside the range\n"
