"""Where the bytes of a step are, and what a plan does, as rows for tables. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packlight.planner import plain_schedule
from packlight.step import BufferKind, Schedule, StepGraph, live_after_forward, simulate
from packlight.units import format_bytes

if TYPE_CHECKING:
    from packlight.step.profile import StepMemory, StepProfile

MAX_LAYERS = 30
OUTSIDE = "(no module)"


@dataclass(frozen=True)
class PeakBreakdown:
    """The whole-step peak of the plain step, by what holds it; the fields add up to the peak."""

    parameter_bytes: int
    state_bytes: int
    input_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    gradient_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Everything together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class LayerRow:
    """One layer's bytes: parameters, gradients with optimizer state, activations at the peak."""

    layer: str
    parameter_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All three kinds together."""
        return self.parameter_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class PlanRow:
    """What a plan does in one layer, or in several layers alike.

    Attributes:
        layer: module path; a `*` stands for the numbers of equal layers.
        num_layers: how many of them.
        kept_bytes: per layer, created in the forward and kept for the backward.
        kept: operations whose results are kept.
        recomputed: (operation, how often it runs again), in order.
        extra_seconds: per layer, spent on running operations again.
    """

    layer: str
    num_layers: int
    kept_bytes: int
    kept: tuple[str, ...]
    recomputed: tuple[tuple[str, int], ...]
    extra_seconds: float


def peak_breakdown(profile: StepProfile) -> PeakBreakdown:
    """Return what is in memory when forward and backward of the plain step peak."""
    graph, memory = profile.graph, profile.memory
    timeline = simulate(graph, plain_schedule(graph))
    gradient_bytes = sum(
        graph.buffers[b].bytes
        for b in timeline.peak_buffers
        if graph.buffers[b].kind is BufferKind.GRADIENT
    )
    live_bytes = sum(graph.buffers[b].bytes for b in timeline.peak_buffers)
    return PeakBreakdown(
        parameter_bytes=memory.parameter_bytes,
        state_bytes=memory.state_bytes,
        input_bytes=memory.input_bytes,
        optimizer_bytes=memory.optimizer_bytes,
        activation_bytes=live_bytes - gradient_bytes,
        gradient_bytes=gradient_bytes,
        workspace_bytes=timeline.peak_bytes - live_bytes,
    )


def layer_rows(
    profile: StepProfile, parameter_bytes: Mapping[str, int], max_layers: int = MAX_LAYERS
) -> list[LayerRow]:
    """Return the three kinds of memory by layer, in the order of the forward.

    Args:
        profile: the step.
        parameter_bytes: bytes of each parameter by its dotted name.
        max_layers: layers are shown as deep as this many rows allow.

    Gradients and optimizer state are shared out in proportion to parameters.
    """
    graph, memory = profile.graph, profile.memory
    timeline = simulate(graph, plain_schedule(graph))
    creator = {b: operation.layer for operation in graph.computations for b in operation.creates}
    activations: dict[str, int] = {}
    for buffer in timeline.peak_buffers:
        if graph.buffers[buffer].kind is not BufferKind.GRADIENT:
            layer = creator[buffer]
            activations[layer] = activations.get(layer, 0) + graph.buffers[buffer].bytes
    parameters: dict[str, int] = {}
    for name, size in parameter_bytes.items():
        layer = name.rpartition(".")[0]
        parameters[layer] = parameters.get(layer, 0) + size
    order = dict.fromkeys(operation.layer for operation in graph.computations)
    names = [layer for layer in order if layer in activations or layer in parameters]
    names += [layer for layer in (*parameters, *activations) if layer not in order]
    depth = sensible_depth(names, max_layers)
    trained_bytes = memory.gradient_bytes + memory.optimizer_bytes
    all_parameter_bytes = max(1, sum(parameters.values()))
    sums: dict[str, list[int]] = {}
    for layer in names:
        entry = sums.setdefault(layer_at_depth(layer, depth), [0, 0])
        entry[0] += parameters.get(layer, 0)
        entry[1] += activations.get(layer, 0)
    return [
        LayerRow(layer, held, round(trained_bytes * held / all_parameter_bytes), activation)
        for layer, (held, activation) in sums.items()
    ]


def plan_rows(
    graph: StepGraph, schedule: Schedule, max_layers: int = MAX_LAYERS
) -> list[PlanRow]:
    """Return what is kept and what runs again, layer by layer; equal layers share a row."""
    reruns = graph.reruns(schedule)
    kept = live_after_forward(graph, schedule)
    operations = graph.operations[: graph.num_forward]
    depth = sensible_depth((o.layer for o in operations), 10 * max_layers)
    layers: dict[str, PlanRow] = {}
    for operation in operations:
        name = layer_at_depth(operation.layer, depth)
        row = layers.get(name, PlanRow(name, 1, 0, (), (), 0.0))
        kept_bytes = sum(graph.buffers[b].bytes for b in operation.creates if b in kept)
        again = reruns.get(operation.id, 0)
        label = operation.short_name
        layers[name] = PlanRow(
            name,
            1,
            row.kept_bytes + kept_bytes,
            (*row.kept, label) if kept_bytes else row.kept,
            (*row.recomputed, (label, again)) if again else row.recomputed,
            row.extra_seconds + again * operation.seconds,
        )
    groups: dict[tuple[object, ...], list[PlanRow]] = {}
    for row in layers.values():
        if row.kept_bytes or row.recomputed:
            pattern = re.sub(r"\d+", "*", row.layer)
            groups.setdefault((pattern, row.kept_bytes, row.kept, row.recomputed), []).append(row)
    return [
        PlanRow(
            rows[0].layer if len(rows) == 1 else _common_name([row.layer for row in rows]),
            len(rows),
            rows[0].kept_bytes,
            rows[0].kept,
            rows[0].recomputed,
            sum(row.extra_seconds for row in rows) / len(rows),
        )
        for rows in groups.values()
    ]


def layer_at_depth(layer: str, depth: int) -> str:
    """Return the first parts of a module path.

    >>> layer_at_depth("transformer.h.3.attn.proj", 3), layer_at_depth("", 3)
    ('transformer.h.3', '(no module)')
    """
    return ".".join(layer.split(".")[:depth]) if layer else OUTSIDE


def sensible_depth(layers: Iterable[str], max_layers: int) -> int:
    """Return the greatest depth at which the module paths make no more than `max_layers` rows.

    >>> sensible_depth(["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "head"], max_layers=3)
    2
    """
    paths = [layer.split(".") for layer in set(layers)]
    depth = 1
    while depth < max((len(path) for path in paths), default=1):
        if len({tuple(path[: depth + 1]) for path in paths}) > max_layers:
            break
        depth += 1
    return depth


def _common_name(layers: list[str]) -> str:
    """Return the names of equal layers as one: the numbers that differ become ranges.

    >>> _common_name(["h.0.mlp", "h.1.mlp", "h.2.mlp"]), _common_name(["h.0.mlp", "h.2.mlp"])
    ('h.0-2.mlp', 'h.0,2.mlp')
    """
    columns = list(zip(*(re.findall(r"\d+|\D+", layer) for layer in layers), strict=True))
    return "".join(_ranges(column) if len(set(column)) > 1 else column[0] for column in columns)


def _ranges(numbers: Iterable[str]) -> str:
    values = sorted({int(number) for number in numbers})
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ",".join(shown) if len(shown) <= 4 else f"{values[0]}..{values[-1]}"


def headline(memory: StepMemory, allocated_peak_bytes: int) -> str:
    """Return the whole-step peak and its two parts in words."""
    whole = memory.peak_bytes(allocated_peak_bytes)
    return (
        f"{format_bytes(whole)} = {format_bytes(memory.resident_bytes)} there before the step "
        f"(parameters, optimizer state, batch) + {format_bytes(whole - memory.resident_bytes)} "
        "allocated by it"
    )


@dataclass(frozen=True, slots=True)
class NetworkRow:
    """Reductions that follow one another.

    Attributes:
        num_reductions: how many.
        num_bytes: that they add up.
        start_seconds, end_seconds: when, from the start of the step.
    """

    num_reductions: int
    num_bytes: int
    start_seconds: float
    end_seconds: float


def network_rows(
    profile: StepProfile, schedule: Schedule, most_rows: int = 16
) -> list[NetworkRow]:
    """Return what a schedule has on the network, in order, in at most so many rows."""
    graph = profile.graph
    timeline = simulate(graph, schedule, profile.machine)
    names = {operation.lane for operation in graph.reductions}
    runs = [run for lane in timeline.lanes if lane.name in names for run in lane.runs]
    size = max(1, -(-len(runs) // most_rows))
    parts = [runs[start : start + size] for start in range(0, len(runs), size)]
    return [
        NetworkRow(
            len(part),
            sum(graph.buffers[graph.operations[run.operation].creates[0]].bytes for run in part),
            part[0].start_seconds,
            part[-1].end_seconds,
        )
        for part in parts
    ]
