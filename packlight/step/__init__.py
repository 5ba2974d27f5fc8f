"""One training step as data: graph, schedule, timeline, plan. Standard library and numpy only."""

from packlight.step.profile import StepMemory, StepProfile
from packlight.step.simulate import live_after_forward, simulate
from packlight.step.types import (
    Action,
    Buffer,
    BufferKind,
    Cluster,
    Device,
    GraphBuilder,
    Instruction,
    Link,
    Operation,
    Phase,
    Plan,
    PlanStatus,
    Schedule,
    StepGraph,
    Timeline,
    Transfer,
)

__all__ = [
    "Action",
    "Buffer",
    "BufferKind",
    "Cluster",
    "Device",
    "GraphBuilder",
    "Instruction",
    "Link",
    "Operation",
    "Phase",
    "Plan",
    "PlanStatus",
    "Schedule",
    "StepGraph",
    "StepMemory",
    "StepProfile",
    "Timeline",
    "Transfer",
    "live_after_forward",
    "simulate",
]
