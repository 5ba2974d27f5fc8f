"""What the report shows, as numbers: curves over the step, the peak's contents, layers.

Bytes come from `simulate`; this module only groups and names them. No torch, no matplotlib.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packlight.planner.explain import operation_at
from packlight.planner.plain import plain_schedule
from packlight.step import (
    Action,
    BufferKind,
    Machine,
    Operation,
    OperationKind,
    Phase,
    Plan,
    Schedule,
    StepGraph,
    Timeline,
    live_after_forward,
    simulate,
)

if TYPE_CHECKING:
    from packlight.step.profile import StepMemory

OUTSIDE = "(outside of modules)"
_MAX_CURVE_POINTS = 4000


@dataclass(frozen=True)
class PlainStep:
    """A step without recomputation and without transfers, to compare a plan with.

    Attributes:
        graph: its computations alone; nothing of it rests in another memory.
        schedule: every operation once.
        resting_parameter_bytes, resting_state_bytes: what is in memory throughout, and in the
            planned step only at times.
    """

    graph: StepGraph
    schedule: Schedule
    resting_parameter_bytes: int
    resting_state_bytes: int

    @property
    def resting_bytes(self) -> int:
        """Both together."""
        return self.resting_parameter_bytes + self.resting_state_bytes

    @property
    def timeline(self) -> Timeline:
        """What it costs."""
        return simulate(self.graph, self.schedule)


def plain_step(graph: StepGraph) -> PlainStep:
    """Return the plain step behind a graph; ids of operations and buffers are the same."""
    resting = {BufferKind.PARAMETER: 0, BufferKind.STATE: 0}
    for b in graph.resting:
        resting[graph.buffers[b].kind] += graph.buffers[b].bytes
    resident = graph.without_transfers().with_reductions_in_line()
    return PlainStep(resident, plain_schedule(resident), *resting.values())


@dataclass(frozen=True)
class Curve:
    """Memory over one step.

    Attributes:
        seconds: of the corners of the curve, in order.
        bytes: at those corners, without resident bytes.
        forward_seconds: when the forward ends.
        peak_seconds: the middle of the operation at which the peak is, or of a wait there.
        peak_bytes: the peak, without resident bytes.
        peak_name: that operation and its layer.
    """

    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    forward_seconds: float
    peak_seconds: float
    peak_bytes: int
    peak_name: str

    @property
    def total_seconds(self) -> float:
        """Duration of the whole step."""
        return self.seconds[-1] if self.seconds else 0.0


def curve(graph: StepGraph, schedule: Schedule, machine: Machine | None = None) -> Curve:
    """Return a schedule's memory over time; an operation holds its workspace while it runs.

    Args:
        graph: the step.
        schedule: any of its schedules.
        machine: with the lanes of its transfers, if it has some.
    """
    timeline = simulate(graph, schedule, machine)
    corners: list[tuple[float, int]] = []
    now, held = 0.0, 0
    forward_seconds, peak_seconds, peak_name = 0.0, 0.0, ""
    for index, instruction in enumerate(schedule.instructions):
        done, after = timeline.done_seconds[index], timeline.live_bytes[index]
        start, during, kind = done, after, None
        if instruction.action is Action.RUN:
            operation = graph.operations[instruction.target]
            kind = operation.kind
            if not operation.lane:
                start = max(now, done - operation.seconds)  # rounding may put it before
                during = max(held, after + operation.workspace_bytes)
        if start > now:  # it waits for a lane, with what is there before
            corners += [(now, held), (start, held)]
        if kind is not None and kind is not OperationKind.WRITE:
            corners += [(start, during), (done, during)]
        if index == timeline.peak_index:
            at = operation_at(graph, schedule, index)
            peak_seconds, peak_name = (start + done) / 2, place_name(at)
            if kind is OperationKind.READ:
                peak_name = f"a read before {peak_name}"
        now, held = done, after
        if index < schedule.num_forward:
            forward_seconds = now
    if timeline.live_bytes:
        corners += [(now, held), (timeline.seconds, held)]
    corners = _thin(corners)
    return Curve(
        seconds=tuple(seconds for seconds, _ in corners),
        bytes=tuple(held for _, held in corners),
        forward_seconds=forward_seconds,
        peak_seconds=peak_seconds,
        peak_bytes=timeline.peak_bytes,
        peak_name=peak_name,
    )


def _thin(corners: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Keep the highest and the lowest corner of each narrow slice of time, so no peak is lost."""
    if len(corners) <= _MAX_CURVE_POINTS or corners[-1][0] <= 0:
        return corners
    num_slices = _MAX_CURVE_POINTS // 4
    slices: dict[int, list[int]] = defaultdict(list)
    for position, (seconds, _) in enumerate(corners):
        slices[int(seconds / corners[-1][0] * num_slices)].append(position)
    kept: set[int] = {0, len(corners) - 1}
    for positions in slices.values():
        kept.update((positions[0], positions[-1]))
        kept.add(max(positions, key=lambda p: corners[p][1]))
        kept.add(min(positions, key=lambda p: corners[p][1]))
    return [corners[position] for position in sorted(kept)]


def place_name(operation: Operation) -> str:
    """Return where an operation is, for people: "lm_head backward (mm)"."""
    name = operation.short_name
    if not operation.layer:
        return name if operation.phase is Phase.FORWARD else f"{name} ({operation.phase.value})"
    phase = "" if operation.phase is Phase.FORWARD else f" {operation.phase.value}"
    return f"{operation.layer}{phase} ({name})"


def whole_step_bytes(memory: StepMemory | None, allocated_bytes: int) -> int:
    """Return a whole step's peak: resident bytes, and the plan's peak or the update's."""
    return allocated_bytes if memory is None else memory.peak_bytes(allocated_bytes)


def peak_by_kind(graph: StepGraph, timeline: Timeline) -> dict[str, int]:
    """Return the bytes live at the peak by what they are; they add up to the peak."""
    parameter_gradients = graph.parameter_gradients()
    groups = {
        "activations": 0,
        "activation gradients": 0,
        "parameter gradients": 0,
        "streamed parameters": 0,
        "streamed optimizer state": 0,
        "outputs": 0,
        "workspace": timeline.peak_workspace_bytes,
    }
    for b in timeline.peak_buffers:
        buffer = graph.buffers[b]
        if buffer.kind is BufferKind.OUTPUT:
            group = "outputs"
        elif buffer.kind is BufferKind.GRADIENT:
            is_final = b in parameter_gradients
            group = "parameter gradients" if is_final else "activation gradients"
        elif buffer.kind is BufferKind.PARAMETER:
            group = "streamed parameters"
        elif buffer.kind is BufferKind.STATE:
            group = "streamed optimizer state"
        else:
            group = "activations"
        groups[group] += buffer.bytes
    return groups


def peak_by_layer(graph: StepGraph, timeline: Timeline, groups: dict[str, str]) -> dict[str, int]:
    """Return the bytes live at the peak by the layer that made them, without workspace.

    Args:
        graph: the step.
        timeline: of the schedule in question.
        groups: the name to show for each layer, see `layer_groups`.
    """
    layer_of = home_layers(graph)
    found: dict[str, int] = defaultdict(int)
    for b in timeline.peak_buffers:
        found[groups[layer_of[b]]] += graph.buffers[b].bytes
    return dict(found)


def home_layers(graph: StepGraph) -> dict[int, str]:
    """Return the layer of each buffer: where it is made, or first used if it is there before."""
    layers: dict[int, str] = {}
    for operation in graph.computations:
        for b in (*operation.creates, *operation.touches):
            layers.setdefault(b, operation.layer)
    return layers


def layer_groups(graph: StepGraph, max_groups: int) -> dict[str, str]:
    """Return for each layer the path to show: as deep as `max_groups` different paths allow."""
    layers = {operation.layer for operation in graph.computations}
    depth = max((layer.count(".") + 1 for layer in layers), default=1)
    while True:
        groups = {layer: ".".join(layer.split(".")[:depth]) or OUTSIDE for layer in layers}
        if depth <= 1 or len(set(groups.values())) <= max_groups:
            return groups
        depth -= 1


@dataclass
class LayerAccount:
    """What a plan does with one layer.

    Attributes:
        layer: its path.
        plain_bytes: made by its forward and in memory when the plain forward ends.
        kept_bytes: the same when the planned forward ends.
        written_bytes: of it and of its optimizer state, written to other memories in one step.
        num_reruns: how many more operations run than in the plain step.
        rerun_seconds: what they cost.
        reruns: how often each operation runs again, by name.
    """

    layer: str
    plain_bytes: int = 0
    kept_bytes: int = 0
    written_bytes: int = 0
    num_reruns: int = 0
    rerun_seconds: float = 0.0
    reruns: dict[str, int] | None = None


def layer_accounts(
    graph: StepGraph, plain: Schedule, plan: Plan | None, max_layers: int = 48
) -> list[LayerAccount]:
    """Return what the plan keeps, offloads and recomputes in each layer, in the forward's order."""
    groups = layer_groups(graph, max_layers)
    accounts: dict[str, LayerAccount] = {}
    for operation in graph.computations:
        name = groups[operation.layer]
        accounts.setdefault(name, LayerAccount(name, reruns={}))
    account_of = {b: accounts[groups[layer]] for b, layer in home_layers(graph).items()}
    for b in live_after_forward(graph, plain):
        account_of[b].plain_bytes += graph.buffers[b].bytes
    if plan is not None:
        for b in live_after_forward(graph, plan.schedule):
            account_of[b].kept_bytes += graph.buffers[b].bytes
        for b in graph.written(plan.schedule):
            account_of[b].written_bytes += graph.buffers[b].bytes
        for op, again in graph.reruns(plan.schedule).items():
            operation = graph.operations[op]
            account = accounts[groups[operation.layer]]
            account.num_reruns += again
            account.rerun_seconds += again * operation.seconds
            assert account.reruns is not None
            name = operation.short_name
            account.reruns[name] = account.reruns.get(name, 0) + again
    return list(accounts.values())
