"""An order of computations and reads, made ready: what lives when, and which lane moves what.

The order says what is not held: a buffer is read back where it stands. Of the lanes that a buffer
could take (`routes.py`), it takes the one that is done with it first, given what those that are
used before it have been given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from packlight.planner.routes import Route, Routes
from packlight.step import StepGraph


@dataclass(slots=True)
class Residence:
    """A stay in memory that starts with a read.

    Attributes:
        buffer: what is read.
        first: the step that uses it first.
        earliest: the step before which it cannot come: an earlier one makes it.
        due: when its read should start, computations taking their time and nobody waiting.
        issue_from: when it may.
    """

    buffer: int
    first: int
    earliest: int = 0
    due: float = 0.0
    issue_from: float = 0.0


class Placement:
    """An order made ready: its steps, what dies where, what is read for which step, and how.

    Attributes:
        steps: computations in order, those left out that run again and that nobody needs.
        num_forward: how many of them run in the forward.
        dies: buffers that no later step needs, by step.
        residences: by first use.
        route: how each buffer that is transferred goes and comes.
        overwrites: how each step may work in place: (created, overwritten).
        base_bytes: what each step holds if every transfer were to take no time; last, the end.
    """

    def __init__(self, graph: StepGraph, order: Sequence[int], routes: Routes) -> None:
        self.graph, self.routes = graph, routes
        resident = graph.resident
        self.size = [0 if b.id in resident else b.bytes for b in graph.buffers]
        entries = self._useful(order)
        self.steps = [e for e in entries if e < graph.num_computations]
        last = graph.num_forward - 1
        self.num_forward = self.steps.index(last) + 1 if last >= 0 else 0
        self._find_lives(entries)
        self._fill_base()
        self.last_update = {
            b: step
            for step, index in enumerate(self.steps)
            for b in graph.operations[index].mutates
            if b in routes.resting
        }
        seconds = [graph.operations[i].seconds for i in self.steps]
        self.nominal = np.concatenate([[0.0], np.cumsum(seconds)])
        # What is read was made before, and must have been written then.
        self.written = {r.buffer for r in self.residences} - routes.resting
        self.route = self._choose_routes()
        end = dict.fromkeys(routes.lanes, math.inf)
        for residence in reversed(self.residences):
            read = self.route[residence.buffer].read
            latest = min(end[read.lane], float(self.nominal[residence.first]))
            residence.due = end[read.lane] = latest - read.seconds

    def _choose_routes(self) -> dict[int, Route]:
        """Share transfers out between lanes, those of what is used first coming first."""
        load = dict.fromkeys(self.routes.lanes, 0.0)
        room = dict(self.routes.room)
        num_reads = Counter(residence.buffer for residence in self.residences)
        chosen: dict[int, Route] = {}
        for residence in self.residences:
            buffer = residence.buffer
            if buffer in chosen:
                continue
            best: tuple[float, dict[str, float], Route] | None = None
            routes = self.routes.of[buffer]
            size = self.graph.buffers[buffer].bytes
            fitting = [r for r in routes if r.rests or room.get(r.memory, size) >= size]
            for route in fitting or routes:
                after = {route.read.lane: load[route.read.lane]}
                after[route.read.lane] += num_reads[buffer] * route.read.seconds
                is_written = not route.rests or buffer in self.last_update
                if route.write is not None and is_written:
                    lane = route.write.lane
                    after[lane] = after.get(lane, load[lane]) + route.write.seconds
                latest = max(after.values())
                if best is None or latest < best[0]:
                    best = (latest, after, route)
            assert best is not None, f"nothing brings buffer {buffer} back"
            load.update(best[1])
            chosen[buffer] = best[2]
            if not best[2].rests and best[2].memory in room:
                room[best[2].memory] -= size
        return chosen

    def _useful(self, order: Sequence[int]) -> list[int]:
        graph = self.graph
        first_run: dict[int, int] = {}
        for place, entry in enumerate(order):
            first_run.setdefault(entry, place)
        wanted = set(graph.outputs)
        kept: list[int] = []
        for place in range(len(order) - 1, -1, -1):
            entry = order[place]
            operation = graph.operations[entry]
            if operation.lane:
                if operation.creates[0] in wanted:
                    wanted.discard(operation.creates[0])
                    kept.append(entry)
                continue
            is_first = first_run[entry] == place
            if is_first and entry == graph.num_forward - 1:
                wanted.update(graph.forward_outputs)
            if is_first or wanted.intersection(operation.creates):
                wanted.difference_update(operation.creates)
                wanted.update(operation.touches)
                kept.append(entry)
        return kept[::-1]

    def _find_lives(self, entries: list[int]) -> None:
        graph, resident = self.graph, self.graph.resident
        step = len(self.steps)
        first_use: dict[int, int] = {}
        wanted = set(graph.outputs)
        unmade: dict[int, list[Residence]] = {}
        self.dies: list[list[int]] = [[] for _ in self.steps]
        self.dies_with_forward: list[int] = []
        self.residences: list[Residence] = []
        for entry in reversed(entries):
            operation = graph.operations[entry]
            if operation.lane:
                (buffer,) = operation.creates
                wanted.discard(buffer)
                residence = Residence(buffer, first_use.pop(buffer, len(self.steps)))
                self.residences.append(residence)
                unmade.setdefault(buffer, []).append(residence)
                continue
            if step == self.num_forward:
                self.dies_with_forward = sorted(set(graph.forward_outputs) - wanted - resident)
                wanted.update(self.dies_with_forward)
            step -= 1
            for buffer in operation.creates:
                first_use.pop(buffer, None)
                for residence in unmade.pop(buffer, ()):
                    residence.earliest = step + 1
                if buffer in wanted:
                    wanted.discard(buffer)
                else:
                    self.dies[step].append(buffer)
            for buffer in operation.touches:
                first_use[buffer] = step
                if buffer not in resident and buffer not in wanted:
                    wanted.add(buffer)
                    self.dies[step].append(buffer)
        self.residences.sort(key=lambda r: (r.first, r.buffer))

    def _overwrite(self, step: int) -> tuple[int, int] | None:
        pairs = self.graph.operations[self.steps[step]].overwrites
        dies, resting = self.dies[step], self.routes.resting
        possible = [p for p in pairs if p[1] in dies and p[1] not in resting]
        return max(possible, key=lambda pair: self.size[pair[0]], default=None)

    def _fill_base(self) -> None:
        num = len(self.steps)
        arriving = [0] * (num + 1)
        for residence in self.residences:
            arriving[residence.first] += self.size[residence.buffer]
        base = np.zeros(num + 1, dtype=np.int64)
        self.overwrites = [self._overwrite(step) for step in range(num)]
        live = 0
        for step, index in enumerate(self.steps):
            operation = self.graph.operations[index]
            if step == self.num_forward:
                live -= sum(self.size[b] for b in self.dies_with_forward)
            live += arriving[step]
            before = live
            live += sum(self.size[b] for b in operation.creates)
            overwrite = self.overwrites[step]
            if overwrite is not None:
                live -= self.size[overwrite[0]]
            base[step] = max(live + operation.workspace_bytes, before)
            live -= sum(
                self.size[b] for b in self.dies[step] if overwrite is None or b != overwrite[1]
            )
        base[num] = live + arriving[num]
        self.base_bytes = base


def peak_of_reading_anew(graph: StepGraph, routes: Routes) -> int:
    """Return the peak of the plain step that reads what rests elsewhere anew in the backward.

    There is room to read one thing ahead.
    """
    order: list[int] = []
    read_in: dict[int, bool] = {}
    for operation in graph.computations:
        is_forward = operation.id < graph.num_forward
        for buffer in operation.touches:
            if buffer in routes.resting and read_in.get(buffer) is not is_forward:
                read_in[buffer] = is_forward
                order.append(routes.read(buffer).id)
        order.append(operation.id)
    base = Placement(graph, order, routes).base_bytes
    return int(base.max()) + max(graph.buffers[b].bytes for b in routes.resting)
