"""A way that was saved, bound to the step that is here: checked before anything runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from packlight.errors import ScheduleError, WayError
from packlight.moves.data_parallel import DataParallel
from packlight.moves.move import Effect, Stage
from packlight.moves.registry import techniques_of
from packlight.moves.stream.move import Offload
from packlight.search.plan_way import WayPlanner, environment
from packlight.search.ready import Ready, ReadyPart
from packlight.search.way import PartPlan, Way
from packlight.step import Machine, StepGraph, simulate
from packlight.step.digest import structure_digest
from packlight.units import format_bytes

FIND_ANEW = "leave way= out: the fastest way is then looked for"


def restored(way: Way, planner: WayPlanner) -> Ready:
    """Return a saved way ready to run, what it holds judged anew by `simulate`.

    Nothing is searched or rehearsed; the loss is traced, and calls whose facts no cache has are
    observed.

    Raises:
        WayError: it is one for another step, torch, device, budget or set of moves; says which.
    """
    here = environment(planner.costs.device)
    for what in ("torch_version", "device_name"):
        saved, found = getattr(way.environment, what), getattr(here, what)
        if saved != found:
            raise WayError(what.partition("_")[0], saved, found, FIND_ANEW)
    _check_moves(way, planner)
    moves = tuple(move for move in way.moves if move.stage is not Stage.LOSS)
    sizes = Counter(planner.sizes(moves))
    if {part.num_rows: part.count for part in way.parts} != dict(sizes):
        saved_rows = [f"{part.count} x {part.num_rows} rows" for part in way.parts]
        raise WayError(
            "step", ", ".join(saved_rows), ", ".join(f"{n} x {s} rows" for s, n in sizes.items()),
            FIND_ANEW,
        )
    memory = planner.memory(planner.draft(moves))
    parts = tuple(_restored_part(part, way, planner) for part in way.parts)
    plans = tuple(
        replace(saved, plan=part.plan) for saved, part in zip(way.parts, parts, strict=True)
    )
    way = replace(way, parts=plans, memory=memory, machine=planner.draft(moves).machine)
    budget_bytes = planner.request.budget_bytes
    if budget_bytes is not None and way.peak_bytes > budget_bytes:
        raise WayError(
            "budget", f"it needs {format_bytes(way.peak_bytes)} ({way.peak_bytes} bytes)",
            f"{format_bytes(budget_bytes)} ({budget_bytes} bytes)", FIND_ANEW,
        )
    return planner.bound(way, parts)


def _check_moves(way: Way, planner: WayPlanner) -> None:
    request = planner.request
    loss_moves = tuple(move for move in way.moves if move.stage is Stage.LOSS)
    if loss_moves != planner.loss_moves:
        raise WayError(
            "precision", [str(m) for m in loss_moves], [str(m) for m in planner.loss_moves],
            "pass the allow= that it was made with, or " + FIND_ANEW,
        )
    for move in way.moves:
        is_named = move.stage is Stage.LOSS or move.name in request.moves
        if move.effect is Effect.APPROXIMATE:
            is_named = is_named and not request.allow.isdisjoint(techniques_of(type(move)))
        if not is_named:
            raise WayError(
                "set of moves", f"it makes {move.name!r}", "among those that may be made",
                f"moves= has to name {move.name!r}, or " + FIND_ANEW,
            )
    is_parallel = way.made(DataParallel) is not None
    if is_parallel is not (request.num_ranks is not None):
        words = ["one rank", "several ranks"]
        raise WayError("number of ranks", words[is_parallel], words[not is_parallel], FIND_ANEW)
    if way.made(Offload) is not None and planner.base.offered is None:
        raise WayError(
            "set of moves", "it offloads", "given where to", "pass offload_directory="
        )


def _restored_part(saved: PartPlan, way: Way, planner: WayPlanner) -> ReadyPart:
    moves = tuple(move for move in way.moves if move.stage is not Stage.LOSS)
    draft = planner.draft(moves, saved.num_rows)
    step = planner.completed(draft)
    graph = step.joint.graph
    if structure_digest(graph) != saved.graph_digest:
        raise WayError(
            "step", f"digest {saved.graph_digest[:12]}", structure_digest(graph)[:12], FIND_ANEW
        )
    peak_bytes = _peak_bytes(saved, draft.machine, graph)
    return planner.part(draft, step, replace(saved.plan, peak_bytes=peak_bytes))


def _peak_bytes(saved: PartPlan, machine: Machine | None, graph: StepGraph) -> int:
    """Return the peak of a saved schedule, which must be one of this graph."""
    try:
        return simulate(graph, saved.plan.schedule, machine).peak_bytes
    except (ScheduleError, IndexError) as error:
        raise WayError("step", "its schedule", f"one of this step: {error}", FIND_ANEW) from error
