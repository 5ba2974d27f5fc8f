"""What a trace depends on and dynamo does not look at, put among dynamo's guards.

Dynamo guards the tree of modules, their attributes, modes and hooks, what functions close over, and
most of torch's switches. It trusts that classes keep their methods, that nobody registers a hook
for all modules, and that the switches between kernels stay. Where one of these changes, the step is
another one, and has to be traced and planned anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from packlight.errors import UnsupportedModelError
from packlight.torch_internals.aot import modules_around, tracing_settings
from packlight.torch_internals.dynamo import guard_on
from packlight.torch_internals.modules import hooks_of_all_modules
from packlight.torch_internals.translator import traced_call

# What calling a module looks up on its class, traced or not.
CALLED = ("__call__", "_call_impl", "__getattr__", "forward")


def guard_what_dynamo_trusts(module: fx.GraphModule) -> None:
    """Have the graph that is being compiled traced anew as soon as something trusted changes.

    Args:
        module: from dynamo, in a backend's call.

    Raises:
        UnsupportedModelError: what changes is an object of `random.Random`, in every call.

    Cost: some 5 microseconds for each call of what is compiled, and 0.2 for each traced method.
    """
    call = traced_call()
    if call is None:
        return  # nobody would ask
    if any(function not in vars(random).values() for function in call.random_functions):
        raise UnsupportedModelError(
            "the model draws numbers from an object of random.Random: traced, they would be the "
            "same in every step\nhint: draw from the module `random` or from torch, or pass them "
            "with the batch"
        )
    kinds = {*_kinds_in_graph(module), *_kinds_in_arguments(call.arguments)}
    found = {(kind, name) for kind in kinds for name in _methods(kind, call.codes)}
    methods = sorted(found, key=str)

    def make_check() -> Callable[[], bool]:
        expected = _trusted(methods)
        return lambda: _trusted(methods) == expected

    guard_on(make_check)


def kernel_switches() -> list[Any]:
    """Return the switches of torch that decide which operators a call is traced into."""
    cuda = torch.backends.cuda
    return [
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), tracing_settings(),
    ]


def _trusted(methods: list[tuple[type, str]]) -> list[Any]:
    found = [getattr(kind, name, None) for kind, name in methods]
    codes = [getattr(method, "__code__", None) for method in found]
    return [kernel_switches(), hooks_of_all_modules(), found, codes]


def _kinds_in_graph(module: fx.GraphModule) -> Iterator[type]:
    """Yield the classes of the modules that calls of a graph were traced in."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                yield from (kind for _, kind in modules_around(node) if isinstance(kind, type))


def _kinds_in_arguments(arguments: dict[str, Any]) -> Iterator[type]:
    """Yield the classes of the modules that a traced function is given, and of what they hold."""
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, nn.Module):
            for module in leaf.modules():
                yield from (type(module), *map(type, vars(module).values()))


def _methods(kind: type, codes: set[CodeType]) -> Iterator[str]:
    """Yield the names of a class's methods that were traced."""
    for name, value in ((n, v) for base in kind.__mro__ for n, v in vars(base).items()):
        function = getattr(value, "__func__", value)  # class methods and static ones
        if isinstance(function, FunctionType) and function.__code__ in codes:
            yield name
    if issubclass(kind, nn.Module):
        yield from CALLED
