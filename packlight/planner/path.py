"""What happened in a step that breaks: sections of pieces, and the Python between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packlight.planner.plain import schedule_from_order
from packlight.step import OperationKind, Plan, Schedule, StepGraph


@dataclass(frozen=True)
class PieceRun:
    """One run of a piece: its forward and, if it comes to that, its backward.

    Attributes:
        graph: of the piece.
        shared: buffers of it whose storages other pieces or Python may hold, too (results,
            gradients, and inputs that a piece has made): buffer -> storage.
    """

    graph: StepGraph
    shared: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Section:
    """The forward or the backward of a run.

    Attributes:
        run: which.
        is_forward: which of the two.
    """

    run: int
    is_forward: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """What Python does before a section, or after the last one.

    Attributes:
        held_bytes: what it holds when it ends, shared storages aside.
        peak_bytes: the most above what there is when it begins.
        holds: the shared storages that somebody outside of pieces holds when it ends.
    """

    held_bytes: int
    peak_bytes: int
    holds: frozenset[int]


@dataclass(frozen=True)
class Path:
    """What happened in one step.

    Attributes:
        runs: of pieces, in the order of their forwards.
        sections: in order.
        gaps: one before each section, and one after the last.
    """

    runs: tuple[PieceRun, ...]
    sections: tuple[Section, ...]
    gaps: tuple[Gap, ...]


# The operations of one run in order: those of its forward, those of its backward.
Order = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class PathPlan:
    """How the pieces of a path run.

    Attributes:
        orders: of each run.
        plan: of the path as one graph.
    """

    orders: tuple[Order, ...]
    plan: Plan


def order_of(graph: StepGraph, schedule: Schedule) -> Order:
    """Return the order of a piece's own schedule."""
    instructions = schedule.instructions
    forward = Schedule(instructions[: schedule.num_forward], schedule.num_forward)
    backward = Schedule(instructions[schedule.num_forward :], 0)
    starts = tangents(graph)
    return tuple(forward.runs()), tuple(run for run in backward.runs() if run not in starts)


def piece_schedule(graph: StepGraph, order: Order) -> Schedule:
    """Return a piece's schedule that runs its operations in an order."""
    forward, backward = order
    return schedule_from_order(graph, (*forward, *tangents(graph), *backward), len(forward))


def tangents(graph: StepGraph) -> tuple[int, ...]:
    """Return the operations that stand for the gradients a piece's backward starts from."""
    return tuple(o.id for o in graph.operations if o.kind is OperationKind.TANGENT)
