"""What a prepared step tells about itself."""

from __future__ import annotations

import sys

import torch

from packlight.moves.precision import Autocast
from packlight.moves.request import Request
from packlight.planner.accounts import peak_by_kind
from packlight.planner.explain import operation_at
from packlight.search.ready import Ready
from packlight.search.way import Way
from packlight.step import simulate
from packlight.units import format_bytes, format_seconds
from packlight.updates.accounting import tensors_bytes
from packlight.updates.several import parts_of


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
        "beside the step": memory.beside_bytes,
        **peak_by_kind(graph, timeline),
    }
    lines = [f"{name:<22}{format_bytes(size):>12}" for name, size in kinds.items() if size]
    lines += _of_sparse_weights(request)
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


def _of_sparse_weights(request: Request) -> list[str]:
    """Return a line about what sparse weights hold of that; none where there are none."""
    module = sys.modules.get("packlight.sparse.weight")  # whose model has some has imported it
    weights = [] if module is None else [
        part for part in request.model.modules() if isinstance(part, module.SparseWeight)
    ]
    if not weights:
        return []
    held = [state for part in parts_of(request.optimizer) for state in [part.state]]
    moments = tensors_bytes(
        value
        for weight in weights
        for state in held
        for value in state.get(weight.values, {}).values()
        if isinstance(value, torch.Tensor)
    )
    share = sum(w.num_nonzeros for w in weights) / sum(w.numel() for w in weights)
    values, index = (sum(t.nbytes for t in ts) for ts in (
        [w.values for w in weights], [b for w in weights for b in w.buffers()],
    ))
    state_words = f", optimizer state {format_bytes(moments)}" if moments else ""
    return [
        f"{'  of these, sparse':<22}{share:>12.1%}  values {format_bytes(values)}, index "
        f"{format_bytes(index)}{state_words}"
    ]


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
