"""A graph that the backend was given, planned: as it is, or in fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from packlight.capture.joint import JointStep
from packlight.capture.pieces import Shape
from packlight.capture.read_joint import Read
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError
from packlight.moves.fuse.move import Fuse, FuseExactly
from packlight.moves.move import ROUNDING_MARGIN, Effect
from packlight.planner import lower_bound_seconds, plan_schedule
from packlight.search.rehearse import with_estimated_seconds
from packlight.step import Limit, Machine, Plan, StepGraph, Termination, simulate

# Recomputation is always made, offloading where there is a directory for it.
KNOWN_MOVES: dict[str, type[Fuse]] = {move.name: move for move in (Fuse, FuseExactly)}


def fastest_form(
    step: JointStep,
    names: Iterable[str],
    read: Read,
    profiler: CallProfiler,
    planned: Callable[[JointStep], tuple[JointStep, Plan]],
) -> tuple[JointStep, Plan]:
    """Return a step, as it is or as a move makes it, with its plan; the fastest that fits.

    Args:
        step: as it was read.
        names: of moves, keys of `KNOWN_MOVES`.
        read: reads the step's joint graph, and what is made of it.
        profiler: what was seen of its calls.
        planned: returns a step, measured anew, and its plan.

    Raises:
        InfeasibleBudgetError: no form fits; of that which needs least.
        OptionError: nothing can be compiled here.
    """
    errors: list[InfeasibleBudgetError] = []
    found: list[tuple[float, JointStep, Plan]] = []

    def look_at(form: JointStep, margin: float) -> None:
        try:
            form, plan = planned(form)
        except InfeasibleBudgetError as error:
            errors.append(error)
        else:
            found.append((margin * plan.seconds, form, plan))

    look_at(step, 1.0)
    for name in names:
        move = KNOWN_MOVES[name]
        form = with_estimated_seconds(move.fused_step(step, read, profiler), profiler)
        look_at(form, ROUNDING_MARGIN if move.effect is Effect.REORDERS_SUMS else 1.0)
    if not found:
        raise min(errors, key=lambda error: error.smallest_bytes)
    _, step, plan = min(found, key=lambda one: one[0])
    return step, plan


def fused_form(names: Iterable[str]) -> Shape | None:
    """Return what rewrites pieces of a step that breaks, None where nothing is asked for.

    How a piece is planned depends on the others, so each has one form: in those kernels that are no
    slower than their calls.

    Args:
        names: of moves, keys of `KNOWN_MOVES`; the first one is made.
    """
    moves = [KNOWN_MOVES[name] for name in names]

    def form(step: JointStep, read: Read, profiler: CallProfiler) -> JointStep:
        return with_estimated_seconds(moves[0].fused_step(step, read, profiler), profiler)

    return form if moves else None


def replanned(
    graph: StepGraph, budget_bytes: int | None, earlier: Plan, machine: Machine | None
) -> Plan:
    """Return the faster of a new plan and an earlier one, under a graph's newly measured times."""
    timeline = simulate(graph, earlier.schedule, machine)
    try:
        plan = plan_schedule(graph, budget_bytes, machine)
    except InfeasibleBudgetError:  # the earlier search found what this one does not
        plan = None
    if plan is not None and plan.seconds <= timeline.seconds:
        return plan
    bound = lower_bound_seconds(graph, budget_bytes)
    return replace(
        earlier,
        seconds=timeline.seconds,
        plain_seconds=graph.seconds,
        termination=Termination.at(timeline.seconds, bound, Limit.MOVES),
        lane_seconds=timeline.lane_seconds,
        wait_seconds=timeline.wait_seconds,
    )
