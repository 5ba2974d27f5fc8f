"""Whether a kernel returns what the calls that it stands for return, bit by bit, observed.

Compiled code takes other routes than eager PyTorch's kernels: another polynomial for an exponential
function, a product and a sum rounded once or twice. Which calls that concerns depends on the chip,
the compiler and the release, so it is tried: on numbers of either sign, and on positive ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from packlight.capture.aot import GraphData
from packlight.capture.joint import JointStep
from packlight.costs.cache import Cache
from packlight.costs.made_up import constant, made_up
from packlight.costs.measure import real_tensors, same_bits
from packlight.kernels.kernel import CompileError, Kernel, Region, kernel_of
from packlight.moves.fuse.fusable import domain, literals

# So many calls are tried in one kernel.
TRIED_AT_ONCE = 16


def equal_results(kernel: Kernel, region: Region) -> list[bool]:
    """Return, for each result of a region, whether kernel and calls give the same bits."""
    equal = [True] * len(region.outputs)
    with real_tensors():
        for is_signed in (False, True):
            inputs, _ = made_up(region.inputs, {}, constant(1), random=True)
            if is_signed:
                for value in inputs:
                    _spread(value)
            expected = fx.Interpreter(region.graph).run(*inputs)
            found = kernel.overload(*inputs)
            results = found if isinstance(found, tuple) else (found,)
            for place, (a, b) in enumerate(zip(results, expected, strict=True)):
                equal[place] = equal[place] and same_bits(a, b)
    return equal


def _spread(value: torch.Tensor) -> None:
    """Make numbers between 0 and 1 to such between -4 and 4."""
    if value.is_floating_point():
        elements = value.untyped_storage().nbytes() // value.itemsize
        value.as_strided((elements,), (1,), 0).sub_(0.5).mul_(8)


def keeping_bits(step: JointStep, nodes: Sequence[fx.Node]) -> set[tuple[Any, ...]]:
    """Return the `literals` of those calls that round alike in a kernel of their own.

    Args:
        step: whose calls they are.
        nodes: pointwise calls.
    """
    smallest: dict[tuple[Any, ...], fx.Node] = {}
    for node in nodes:
        kind = literals(node)
        if kind not in smallest or domain(node) < domain(smallest[kind]):
            smallest[kind] = node
    known = Cache("bits", step.device)
    kept: set[tuple[Any, ...]] = set()
    unknown: list[fx.Node] = []
    for kind, node in smallest.items():
        if _key(kind) not in known:
            unknown.append(node)
        elif known[_key(kind)]:
            kept.add(kind)
    for start in range(0, len(unknown), TRIED_AT_ONCE):
        some = unknown[start : start + TRIED_AT_ONCE]
        for node, is_equal in zip(some, _tried(some), strict=True):
            if is_equal is not None:  # what does not compile may do so another time
                known[_key(literals(node))] = is_equal
            if is_equal:
                kept.add(literals(node))
    known.save()
    return kept


def _key(kind: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:24]


def _tried(nodes: Sequence[fx.Node]) -> Sequence[bool | None]:
    """Return whether calls keep their bits, None where they do not compile."""
    region = _side_by_side(nodes)
    try:
        return equal_results(kernel_of(region), region)
    except CompileError:
        if len(nodes) == 1:
            return [None]
        return [is_equal for node in nodes for is_equal in _tried([node])]


def _side_by_side(nodes: Sequence[fx.Node]) -> Region:
    """Return a region that makes some calls, each on arguments of its own."""
    graph = fx.Graph()
    inputs: list[torch.Tensor] = []
    given: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in nodes:
        for argument in node.all_input_nodes:
            given[node, argument] = graph.placeholder(f"a{len(inputs)}")
            inputs.append(argument.meta["val"])
    results = []
    for node in nodes:
        own = {argument: given[node, argument] for argument in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), own.__getitem__)
        results.append(graph.call_function(node.target, args, kwargs))  # type: ignore[arg-type]
    graph.output(tuple(results))
    outputs = tuple([node.meta["val"] for node in nodes])
    return Region(GraphData(torch.nn.Module(), graph), tuple(inputs), outputs, True)
