"""A schedule of one step judged for the same step at other sizes: what it holds there, how long."""

from __future__ import annotations

from dataclasses import replace

from packlight.capture.whole_step import WholeStep
from packlight.moves.draft import Draft
from packlight.planner.plain import plain_schedule
from packlight.step import Limit, Plan, Termination, simulate


def judged(old: Plan, step: WholeStep, draft: Draft) -> Plan:
    """Return a plan with the same schedule for a step at other sizes.

    Raises:
        ScheduleError: it is no schedule of that step.
    """
    graph = step.joint.graph
    timeline = simulate(graph, old.schedule, draft.machine)
    here = graph.without_transfers()
    plain = simulate(here, plain_schedule(here), draft.machine)
    return replace(
        old,
        peak_bytes=timeline.peak_bytes,
        seconds=timeline.seconds,
        plain_seconds=plain.seconds,
        plain_peak_bytes=plain.peak_bytes,
        termination=Termination.at(timeline.seconds, plain.seconds, Limit.OTHER_SIZES),
    )
