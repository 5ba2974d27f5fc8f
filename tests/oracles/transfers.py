"""What planners with transfers are held against: trying everything, and two plain ideas.

Nothing here shares code with the planner.
"""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import NamedTuple

from packlight.step import (
    Action,
    Buffer,
    BufferKind,
    Instruction,
    Machine,
    Operation,
    Phase,
    Schedule,
    StepGraph,
)
from tests.oracles.machines import read, write


class _State(NamedTuple):
    """What matters for what can still happen; times are counted from now.

    `far` says of each buffer that has a valid copy elsewhere in which memory it is.
    """

    first_runs: int
    live: frozenset[int]
    far: frozenset[tuple[int, str]]
    written_in: frozenset[tuple[int, int]]
    ready_in: frozenset[tuple[int, int]]
    free_in: tuple[int, ...]


def fastest_seconds_with_transfers(
    graph: StepGraph, budget_bytes: int, machine: Machine, max_states: int = 10**6
) -> float:
    """Return the seconds of the fastest schedule with transfers; infinity if there is none.

    Dijkstra over states, a move being one instruction; for a step of a few operations whose
    durations, and those of its transfers, are whole numbers. Each memory has one lane.
    """
    lanes = list(machine.lanes)
    place_of = {lane.memory: place for place, lane in enumerate(lanes)}
    home = {b: graph.buffers[there].memory for b, there in graph.resting.items()}
    resident = frozenset(b.id for b in graph.buffers if b.kind.is_resident) - set(home)
    size = [b.bytes for b in graph.buffers]
    computations = graph.computations
    last_needed = {b: len(computations) for b in graph.outputs}
    for operation in reversed(computations):
        for buffer in (*operation.reads, *operation.mutates):
            last_needed.setdefault(buffer, operation.id)
    pinned = frozenset(graph.forward_outputs) & frozenset(graph.outputs)
    end = len(computations)
    start = _State(
        0, frozenset(), frozenset(home.items()), frozenset(), frozenset(), (0,) * len(lanes)
    )
    best: dict[_State, int] = {start: 0}
    ties = count()
    queue = [(0, next(ties), start)]

    def held_bytes(live: frozenset[int]) -> int:
        return sum(size[b] for b in live)

    def reach(now: int, passed: int, state: _State) -> None:
        def later(times: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
            return frozenset((b, t - passed) for b, t in times if t > passed)

        state = state._replace(
            written_in=later(state.written_in), ready_in=later(state.ready_in),
            free_in=tuple(max(0, time - passed) for time in state.free_in),
        )
        if now + passed < best.get(state, 10**9):
            best[state] = now + passed
            heapq.heappush(queue, (now + passed, next(ties), state))

    def taken(state: _State, memory: str, seconds: float) -> tuple[int, tuple[int, ...]]:
        """Return when a memory's lane is done with one more transfer, and all lanes' times."""
        free_in = list(state.free_in)
        free_in[place_of[memory]] += round(seconds)
        return free_in[place_of[memory]], tuple(free_in)

    while queue:
        now, _, state = heapq.heappop(queue)
        if now > best[state]:
            continue
        assert len(best) < max_states, "too large to try everything"
        first_runs, live = state[:2]
        far = dict(state.far)
        written_in, ready_in = dict(state.written_in), dict(state.ready_in)
        if first_runs == end and live.issuperset(set(graph.outputs) - resident):
            if set(home) <= set(far) and live.isdisjoint(home):
                if max(state.free_in) == 0:
                    return float(now)
                reach(now, max(state.free_in), state)
                continue
        for buffer in live - pinned:
            if buffer not in home or buffer in far:
                wait = max(written_in.get(buffer, 0), ready_in.get(buffer, 0))
                reach(now, wait, state._replace(live=live - {buffer}))
            is_wanted = last_needed.get(buffer, -1) >= first_runs or buffer in home
            for lane in lanes if buffer not in far and is_wanted else ():
                if home.get(buffer, lane.memory) != lane.memory:
                    continue
                assert lane.write is not None
                done, free_in = taken(state, lane.memory, lane.write.seconds(size[buffer]))
                reach(now, 0, state._replace(
                    far=state.far | {(buffer, lane.memory)},
                    written_in=state.written_in | {(buffer, done)}, free_in=free_in,
                ))
        for buffer, memory in far.items():
            if buffer in live or last_needed.get(buffer, -1) < first_runs:
                continue
            if held_bytes(live | {buffer}) <= budget_bytes:
                speed = lanes[place_of[memory]].read
                assert speed is not None
                done, free_in = taken(state, memory, speed.seconds(size[buffer]))
                reach(now, 0, state._replace(
                    live=live | {buffer}, ready_in=state.ready_in | {(buffer, done)},
                    free_in=free_in,
                ))
        again = [o for o in computations[:first_runs] if o.can_recompute and o.creates]
        for operation in [*computations[first_runs : first_runs + 1], *again]:
            is_first = operation.id == first_runs
            if is_first and first_runs == graph.num_forward:
                if not live.issuperset(graph.forward_outputs):
                    continue
            touched = {*operation.reads, *operation.mutates}
            if not (live | resident).issuperset(touched) or live & set(operation.creates):
                continue
            after = live | set(operation.creates)
            if held_bytes(after) + operation.workspace_bytes > budget_bytes:
                continue
            wait = max([0, *(ready_in.get(b, 0) for b in touched),
                        *(written_in.get(b, 0) for b in operation.mutates)])
            reach(now, wait + round(operation.seconds), state._replace(
                first_runs=first_runs + is_first, live=after,
                far=frozenset(item for item in state.far if item[0] not in operation.mutates),
            ))
    return math.inf


def offload_only(graph: StepGraph, budget_bytes: int, machine: Machine) -> Schedule | None:
    """Return the plain step with the fewest, largest buffers sent away between uses that fit it.

    Naive on purpose: a buffer is written when it is made, freed after its last use before the
    longest gap between uses, and fetched just before the operation after it.
    """
    num = graph.num_computations
    resident = {b.id for b in graph.buffers if b.kind.is_resident}
    uses: dict[int, list[int]] = {}
    for operation in graph.computations:
        for buffer in (*operation.creates, *operation.reads):
            if buffer not in resident:
                uses.setdefault(buffer, []).append(operation.id)
    for buffer in graph.forward_outputs:
        uses[buffer].append(graph.num_forward)
    for buffer in graph.outputs:
        uses[buffer].append(num)
    gaps = {}
    for buffer, at in uses.items():
        at = sorted(set(at))
        pairs = [(b - a, a, b) for a, b in zip(at, at[1:], strict=False)]
        if pairs and buffer not in graph.forward_outputs:
            length, before, after = max(pairs)
            if length > 2 and after < num:
                gaps[buffer] = (before, after)
    away: dict[int, tuple[int, int]] = {}
    ranked = sorted(gaps, key=lambda b: -graph.buffers[b].bytes * (gaps[b][1] - gaps[b][0]))
    for buffer in [None, *ranked]:
        if buffer is not None:
            away[buffer] = gaps[buffer]
        schedule, peak_bytes = _sent_away(graph, uses, away)
        if peak_bytes <= budget_bytes:
            return schedule
    return None


def _sent_away(
    graph: StepGraph, uses: dict[int, list[int]], away: dict[int, tuple[int, int]]
) -> tuple[Schedule, int]:
    instructions: list[Instruction] = []
    live: set[int] = set()
    peak_bytes = num_forward = 0
    for operation in graph.computations:
        if operation.id == graph.num_forward:
            num_forward = len(instructions)
            for b in sorted(b for b in live if max(uses[b]) <= graph.num_forward - 1
                            or (b in graph.forward_outputs and max(uses[b]) == graph.num_forward)):
                instructions.append(Instruction(Action.FREE, b))
                live.remove(b)
        for buffer in sorted(b for b, gap in away.items() if gap[1] == operation.id):
            instructions.append(read(graph, buffer))
            live.add(buffer)
        instructions.append(Instruction(Action.RUN, operation.id))
        live |= set(operation.creates)
        held = sum(graph.buffers[b].bytes for b in live)
        peak_bytes = max(peak_bytes, held + operation.workspace_bytes)
        for buffer in operation.creates:
            if buffer in away:
                instructions.append(write(graph, buffer))
        for buffer in sorted(live):
            ends = away.get(buffer, (-1, -1))[0] == operation.id
            if ends or max(uses[buffer]) <= operation.id:
                instructions.append(Instruction(Action.FREE, buffer))
                live.remove(buffer)
    return Schedule(tuple(instructions), num_forward), peak_bytes


def with_updates(graph: StepGraph, num_states: int = 2) -> tuple[StepGraph, list[int]]:
    """Return a step that ends by updating its parameters, with `num_states` each, and those all.

    Gradients of the parameters are then no outputs; a parameter's update reads its gradient, the
    loss, itself and its state.
    """
    operations, buffers = list(graph.operations), list(graph.buffers)
    left = [b.id for b in buffers if b.kind is BufferKind.PARAMETER]
    updated: list[int] = []
    for gradient in graph.outputs:
        if gradient in graph.forward_outputs:
            continue
        # Gradients come in the reverse order of their parameters.
        num_bytes = buffers[gradient].bytes
        parameter = next(p for p in reversed(left) if buffers[p].bytes == num_bytes)
        left.remove(parameter)
        state = len(buffers)
        buffers.append(Buffer(state, num_states * num_bytes, BufferKind.STATE, "state"))
        operations.append(
            Operation(
                len(operations), "update", (gradient, graph.outputs[0], parameter, state), (),
                1e-9 * num_bytes, phase=Phase.UPDATE, can_recompute=False,
                mutates=(parameter, state),
            )
        )
        updated += [parameter, state]
    step = StepGraph(
        tuple(operations), tuple(buffers), graph.num_forward, graph.forward_outputs,
        graph.forward_outputs,
    )
    return step, updated
