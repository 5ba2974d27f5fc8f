"""What a prepared step tells about itself."""

from __future__ import annotations

from packlight.moves.precision import Autocast
from packlight.moves.request import Request
from packlight.planner.accounts import peak_by_kind
from packlight.planner.explain import operation_at
from packlight.search.ready import Ready
from packlight.search.way import Way
from packlight.step import simulate
from packlight.units import format_bytes, format_seconds


def describe(ready: Ready, request: Request) -> str:
    """Return a few lines: what is in memory at the peak and where that is, moves, price."""
    way, budget_bytes = ready.way, request.budget_bytes
    memory = way.memory
    part = max(ready.parts, key=lambda p: p.plan.peak_bytes)
    graph, plan = part.step.joint.graph, part.plan
    timeline = simulate(graph, plan.schedule, way.machine)
    operation = operation_at(graph, plan.schedule, timeline.peak_index)
    where = operation.short_name + (f" in {operation.layer}" if operation.layer else "")
    kinds = {
        "parameters": memory.parameter_bytes + memory.state_bytes,
        "optimizer state": memory.optimizer_bytes,
        "batch": memory.input_bytes,
        "accumulated gradients": memory.accumulated_bytes,
        **peak_by_kind(graph, timeline),
    }
    lines = [f"{name:<22}{format_bytes(size):>12}" for name, size in kinds.items() if size]
    limit = "no limit" if budget_bytes is None else format_bytes(budget_bytes)
    lines.append(
        f"{'whole step':<22}{format_bytes(way.peak_bytes):>12}  of {limit}; the peak is in the "
        f"{operation.phase}, {where}"
    )
    for name, text in how_it_runs(way, request):
        is_reason = name.startswith("without ")
        lines.append(f"{'':<22}{name}: {text}" if is_reason else f"{name:<22}{text}")
    what = "microbatch" if way.num_microbatches > 1 else "step"
    lines.append(
        f"{'predicted time':<22}{format_seconds(way.seconds)}; {plan.slowdown:.3f} x the {what} "
        f"without recomputation (no schedule below {plan.bound_seconds / plan.plain_seconds:.3f} "
        f"x; {plan.termination})"
    )
    return "\n".join(lines)


def how_it_runs(way: Way, request: Request) -> list[tuple[str, str]]:
    """Return (name, text): the precision, the moves made, and why others were not."""
    rows = []
    autocast = way.made(Autocast)
    if isinstance(autocast, Autocast):
        scaler = request.scaler
        scale = "" if scaler is None else f"; loss scale {scaler.get_scale():g}"
        rows.append(("precision", f"{autocast.precision} under autocast{scale}"))
    rows.append(("moves", ", ".join(moves_of(way)) or "none"))
    return rows + [(f"without {name}", reason) for name, reason in way.not_made.items()]


def moves_of(way: Way) -> list[str]:
    """Return what is done to fit, in words."""
    plan, num_offloaded = way.parts[0].plan, way.parts[0].num_offloaded
    words = list(way.words)
    if num_offloaded:
        words.append(f"{num_offloaded} activations offloaded")
    if plan.num_reruns:
        words.append(f"{plan.num_reruns} operations recomputed")
    return words
