"""The torch.compile backend: capture, profile, plan, run.

    model = torch.compile(model, backend="packlight", options={"budget": "300MiB"})

The budget covers every byte allocated from the start of the forward to the end of the backward
above what was there before: saved activations, outputs, gradients, workspace. With an
`offload_directory`, activations may lie on its disk between their uses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from packlight.capture.dynamo import (
    prepare_dynamo,
    refuse_graph_break,
    refuse_values,
)
from packlight.capture.joint import JointStep
from packlight.capture.pieces import Alone, compile_piece
from packlight.capture.read_joint import Read
from packlight.costs.lane import measure_lane
from packlight.costs.measure import real_tensors
from packlight.costs.profiler import CallProfiler
from packlight.errors import GraphBreakError, InfeasibleBudgetError, OptionError
from packlight.lower.aot import OVERWRITTEN_KEY, partitioned
from packlight.lower.emit import emit
from packlight.memory.far import FarMemory, far_memory
from packlight.memory.pool import TierPool
from packlight.moves.registry import checked_techniques
from packlight.planner import plan_schedule
from packlight.run.piece_loop import PieceLoop
from packlight.search.forms import KNOWN_MOVES, fastest_form, fused_form, replanned
from packlight.search.rehearse import (
    fits,
    in_known_terms,
    real_inputs,
    rehearse,
    with_estimated_seconds,
)
from packlight.step import (
    Machine,
    Plan,
    StepGraph,
    live_after_forward,
    with_transfers,
)
from packlight.torch_internals.autograd import is_graph_retained
from packlight.torch_internals.breaks import break_anywhere
from packlight.torch_internals.calling import box_arguments, boxed, has_boxed_arguments
from packlight.torch_internals.calls import (
    calling_line,
    is_compiling_off,
    is_failing,
    num_recorded,
    watch_calls,
)
from packlight.torch_internals.translator import compiled_for, graph_break, is_resumed, options_of
from packlight.units import parse_bytes

KNOWN_OPTIONS = ("budget", "allow", "rehearse", "progress", "offload_directory", "moves")
LANE_PROBE_BYTES = 16 * 2**20
OUTSIDE_HINT = (
    "what eager PyTorch does between forward and backward (a loss outside) comes on top, once it "
    "is seen"
)


class StepCaptured(Exception):  # noqa: N818 - not an error
    """Ends a dry run: the step is captured and planned, and nothing of it has run."""


@dataclass(frozen=True)
class Compilation:
    """What was captured and planned for one graph; kept for inspection.

    Attributes:
        graph: the captured step.
        plan: what runs.
        machine: whose lanes transfers take, if buffers may be transferred.
        tiers: where they are, for each forward whose backward is still to come.
    """

    graph: StepGraph
    plan: Plan
    machine: Machine | None = None
    tiers: TierPool | None = None


@dataclass(eq=False)
class PacklightBackend:
    """A torch.compile backend with its options.

    Within a budget graphs are pieces (run/pieces.py): those of a function that breaks into several
    are planned together, and so are several forwards before a backward.

    Attributes:
        budget_bytes: peak of a step above what was there before it; None for no limit.
        allow: names of approximate techniques.
        rehearse: time operations inside the step, too (see search/rehearse.py).
        progress: show what profiling does.
        offload_directory: where activations may lie between their uses.
        moves: names of those made on request: "fuse", "fuse-exactly" (see moves/fuse).
        choose_budget: asked for each captured graph, where the budget depends on it.
        compilations: one per captured graph, newest last.
        is_dry_run: capture and plan when called, but raise `StepCaptured` instead of running.
        loop: what runs pieces.
    """

    budget_bytes: int | None = None
    allow: tuple[str, ...] = ()
    rehearse: bool = True
    progress: bool = True
    offload_directory: Path | None = None
    moves: tuple[str, ...] = ()
    choose_budget: Callable[[StepGraph], int | None] | None = None
    compilations: list[Compilation] = field(default_factory=list)
    is_dry_run: bool = False
    _example_inputs: Sequence[Any] = ()

    def __post_init__(self) -> None:
        prepare_dynamo()
        self.loop = PieceLoop(self.budget_bytes)
        this = weakref.ref(self)
        break_anywhere(self, lambda _: None if (backend := this()) is None else backend.loop)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        if self.loop.is_broken or is_resumed() or graph_break() is not None:
            if self._needs_whole_graphs:
                refuse_graph_break()
            shape = fused_form(self.moves)
            with CallProfiler(self.progress) as profiler:
                return self.loop.counting(
                    compile_piece(module, example_inputs, self.loop, profiler, shape=shape)
                )
        refuse_values(module)
        self._example_inputs, num_before = example_inputs, len(self.compilations)
        with CallProfiler(self.progress) as profiler:
            alone = Alone(partial(self._planned, profiler=profiler), _boxed)
            compiled = compile_piece(module, example_inputs, self.loop, profiler, alone)
        self._example_inputs = ()
        new = self.compilations[num_before:]

        def run(*arguments: Any) -> Any:
            if self.is_dry_run:
                raise StepCaptured
            if new and self.budget_bytes is not None:
                refuse_more_runs(new[0], self.budget_bytes, arguments)
            return compiled(*arguments)

        return self.loop.counting(run)

    @property
    def _needs_whole_graphs(self) -> bool:
        is_asked = self.choose_budget is not None or self.is_dry_run
        return is_asked or bool(self.offload_directory)

    def _planned(
        self, step: JointStep, read: Read, profiler: CallProfiler
    ) -> tuple[JointStep, Plan] | tuple[fx.GraphModule, fx.GraphModule]:
        """Plan a step.

        Where a budget is for all forwards before a backward, and nothing is transferred, the loop
        runs it.
        """
        budget = self.budget_bytes
        if self.choose_budget is not None:
            budget = self.choose_budget(step.graph)
        far = None if budget is None else far_memory(step.device, self.offload_directory)
        machine = None if far is None else _machine(step.device, far)
        try:
            planned = partial(self._with_plan, budget, machine, profiler)
            step, plan = fastest_form(step, self.moves, read, profiler, planned)
        except InfeasibleBudgetError as error:
            raise InfeasibleBudgetError(
                error.budget_bytes, error.smallest_bytes, error.peak_operation, error.peak_buffers,
                "\n  ".join(filter(None, [error.hint, OUTSIDE_HINT])),
            ) from None
        if self.budget_bytes is not None and not plan.lane_seconds:
            step = replace(step, graph=step.graph.without_transfers())
            self.compilations.append(Compilation(step.graph, plan, machine))
            return step, plan
        program = emit(step, plan.schedule, (plan.schedule.num_forward,))
        tiers = None
        if program.slots:
            assert far is not None
            tiers = TierPool(partial(far.make_tier, program.slots))
        self.compilations.append(Compilation(step.graph, plan, machine, tiers))
        return partitioned(program, step, tiers)

    def _with_plan(
        self, budget: int | None, machine: Machine | None, profiler: CallProfiler, step: JointStep
    ) -> tuple[JointStep, Plan]:
        if machine is not None:
            step = replace(step, graph=with_transfers(step.graph, machine))
        plan = plan_schedule(step.graph, budget, machine)
        rehearsed = self._rehearsed(step, budget, plan, profiler)
        if rehearsed is not None:
            step = rehearsed
            plan = replanned(step.graph, budget, plan, machine)
        return step, plan

    def _rehearsed(
        self, step: JointStep, budget_bytes: int | None, plan: Plan, profiler: CallProfiler
    ) -> JointStep | None:
        """Return the step with times measured inside it; None if they are known or cannot be."""
        is_known = all(f is None or f.in_step_seconds is not None for f in step.facts)
        if is_known or not self.rehearse:
            return None
        if plan.lane_seconds > 0:  # transfers would disturb what is measured
            try:
                plan = plan_schedule(step.graph.without_transfers(), budget_bytes)
            except InfeasibleBudgetError:
                return with_estimated_seconds(step, profiler)
        primals = real_inputs(step, self._example_inputs)
        if primals is None or not fits(plan.peak_bytes, step.device):
            return None
        tangents = [n.meta["val"] for n in step.tangents]
        program = emit(step, plan.schedule, (plan.schedule.num_forward,))
        seconds = rehearse(step, program, primals, tangents, step.device)
        seconds = in_known_terms(step, seconds)
        for index, typical in seconds.items():
            profiler.note_in_step(*step.call(index), typical)
        return step.with_seconds(seconds)


def packlight_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile a graph (the entry point of `torch.compile(..., backend="packlight")`).

    Args:
        module: the graph, from dynamo.
        example_inputs: its inputs.
        options: `budget` (bytes or a string such as "300MiB"; absent for no limit), `allow` (names
            of approximate techniques), `rehearse` (time operations inside the step, too, which
            takes about four steps; True), `progress` (show what profiling does; True),
            `offload_directory` (where activations may lie between their uses), `moves` (names of
            moves to make where they save time: "fuse", "fuse-exactly").
        **unknown: refused.

    Raises:
        OptionError, BudgetFormatError, InfeasibleBudgetError, GraphBreakError,
            UnsupportedModelError, OffloadError.
    """
    given = compiled_for()
    if given is None:
        backend = backend_from_options({**(options or {}), **unknown})
    else:
        backend = _backend_of(given)
    return backend(module, example_inputs)


# By the wrapper that one call of `torch.compile` makes: all graphs of it share a budget.
_backends: dict[int, PacklightBackend] = {}


def _backend_of(given: Any) -> PacklightBackend:
    """Return the backend of one call of `torch.compile`."""
    if id(given) not in _backends:
        _backends[id(given)] = backend_from_options(options_of(given))
        weakref.finalize(given, _backends.pop, id(given), None).atexit = False
    return _backends[id(given)]


def backend_from_options(options: dict[str, Any]) -> PacklightBackend:
    """Return a backend for an options dictionary, checked."""
    strange = sorted(set(options) - set(KNOWN_OPTIONS))
    if strange:
        raise OptionError(
            f"unknown option{'s' if len(strange) > 1 else ''} {', '.join(map(repr, strange))} of "
            f"the packlight backend\nhint: known options are {', '.join(map(repr, KNOWN_OPTIONS))}"
        )
    allow = checked_techniques(options.get("allow", ()))
    moves = tuple(options.get("moves", ()))
    strange = [name for name in moves if name not in KNOWN_MOVES]
    if strange:
        raise OptionError(
            f"{strange[0]!r} is no move that the packlight backend makes on request\n"
            f"hint: those are {', '.join(map(repr, KNOWN_MOVES))}; packlight.fit has more"
        )
    budget, directory = options.get("budget"), options.get("offload_directory")
    return PacklightBackend(
        budget_bytes=None if budget is None else parse_bytes(budget),
        allow=allow,
        rehearse=bool(options.get("rehearse", True)),
        progress=bool(options.get("progress", True)),
        offload_directory=None if directory is None else Path(directory),
        moves=moves,
    )


def refuse_more_runs(
    compilation: Compilation, budget_bytes: int, arguments: Sequence[Any]
) -> None:
    """Refuse a forward beside others whose backwards are to come, if that is over the budget.

    What runs with transfers is planned for one forward at a time.

    Args:
        compilation: of the graph that is called.
        budget_bytes: for all forwards before a backward.
        arguments: of the call; gradients of parameters among them count.
    """
    tiers, plan = compilation.tiers, compilation.plan
    if tiers is None:
        return
    graph = compilation.graph
    kept = sum(graph.buffers[b].bytes for b in live_after_forward(graph, plan.schedule))
    parameters = [p for p in arguments if isinstance(p, torch.nn.Parameter)]
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    needed = plan.peak_bytes + tiers.num_in_flight * kept + gradients
    if needed > budget_bytes:
        raise InfeasibleBudgetError(
            budget_bytes, needed, f"forward {tiers.num_in_flight + 1} before a backward",
            [("this forward and its backward", plan.peak_bytes),
             ("kept by forwards before it", tiers.num_in_flight * kept),
             ("gradients of backwards before it", gradients)],
            "a forward that transfers buffers is planned alone: call backward() on each loss "
            "before the next forward, zero_grad() before the next step",
        )


def _machine(device: torch.device, far: FarMemory) -> Machine:
    """Return the machine with the lane to a far memory, measured."""
    with real_tensors():
        return Machine.with_one_lane(measure_lane(far.directory, LANE_PROBE_BYTES, device))


def _boxed(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Compile a graph to a function that takes its arguments in a list and empties the list."""
    if not has_boxed_arguments(module.graph):
        box_arguments(module.graph)
        module.recompile()
    forward = module.forward
    overwritten = module.meta.get(OVERWRITTEN_KEY, ())

    def run(arguments: list[Any]) -> Any:
        if overwritten and is_graph_retained():
            for place in overwritten:  # retain_graph=True: the next backward needs them, too
                arguments[place] = arguments[place].clone()
        return forward(arguments)

    return boxed(run)


prepare_dynamo()


@contextmanager
def _looking_at_call(given: Any) -> Iterator[None]:
    """Tell the loop of a call; refuse one of which nothing is compiled once it is over.

    Dynamo does not ask about a function that `torch.compiler.disable` is around: nobody plans it.
    """
    known, num_before = _backends.get(id(given)), num_recorded()
    runs_before = 0
    if known is not None:
        runs_before = known.loop.num_runs
        known.loop.call_begins()
    yield
    if known is not None:
        known.loop.call_ends()
    if num_recorded() == num_before or is_failing() or is_compiling_off():
        return
    has_budget = options_of(given).get("budget") is not None
    if has_budget and _backend_of(given).loop.num_runs == runs_before:
        file, line = calling_line()
        why = "".join(f" ({p}: {w})" for p, w in [*_backend_of(given).loop.left_out.items()][:1])
        raise GraphBreakError(
            file, line,
            f"nothing of this call is compiled: it ran in eager PyTorch, without a plan{why}",
            "take torch.compiler.disable off the forward, or put it around less; packlight.fit "
            "counts what runs in eager PyTorch",
        )


break_anywhere(packlight_backend, lambda given: _backend_of(given).loop)
watch_calls(packlight_backend, _looking_at_call)
