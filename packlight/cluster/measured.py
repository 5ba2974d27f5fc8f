"""A captured step as a chain of layers: seconds as they were measured, choices as they are planned.

The forward is cut where few bytes cross (`planner/segments.py`), and each segment's Pareto front of
what it keeps against what it computes again is the front that the planner of one device uses. So
a stage of a pipeline is planned from the same leaves as a step on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from packlight.cluster.costs import Choice, Layer, pareto
from packlight.errors import OptionError
from packlight.planner.facts import Facts, Segment
from packlight.planner.segments import (
    backward_labels,
    build_segments,
    cut_points,
    reorder_backward,
)
from packlight.step import BufferKind, Phase, StepGraph
from packlight.step.profile import StepProfile

_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Chain:
    """A model whose layers' costs are known, for one size of microbatch.

    Attributes:
        layers: in order; parameters in elements of four bytes.
        rows: samples of a microbatch.
        static_bytes_per_parameter: parameters, gradients and optimizer state.
        update_seconds: of the optimizer, all parameters.
        where: the costs are from.
    """

    layers: tuple[Layer, ...]
    rows: int
    static_bytes_per_parameter: float
    update_seconds: float
    where: str = ""

    def static_bytes(self, parameters: int) -> int:
        """Return what so many parameters hold throughout."""
        return int(parameters * self.static_bytes_per_parameter)


def chain_of(profile: StepProfile, rows: int, max_layers: int = 48) -> Chain:
    """Return a captured step as a chain.

    Args:
        profile: of the step, nothing streamed or reduced.
        rows: samples of its batch.
        max_layers: into how many parts the forward is cut at most.

    Raises:
        OptionError: the step has transfers or reductions of its own.
    """
    graph, memory = profile.graph, profile.memory
    if graph.transfers or graph.reductions:
        raise OptionError("a step that is streamed or reduced already is no layer of a pipeline")
    parameters = memory.parameter_bytes // _ELEMENT_BYTES
    static = memory.parameter_bytes + memory.gradient_bytes + memory.optimizer_bytes
    return Chain(
        tuple(layers_of_graph(graph, max_layers)), rows, static / max(parameters, 1),
        sum(o.seconds for o in graph.computations if o.phase is Phase.UPDATE),
        profile.device_name,
    )


def layers_of_graph(graph: StepGraph, max_layers: int = 48) -> list[Layer]:
    """Return the parts of a step between cuts of its forward, with their Pareto fronts.

    What several parts carry through, such as a long skip connection, each of them counts.
    """
    facts = Facts(graph)
    cuts = cut_points(facts, max_layers)
    labels = backward_labels(facts, cuts)
    reordered, _ = reorder_backward(graph, labels)
    segments = build_segments(Facts(reordered), cuts, sorted(labels, reverse=True))
    seen: set[int] = set()
    layers = []
    for index, segment in enumerate(segments):
        behind = segments[index + 1].frontier_bytes if index + 1 < len(segments) else 0
        layers.append(_layer(reordered, segment, index, behind, seen))
    return layers


def _layer(
    graph: StepGraph, segment: Segment, index: int, output_bytes: int, seen: set[int]
) -> Layer:
    own = {
        b
        for i in segment.forward
        for b in graph.computations[i].reads
        if graph.buffers[b].kind is BufferKind.PARAMETER
    } - seen
    seen |= own
    backward = sum(
        graph.computations[i].seconds
        for i in segment.backward
        if graph.computations[i].phase is Phase.BACKWARD
    )
    choices = pareto(
        Choice(option.kept_bytes, option.extra_seconds, "kept" if not option.extra_seconds else
               f"{option.extra_seconds / max(segment.forward_seconds, 1e-12):.0%} again")
        for option in segment.options
    )
    peaks = [max(o.forward_peak_bytes, o.backward_peak_bytes) for o in segment.options]
    return Layer(
        f"part {index}", sum(graph.buffers[b].bytes for b in own) // _ELEMENT_BYTES,
        segment.forward_seconds, backward, 0.0, output_bytes, choices,
        workspace_bytes=max(peaks),
    )
