"""A captured step: a `StepGraph` read from a joint FX graph, with the way back to its nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from packlight.capture.layouts import fake_arguments
from packlight.costs.measure import CallFacts
from packlight.step import StepGraph

CPU_GENERATOR_BYTES = 5056


@dataclass
class JointStep:
    """A captured step: the data to plan with, and what the runtime needs to emit graphs from it.

    Attributes:
        graph: the step as data.
        module: the joint FX graph that it was read from.
        node_of_operation: the FX node that a computation calls (for pseudo operations, the node
            whose generator state, tangent or snapshot they stand for).
        root_of_buffer: the FX node whose value owns the buffer's whole storage.
        buffer_of_node: the buffer behind each tensor-valued node.
        sources: for nodes that are views or items, True.
        overwritten_argument: (operation, read buffer) -> index of the tensor argument to overwrite.
        primals, tangents: placeholders in order.
        forward_results, backward_results: what the two graphs must return (nodes, None, constants).
        rng_state_of: random operation -> the buffer with the generator's state before it.
        facts: what was observed of each computation's call, None for pseudo operations.
    """

    graph: StepGraph
    module: fx.GraphModule
    node_of_operation: list[fx.Node]
    root_of_buffer: list[fx.Node | None]
    buffer_of_node: dict[fx.Node, int]
    folded: set[fx.Node]
    overwritten_argument: dict[tuple[int, int], int]
    primals: list[fx.Node]
    tangents: list[fx.Node]
    forward_results: list[Any]
    backward_results: list[Any]
    rng_state_of: dict[int, int]
    facts: list[CallFacts | None]

    @property
    def device(self) -> torch.device:
        """Where the step runs: the first accelerator among its inputs, else the CPU."""
        devices = [
            t.device for n in self.primals if isinstance(t := n.meta.get("val"), torch.Tensor)
        ]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

    def call(self, operation: int) -> tuple[torch._ops.OpOverload, Any, Any]:
        """Return the call behind an operation: target and arguments with fake tensors."""
        node = self.node_of_operation[operation]
        return node.target, *fake_arguments(node)  # type: ignore[return-value]

    def with_seconds(self, seconds: dict[int, float]) -> JointStep:
        """Return the step with other durations of some operations."""
        computations = (
            replace(o, seconds=seconds.get(o.id, o.seconds)) for o in self.graph.computations
        )
        return replace(self, graph=self.graph.with_computations(computations))
