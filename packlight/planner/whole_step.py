"""A budget for the whole step: what is left of it for a schedule, and errors in its terms."""

from __future__ import annotations

from packlight.errors import InfeasibleBudgetError
from packlight.planner.explain import batch_hint
from packlight.planner.plan import Planner
from packlight.step import Machine, Plan, StepGraph, StepMemory


def plan_whole_step(
    graph: StepGraph,
    memory: StepMemory,
    budget_bytes: int | None,
    machine: Machine | None = None,
    num_rows: int | None = None,
) -> Plan:
    """Return a plan whose whole-step peak is within a budget.

    Args:
        graph: forward, backward and (where they belong to the schedule) updates.
        memory: what the step holds besides.
        budget_bytes: for all of it; None for no limit.
        machine: with the lanes of the graph's transfers, if it has some.
        num_rows: of the (micro)batch that the graph is for, where that is known.

    Raises:
        InfeasibleBudgetError: with whole-step numbers.
    """
    if budget_bytes is None:
        return Planner(graph, machine).plan(None)
    left = max(0, budget_bytes - memory.resident_bytes)
    where, live, hint = "", [], ""
    planner = Planner(graph, machine)
    try:
        plan = planner.plan(left)
        if memory.update_workspace_bytes <= left:
            return plan
    except InfeasibleBudgetError as error:
        where, live = error.peak_operation, error.peak_buffers
        smallest = planner.smallest().schedule
        hint = batch_hint(planner.graph, smallest, budget_bytes, machine, memory, num_rows)
    smallest_bytes = planner.smallest().peak_bytes
    if memory.update_workspace_bytes > smallest_bytes or not where:
        where, live = "the optimizer's update", [("workspace", memory.update_workspace_bytes)]
        hint = ""
    resident = [
        ("parameters", memory.parameter_bytes + memory.state_bytes),
        ("optimizer state", memory.optimizer_bytes),
        ("accumulated gradients", memory.accumulated_bytes),
        ("beside the step", memory.beside_bytes),
        ("batch", memory.input_bytes),
    ]
    in_memory = [(name, size) for name, size in (*resident, *live) if size > 0]
    in_memory.sort(key=lambda item: -item[1])
    if left == 0:  # what is there throughout is too much by itself: it comes first
        in_memory.sort(key=lambda item: item not in resident)
    raise InfeasibleBudgetError(
        budget_bytes,
        memory.peak_bytes(smallest_bytes),
        where,
        in_memory,
        hint,
    )
