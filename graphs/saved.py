"""Saved networks: graph and plan as JSON, tensors as safetensors, a manifest of hashes written last. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from metaprune.graphs import structure
from metaprune.graphs.errors import LoadError, MetapruneError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph, Meta, Node, Signature, TensorInfo, Training, verify
from metaprune.graphs.plan import Plan
from metaprune.graphs.structure import Record, Ref, Sequence

SCHEMA = 1
_FILES = ("graph.json", "plan.json", "model.safetensors", "inputs.safetensors")
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,512}")
_CLASS = re.compile(
    r"(builtins:(dict|list|tuple)|collections:OrderedDict|(transformers|torch|torchvision)(\.\w+)*:[\w.]+)"
)


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds: the cut graph with its tensors, the plan, the example call."""

    graph: Graph
    plan: Plan
    inputs: Any


def save(directory: Path, graph: Graph, module: nn.Module, plan: Plan) -> None:
    """Writes a folder; the tensors are the module's own, so a recovered network is saved as it is now."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    values = {name: tensors.get(name, graph.values[name]).detach().cpu().contiguous() for name in graph.tensors}
    parts = {
        "graph.json": json.dumps(_encode_graph(graph)).encode(),
        "plan.json": plan.to_json().encode(),
        "model.safetensors": save_tensors({name: value.clone() for name, value in values.items()}),
        "inputs.safetensors": save_tensors({k: v.detach().cpu().contiguous() for k, v in graph.example.items()}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    for name, content in parts.items():
        write_atomically(directory / name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    write_atomically(directory / "manifest.json", json.dumps({"schema": SCHEMA, "files": hashes}, indent=1).encode())


def load(directory: Path) -> Saved:
    """Reads a folder; raises `LoadError` naming the part that is missing, truncated or hostile."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        hashes = manifest["files"] if manifest.get("schema") == SCHEMA else {}
        parts: dict[str, bytes] = {}
        for name in _FILES:
            parts[name] = (directory / name).read_bytes()
            if hashlib.sha256(parts[name]).hexdigest() != hashes.get(name):
                raise LoadError(f"{directory}: {name} does not match the manifest")
        plan = Plan.from_json(parts["plan.json"].decode())
        values = load_tensors(parts["model.safetensors"])
        example = load_tensors(parts["inputs.safetensors"])
        graph = _decode_graph(json.loads(parts["graph.json"]), values, example)
    except LoadError:
        raise
    except MetapruneError as error:
        raise LoadError(f"{directory}: {error}") from None
    except OSError as error:
        raise LoadError(f"{directory}: {error.strerror or error} ({error.filename})") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
        SafetensorError,
        ImportError,
    ) as error:
        raise LoadError(f"{directory}: damaged: {type(error).__name__}: {str(error)[:200]}") from None
    positional, named = graph.signature.spec
    find: Any = lambda ref: example[ref.name]  # noqa: E731
    inputs: Any = {k: structure.put_together(v, find) for k, v in named.items()}
    return Saved(graph, plan, inputs or tuple(structure.put_together(a, find) for a in positional))


# ---- JSON


def _encode_graph(graph: Graph) -> dict[str, Any]:
    nodes = [
        {
            "name": n.name,
            "op": n.op,
            "args": _encode(n.args),
            "kwargs": {k: _encode(v) for k, v in n.kwargs.items()},
            "meta": _encode_meta(n.meta),
            "module": n.module,
        }
        for n in graph.nodes.values()
    ]
    tensors = [
        {
            "name": t.name,
            "kind": t.kind,
            "shape": list(t.shape),
            "dtype": _dtype_name(t.dtype),
            "aliases": list(t.aliases),
            "persistent": t.persistent,
            "requires_grad": t.requires_grad,
        }
        for t in graph.tensors.values()
    ]
    s = graph.signature
    signature = {
        "names": list(s.names),
        "args": [_encode(a) for a in s.spec[0]],
        "kwargs": {k: _encode(v) for k, v in s.spec[1].items()},
        "output": _encode(s.output),
        "dropped": list(s.dropped),
    }
    body = {"schema": SCHEMA, "nodes": nodes, "tensors": tensors, "signature": signature}
    return {**body, "batch": graph.batch, "notes": graph.notes}


def _decode_graph(body: dict[str, Any], values: dict[str, torch.Tensor], example: dict[str, torch.Tensor]) -> Graph:
    if body.get("schema") != SCHEMA:
        raise LoadError(f"the graph is not of schema {SCHEMA}")
    nodes: dict[str, Node] = {}
    for item in body["nodes"]:
        args, kwargs = _decode(item["args"]), {_name(k): _decode(v) for k, v in item["kwargs"].items()}
        name = _name(item["name"])
        if name in nodes:
            raise LoadError(f"node {name} is defined twice")
        nodes[name] = Node(name, str(item["op"]), args, kwargs, _decode_meta(item["meta"]), str(item["module"]))
    tensors: dict[str, TensorInfo] = {}
    everything: dict[str, torch.Tensor] = {}
    for item in body["tensors"]:
        name = _name(item["name"])
        info = TensorInfo(
            name,
            str(item["kind"]),
            tuple(int(n) for n in item["shape"]),
            _dtype(item["dtype"]),
            tuple(_name(a) for a in item["aliases"]),
            bool(item["persistent"]),
            bool(item["requires_grad"]),
        )
        if name not in values:
            raise LoadError(f"tensor {name} is missing")
        if tuple(values[name].shape) != info.shape or values[name].dtype != info.dtype:
            raise LoadError(f"tensor {name} is of another shape or dtype than the graph says")
        tensors[name] = info
        everything.update(dict.fromkeys(info.aliases, values[name]))
    given = body["signature"]
    signature = Signature(
        tuple(str(n) for n in given["names"]),
        (tuple(_decode(a) for a in given["args"]), {str(k): _decode(v) for k, v in given["kwargs"].items()}),
        _decode(given["output"]),
        tuple(str(d) for d in given["dropped"]),
    )
    graph = Graph(
        nodes, tensors, signature, everything, None, example, float(body["batch"]), [str(n) for n in body["notes"]]
    )
    verify(graph)
    return graph


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Training):
        return {"training": True}
    if isinstance(value, (Record, Sequence)):
        kind = "record" if isinstance(value, Record) else "sequence"
        items = (
            [[k, _encode(v)] for k, v in value.items.items()]
            if isinstance(value, Record)
            else [_encode(v) for v in value.items]
        )
        return {kind: value.cls, "items": items}
    if isinstance(value, torch.dtype):
        return {"dtype": _dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise MetapruneError(f"a {type(value).__name__} among an operator's arguments can not be saved")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "ref" in value:
        return Ref(_name(value["ref"]))
    if "training" in value:
        return Training()
    if "dtype" in value:
        return _dtype(value["dtype"])
    if "device" in value:
        return torch.device(value["device"])
    if "float" in value:
        return float(value["float"])
    if "torch" in value:
        found = getattr(torch, value["torch"])
        if not isinstance(found, (torch.memory_format, torch.layout)):
            raise LoadError(f"{value['torch']!r} is not a memory format")
        return found
    kind = value.get("record") or value.get("sequence")
    if not isinstance(kind, str) or not _CLASS.fullmatch(kind):
        raise LoadError(f"{str(kind)[:80]!r} is not an output class that may be loaded")
    if "record" in value:
        return Record(kind, {k: _decode(v) for k, v in value["items"]})
    return Sequence(kind, tuple(_decode(v) for v in value["items"]))


def _encode_meta(meta: Any) -> Any:
    if isinstance(meta, Meta):
        return {"shape": list(meta.shape), "dtype": _dtype_name(meta.dtype), "batched": list(meta.batched)}
    return [_encode_meta(m) for m in meta] if isinstance(meta, tuple) else _encode(meta)


def _decode_meta(meta: Any) -> Any:
    if isinstance(meta, dict) and "shape" in meta:
        shape = tuple(int(n) for n in meta["shape"])
        return Meta(shape, _dtype(meta["dtype"]), tuple(bool(b) for b in meta["batched"]))
    return tuple(_decode_meta(m) for m in meta) if isinstance(meta, list) else _decode(meta)


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LoadError(f"{str(name)[:80]!r} is not a name")
    return name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise LoadError(f"{str(name)[:80]!r} is not a dtype")
    return found
