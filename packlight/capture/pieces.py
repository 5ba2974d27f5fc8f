"""Pieces of a function that breaks: each a graph of its own, with the user's Python between them.

Dynamo compiles what lies between two breaks and calls a backend for it; AOTAutograd adds the
backward, and autograd's eager engine calls the pieces' backwards in its own order. What AOTAutograd
compiles here are stand-ins: they call a `Host`, which runs what it likes in their place and may run
something else in the next step. Autograd is given nothing to save but a token; while that lives,
the host keeps what the backward needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import fx

from packlight.capture.aot import mutations, written_back
from packlight.capture.dropout import use_eager_dropout
from packlight.capture.dynamo import (
    described_break,
    native_calls,
    plain_errors,
    prepare_dynamo,
    specialize,
)
from packlight.capture.guards import guard_what_dynamo_trusts
from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Measure, Read, read_joint_graph
from packlight.costs.measure import CallFacts
from packlight.costs.profiler import CallProfiler
from packlight.step import Plan
from packlight.step.digest import structure_digest
from packlight.torch_internals.aot import aot_compiler, descriptions, saved_descriptions
from packlight.torch_internals.breaks import break_anywhere
from packlight.torch_internals.calling import boxed
from packlight.torch_internals.dynamo import quick_tracing, with_own_cache
from packlight.torch_internals.translator import graph_break

TOKEN = "run_token"

Parts = tuple[fx.GraphModule, fx.GraphModule]


@dataclass(eq=False)
class Piece:
    """One graph between two breaks.

    Attributes:
        step: its forward and, if there is one, its backward.
        has_backward: whether a gradient goes through it.
        cause: why it ends, in a line; "" where it ends with its function.
        place: where that is, "file:line".
        plan: of its own, where nothing breaks: how it runs if a step is one run of it.
        ready: what its host has made of it.
    """

    step: JointStep
    has_backward: bool
    cause: str = ""
    place: str = ""
    plan: Plan | None = None
    ready: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Equal where a schedule of one piece is one of the other, and holds as much."""
        return structure_digest(self.step.graph)

    @cached_property
    def form(self) -> str:
        """Equal where an order of one piece is one of the other, whatever the sizes."""
        graph = self.step.graph
        return structure_digest(replace(
            graph,
            operations=tuple(
                replace(o, workspace_bytes=0, overwrites=()) for o in graph.operations
            ),
            buffers=tuple(replace(b, bytes=0) for b in graph.buffers),
        ))


class Host(Protocol):
    """Runs pieces."""

    def observing(self) -> None:
        """Take note that a call is about to be observed, which takes a profiler."""

    def captured(self, piece: Piece) -> None:
        """Take note of a new piece."""

    def forward(self, piece: Piece, primals: list[Any]) -> tuple[list[Any], torch.Tensor | None]:
        """Run a piece's forward.

        Args:
            piece: which.
            primals: its inputs; the list is the host's to empty.

        Returns:
            The forward's results, and a token if there is a backward: an int64 tensor of one
            element, in whose life the backward may be asked for.
        """

    def backward(self, piece: Piece, token: torch.Tensor, tangents: list[Any]) -> list[Any]:
        """Run the backward of the run with a token; return a gradient or None per primal."""


@dataclass(frozen=True)
class Alone:
    """What is done with a graph that nothing breaks.

    Attributes:
        planned: given its step, and how a rewritten joint graph of it is read, returns the step
            that runs, measured anew, and its plan; or, if no host is to run it, its forward and its
            backward, between which autograd carries the values.
        compile: compiles those, and a graph through which no gradient goes.
    """

    planned: Callable[[JointStep, Read], tuple[JointStep, Plan] | Parts]
    compile: Callable[[fx.GraphModule, Any], Callable[..., Any]]


# Given a piece's step, how a rewritten joint graph of it is read, and what observes calls: returns
# the step that runs.
Shape = Callable[[JointStep, Read, CallProfiler], JointStep]


def compile_piece(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    host: Host,
    profiler: CallProfiler,
    alone: Alone | None = None,
    shape: Shape | None = None,
) -> Callable[..., Any]:
    """Return what dynamo calls in the place of a graph: the host's forward and backward.

    Args:
        module: the graph, from dynamo.
        inputs: its inputs.
        host: runs the piece.
        profiler: observes calls.
        alone: if it is no piece of anything larger.
        shape: else rewrites it.
    """
    specialize(inputs)
    guard_what_dynamo_trusts(module)

    def measure(target: Any, args: Any, kwargs: Any) -> CallFacts:
        if not profiler.is_known(target, args, kwargs):
            host.observing()
        return profiler.measure(target, args, kwargs)

    shaped = None if shape is None else lambda step, read: shape(step, read, profiler)
    compiler = _PieceCompiler(host, measure, graph_break(), alone, shaped)
    with native_calls():
        compiled: Callable[..., Any] = aot_compiler(compiler.compile, compiler.partition)(
            module, inputs
        )
    return compiled


class _PieceCompiler:
    """AOTAutograd's compiler for one graph."""

    def __init__(
        self,
        host: Host,
        measure: Measure,
        found: tuple[str, Any] | None,
        alone: Alone | None,
        shaped: Callable[[JointStep, Read], JointStep] | None,
    ) -> None:
        self.host, self.measure, self.found, self.alone = host, measure, found, alone
        self.shaped = shaped
        self.piece: Piece | None = None

    def partition(
        self, joint: fx.GraphModule, num_forward_outputs: int
    ) -> Parts:
        """Take the joint graph; return stand-ins for its two parts."""
        use_eager_dropout(joint)
        mutated = mutations(joint, num_forward_outputs)
        read = partial(
            read_joint_graph,
            num_forward_outputs=num_forward_outputs,
            measure=self.measure,
            mutated_primals=frozenset(written_back(joint, num_forward_outputs).values()),
            pinned_outputs=lambda index: index not in mutated,
        )
        step, plan = read(joint), None
        if self.alone is not None:
            first, second = self.alone.planned(step, read)
            if isinstance(first, fx.GraphModule):
                assert isinstance(second, fx.GraphModule)
                return first, second
            assert isinstance(second, Plan)
            step, plan = first, second
        elif self.shaped is not None:
            step = self.shaped(step, read)
        self._take(step, has_backward=True, plan=plan)
        described = descriptions(joint.graph.output_node())
        mode = next(v.fake_mode for n in step.primals if hasattr(v := n.meta["val"], "fake_mode"))
        with mode:
            token = torch.empty(1, dtype=torch.int64)
        results, gradients = step.forward_results, step.backward_results
        forward = _stand_in(step.primals, results, gives_token=True)
        backward = _stand_in(step.tangents, gradients, token=token)
        if described is not None:
            split = num_forward_outputs
            forward.graph.output_node().meta["desc"] = [*described[:split], *saved_descriptions(1)]
            backward.graph.output_node().meta["desc"] = list(described[split:])
        return forward, backward

    def compile(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Return what runs in a graph's place."""
        host, known = self.host, self.piece
        if known is None and self.alone is not None:
            return self.alone.compile(module, inputs)
        if known is None:  # no gradient goes through it
            results = module.graph.output_node().args[0]
            assert isinstance(results, (tuple, list))
            use_eager_dropout(module)
            step = read_joint_graph(module, len(results), self.measure)
            known = self._take(step, has_backward=False)
        piece: Piece = known
        arguments = module.graph.find_nodes(op="placeholder")
        if arguments and arguments[0].target == TOKEN:

            def backward(given: list[Any]) -> list[Any]:
                token, *tangents = given
                given.clear()
                return host.backward(piece, token, tangents)

            return boxed(backward)

        def forward(given: list[Any]) -> list[Any]:
            primals = [*given]
            given.clear()
            results, token = host.forward(piece, primals)
            return results if token is None else [*results, token]

        return boxed(forward)

    def _take(self, step: JointStep, has_backward: bool, plan: Plan | None = None) -> Piece:
        cause, place = "", ""
        if self.found is not None:
            cause, place = described_break(*self.found)
        self.piece = Piece(step, has_backward, cause, place, plan)
        self.host.captured(self.piece)
        return self.piece


def _stand_in(
    arguments: Sequence[fx.Node],
    results: Sequence[Any],
    *,
    token: torch.Tensor | None = None,
    gives_token: bool = False,
) -> fx.GraphModule:
    """Return a graph with the signature of another one, which never runs."""
    graph = fx.Graph()
    if token is not None:
        graph.placeholder(TOKEN).meta["val"] = token
    for argument in arguments:
        graph.node_copy(argument)

    def made(meta: dict[str, Any]) -> fx.Node:
        node = graph.call_function(torch.empty, (1,))
        node.meta = meta
        return node

    outputs = [made(dict(r.meta)) if isinstance(r, fx.Node) else r for r in results]
    graph.output((*outputs, *([made({})] if gives_token else ())))
    return fx.GraphModule({}, graph)


class PiecewiseCall:
    """A user's function compiled piece by piece, every piece run by a host.

    Args:
        function: the user's.
        host: runs pieces, and is told what is left to eager PyTorch.
        progress: show what profiling does.
        shape: rewrites pieces.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        host: Any,
        progress: bool,
        shape: Shape | None = None,
    ) -> None:
        # Dynamo remembers every backend for good; what hangs on this one must not live as long.
        known = weakref.ref(host)

        def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            host = known()
            assert host is not None, "the compiled function belongs to its host"
            with CallProfiler(progress) as profiler:
                return compile_piece(module, inputs, _Weakly(known), profiler, shape=shape)

        prepare_dynamo()
        break_anywhere(backend, lambda _: known())
        self._backend = backend  # dynamo's register of those that break anywhere is a weak one
        self._compiled = torch.compile(with_own_cache(function), backend=backend)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        with plain_errors(), torch.enable_grad(), quick_tracing():
            return self._compiled(*arguments)


class _Weakly:
    """A host that compiled code does not keep alive."""

    def __init__(self, host: weakref.ref[Any]) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host(), name)
