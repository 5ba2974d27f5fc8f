"""One training step as data: graph, schedule, timeline, plan. Standard library and numpy only."""

from packlight.step.builder import GraphBuilder
from packlight.step.machine import Lane, Machine, Memory, Speed
from packlight.step.profile import StepMemory, StepProfile
from packlight.step.schedule import (
    Action,
    Instruction,
    LaneRun,
    LaneTimeline,
    Plan,
    PlanStatus,
    Schedule,
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
    "Action",
    "Buffer",
    "BufferKind",
    "GraphBuilder",
    "Instruction",
    "Lane",
    "LaneRun",
    "LaneTimeline",
    "Machine",
    "Memory",
    "Operation",
    "OperationKind",
    "Phase",
    "Plan",
    "PlanStatus",
    "Schedule",
    "Speed",
    "StepGraph",
    "StepMemory",
    "StepProfile",
    "Timeline",
    "live_after_forward",
    "simulate",
    "with_transfers",
]
