"""What a prepared step tells about itself."""

from __future__ import annotations

from torch import nn

from packlight.capture.whole_step import Consumption
from packlight.planner.accounts import peak_by_kind
from packlight.planner.explain import operation_at
from packlight.search.ways import Request, Way
from packlight.step import simulate
from packlight.units import format_bytes, format_seconds


def describe_way(way: Way, request: Request) -> str:
    """Return a few lines: what is in memory at the peak and where that is, moves, price."""
    memory, budget_bytes = way.memory, request.budget_bytes
    part = max(way.parts, key=lambda p: p.plan.peak_bytes)
    graph, plan = part.step.joint.graph, part.plan
    timeline = simulate(graph, plan.schedule, way.device)
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
        f"x; {plan.status})"
    )
    return "\n".join(lines)


def how_it_runs(way: Way, request: Request) -> list[tuple[str, str]]:
    """Return (name, text): the precision, the moves made, and why others were not."""
    rows = []
    if request.precision is not None:
        scaler = request.scaler
        scale = "" if scaler is None else f"; loss scale {scaler.get_scale():g}"
        rows.append(("precision", f"{request.precision} under autocast{scale}"))
    rows.append(("moves", ", ".join(moves_of(way)) or "none"))
    return rows + [(f"without {name}", reason) for name, reason in way.not_made.items()]


def moves_of(way: Way) -> list[str]:
    """Return what is done to fit, in words."""
    counts = [part.plan.schedule.compute_counts() for part in way.parts]
    num_again = sum(count - 1 for count in counts[0].values())
    moves = []
    if way.consumption is Consumption.UPDATE:
        moves.append("update-in-backward")
    if way.num_microbatches > 1:
        sizes = " + ".join(
            f"{count} x {part.num_rows} rows"
            for part, count in zip(way.parts, way.counts, strict=True)
        )
        moves.append(f"{way.num_microbatches} microbatches ({sizes})")
    if way.rewriting.packs:
        moves.append("masks and indices packed")
    if way.rewriting.head_chunks > 1:
        moves.append(f"loss head in {way.rewriting.head_chunks} chunks")
    for kind, count in way.layers_in_chunks.items():
        layers = f"{count} {kind}s" if count > 1 else f"1 {kind}"
        moves.append(f"{layers} in {way.rewriting.layer_chunks} chunks")
    num_states = sum(1 for named in way.streaming.states.values() if named)
    if num_states:
        moves.append(f"optimizer state of {num_states} parameters offloaded between updates")
    if way.streaming.parameters:
        num_streamed = sum(isinstance(t, nn.Parameter) for t in way.streaming.parameters)
        moves.append(
            f"parameters streamed: {num_streamed} of {way.num_parameters}, "
            f"{format_bytes(way.streaming.parameter_bytes)}"
        )
    stored = set(way.parts[0].step.joint.graph.stored)
    num_offloaded = sum(buffer not in stored for buffer in way.written_buffers)
    if num_offloaded:
        moves.append(f"{num_offloaded} activations offloaded")
    if num_again:
        moves.append(f"{num_again} operations recomputed")
    return moves
