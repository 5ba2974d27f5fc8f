"""Joint graphs kept on disk: what AOTAutograd made of a traced call, for the next process.

The key is a digest of all that AOTAutograd reads: the traced graph with its literal arguments, what
its inputs look like and which of them share memory, torch's settings, versions. What a later
release of torch or a user's own operator could make something else of is not kept, and neither is a
graph with anything in it that has no plain form here: then it is made anew. Files are compressed
JSON; one that cannot be read is none.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.fakes import fake_tensor
from packlight.capture.guards import kernel_switches
from packlight.costs.cache import cache_directory, instruction_set
from packlight.costs.measure import real_tensors
from packlight.torch_internals.aot import description_class
from packlight.torch_internals.dispatch import FakeTensorMode, is_fake
from packlight.torch_internals.storages import storage_identity

FORMAT_VERSION = 3
# The oldest files go when there are more.
MOST_FILES = 64
# A constant in a graph is kept if it has no more elements.
MOST_ELEMENTS = 64

_SCALARS = (bool, int, str, type(None))
_OWN_PACKAGES = ("torch", "_operator", "builtins", "math")
_STACKS = ("nn_module_stack", "fwd_nn_module_stack")


class _NoPlainFormError(Exception):
    """Something in a graph that is not kept."""


# ---------------------------------------------------------------------------------------------
# Keys


def key_of(module: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """Return what tells a traced graph from any that has another joint graph, None if unsure.

    Args:
        module: traced by dynamo.
        inputs: real or fake tensors, in the order of its placeholders.
    """
    try:
        described = [_settings(), _described_inputs(inputs), _described_nodes(module)]
    except _NoPlainFormError:
        return None
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _settings() -> list[Any]:
    """Return everything beside graph and inputs that decides what is traced."""
    return [
        FORMAT_VERSION, torch.__version__, torch.version.git_version,
        instruction_set(torch.device("cpu")),
        torch.cuda.get_device_name() if torch.cuda.is_initialized() else "",
        [[d, torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))]
         for d in ("cpu", "cuda")],
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch.get_default_dtype()),
        torch.are_deterministic_algorithms_enabled(), kernel_switches(),
    ]


def _described_inputs(inputs: Sequence[Any]) -> list[Any]:
    first_with: dict[int, int] = {}
    described = []
    for index, value in enumerate(inputs):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and not is_fake(value):
            raise _NoPlainFormError
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise _NoPlainFormError
        storage = value.untyped_storage()
        described.append([
            str(value.dtype), str(value.device), *_layout(value), value.requires_grad,
            value.is_leaf, storage.nbytes(), first_with.setdefault(storage_identity(value), index),
        ])
    return described


def _described_nodes(module: fx.GraphModule) -> list[Any]:
    place: dict[fx.Node, int] = {}
    described = []
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "call_function", "call_method", "output"):
            raise _NoPlainFormError  # constants, and functions of functions
        layers = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        described.append([
            node.op, _name_of_function(node.target), node.name, layers,
            _encoded(node.args, place), _encoded(dict(node.kwargs), place),
        ])
        place[node] = len(place)
    return described


def _name_of_function(target: Any) -> str:
    """Return the name of a method or of one of torch's functions."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in ("aten", "prims"):
            return str(target)
        raise _NoPlainFormError
    module = getattr(target, "__module__", None) or type(target).__module__
    name = getattr(target, "__qualname__", getattr(target, "__name__", ""))
    if module.partition(".")[0] not in _OWN_PACKAGES or not name:
        raise _NoPlainFormError
    return f"{module}.{name}"


# ---------------------------------------------------------------------------------------------
# Files


def _path(key: str) -> Path:
    return cache_directory() / "joints" / f"{key}.json.z"


def load(key: str) -> tuple[fx.GraphModule, int] | None:
    """Return a joint graph and how many of its results are the forward's, None if there is none."""
    path = _path(key)
    try:
        kept = json.loads(zlib.decompress(path.read_bytes()))
        with real_tensors():
            module = _Decoder(kept).module()
        os.utime(path)
        return module, int(kept["num_forward_outputs"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, zlib.error):
        return None


def save(key: str, joint: fx.GraphModule, num_forward_outputs: int) -> None:
    """Keep a joint graph as AOTAutograd made it, if all of it has a plain form."""
    try:
        kept = _Encoder(joint).kept()
    except _NoPlainFormError:
        return
    kept["num_forward_outputs"] = num_forward_outputs
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(zlib.compress(json.dumps(kept).encode(), 1))
        os.replace(file.name, path)
        files = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in files[:-MOST_FILES]:
            old.unlink()
    except OSError:
        return


# ---------------------------------------------------------------------------------------------
# Plain forms: scalars as they are, all else as [a letter, ...]


def _encoded(value: Any, place: dict[fx.Node, int]) -> Any:
    """Return the plain form of an argument of a call."""
    if isinstance(value, fx.Node):
        return ["n", place[value]]
    if type(value) in _SCALARS:
        return value
    if type(value) is float:
        return ["f", value.hex()]
    if isinstance(value, (list, tuple)) and type(value).__name__ in (
        "list", "tuple", "immutable_list", "Size"
    ):
        letter = "l" if isinstance(value, list) else "t"
        return [letter, *(_encoded(v, place) for v in value)]
    if isinstance(value, dict):
        return ["k", *([k, _encoded(v, place)] for k, v in value.items())]
    if type(value) is slice:
        return ["s", *(_encoded(v, place) for v in (value.start, value.stop, value.step))]
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return ["c", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["d", str(value)]
    if value is Ellipsis:
        return ["e"]
    raise _NoPlainFormError


def _decoded(kept: Any, nodes: list[fx.Node]) -> Any:
    if not isinstance(kept, list):
        return kept
    letter, *rest = kept
    if letter == "n":
        return nodes[rest[0]]
    if letter == "f":
        return float.fromhex(rest[0])
    if letter in "lt":
        values = [_decoded(v, nodes) for v in rest]
        return values if letter == "l" else tuple(values)
    if letter == "k":
        return {k: _decoded(v, nodes) for k, v in rest}
    if letter == "s":
        return slice(*(_decoded(v, nodes) for v in rest))
    if letter == "e":
        return Ellipsis
    return torch.device(rest[0]) if letter == "d" else getattr(torch, rest[0])


def _layout(value: torch.Tensor) -> list[Any]:
    shape, stride, offset = list(value.shape), list(value.stride()), value.storage_offset()
    if not all(type(n) is int for n in (*shape, *stride, offset)):
        raise _NoPlainFormError
    return [shape, stride, offset]


class _Encoder:
    """Writes down one joint graph."""

    def __init__(self, joint: fx.GraphModule) -> None:
        self.joint = joint
        self.place: dict[fx.Node, int] = {}
        self.storages: dict[int, int] = {}
        self.sizes: list[list[Any]] = []
        self.stacks: dict[Any, int] = {}
        self.sequences: dict[int, int] = {}

    def kept(self) -> dict[str, Any]:
        nodes = []
        for node in self.joint.graph.nodes:
            nodes.append([
                node.op, self._target(node), node.name, _encoded(node.args, self.place),
                _encoded(dict(node.kwargs), self.place), self._value(node.meta.get("val")),
                self._meta(node),
            ])
            self.place[node] = len(self.place)
        stacks = [list(map(list, stack)) for stack in self.stacks]
        return {"storages": self.sizes, "stacks": stacks, "nodes": nodes}

    def _target(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "output"):
            return node.target
        if node.op == "get_attr":
            return [node.target, *_kept_constant(getattr(self.joint, str(node.target), None))]
        if node.target is operator.getitem:
            return "getitem"
        if isinstance(node.target, torch._ops.OpOverload) and node.op == "call_function":
            return str(node.target).split(".")
        raise _NoPlainFormError

    def _value(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return ["l" if isinstance(value, list) else "t", *map(self._value, value)]
        if not is_fake(value):
            return _encoded(value, {})
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise _NoPlainFormError
        storage = value.untyped_storage()
        identity = storage_identity(value)
        if identity not in self.storages:
            if type(storage.nbytes()) is not int:
                raise _NoPlainFormError
            self.storages[identity] = len(self.sizes)
            self.sizes.append([storage.nbytes(), str(value.device)])
        dtype = str(value.dtype).removeprefix("torch.")
        index = self.storages[identity]
        return ["T", index, dtype, *_layout(value), value.requires_grad]

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if "partitioner_tag" in node.meta:
            kept["partitioner_tag"] = node.meta["partitioner_tag"]
        if "seq_nr" in node.meta:  # torch counts on; only which are the same says something
            number = node.meta["seq_nr"]
            kept["seq_nr"] = self.sequences.setdefault(number, len(self.sequences))
        for name in _STACKS:
            if node.meta.get(name):
                stack = tuple((path, str(kind)) for path, kind in node.meta[name].values())
                kept[name] = self.stacks.setdefault(stack, len(self.stacks))
        if "desc" in node.meta:
            kept["desc"] = _kept_description(node.meta["desc"])
        return kept


class _Decoder:
    """Makes a joint graph out of what was written down."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.mode = FakeTensorMode()
        self.nodes_kept = kept["nodes"]
        self.stacks = [
            {str(i): (path, kind) for i, (path, kind) in enumerate(stack)}
            for stack in kept["stacks"]
        ]
        self.storages = [
            (torch.UntypedStorage(size, device="meta"), torch.device(device))
            for size, device in kept["storages"]
        ]
        self.targets: dict[tuple[str, ...], Any] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def module(self) -> fx.GraphModule:
        graph = fx.Graph()
        nodes: list[fx.Node] = []
        for op, target, name, args, kwargs, value, meta in self.nodes_kept:
            args, kwargs = _decoded(args, nodes), _decoded(kwargs, nodes)
            node = graph.create_node(op, self._target(op, target), args, kwargs, name)
            if value is not None:
                node.meta["val"] = self._value(value)
            for key, content in meta.items():
                node.meta[key] = self._meta(key, content)
            nodes.append(node)
        root = torch.nn.Module()
        for name, constant in self.constants.items():
            root.register_buffer(name, constant)
        return GraphData(root, graph)

    def _target(self, op: str, kept: Any) -> Any:
        if op == "get_attr":
            name, values, dtype = kept
            self.constants[name] = torch.tensor(values, dtype=getattr(torch, dtype))
            return name
        if op != "call_function":
            return kept
        if kept == "getitem":
            return operator.getitem
        path = tuple(kept)
        if path not in self.targets:
            found: Any = torch.ops
            for part in path:
                found = getattr(found, part)
            self.targets[path] = found
        return self.targets[path]

    def _value(self, kept: Any) -> Any:
        if not isinstance(kept, list):
            return kept
        if kept[0] in ("l", "t"):
            values = [self._value(v) for v in kept[1:]]
            return values if kept[0] == "l" else tuple(values)
        if kept[0] != "T":
            return _decoded(kept, [])
        _, index, dtype, shape, stride, offset, requires_grad = kept
        storage, device = self.storages[index]
        kind = getattr(torch, dtype)
        fake = fake_tensor(self.mode, storage, kind, device, shape, stride, offset)
        return fake.requires_grad_() if requires_grad else fake

    def _meta(self, key: str, kept: Any) -> Any:
        if key in _STACKS:
            return self.stacks[kept]
        return _description(kept) if key == "desc" else _decoded(kept, [])


def _kept_constant(constant: Any) -> list[Any]:
    is_plain = type(constant) is torch.Tensor and constant.numel() <= MOST_ELEMENTS
    if not is_plain or constant.device.type != "cpu" or not constant.is_contiguous():
        raise _NoPlainFormError
    if constant.dtype not in (torch.int64, torch.int32, torch.bool, torch.float64, torch.float32):
        raise _NoPlainFormError
    return [constant.tolist(), str(constant.dtype).removeprefix("torch.")]


def _kept_description(value: Any) -> Any:
    """Return the plain form of AOTAutograd's descriptions: small classes within one another."""
    if isinstance(value, (list, tuple)):
        return ["l", *map(_kept_description, value)]
    if is_dataclass(value):
        inner = [[f.name, _kept_description(getattr(value, f.name))] for f in fields(value)]
        return ["D", type(value).__name__, *inner]
    return _encoded(value, {})


def _description(kept: Any) -> Any:
    if isinstance(kept, list) and kept[0] == "l":
        return [_description(v) for v in kept[1:]]
    if isinstance(kept, list) and kept[0] == "D":
        make: Callable[..., Any] = description_class(kept[1])
        return make(**{name: _description(v) for name, v in kept[2:]})
    return _decoded(kept, [])
