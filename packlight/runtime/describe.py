"""What a prepared step tells about itself."""

from __future__ import annotations

from packlight.capture.whole_step import Consumption
from packlight.runtime.prepare import Preparer, Way
from packlight.units import format_bytes


def describe_way(way: Way, budget_bytes: int | None, preparer: Preparer) -> str:
    """Return a few lines: memory by kind, moves, price."""
    memory, plan = way.memory, way.parts[0].plan
    lines = [
        f"parameters      {format_bytes(memory.parameter_bytes + memory.state_bytes):>12}",
        f"optimizer state {format_bytes(memory.optimizer_bytes):>12}",
        f"batch           {format_bytes(memory.input_bytes):>12}",
        f"schedule's peak {format_bytes(plan.peak_bytes):>12}  (plain step: "
        f"{format_bytes(plan.plain_peak_bytes)}; "
        f"gradients {format_bytes(memory.gradient_bytes)})",
        f"whole step      {format_bytes(way.peak_bytes):>12}  of "
        + ("no limit" if budget_bytes is None else format_bytes(budget_bytes)),
        f"predicted time  {plan.slowdown:>11.3f}x  (no schedule below "
        f"{plan.bound_seconds / plan.plain_seconds:.3f}x; {plan.status})",
    ]
    if way.consumption is Consumption.UPDATE:
        lines.append("moves           update-in-backward")
    else:
        lines.append(f"not made        update-in-backward: {preparer.no_update_in_backward}")
    return "\n".join(lines)
