"""A budget for the whole step: what is left of it for a schedule, and errors in its terms."""

from __future__ import annotations

from packlight.errors import InfeasibleBudgetError
from packlight.planner.plan import plan_schedule, smallest_peak_bytes
from packlight.step import Device, Plan, StepGraph, StepMemory


def plan_whole_step(
    graph: StepGraph,
    memory: StepMemory,
    budget_bytes: int | None,
    device: Device | None = None,
) -> Plan:
    """Return a plan whose whole-step peak is within a budget.

    Args:
        graph: forward, backward and (where they belong to the schedule) updates.
        memory: what the step holds besides.
        budget_bytes: for all of it; None for no limit.
        device: with a link, buffers may be offloaded.

    Raises:
        InfeasibleBudgetError: with whole-step numbers.
    """
    if budget_bytes is None:
        return plan_schedule(graph, None, device)
    where, live, hint = "the start: what is there before the first operation", [], ""
    left = budget_bytes - memory.resident_bytes
    try:
        if memory.update_workspace_bytes > left > 0:
            where, live = "the optimizer's update", [("workspace", memory.update_workspace_bytes)]
        elif left > 0:
            return plan_schedule(graph, left, device)
        smallest_bytes = smallest_peak_bytes(graph, device)
    except InfeasibleBudgetError as error:
        smallest_bytes = error.smallest_bytes
        where, live, hint = error.peak_operation, error.peak_buffers, error.hint
    resident = [
        ("parameters", memory.parameter_bytes + memory.state_bytes),
        ("optimizer state", memory.optimizer_bytes),
        ("accumulated gradients", memory.accumulated_bytes),
        ("batch", memory.input_bytes),
    ]
    in_memory = [(name, size) for name, size in (*resident, *live) if size > 0]
    raise InfeasibleBudgetError(
        budget_bytes,
        memory.peak_bytes(smallest_bytes),
        where,
        sorted(in_memory, key=lambda item: -item[1]),
        hint,
    )
