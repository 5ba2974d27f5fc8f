"""Machines by hand, and the instructions that move a buffer on their lanes."""

from __future__ import annotations

from packlight.step import (
    Action,
    Instruction,
    Lane,
    Machine,
    Memory,
    OperationKind,
    Speed,
    StepGraph,
)


def lane(
    name: str, bytes_per_second: float, latency_seconds: float = 0.0,
    write_bytes_per_second: float | None = None, compute_share: float = 0.0, memory: str = "",
) -> Lane:
    """Return a lane to a memory, by default one of its own name."""
    write = Speed(write_bytes_per_second or bytes_per_second, latency_seconds)
    return Lane(
        name, memory or name, Speed(bytes_per_second, latency_seconds), write, compute_share
    )


def one_lane(
    bytes_per_second: float, latency_seconds: float = 0.0,
    write_bytes_per_second: float | None = None, compute_share: float = 0.0,
) -> Machine:
    """Return a machine with a disk."""
    return Machine.with_one_lane(
        lane("disk", bytes_per_second, latency_seconds, write_bytes_per_second, compute_share)
    )


def several_lanes(*lanes: Lane) -> Machine:
    """Return a machine with as many memories as its lanes reach, all of any size."""
    return Machine(tuple(Memory(name) for name in dict.fromkeys(x.memory for x in lanes)), lanes)


def _moved(graph: StepGraph, kind: OperationKind, buffer: int, lane: str | None) -> Instruction:
    for operation in graph.operations:
        ends = operation.reads if kind is OperationKind.WRITE else operation.creates
        if operation.kind is kind and ends == (buffer,) and lane in (None, operation.lane):
            return Instruction(Action.RUN, operation.id)
    raise LookupError(f"no {kind} of buffer {buffer} on {lane or 'any lane'}")


def write(graph: StepGraph, buffer: int, lane: str | None = None) -> Instruction:
    """Return the instruction that writes a buffer of the device to another memory."""
    return _moved(graph, OperationKind.WRITE, buffer, lane)


def read(graph: StepGraph, buffer: int, lane: str | None = None) -> Instruction:
    """Return the instruction that reads it back."""
    return _moved(graph, OperationKind.READ, buffer, lane)
