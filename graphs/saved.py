"""Saved networks: graph and plan as JSON, tensors as safetensors, a manifest of hashes written last. No pickle."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from dataclasses import dataclass, is_dataclass
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
from metaprune.graphs.ir import Graph, Meta, Momentum, Node, Signature, TensorInfo, Training, verify
from metaprune.graphs.plan import Plan
from metaprune.graphs.structure import Record, Ref, Sequence

SCHEMA = 1
_PART = re.compile(r"(graph|plan|model|inputs)-[0-9a-f]{16}\.(?:json|safetensors)")
_NODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_TENSOR = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_KINDS = ("parameter", "buffer", "constant")
_PLAIN = ("builtins:dict", "builtins:list", "builtins:tuple", "collections:OrderedDict")
_OUTPUT = re.compile(r"transformers(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_LARGEST = 2**48


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds: the cut graph with its tensors, the plan, the example call."""

    graph: Graph
    plan: Plan
    inputs: Any


def save(directory: Path, graph: Graph, module: nn.Module, plan: Plan) -> None:
    """Writes a folder; the tensors are the module's own, so a recovered network is saved as it is now.

    Parts are named after their content and the manifest that lists them is replaced last, so that a folder always
    holds the old network or the new one.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    values = {name: tensors.get(name, graph.values[name]).detach().cpu().contiguous() for name in graph.tensors}
    contents = {
        "graph.json": json.dumps(_encode_graph(graph)).encode(),
        "plan.json": plan.to_json().encode(),
        "model.safetensors": save_tensors({name: value.clone() for name, value in values.items()}),
        "inputs.safetensors": save_tensors({k: v.detach().cpu().contiguous() for k, v in graph.example.items()}),
    }
    files: dict[str, str] = {}
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        stem, _, ending = name.partition(".")
        part = f"{stem}-{digest[:16]}.{ending}"
        files[part] = digest
        write_atomically(directory / part, content)
    write_atomically(directory / "manifest.json", json.dumps({"schema": SCHEMA, "files": files}, indent=1).encode())
    for path in directory.iterdir():
        if _PART.fullmatch(path.name) and path.name not in files:
            path.unlink()


def load(directory: Path) -> Saved:
    """Reads a folder; raises `LoadError` naming the part that is missing, truncated or hostile."""
    try:
        parts = _parts(directory)
        plan = Plan.from_json(parts["plan"].decode())
        values = load_tensors(parts["model"])
        example = load_tensors(parts["inputs"])
        graph = _decode_graph(json.loads(parts["graph"]), values, example)
        positional, named = graph.signature.spec
        given: Any = {k: structure.put_together(v, lambda ref: example[ref.name]) for k, v in named.items()}
        given = given or tuple(structure.put_together(a, lambda ref: example[ref.name]) for a in positional)
        return Saved(graph, plan, given)
    except LoadError:
        raise
    except MetapruneError as error:
        raise LoadError(f"{directory}: {error}") from None
    except OSError as error:
        raise LoadError(f"{directory}: {error.strerror or error} ({error.filename})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, ImportError) as error:
        raise LoadError(f"{directory}: damaged: {type(error).__name__}: {str(error)[:200]}") from None


def _parts(directory: Path) -> dict[str, bytes]:
    """Content of the four parts, checked against the manifest."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    if manifest.get("schema") != SCHEMA or not isinstance(manifest.get("files"), dict):
        raise LoadError(f"{directory}: the manifest is not of schema {SCHEMA}")
    parts: dict[str, bytes] = {}
    for name, digest in manifest["files"].items():
        match = _PART.fullmatch(name)
        if match is None or match[1] in parts:
            raise LoadError(f"{directory}: the manifest lists {str(name)[:80]!r}")
        parts[match[1]] = (directory / name).read_bytes()
        if hashlib.sha256(parts[match[1]]).hexdigest() != digest:
            raise LoadError(f"{directory}: {name} does not match the manifest")
    for stem in ("graph", "plan", "model", "inputs"):
        if stem not in parts:
            raise LoadError(f"{directory}: the manifest lists no {stem}")
    return parts


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
        name = _name(item["name"], _TENSOR)
        if item["kind"] not in _KINDS:
            raise LoadError(f"tensor {name} is of the unknown kind {str(item['kind'])[:80]!r}")
        info = TensorInfo(
            name,
            str(item["kind"]),
            tuple(int(n) for n in item["shape"]),
            _dtype(item["dtype"]),
            tuple(_name(a, _TENSOR) for a in item["aliases"]),
            bool(item["persistent"]),
            bool(item["requires_grad"]),
        )
        if name not in values:
            raise LoadError(f"tensor {name} is missing")
        if tuple(values[name].shape) != info.shape or values[name].dtype != info.dtype:
            raise LoadError(f"tensor {name} is of another shape or dtype than the graph says")
        if name not in info.aliases or any(alias in everything for alias in info.aliases):
            raise LoadError(f"tensor {name} has aliases that are not its own")
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
    inputs = {node.name for node in nodes.values() if node.op == "input"}
    spec = {n for value in (*signature.spec[0], *signature.spec[1].values()) for n in structure.refs(value)}
    if inputs != spec or inputs != set(example):
        named_once = sorted((inputs | spec | set(example)) - (inputs & spec & set(example)))
        raise LoadError(f"the graph, its signature and its example differ in the inputs {', '.join(named_once)[:80]}")
    if not 0 < graph.batch <= _LARGEST:
        raise LoadError(f"a batch ratio of {graph.batch} makes no sense")
    return graph


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Training):
        return {"training": True}
    if isinstance(value, Momentum):
        return {"momentum": value.counter}
    if isinstance(value, (Record, Sequence)):
        kind, name = ("record", "builtins:dict") if isinstance(value, Record) else ("sequence", "builtins:tuple")
        name = value.cls if value.cls in _PLAIN or _is_output_class(value.cls) else name
        items = (
            [[k, _encode(v)] for k, v in value.items.items()]
            if isinstance(value, Record)
            else [_encode(v) for v in value.items]
        )
        return {kind: name, "items": items}
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
    if "momentum" in value:
        return Momentum(_name(value["momentum"], _TENSOR))
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
    if not isinstance(kind, str) or not (kind in _PLAIN or _is_output_class(kind)):
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
        if any(not 0 <= n < _LARGEST for n in shape):
            raise LoadError(f"a value of shape {str(shape)[:80]} makes no sense")
        return Meta(shape, _dtype(meta["dtype"]), tuple(bool(b) for b in meta["batched"]))
    return tuple(_decode_meta(m) for m in meta) if isinstance(meta, list) else _decode(meta)


def _is_output_class(path: str) -> bool:
    """Whether a path names an output class of transformers: a mapping that is a dataclass. Others become dicts."""
    if not _OUTPUT.fullmatch(path):
        return False
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, dict) and is_dataclass(found)


def _name(name: Any, pattern: re.Pattern[str] = _NODE) -> str:
    if not isinstance(name, str) or len(name) > 512 or not pattern.fullmatch(name):
        raise LoadError(f"{str(name)[:80]!r} is not a name")
    return name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise LoadError(f"{str(name)[:80]!r} is not a dtype")
    return found
