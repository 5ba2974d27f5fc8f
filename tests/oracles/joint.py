"""The joint graph of a step, caught before it is planned, and its plain execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from packlight.capture.dynamo import prepare_dynamo, specialize


class _Caught(Exception):
    pass


@dataclass
class Joint:
    """A joint graph with the real tensors behind its primals."""

    module: fx.GraphModule
    num_forward_outputs: int
    primals: list[Any]

    def run(self, module: fx.GraphModule | None = None, tangent: float = 1.0) -> list[Any]:
        """Return what a module with this one's placeholders returns, call by call."""
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        values = [
            torch.full(n.meta["val"].shape, tangent, dtype=n.meta["val"].dtype)
            for n in placeholders[len(self.primals) :]
        ]
        torch.manual_seed(5)
        with torch.no_grad():
            interpreter = fx.Interpreter(module or self.module)
            return interpreter.run(*self.primals, *values, enable_io_processing=False)


def joint_graph(function: Callable[..., Any], *arguments: Any) -> Joint:
    """Return the joint graph that AOTAutograd makes of a call."""
    prepare_dynamo()
    torch._dynamo.reset()
    caught: list[Any] = []

    def partition(module: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        caught.extend([module, num_fwd_outputs])
        raise _Caught

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        specialize(inputs)
        caught.append([t.detach() for t in inputs if isinstance(t, torch.Tensor)])
        compiler = aot_autograd(fw_compiler=None, bw_compiler=None, partition_fn=partition)
        return compiler(module, inputs)

    try:
        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    except Exception:
        if len(caught) != 3:
            raise
    real, module, num_forward_outputs = caught
    remaining = iter(real)
    primals = [
        next(remaining) if isinstance(n.meta["val"], torch.Tensor) else n.meta["val"]
        for n in module.graph.nodes
        if n.op == "placeholder" and "tangents" not in n.name
    ]
    return Joint(module, num_forward_outputs, primals)
