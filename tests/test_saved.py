"""Saved folders: exact round trips, and nothing but a clear error from a damaged or hostile one."""

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metaprune as mp
from metaprune.graphs.errors import LoadError, PlanError
from metaprune.graphs.plan import Plan
from tests.support import oracle
from tests.support.cases import Net, conv
from tests.test_constructs_attention import CASES as ATTENTION
from tests.test_constructs_convolution import CASES as CONVOLUTION
from tests.test_constructs_operators import CASES as OPERATORS
from tests.test_constructs_sequence import CASES as SEQUENCE

CASES = {case.name: case for case in (*CONVOLUTION, *ATTENTION, *SEQUENCE, *OPERATORS)}
ROUND_TRIPS = """
    resnet grouped weight_norm spectral_norm block_attention affine_grid multihead_cross grouped_queries shifted_windows
    encoder_layer llama_tied experts lstm_bidirectional shared_block bfloat16 float64 inputs_keywords inputs_nested
    output_dict output_ordered_dict output_scalar elementwise_cast added_buffer einsum
""".split()
FILES = ("graph.json", "plan.json", "model.safetensors", "inputs.safetensors")


def pruned(name: str) -> tuple[nn.Module, mp.Pruned, Any]:
    torch.manual_seed(0)
    case = CASES[name]
    network = oracle.alive(case.build()).eval()
    result = mp.prune(network, case.inputs(2), budget="width=0.5", allocator="uniform", certify=False)
    return network, result, case.inputs(3)


def small() -> nn.Module:
    """Two convolutions, a reshape with sizes, an ordered dict as output."""
    torch.manual_seed(0)
    body = lambda m, x: OrderedDict(y=m.c(m.b(m.a(x)).view(-1, 6, 16).mean(2)))  # noqa: E731
    return oracle.alive(Net(body, a=conv(3, 8), b=conv(8, 6), c=nn.Linear(6, 3))).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "network"
    mp.prune(small(), torch.randn(2, 3, 4, 4), budget="width=0.5", allocator="uniform").save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder to be damaged."""
    target = tmp_path / "network"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def sign(folder: Path) -> None:
    """Makes the manifest fit what the files now hold, as a hostile author would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def part(folder: Path, name: str) -> Path:
    """The file that holds a part: `graph.json` stands as `graph-<hash>.json`."""
    if name == "manifest.json":
        return folder / name
    stem, _, ending = name.partition(".")
    return next(folder.glob(f"{stem}-*.{ending}"))


def change(folder: Path, edit: Callable[[Any], Any], name: str = "graph.json") -> None:
    body = json.loads(part(folder, name).read_text())
    result = edit(body)
    part(folder, name).write_text(json.dumps(body if result is None else result))
    sign(folder)


def refused(folder: Path) -> str:
    """The message with which loading is refused; nothing in the folder may change."""
    before = sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in folder.parent.rglob("*"))
    with pytest.raises(LoadError) as error:
        mp.load(folder)
    assert before == sorted(
        (file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in folder.parent.rglob("*")
    )
    return str(error.value)


# ---- round trips


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_loaded_network_is_the_saved_one(name: str, tmp_path: Path) -> None:
    _, result, inputs = pruned(name)
    result.save(tmp_path / "out")
    loaded = mp.load(tmp_path / "out")
    portable = oracle.tensors_of(loaded)
    for key, tensor in oracle.tensors_of(result.module).items():
        assert torch.equal(tensor, portable[key]), key
        assert tensor.dtype == portable[key].dtype
    with torch.no_grad():
        found, expected = oracle.call(loaded, inputs), oracle.call(result.module.eval(), inputs)
    assert type(found) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(oracle.flat(found), oracle.flat(expected), strict=True))
    wanted = {n for n, p in result.module.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == wanted
    assert set(loaded.state_dict()) >= set(result.module.state_dict())


@pytest.mark.parametrize("name", ["resnet", "vision_transformer", "lstm_bidirectional"])
def test_loading_into_a_fresh_network_gives_the_native_form(name: str, tmp_path: Path) -> None:
    network, result, inputs = pruned(name)
    assert result.kind == "native"
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.add_(0.01)  # as recovery does: the saved weights count, not a replay of the cut
    result.save(tmp_path / "out")
    fresh = CASES[name].build()
    state = copy.deepcopy(fresh.state_dict())
    loaded = mp.load(tmp_path / "out", into=fresh)
    assert type(loaded) is type(network)
    with torch.no_grad():
        found, expected = oracle.call(loaded.eval(), inputs), oracle.call(result.module.eval(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(oracle.flat(found), oracle.flat(expected), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["multihead_cross", "llama_tied"])
def test_a_network_whose_class_can_not_express_the_cut_is_portable(name: str, tmp_path: Path) -> None:
    _, result, _ = pruned(name)
    assert result.kind == "portable"
    result.save(tmp_path / "out")
    with pytest.raises(mp.MetapruneError, match="without `into`"):
        mp.load(tmp_path / "out", into=CASES[name].build())


def test_loading_into_another_network_is_refused(saved: Path) -> None:
    with pytest.raises(PlanError, match="into"):
        mp.load(saved, into=Net(small().body, a=conv(3, 10), b=conv(10, 6), c=nn.Linear(6, 3)))
    with pytest.raises(mp.MetapruneError):
        mp.load(saved, into=nn.Linear(2, 2))


PROGRAM = """
import sys, torch, metaprune as mp
torch.set_num_threads(1)
torch.manual_seed(5)
y = mp.load(sys.argv[1])(torch.randn(3, 3, 8, 8))
torch.save(y, sys.argv[2])
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    _, result, _ = pruned("resnet")
    result.save(tmp_path / "out")
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, tmp_path / "out", tmp_path / "y.pt"], check=True)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = result.module(torch.randn(3, 3, 8, 8))
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


def test_saving_again_replaces_and_a_recovered_network_is_saved_as_it_is(tmp_path: Path) -> None:
    _, result, inputs = pruned("resnet")
    for _ in range(2):
        with torch.no_grad():
            result.module.get_parameter("7.bias").add_(1)
        result.save(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(mp.load(tmp_path / "out")(inputs), result.module(inputs))
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*listed, "manifest.json"}
    assert len(listed) == len(FILES)


def test_the_plan_in_the_folder_is_the_plan(saved: Path) -> None:
    found = Plan.load(part(saved, "plan.json"))
    graph = mp.trace(small(), torch.randn(2, 3, 4, 4))
    assert found == mp.plan(graph, "width=0.5", allocator="uniform")


# ---- kill -9 while saving


def killed(kind: str, when: int, folder: Path) -> int:
    """Saves a network in a child process that dies at a call of `os.fsync` or `os.replace`; its exit status."""
    network = small()
    with torch.no_grad():
        network.c.bias.add_(1)
    result = mp.prune(network, torch.randn(2, 3, 4, 4), budget="width=0.5", allocator="uniform", certify=False)
    calls, original = [0], getattr(os, kind)

    def dying(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    child = os.fork()
    if child == 0:
        setattr(os, kind, dying)
        code = 1
        try:
            result.save(folder)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the child only writes files
@pytest.mark.parametrize(
    ("kind", "when"), [*(("fsync", n) for n in (3, 6)), *(("replace", n) for n in range(1, 6)), ("replace", 50)]
)
def test_a_save_that_is_killed_leaves_the_old_network_or_the_new(kind: str, when: int, folder: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        old = mp.load(folder)(x)["y"]
        code = killed(kind, when, folder)
        assert code == (0 if when == 50 else -signal.SIGKILL)
        found = mp.load(folder)(x)["y"]
    assert torch.equal(found, old) or torch.allclose(found, old + 1)
    assert code != 0 or torch.allclose(found, old + 1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_first_save_that_is_killed_leaves_nothing_that_loads(tmp_path: Path) -> None:
    assert killed("replace", 4, tmp_path / "network") == -signal.SIGKILL
    assert "manifest" in refused(tmp_path / "network")


# ---- damage


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    path = part(folder, name)
    path.unlink()
    assert path.name in refused(folder)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_directory_in_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    path = part(folder, name)
    path.unlink()
    path.mkdir()
    refused(folder)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_truncation_is_refused(name: str, signed: bool, folder: Path) -> None:
    content = part(folder, name).read_bytes()
    for length in (0, 1, 7, len(content) // 2, len(content) - 1):
        part(folder, name).write_bytes(content[:length])
        if signed and name != "manifest.json":
            sign(folder)
        refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(name: str, folder: Path) -> None:
    path = part(folder, name)
    content = bytearray(path.read_bytes())
    for place in random.Random(0).sample(range(len(content)), 8):
        altered = bytes(content[:place]) + bytes([content[place] ^ 1]) + bytes(content[place + 1 :])
        path.write_bytes(altered)
        assert path.name in refused(folder)


GARBAGE = {
    "empty_list": b"[]",
    "null": b"null",
    "number": b"5",
    "text": b'"nodes"',
    "nested": b"[" * 100_000,
    "not_utf8": b"\xff\xfe\x00",
    "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94.",
    "infinite": b'{"schema": 1, "files": {}, "batch": Infinity}',
}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused(name: str, content: bytes, folder: Path) -> None:
    part(folder, name).write_bytes(content)
    if name != "manifest.json":
        sign(folder)
    refused(folder)
