"""Saved folders written by an enemy, with a manifest that fits: always a clear error, nothing run, nothing written."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import metaprune as mp
from tests.test_saved import change, folder, part, refused, saved, sign  # noqa: F401 - fixtures

Body = dict[str, Any]


def node(body: Body, op: str) -> Body:
    """The first node of an operator."""
    return next(n for n in body["nodes"] if op in n["op"])


def first_op(name: str) -> Callable[[Body], None]:
    return lambda b: node(b, "conv2d").update(op=name)


def renamed(old: str, new: str) -> Callable[[Body], Any]:
    """A tensor under another name, everywhere."""
    return lambda b: json.loads(json.dumps(b).replace(f'"{old}"', json.dumps(new)))


def argument(value: Any) -> Callable[[Body], None]:
    return lambda b: node(b, "conv2d")["args"].__setitem__(3, value)


def output(value: Any) -> Callable[[Body], None]:
    return lambda b: b["signature"].update(output=value)


def tensor(**values: Any) -> Callable[[Body], None]:
    return lambda b: b["tensors"][0].update(**values)


OPERATORS = """
    aten.no_such_operator.default aten.conv2d.no_such_overload os.system.default operator.__import__ operator.attrgetter
    builtins.eval.default torch.load aten.from_file.default aten.set_.source_Tensor aten.__class__.default
    aten.conv2d.__globals__ ../aten.conv2d.default aten..default aten.conv2d inputs
""".split()
CLASSES = """
    os:system builtins:eval builtins:exec subprocess:Popen posix:system importlib:import_module os.path:join
    torch.nn:Module torch:load torch.hub:load builtins:object builtins:__import__ torch.nn.modules.linear:Linear
    tests.support.cases:Case transformers.no_such_module:Output torch:no_such collections:OrderedDict.fromkeys
    ../torch:Size torch:..
""".split()
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "a..b",
    ".a",
    "a.",
    "",
    "a b",
    "a\nb",
    "a\x00b",
    "x" * 600,
    "ä",
    5,
    None,
    ["a"],
]
TAKEN = [
    "forward",
    "graph",
    "training",
    "__class__",
    "_places",
    "_parameters",
    "forward.weight",
    "__init__.weight",
    "train",
]
DTYPES = ["nn", "float33", "load", "", 5, None, "float32.__class__"]
SHAPES = [[-1], [2**70], [10**12, 10**12], ["a"], [1.5], 5, "ab", [[1]], None, [8, 3, 3, 3], []]
CASES: dict[str, Callable[[Body], Any]] = {
    **{f"operator_{op}": first_op(op) for op in OPERATORS},
    **{f"record_{cls}": output({"record": cls, "items": [["y", {"ref": "in0"}]]}) for cls in CLASSES},
    **{f"sequence_{cls}": output({"sequence": cls, "items": [{"ref": "in0"}]}) for cls in CLASSES},
    **{f"name_{i}": renamed("a.weight", name) for i, name in enumerate(NAMES)},
    **{f"node_name_{i}": renamed("conv2d", name) for i, name in enumerate(NAMES)},
    **{f"taken_{name}": renamed("a.weight", name) for name in TAKEN},
    **{f"dtype_{dtype}": tensor(dtype=dtype) for dtype in DTYPES},
    **{f"shape_{i}": tensor(shape=shape) for i, shape in enumerate(SHAPES)},
    "alias_unknown": tensor(aliases=["somebody.else"]),
    "alias_none": tensor(aliases=[]),
    "alias_taken": tensor(aliases=["a.weight", "b.weight"]),
    "kind_unknown": tensor(kind="pickle"),
    "parameter_of_integers": lambda b: b["tensors"][0].update(kind="parameter", dtype="int64", requires_grad=True),
    "argument_device": argument({"device": "no such device"}),
    "argument_device_number": argument({"device": 10**30}),
    "argument_float": argument({"float": "__import__"}),
    "argument_torch": argument({"torch": "load"}),
    "argument_torch_unknown": argument({"torch": "no_such"}),
    "argument_torch_path": argument({"torch": "hub.load"}),
    "argument_dtype": argument({"dtype": "hub"}),
    "argument_unknown": argument({"pickle": "gASV"}),
    "argument_empty": argument({}),
    "argument_ref_list": argument({"ref": ["a"]}),
    "argument_ref_unknown": argument({"ref": "nobody"}),
    "ref_forward": lambda b: node(b, "conv2d")["args"].__setitem__(0, {"ref": b["nodes"][-1]["name"]}),
    "ref_itself": lambda b: node(b, "conv2d")["args"].__setitem__(0, {"ref": node(b, "conv2d")["name"]}),
    "cycle": lambda b: b["nodes"].reverse(),
    "node_twice": lambda b: b["nodes"].append(b["nodes"][-1]),
    "node_of_unknown_tensor": lambda b: node(b, "tensor").update(args=["nobody"]),
    "node_of_no_tensor": lambda b: node(b, "tensor").update(args=[]),
    "node_of_two_tensors": lambda b: node(b, "tensor").update(args=[["a.weight", "b.weight"]]),
    "node_without_op": lambda b: b["nodes"][0].pop("op"),
    "node_is_text": lambda b: b["nodes"].__setitem__(0, "conv2d"),
    "nodes_is_text": lambda b: b.update(nodes="conv2d"),
    "too_many_arguments": lambda b: node(b, "conv2d")["args"].extend([1] * 20),
    "too_few_arguments": lambda b: node(b, "conv2d").update(args=[]),
    "unknown_keyword": lambda b: node(b, "conv2d").update(kwargs={"__class__": 1}),
    "keywords_list": lambda b: node(b, "conv2d").update(kwargs=[1]),
    "meta_huge": lambda b: node(b, "conv2d").update(meta={"shape": [10**30], "dtype": "float32", "batched": [False]}),
    "output_unknown": output({"ref": "nobody"}),
    "output_class_text": output({"record": 5, "items": []}),
    "output_items_text": output({"sequence": "builtins:list", "items": 5}),
    "output_pairs_short": output({"record": "builtins:dict", "items": [["y"]]}),
    "spec_unknown_input": lambda b: b["signature"].update(args=[{"ref": "in7"}]),
    "spec_without_input": lambda b: b["signature"].update(args=[5]),
    "names_number": lambda b: b["signature"].update(names=7),
    "batch_text": lambda b: b.update(batch="many"),
    "batch_infinite": lambda b: b.update(batch=float("inf")),
    "batch_negative": lambda b: b.update(batch=-1),
    "notes_number": lambda b: b.update(notes=5),
    "schema_newer": lambda b: b.update(schema=2),
    "schema_missing": lambda b: b.pop("schema"),
    "tensors_missing": lambda b: b.pop("tensors"),
    "signature_missing": lambda b: b.pop("signature"),
    "input_twice": lambda b: b["nodes"].insert(0, {**b["nodes"][0], "name": "in9", "op": "input"}),
}


@pytest.mark.parametrize("edit", CASES.values(), ids=CASES)
def test_a_hostile_graph_is_refused(edit: Callable[[Body], Any], folder: Path) -> None:  # noqa: F811
    change(folder, edit)
    assert len(refused(folder)) < 600


PLANS: dict[str, Callable[[Body], Any]] = {
    "unit_text": lambda b: b["edits"][0].update(units=["0"]),
    "unit_float": lambda b: b["edits"][0].update(units=[0.5]),
    "unit_bool": lambda b: b["edits"][0].update(units=[True]),
    "edit_unknown": lambda b: b["edits"][0].update(edit="exec"),
    "edits_map": lambda b: b.update(edits={}),
    "group_number": lambda b: b["edits"][0].update(group=5),
    "graph_list": lambda b: b.update(graph=[]),
    "reached_list": lambda b: b.update(reached=[]),
    "schema": lambda b: b.update(schema="1"),
}


@pytest.mark.parametrize("edit", PLANS.values(), ids=PLANS)
def test_a_hostile_plan_is_refused(edit: Callable[[Body], Any], folder: Path) -> None:  # noqa: F811
    change(folder, edit, "plan.json")
    refused(folder)


TENSORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "missing": lambda t: t.pop("a.weight"),
    "other_shape": lambda t: t.update({"a.weight": torch.zeros(1)}),
    "other_dtype": lambda t: t.update({"a.weight": t["a.weight"].double()}),
    "none": lambda t: t.clear(),
}


@pytest.mark.parametrize("edit", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_named(edit: Callable[[dict[str, Tensor]], Any], folder: Path) -> None:  # noqa: F811
    tensors = load_file(part(folder, "model.safetensors"))
    edit(tensors)
    save_file(tensors, part(folder, "model.safetensors"))
    sign(folder)
    assert "a.weight" in refused(folder)


def test_example_inputs_must_be_there(folder: Path) -> None:  # noqa: F811
    save_file({"other": torch.zeros(1)}, part(folder, "inputs.safetensors"))
    sign(folder)
    assert "in0" in refused(folder)


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON document, as (container, key)."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in ((value, key), *leaves(item))]
    if isinstance(value, list):
        return [place for key, item in enumerate(value) for place in ((value, key), *leaves(item))]
    return []


ODD = (
    None,
    True,
    -1,
    0,
    2**40,
    1e308,
    "",
    "a.weight",
    "../x",
    [],
    [[]],
    {},
    {"ref": "in0"},
    {"ref": "conv2d"},
    "x" * 5000,
)


@pytest.mark.parametrize("seed", range(10))
def test_random_changes_never_give_another_kind_of_error(seed: int, folder: Path) -> None:  # noqa: F811
    draw = random.Random(seed)
    path = part(folder, "graph.json")
    original = path.read_text()
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(25):
        body = json.loads(original)
        for _ in range(draw.choice((1, 1, 2))):
            container, key = draw.choice(leaves(body))
            container[key] = draw.choice(ODD)
        path.write_text(json.dumps(body))
        sign(folder)
        try:
            assert isinstance(mp.load(folder), torch.nn.Module)
            outcomes["loaded"] += 1
        except mp.MetapruneError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5
