"""Zoos: builds survive being killed, several processes make what one does, broken members are named."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import metaprune as mp
from metaprune.cli import app
from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.metanet.architectures import FAMILIES
from metaprune.metanet.building import build, lines
from metaprune.metanet.labels import measure
from metaprune.metanet.making import EARLY, PRUNED, TRAINED, Line, Maker
from metaprune.metanet.processes import spread
from metaprune.metanet.sources import source
from metaprune.metanet.zoo import Zoo, network, sha256
from tests.support.small_zoo import PLANS, SEED, built

pytestmark = pytest.mark.xdist_group("small zoo")  # one process: it is expensive
BUILD = """
import sys
from metaprune.metanet.building import build
if __name__ == "__main__":
    build(sys.argv[1], networks=3, data="digits", seed=int(sys.argv[2]), plans=1, epochs=1)
"""


@pytest.fixture
def zoo(small_zoo: Zoo) -> Zoo:
    """The shared zoo as if just opened: what one test found broken is no other's business."""
    return Zoo.open(small_zoo.folder)


def copied(zoo: Zoo, to: Path) -> Path:
    shutil.copytree(zoo.folder, to)
    return to


# ---- processes


def test_items_are_spread_over_processes() -> None:
    assert sorted(spread(math.sqrt, [1.0, 4.0, 9.0], 2)) == list(spread(math.sqrt, [1.0, 4.0, 9.0])) == [
        (1.0, 1.0), (4.0, 2.0), (9.0, 3.0)
    ]  # fmt: skip
    assert list(spread(math.sqrt, [], 2)) == []


def test_a_process_that_dies_is_an_error_that_says_at_what() -> None:
    with pytest.raises(MetapruneError, match="died at 3"):
        list(spread(os._exit, [3], 2))


# ---- building


def test_lines_take_families_in_turn_and_do_not_depend_on_the_number_of_networks() -> None:
    every = lines(120, "both", 7)
    assert sum(len(line.kinds) for line in every) == 120
    assert lines(40, "both", 7)[:-1] == every[: len(lines(40, "both", 7)) - 1]
    used = Counter(line.family for line in every)
    assert set(used) == set(FAMILIES)
    assert max(used.values()) - min(used.values()) <= 1
    kinds = Counter(kind for line in every for kind in line.kinds)
    assert min(kinds[EARLY], kinds[PRUNED]) >= 12
    assert min(Counter(line.data for line in every).values()) > 30
    assert len({line.seed for line in every}) == len(every)


def test_a_zoo_streams_tasks_with_their_labels(zoo: Zoo) -> None:
    assert len(zoo) == 3
    members = list(zoo)
    assert [member.name for member in members] == sorted(zoo.facts)
    assert not zoo.skipped
    for member in members:
        assert isinstance(member.task, mp.Task)
        assert member.task.score() == member.facts["accuracy"]
        labels = zoo.labels(member.name)
        assert labels is not None
        graph = mp.trace(member.task.model, member.task.inputs)
        assert member.facts["macs"] == graph.cost().macs
        assert labels.sizes == {g.name: g.size for g in graph.groups if not g.pinned}
    again = measure(graph, member.calibration, plans=PLANS, seed=member.facts["seed"])
    assert torch.equal(again.joint, labels.joint)


def test_an_early_member_is_the_same_network_before_it_is_trained(zoo: Zoo) -> None:
    early = next(name for name, facts in zoo.facts.items() if facts["kind"] == EARLY)
    later = early.removesuffix(f"-{EARLY}")
    assert zoo.facts[early]["recipe"] == zoo.facts[later]["recipe"]
    assert 0.1 <= zoo.facts[early]["share"] <= 0.4
    one, other = (zoo.member(name).task.model.state_dict() for name in (early, later))
    weights = [name for name, value in one.items() if value.ndim > 1]
    cosine = [torch.cosine_similarity(one[n].flatten(), other[n].flatten(), dim=0) for n in weights]
    assert all(0.5 < c < 0.9999 for c in cosine)


def test_a_pruned_member_is_smaller_than_the_one_it_comes_from(tmp_path: Path) -> None:
    line = Line(0, "mlp", "digits", 28, (TRAINED, PRUNED))
    maker = Maker(tmp_path, None, PLANS, 2)
    assert maker(line) == {}
    folders = [tmp_path / "members" / name for name in line.names]
    base, pruned = (json.loads((folder / "member.json").read_text()) for folder in folders)
    assert 0.5 < pruned["macs"] / base["macs"] <= pruned["share"] <= 0.8
    assert pruned["recipe"] is None
    assert pruned["accuracy"] > 0.7
    shutil.rmtree(folders[1])
    before = sha256(folders[0] / "member.json")
    assert maker(line) == {}
    again = json.loads((folders[1] / "member.json").read_text())
    assert again["files"] == pruned["files"]
    assert sha256(folders[0] / "member.json") == before  # what was there stayed


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_killed_build_goes_on_to_the_same_bits(zoo: Zoo, tmp_path: Path, processes: int) -> None:
    script, out = tmp_path / "script.py", tmp_path / "b"
    script.write_text(BUILD)
    process = subprocess.Popen([sys.executable, script, out, str(SEED)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(out.glob("members/[0-9]*/member.json")) or not list(out.glob("members/.part-*")):
        assert process.poll() is None, "it was to be killed on its way"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path: path.stat().st_mtime_ns for path in out.glob("members/[0-9]*/*")}
    assert left
    resumed = built(out, processes)
    assert (out / "manifest.json").read_bytes() == (zoo.folder / "manifest.json").read_bytes()
    assert not list(out.glob("members/.part-*"))
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert len(list(resumed)) == 3


def test_one_that_can_not_be_made_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object) -> None:
        raise MetapruneError("the loss is\nnot finite")

    monkeypatch.setattr("metaprune.metanet.making.train", diverge)
    with pytest.raises(MetapruneError, match="no members"):
        build(tmp_path, 1, "digits", SEED, plans=PLANS, epochs=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["failed"].values()) == {"the loss is not finite"}


def test_bad_options_are_refused_before_any_work(zoo: Zoo, tmp_path: Path) -> None:
    for options, said in [
        ({"networks": 0}, "networks"),
        ({"processes": 0}, "processes"),
        ({"data": "cats"}, "data"),
        ({"data": "fashion-mnist", "directory": tmp_path}, "directory"),
        ({"seed": "x"}, "seed"),
        ({"epochs": 0}, "epochs"),
    ]:
        with pytest.raises(OptionError, match=said):
            build(tmp_path / "new", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    with pytest.raises(OptionError, match="another seed"):
        build(zoo.folder, 3, "digits", SEED + 1, plans=PLANS, epochs=1)


# ---- broken members


def test_broken_members_are_skipped_by_name_and_made_again(zoo: Zoo, tmp_path: Path) -> None:
    folder = copied(zoo, tmp_path / "c")
    first, second, third = sorted(zoo.facts)
    weights = folder / "members" / first / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (folder / "members" / second / "labels.safetensors").unlink()
    broken = Zoo.open(folder)
    assert [member.name for member in broken] == [third]
    assert "weights.safetensors: it is not the file" in broken.skipped[first]
    assert "labels.safetensors: No such file" in broken.skipped[second]
    with pytest.raises(LoadError, match="hash"):
        broken.member(first)
    code = CliRunner().invoke(app, ["zoo", "show", str(folder), "--json"])
    assert set(json.loads(code.stdout)["skipped"]) == {first, second}
    healed = built(folder)
    assert len(list(healed)) == 3
    assert healed.facts == zoo.facts


def test_weights_that_are_not_finite_are_found_behind_a_right_hash(zoo: Zoo, tmp_path: Path) -> None:
    folder = copied(zoo, tmp_path / "c")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["members"].items():
        path = folder / "members" / name / "weights.safetensors"
        tensors = load_file(path)
        next(value for value in tensors.values() if value.ndim > 1)[0, 0] = float("nan")
        save_file(tensors, path)
        facts["files"]["weights.safetensors"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    broken = Zoo.open(folder)
    with pytest.raises(MetapruneError, match="none of its 3 members is whole"):
        list(broken)
    assert len(broken.skipped) == 3
    assert all("not finite" in reason for reason in broken.skipped.values())


def test_weights_of_another_network_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    facts = next(iter(zoo.facts.values()))
    save_file({"a": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(LoadError, match="not those of the recipe"):
        network(tmp_path, facts)


def test_folders_that_are_no_zoo_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no zoo"):
        Zoo.open(tmp_path)
    manifest = json.loads((zoo.folder / "manifest.json").read_text())
    name, facts = next(iter(manifest["members"].items()))
    for members, said in [
        ({}, "no members"),
        ({"../outside": facts}, "no member"),
        ({name: {**facts, "files": {"../../secret.json": "0"}}}, "no member"),
        ({name: {**facts, "accuracy": "high"}}, "no member"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "members": members}))
        with pytest.raises(MetapruneError, match=said):
            Zoo.open(tmp_path)
    with pytest.raises(OptionError, match="name"):
        zoo.member("9999-none")
    with pytest.raises(OptionError, match="name"):
        zoo.labels("9999-none")


# ---- data and shell


def test_fashion_mnist_is_averaged_to_fourteen_pixels() -> None:
    pytest.importorskip("sklearn")
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not installed")
    given = source("fashion-mnist")
    large, _, _ = mp.fashion_mnist(subset=len(given.train.images), validation=len(given.val.images), augment=None)
    assert given.shape == (1, 14, 14)
    assert given.train.images.mean() == pytest.approx(0, abs=1e-4)
    assert given.train.images.std() == pytest.approx(1, abs=1e-3)
    corner = large.images[:50, 0, 4:6, 6:8].mean((1, 2))  # the mean of four pixels, on the scale of the large images
    pixel = given.train.images[:50, 0, 2, 3]
    assert torch.corrcoef(torch.stack([corner, pixel]))[0, 1] == pytest.approx(1, abs=1e-5)
    assert torch.equal(given.calibration.images, given.train.images[:512])


def test_the_shell_builds_and_shows(zoo: Zoo, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["zoo", "show", str(zoo.folder)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert "3 members" in shown.stdout
    for facts in zoo.facts.values():
        assert facts["family"] in shown.stdout
    table = json.loads(CliRunner().invoke(app, ["zoo", "show", str(zoo.folder), "--json"]).stdout)
    assert sum(row["members"] for row in table["families"].values()) == table["members"] == 3
    assert sum(row["early"] for row in table["families"].values()) == 1
    wrong = CliRunner().invoke(app, ["zoo", "build", "--out", str(tmp_path / "z"), "--data", "cats"])
    assert wrong.exit_code == 2
    assert "data" in wrong.stderr
