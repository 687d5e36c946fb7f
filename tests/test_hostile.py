"""Saved folders written by an enemy, with a manifest that fits: always a clear error, nothing run, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
       builtins:object builtins:__import__
    tests.support.cases:Case collections:OrderedDict.fromkeys
    ../torch:Size
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
    **{f"node_name_{i}": renamed("conv2d", name) for i, name in enumerate(NAMES[5:])},
    **{f"taken_{name}": renamed("a.weight", name) for name in TAKEN},
    **{f"dtype_{dtype}": tensor(dtype=dtype) for dtype in DTYPES},
    **{f"shape_{i}": tensor(shape=shape) for i, shape in enumerate(SHAPES)},
    "parameter_of_integers": lambda b: b["tensors"][0].update(kind="parameter", dtype="int64", requires_grad=True),
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
    "keywords_list": lambda b: node(b, "conv2d").update(kwargs=[1]),
    "output_unknown": output({"ref": "nobody"}),
    "output_class_text": output({"record": 5, "items": []}),
    "output_items_text": output({"sequence": "builtins:list", "items": 5}),
    "output_pairs_short": output({"record": "builtins:dict", "items": [["y"]]}),
    "names_number": lambda b: b["signature"].update(names=7),
    "batch_text": lambda b: b.update(batch="many"),
    "notes_number": lambda b: b.update(notes=5),
    "schema_newer": lambda b: b.update(schema=2),
    "schema_missing": lambda b: b.pop("schema"),
    "tensors_missing": lambda b: b.pop("tensors"),
    "signature_missing": lambda b: b.pop("signature"),
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
