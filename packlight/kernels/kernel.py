"""A small graph of calls as one operator of torch's: compiled, kept on disk, registered.

The operator is named by a digest of what it computes, so equal regions of a step, of another step
and of another process are one operator, whose costs are observed and remembered like those of any
other. Its results are allocated here, with the strides that the graph says, and the compiled code
writes into them: given one of its inputs as `out=`, it writes there, whatever shape that has.
Whether that keeps the result is observed, too (`costs/measure.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.costs.cache import cache_directory, device_name, instruction_set
from packlight.costs.measure import FUSED_NAMESPACE
from packlight.torch_internals.dispatch import FakeTensorMode
from packlight.torch_internals.inductor import compiled_source, compiler_problem, loaded

FORMAT_VERSION = 4
# The oldest files go when there are more.
MOST_FILES = 4096

_library = torch.library.Library(FUSED_NAMESPACE, "FRAGMENT")
_kernels: dict[str, Kernel | CompileError] = {}


class CompileError(Exception):
    """A group of calls that cannot be compiled; the message says why."""


@dataclass(frozen=True)
class Region:
    """What a kernel computes.

    Attributes:
        graph: placeholders, calls, and a tuple of results.
        inputs: fake tensors, in order.
        outputs: fake tensors: shapes, dtypes and strides of the results.
        rounds_as_eager: every call's result is rounded to its dtype.
    """

    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    rounds_as_eager: bool

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.outputs[0].device

    @property
    def name(self) -> str:
        """Equal for regions that one kernel computes, on one kind of device."""
        place = {node: index for index, node in enumerate(self.graph.graph.nodes)}
        lines = [
            FORMAT_VERSION, torch.__version__, device_name(self.device),
            instruction_set(self.device), self.rounds_as_eager,
            *map(_layout, (*self.inputs, *self.outputs)),
        ]
        for node in self.graph.graph.nodes:
            leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
            named = [f"%{place[x]}" if isinstance(x, fx.Node) else repr(x) for x in leaves]
            lines.append((node.op, "" if node.op == "placeholder" else str(node.target), named,
                          str(structure)))
        text = "\n".join(map(str, lines))
        return "r" + hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Kernel:
    """A compiled region.

    Attributes:
        overload: the operator: takes the inputs, returns one tensor, or all in a tuple.
        call: what it runs. Called directly it costs half of what torch's dispatcher adds.
        compile_seconds: how long inductor took, once.
    """

    overload: torch._ops.OpOverload
    call: Callable[..., Any]
    compile_seconds: float


def kernel_of(region: Region) -> Kernel:
    """Return the kernel of a region: known to this process, kept on disk, or compiled now.

    Raises:
        CompileError: it cannot be compiled; the same region is not tried again.
    """
    name = region.name
    if name not in _kernels:
        try:
            with warnings.catch_warnings():  # of a compiler's own: they are not the user's business
                warnings.simplefilter("ignore")
                source, seconds = _source(region, name)
                call = loaded(source, name)
            _kernels[name] = _registered(region, name, call, seconds)
        except Exception as error:  # of inductor, of a compiler, of the system
            problem = compiler_problem(region.device)
            line = str(error).strip().partition("\n")[0]
            _kernels[name] = CompileError(problem or f"{type(error).__name__}: {line}")
    kernel = _kernels[name]
    if isinstance(kernel, CompileError):
        raise kernel
    return kernel


def direct_call(target: Any) -> Any:
    """Return what runs behind a fused operator; any other target as it is."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == FUSED_NAMESPACE:
        kernel = _kernels[target._schema.name.partition("::")[2]]
        assert isinstance(kernel, Kernel)
        return kernel.call
    return target


def _layout(value: torch.Tensor) -> str:
    return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride())}{value.device}"


# -- compiled, kept


def _source(region: Region, name: str) -> tuple[str, float]:
    """Return a kernel's source and how long it took to compile, from disk if it is there."""
    path = cache_directory() / "kernels" / f"{name}.json"
    try:
        kept = json.loads(path.read_text())
        return str(kept["source"]), float(kept["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    start = time.perf_counter()
    source = _compiled(region)
    loaded(source, name)  # a kernel for a CPU is compiled here
    seconds = time.perf_counter() - start
    _keep(path, {"source": source, "seconds": seconds})
    return source, seconds


def _compiled(region: Region) -> str:
    num_inputs = len(region.inputs)

    def write_results(*arguments: torch.Tensor) -> tuple[()]:
        _Writing(region.graph, arguments[num_inputs:]).run(*arguments[:num_inputs])
        return ()

    with FakeTensorMode():
        arguments = [
            torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)
            for t in (*region.inputs, *region.outputs)
        ]
    return compiled_source(write_results, arguments, rounds_as_eager=region.rounds_as_eager)


class _Writing(fx.Interpreter):
    """Writes results where they belong as soon as they are there.

    Calls that read them read them there: else inductor would keep a copy for those that it cannot
    have in the same loop.
    """

    def __init__(self, graph: fx.GraphModule, outs: Sequence[torch.Tensor]) -> None:
        super().__init__(graph)
        (results,) = graph.graph.find_nodes(op="output")[0].args
        self._out_of = dict(zip(results, outs, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return torch.ops.aten.copy_(self._out_of[n], value) if n in self._out_of else value


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all; a directory that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(content))
        os.replace(file.name, path)
        files = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in files[:-MOST_FILES]:
            old.unlink()
    except OSError:
        return


# -- registered


def _registered(
    region: Region, name: str, compiled: Callable[[list[Any]], Any], seconds: float
) -> Kernel:
    call = _allocating(region.outputs, compiled)
    call.__name__ = name
    arguments = ", ".join(f"Tensor a{i}" for i in range(len(region.inputs)))
    others = ["Tensor"] * (len(region.outputs) - 1)
    for overload, out, first in (("", "", "Tensor"), (".out", "*, Tensor(a!) out", "Tensor(a!)")):
        results = ", ".join((first, *others))
        results = f"({results})" if others else results
        given = ", ".join(filter(None, (arguments, out)))
        _library.define(f"{name}{overload}({given}) -> {results}")
        _library.impl(f"{name}{overload}", call, "CompositeExplicitAutograd")

    def fake(*inputs: torch.Tensor, out: torch.Tensor | None = None) -> Any:
        made = [
            torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)
            for t in region.outputs[out is not None :]
        ]
        made = made if out is None else [out.view(region.outputs[0].shape), *made]
        return tuple(made) if len(made) > 1 else made[0]

    for overload in ("", ".out"):
        torch.library.register_fake(f"{FUSED_NAMESPACE}::{name}{overload}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, FUSED_NAMESPACE), name)
    return Kernel(packet.default, call, seconds)


def _allocating(
    outputs: Sequence[torch.Tensor], compiled: Callable[[list[Any]], Any]
) -> Callable[..., Any]:
    """Return a function that makes room for results, has them written, and returns them."""
    empty = torch.empty_strided
    layouts = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in outputs]
    (shape, stride, dtype, device), *others = layouts

    def first_of(out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            return empty(shape, stride, dtype=dtype, device=device)
        return out if out.shape == shape else out.view(shape)

    def call_single(*inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result = first_of(out)
        compiled([*inputs, result])
        return result

    def call_several(
        *inputs: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        results = (first_of(out), *(empty(s, t, dtype=d, device=v) for s, t, d, v in others))
        compiled([*inputs, *results])
        return results

    return call_several if others else call_single
