"""Why a budget is too small: where the smallest schedule peaks, what lies there, what helps."""

from __future__ import annotations

from dataclasses import replace

from packlight.errors import InfeasibleBudgetError
from packlight.planner.facts import Facts
from packlight.planner.smallest import smallest_schedules
from packlight.step import (
    Action,
    Machine,
    Operation,
    OperationKind,
    Phase,
    Schedule,
    StepGraph,
    StepMemory,
    simulate,
)
from packlight.units import format_bytes

SHARES = tuple(2**power for power in range(1, 11))


def infeasible_budget(
    graph: StepGraph, budget_bytes: int, smallest: Schedule, machine: Machine | None = None
) -> InfeasibleBudgetError:
    """Return the error for a budget below the smallest schedule that was found.

    Args:
        graph: the step.
        budget_bytes: what was asked for.
        smallest: the schedule with the smallest peak.
        machine: with the lanes of its transfers, if it has some.
    """
    timeline = simulate(graph, smallest, machine)
    operation = operation_at(graph, smallest, timeline.peak_index)
    where = f"the {operation.phase} of {operation.name}"
    where += f" in {operation.layer!r}" if operation.layer else ""
    if operation.phase is Phase.UPDATE:
        where = f"the update of {operation.layer!r}"
    live = [(graph.buffers[b].name, graph.buffers[b].bytes) for b in timeline.peak_buffers]
    if timeline.peak_workspace_bytes:
        live.append(("workspace", timeline.peak_workspace_bytes))
    live.sort(key=lambda item: -item[1])
    return InfeasibleBudgetError(
        budget_bytes, timeline.peak_bytes, where, live,
        batch_hint(graph, smallest, budget_bytes, machine),
    )


def operation_at(graph: StepGraph, schedule: Schedule, index: int) -> Operation:
    """Return the computation that an instruction runs or is issued before (or else after)."""
    num = graph.num_computations
    runs = [
        i for i, s in enumerate(schedule.instructions) if s.action is Action.RUN and s.target < num
    ]
    place = next((i for i in runs if i >= index), runs[-1])
    return graph.operations[schedule.instructions[place].target]


def batch_hint(
    graph: StepGraph,
    smallest: Schedule,
    budget_bytes: int,
    machine: Machine | None = None,
    memory: StepMemory | None = None,
    num_rows: int | None = None,
) -> str:
    """Return a hint that says how much of the peak a smaller batch would take away.

    Everything that a schedule allocates shrinks with the batch except gradients of parameters
    (outputs of the step, or read by updates) and what rests in another memory between its uses.

    Args:
        graph: the step.
        smallest: the schedule with the smallest peak.
        budget_bytes: what was asked for.
        machine: with the lanes of its transfers, if it has some.
        memory: what the whole step holds besides, where the budget is for that, too.
        num_rows: of the batch that the graph is for, where that is known: no share has less than 1.
    """
    timeline = simulate(graph, smallest, machine)
    constant = _of_any_batch(graph)
    largest = [b for b in timeline.peak_buffers if b not in constant][:2]
    if not largest and not timeline.peak_workspace_bytes:
        return "all of the peak is gradients of parameters: only a smaller model needs less"
    names = " and ".join(
        f"{graph.buffers[b].name} ({format_bytes(graph.buffers[b].bytes)})" for b in largest
    )
    named = f"{names} shrink with the batch; " if names and num_rows != 1 else ""

    def shrunk(share: int) -> StepGraph:
        return _with_share(graph, constant, share if num_rows is None else min(share, num_rows))

    def outside(peak_bytes: int, share: int) -> int:
        if memory is None:
            return peak_bytes
        return replace(memory, input_bytes=memory.input_bytes // share).peak_bytes(peak_bytes)

    def need(share: int) -> int:
        return outside(simulate(shrunk(share), smallest, machine).peak_bytes, share)

    for share in SHARES:
        if need(share) <= budget_bytes:
            return f"{named}1/{share} of the batch would need about {format_bytes(need(share))}"
    least = shrunk(SHARES[-1]).without_transfers()
    tiny = outside(Facts(least).least_peak_bytes, SHARES[-1])
    if tiny <= budget_bytes:  # another schedule is then the smallest
        tiny = outside(simulate(least, smallest_schedules(least)[0]).peak_bytes, SHARES[-1])
    if tiny <= budget_bytes:
        return f"{named}a tiny batch would need about {format_bytes(tiny)}"
    what = "parameters, optimizer state and gradients" if memory else "parameter gradients"
    what += " and what one row takes" if num_rows == 1 else ""
    return f"{named}even a tiny batch leaves {format_bytes(tiny)} of {what}"


def _of_any_batch(graph: StepGraph) -> set[int]:
    """Return the buffers that are as large with any other batch."""
    constant = {*graph.outputs, *graph.resting}
    constant.update(b for o in graph.computations if o.mutates for b in o.reads)
    kinds = (OperationKind.BUCKET, OperationKind.OWN)
    buckets = [o for o in graph.computations if o.kind in kinds]
    constant.update(b for o in buckets for b in (*o.reads, *o.creates))
    # They share a storage, or one is the other's copy in another memory.
    pairs: list[tuple[int, ...]] = [p for o in graph.computations for p in o.overwrites]
    pairs += [(*o.reads, *o.creates, *o.mutates) for o in graph.transfers]
    num_before = -1
    while len(constant) > num_before:
        num_before = len(constant)
        for pair in pairs:
            if not constant.isdisjoint(pair):
                constant.update(pair)
    return constant


def _with_share(graph: StepGraph, constant: set[int], share: int) -> StepGraph:
    """Return the graph of a share of the batch, as far as that can be told from this one."""
    buffers = tuple(
        b if b.id in constant else replace(b, bytes=-(-b.bytes // share)) for b in graph.buffers
    )
    computations = tuple(
        o if o.mutates else replace(o, workspace_bytes=o.workspace_bytes // share)
        for o in graph.computations
    )
    return replace(graph, buffers=buffers, operations=(*computations, *graph.transfers))
