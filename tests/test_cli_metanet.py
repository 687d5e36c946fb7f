"""The metanetwork on the command line: a zoo is built, heads are fitted on it, and a network is pruned in one pass."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import metaprune as mp
from metaprune.cli import app
from metaprune.cli_metanet import _held_out
from metaprune.metanet import fitting
from metaprune.metanet.ensembles import Course

pytestmark = [
    pytest.mark.xdist_group("small zoo"),  # one process: it is expensive
    pytest.mark.filterwarnings("ignore:outside the range of the zoo:UserWarning"),  # three networks span no wide range
]
NETWORKS = """
import torch
from torch import nn
import metaprune as mp

def small():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers).eval(), torch.zeros(2, 1, 8, 8)

def task():
    train, test = mp.digits(size=64)
    return mp.Task(*small(), [next(iter(train))], test)
"""


@pytest.fixture(scope="module")
def zoo(small_zoo: mp.Zoo) -> Path:
    return small_zoo.folder


@pytest.fixture(scope="module")
def fitted(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What `fit` writes, and what it says in JSON."""
    out = tmp_path_factory.mktemp("fit") / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        code, report, error = run("fit", str(zoo), "--out", str(out), "--work", str(out.parent / "work"), "--json")
    assert code == 0, error
    return out, json.loads(report)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "one_pass_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "one_pass_networks", raising=False)
    quicken(monkeypatch)
    return tmp_path


def quicken(patch: pytest.MonkeyPatch) -> None:
    """A fit of a few steps: how well it predicts is not asked here."""
    patch.setattr(fitting, "Course", lambda: Course(steps=20, every=10, batch=32))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_fit_writes_what_fit_in_python_gives_and_its_card_beside_it(
    fitted: tuple[Path, dict[str, Any]], zoo: Path
) -> None:
    out, report = fitted
    mine = mp.fit(mp.Zoo.open(zoo), out=out.parent / "work")  # the same fit: nothing is computed anew
    theirs = mp.MetaPruner.load(out)
    for sight, predictor in mine.predictors.items():
        for name, value in predictor.tensors().items():
            assert torch.equal(value, theirs.predictors[sight].tensors()[name])
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["validation"] == theirs.card["validation"] == mine.card["validation"]
    assert report["networks"] == len(card["zoo"]["networks"]) == 3
    assert report["skipped"] == {}
    by_name = {(row["sight"], row["head"]): row for row in report["held_out"]}
    assert len(by_name) == 7  # two curves and the units by data and by the weights alone, and allocations by data
    joint = card["validation"]["data"]["joint"]
    assert by_name["data", "joint"]["spearman"] == joint["spearman within networks"]
    plain = card["validation"]["weights"]["curves"]["plain"]
    assert by_name["weights", "curves, plain"]["r2"] == plain["r2"]
    assert by_name["weights", "curves, plain"]["least_r2"] == plain["least r2 of a network"]


def test_fit_prints_the_held_out_figures_and_who_was_skipped(
    fitted: tuple[Path, dict[str, Any]], zoo: Path, workplace: Path
) -> None:
    shutil.copytree(zoo, workplace / "zoo")
    name = sorted(mp.Zoo.open(zoo).facts)[0]
    next((workplace / "zoo" / "members" / name).glob("weights*")).unlink()
    work = workplace / "work"
    shutil.copytree(fitted[0].parent / "work" / "examples", work / "examples")
    code, out, error = run("fit", "zoo", "--out", "y.safetensors", "--work", "work", "--heads", "curves")
    assert code == 0, error
    assert f"skipped: {name}: weights.safetensors: No such file" in out
    assert "2 networks" in out
    assert "ablation" in out
    assert "joint" not in out


def test_rows_are_those_of_the_card() -> None:
    def part(r2: float | None, **more: float | None) -> Mapping[str, Any]:
        return {"r2": r2, "r2 by family": {"a": r2}, "least r2 of a network": -1.0, "networks": 2, **more}

    heads = {
        "curves": {"rows": 3, "steps": 2, "history": [], "plain": part(0.5), "compensated": part(None)},
        "ablation": {"rows": 3, "steps": 2, "history": [], **part(0.25, **{"spearman within groups": 0.75})},
    }
    assert [tuple(row.values()) for row in _held_out({"data": heads})] == [
        ("data", "curves, plain", 0.5, -1.0, None),
        ("data", "curves, compensated", None, -1.0, None),
        ("data", "ablation", 0.25, -1.0, 0.75),
    ]


@pytest.mark.parametrize(("target", "sight"), [("small", "weights"), ("task", "data")])
def test_prune_in_one_pass_is_what_python_gives(
    fitted: tuple[Path, dict[str, Any]], workplace: Path, target: str, sight: str
) -> None:
    options = ("--budget", "macs=0.5", "--pruner", str(fitted[0]), "--out", "half", "--json")
    code, out, error = run("prune", f"one_pass_networks:{target}", *options)
    assert code == 0, error
    report = json.loads(out)
    assert report["certificate"]["ok"] is True
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    import one_pass_networks

    model, inputs = one_pass_networks.small()
    data = one_pass_networks.task().train if sight == "data" else None
    pruned = mp.MetaPruner.load(fitted[0]).prune(model, inputs, "macs=0.5", data)
    assert pruned.plan.provenance["features"] == sight
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(mp.load(workplace / "half")(x), pruned.module.eval()(x))


def test_options_reach_the_one_pass(fitted: tuple[Path, dict[str, Any]]) -> None:
    common = ("--budget", "width=0.5", "--pruner", str(fitted[0]), "--out")
    assert run("prune", "one_pass_networks:small", *common, "half", "--protect", "1")[0] == 0
    rows = json.loads(run("inspect", "half", "--json")[1])["groups"]
    assert sorted(row["size"] for row in rows if not row["pinned"]) == [8, 24]
    assert run("prune", "half", *common, "quarter")[0] == 0  # a saved folder has no data: the weights alone
    rows = json.loads(run("inspect", "quarter", "--json")[1])["groups"]
    assert sorted(row["size"] for row in rows if not row["pinned"]) == [4, 12]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "none", "--out", "x.safetensors"), "there is no zoo"),
        (("fit", "none", "--out", "x.json"), "out: a name that ends in .safetensors"),
        (("fit", "ZOO", "--out", "x.safetensors", "--heads", "tails"), "heads: 'tails' is none of"),
        (("prune", "SMALL", "--pruner", "none.safetensors"), "no checkpoint of a pruner"),
        (("prune", "SMALL", "--pruner", "FIT", "--criterion", "lamp"), "pruner: it ranks units"),
        (("prune", "SMALL", "--pruner", "FIT", "--allocator", "dp"), "pruner: it ranks units"),
        (("prune", "one_pass_networks:task"), "must return (model, inputs)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    fitted: tuple[Path, dict[str, Any]], zoo: Path, workplace: Path, arguments: tuple[str, ...], said: str
) -> None:
    names = {"ZOO": str(zoo), "FIT": str(fitted[0]), "SMALL": "one_pass_networks:small"}
    given = [names.get(argument, argument) for argument in arguments]
    before = {path.name for path in workplace.iterdir()} | {"__pycache__"}
    code, out, error = run(*given, *(("--budget", "macs=0.5", "--out", "half") if given[0] == "prune" else ()))
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert {path.name for path in workplace.iterdir()} <= before
