"""One training step as data: graph, schedule, timeline, plan. Standard library and numpy only."""

from packlight.step.builder import GraphBuilder
from packlight.step.machine import RANKS, Lane, Machine, Memory, Speed
from packlight.step.profile import StepMemory, StepProfile
from packlight.step.schedule import (
    Action,
    Instruction,
    LaneRun,
    LaneTimeline,
    Limit,
    Plan,
    Reason,
    Schedule,
    Termination,
    Timeline,
)
from packlight.step.simulate import live_after_forward, simulate
from packlight.step.transfers import with_transfers
from packlight.step.types import (
    Buffer,
    BufferKind,
    Operation,
    OperationKind,
    Phase,
    StepGraph,
)

__all__ = [
    "RANKS",
    "Action",
    "Buffer",
    "BufferKind",
    "GraphBuilder",
    "Instruction",
    "Lane",
    "LaneRun",
    "LaneTimeline",
    "Limit",
    "Machine",
    "Memory",
    "Operation",
    "OperationKind",
    "Phase",
    "Plan",
    "Reason",
    "Schedule",
    "Speed",
    "StepGraph",
    "StepMemory",
    "StepProfile",
    "Termination",
    "Timeline",
    "live_after_forward",
    "simulate",
    "with_transfers",
]
