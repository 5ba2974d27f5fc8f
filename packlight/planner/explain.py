"""Why a budget is too small: where the smallest schedule peaks, what lies there, what helps."""

from __future__ import annotations

from packlight.errors import InfeasibleBudgetError
from packlight.step import Action, Machine, Operation, Phase, Schedule, StepGraph, simulate
from packlight.units import format_bytes


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
    graph: StepGraph, smallest: Schedule, budget_bytes: int, machine: Machine | None = None
) -> str:
    """Return a hint that says how much of the peak a smaller batch would take away.

    Everything in memory at the peak shrinks with the batch except gradients of parameters (outputs
    of the step, or read by updates) and what rests in another memory between its uses.
    """
    timeline = simulate(graph, smallest, machine)
    constant = {*graph.outputs, *graph.resting}
    constant.update(b for o in graph.computations if o.mutates for b in o.reads)
    constant_bytes = sum(graph.buffers[b].bytes for b in timeline.peak_buffers if b in constant)
    scaling_bytes = timeline.peak_bytes - constant_bytes
    if scaling_bytes <= 0:
        return "all of the peak is gradients of parameters: only a smaller model needs less"
    largest = [b for b in timeline.peak_buffers if b not in constant][:2]
    names = " and ".join(
        f"{graph.buffers[b].name} ({format_bytes(graph.buffers[b].bytes)})" for b in largest
    )
    share = 2
    while constant_bytes + scaling_bytes // share > budget_bytes and share < 1024:
        share *= 2
    need = constant_bytes + scaling_bytes // share
    named = f"{names} shrink with the batch; " if names else ""
    if need > budget_bytes:
        return (
            f"{named}even a tiny batch leaves {format_bytes(constant_bytes)} of parameter gradients"
        )
    return f"{named}1/{share} of the batch would need about {format_bytes(need)}"
