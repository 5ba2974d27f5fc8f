"""From an order of operations and fetches to a schedule: when each transfer is issued.

The order says what is not held: a buffer is fetched where it stands. Between its last use before
and there, it need not be in memory, but may: its write takes time, and its fetch should be over
when somebody reads it. Both are placed by running the schedule in the mind:

    write   when the buffer is made; its memory is taken away as soon as it is written, or earlier
            than that, by waiting, where something else needs the memory
    fetch   in the order of use, no earlier than its due date, when there is memory from then on
            until its use. The due date is the latest at which the link would be in time for this
            and all later fetches (scheduled backwards, as late as possible), times some hurry.

What is still in memory, its write pending, when its fetch is due, simply stays.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from packlight.step import Action, Instruction, Link, Schedule, StepGraph

UNLIMITED_BYTES = 1 << 60


def fetch_of(buffer: int) -> int:
    """Return what stands for the fetch of a buffer in an order of operations: a number below -1."""
    return -2 - buffer


def fetched_by(entry: int) -> int:
    """Return the buffer that an entry below -1 fetches."""
    return -2 - entry


@dataclass(slots=True)
class _Residence:
    """A stay in memory that starts with a fetch.

    Attributes:
        buffer: what is fetched.
        first: the step that uses it first.
        earliest: the step before which it cannot come: an earlier one makes it.
        due: when its fetch should start, operations taking their time and nobody waiting.
        issue_from: when it may.
    """

    buffer: int
    first: int
    earliest: int = 0
    due: float = 0.0
    issue_from: float = 0.0


class Placement:
    """An order made ready: its steps, what dies where, what is fetched for which step.

    Attributes:
        steps: operations in order, recomputations and fetches that nobody needs left out.
        num_forward: how many of them run in the forward.
        dies: buffers that no later step needs, by step.
        residences: by first use.
        overwrites: how each step may work in place: (created, overwritten).
        base_bytes: what each step holds if every transfer were to take no time; last, the end.
    """

    def __init__(self, graph: StepGraph, order: Sequence[int], link: Link) -> None:
        self.graph, self.link = graph, link
        resident = graph.resident
        self.size = [0 if b.id in resident else b.bytes for b in graph.buffers]
        self.stored = frozenset(graph.stored)
        entries = self._useful(order)
        self.steps = [e for e in entries if e >= 0]
        last = graph.num_forward - 1
        self.num_forward = self.steps.index(last) + 1 if last >= 0 else 0
        self._find_lives(entries)
        self._fill_base()
        self.last_update = {
            b: step
            for step, index in enumerate(self.steps)
            for b in graph.operations[index].mutates
            if b in self.stored
        }
        seconds = [graph.operations[i].seconds for i in self.steps]
        self.nominal = np.concatenate([[0.0], np.cumsum(seconds)])
        # What is fetched was made before, and must have been written then.
        self.written = {r.buffer for r in self.residences} - self.stored
        end = math.inf
        for residence in reversed(self.residences):
            end = min(end, float(self.nominal[residence.first]))
            end -= link.read_seconds(graph.buffers[residence.buffer].bytes)
            residence.due = end

    def _useful(self, order: Sequence[int]) -> list[int]:
        graph = self.graph
        first_run: dict[int, int] = {}
        for place, entry in enumerate(order):
            first_run.setdefault(entry, place)
        wanted = set(graph.outputs)
        kept: list[int] = []
        for place in range(len(order) - 1, -1, -1):
            entry = order[place]
            if entry < 0:
                if fetched_by(entry) in wanted:
                    wanted.discard(fetched_by(entry))
                    kept.append(entry)
                continue
            operation = graph.operations[entry]
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
        unmade: dict[int, list[_Residence]] = {}
        self.dies: list[list[int]] = [[] for _ in self.steps]
        self.dies_with_forward: list[int] = []
        self.residences: list[_Residence] = []
        for entry in reversed(entries):
            if entry < 0:
                buffer = fetched_by(entry)
                wanted.discard(buffer)
                residence = _Residence(buffer, first_use.pop(buffer, len(self.steps)))
                self.residences.append(residence)
                unmade.setdefault(buffer, []).append(residence)
                continue
            if step == self.num_forward:
                self.dies_with_forward = sorted(set(graph.forward_outputs) - wanted - resident)
                wanted.update(self.dies_with_forward)
            step -= 1
            operation = graph.operations[entry]
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
        dies, stored = self.dies[step], self.stored
        possible = [p for p in pairs if p[1] in dies and p[1] not in stored]
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

    def schedule(self, budget_bytes: int, hurry: float) -> tuple[Schedule, float]:
        """Return the schedule and how long it takes.

        Args:
            budget_bytes: for everything; kept wherever `base_bytes` is within it.
            hurry: how much earlier than just in time a fetch may be issued: 1.0 for not at all,
                2.0 for twice the time ahead, infinity for as early as there is memory.
        """
        run = _Run(self, budget_bytes, hurry)
        schedule = run.run()
        return schedule, max(run.now, run.link_free)


class _Run:
    """Runs a placement in the mind."""

    def __init__(self, placement: Placement, budget_bytes: int, hurry: float) -> None:
        self.at, self.graph, self.link = placement, placement.graph, placement.link
        self.budget_bytes = budget_bytes
        self.instructions: list[Instruction] = []
        self.now = self.link_free = 0.0
        self.held = placement.base_bytes.copy()
        # Dead buffers that stay until they are written, in the order in which they will be.
        self.tails: dict[int, float] = {}
        self.tail_bytes = 0
        self.written_at: dict[int, float] = {}
        self.ready_at: dict[int, float] = {}
        self.in_use: set[int] = set()
        self.waiting = list(placement.residences)
        for residence in self.waiting:
            use = float(placement.nominal[residence.first])
            ahead = use - residence.due
            residence.issue_from = use - hurry * ahead if math.isfinite(hurry) else -math.inf

    def run(self) -> Schedule:
        at, graph = self.at, self.graph
        num_forward = 0
        for step, index in enumerate(at.steps):
            if step == at.num_forward:
                num_forward = len(self.instructions)
                for buffer in at.dies_with_forward:
                    self._end(buffer)
            self._prepare(step)
            operation = graph.operations[index]
            overwrite = self._chosen_overwrite(step)
            for buffer in operation.touches:
                self._wait(self.ready_at.pop(buffer, 0.0))
            for buffer in operation.mutates:
                self._wait(self.written_at.get(buffer, 0.0))
            if overwrite is not None:
                self._wait(self.written_at.get(overwrite[1], 0.0))
                self.in_use.discard(overwrite[1])
            self.instructions.append(Instruction(Action.COMPUTE, index, overwrite))
            self.now += operation.seconds
            for buffer in operation.creates:
                self.in_use.add(buffer)
                if buffer in at.written and buffer not in self.written_at:
                    self._offload(buffer)
            for buffer in operation.mutates:
                if at.last_update.get(buffer) == step:
                    self._offload(buffer)
            for buffer in at.dies[step]:
                if overwrite is None or buffer != overwrite[1]:
                    self._end(buffer)
        if at.num_forward == len(at.steps):
            num_forward = len(self.instructions)
            for buffer in at.dies_with_forward:
                self._end(buffer)
        self._prepare(len(at.steps))
        while self.tails:
            self._free_tail()
        return Schedule(tuple(self.instructions), num_forward)

    def _wait(self, time: float) -> None:
        self.now = max(self.now, time)

    def _offload(self, buffer: int) -> None:
        self.instructions.append(Instruction(Action.OFFLOAD, buffer))
        seconds = self.link.write_seconds(self.graph.buffers[buffer].bytes)
        self.link_free = max(self.link_free, self.now) + seconds
        self.now += self.link.compute_share * seconds
        self.written_at[buffer] = self.link_free

    def _end(self, buffer: int) -> None:
        """Free a buffer that is not used any more, or let it stay until it is written."""
        self.in_use.discard(buffer)
        written_at = self.written_at.get(buffer, 0.0)
        if written_at > self.now:
            self.tails[buffer] = written_at
            self.tail_bytes += self.at.size[buffer]
        else:
            self.instructions.append(Instruction(Action.FREE, buffer))

    def _made_at(self, step: int) -> tuple[int, ...]:
        at = self.at
        return self.graph.operations[at.steps[step]].creates if step < len(at.steps) else ()

    def _free_tail(self, buffer: int = -1) -> None:
        """Free a buffer as soon as it is written; by default, the first to be so."""
        if buffer < 0:
            buffer = min(self.tails, key=lambda b: (self.tails[b], b))
        self._wait(self.tails.pop(buffer))
        self.tail_bytes -= self.at.size[buffer]
        self.instructions.append(Instruction(Action.FREE, buffer))

    def _prepare(self, step: int) -> None:
        """Make memory for a step, fetch what it needs, and what others will where that fits."""
        while self.tails and min(self.tails.values()) <= self.now:
            self._free_tail()
        if not self.tails and not self.waiting:
            return
        num_due = bisect_right(self.waiting, step, key=lambda r: r.first)
        for buffer in self._made_at(step):
            if buffer in self.tails:
                self._free_tail(buffer)
        due = [r for r in self.waiting[:num_due] if not self._stays(r, step)]
        while self.tails and self.held[step] + self.tail_bytes > self.budget_bytes:
            self._free_tail()
        for residence in due:
            self._fetch(residence, step)
        nominal = self.at.nominal[step]
        rest: list[_Residence] = []
        place = num_due
        while place < len(self.waiting):
            residence = self.waiting[place]
            if residence.issue_from > nominal:
                break
            if residence.earliest > step or not self._is_away(residence.buffer):
                rest.append(residence)
            elif not self._has_room(residence, step):
                break  # those that are used later must not take its memory
            elif not self._stays(residence, step):
                self._fetch(residence, step)
            place += 1
        self.waiting = rest + self.waiting[place:]

    def _is_away(self, buffer: int) -> bool:
        """Whether a buffer has been made and is not in use any more."""
        if buffer in self.in_use:
            return False
        return buffer in self.at.stored or buffer in self.written_at

    def _has_room(self, residence: _Residence, step: int) -> bool:
        size = self.at.size[residence.buffer]
        tail_bytes = self.tail_bytes - (size if residence.buffer in self.tails else 0)
        if self.held[step] + tail_bytes + size > self.budget_bytes:
            return False
        return int(self.held[step : residence.first].max()) + size <= self.budget_bytes

    def _stays(self, residence: _Residence, step: int) -> bool:
        """Keep a buffer that is still in memory, its write pending; return whether it was."""
        buffer, size = residence.buffer, self.at.size[residence.buffer]
        if buffer not in self.tails:
            return False
        del self.tails[buffer]
        self.tail_bytes -= size
        self.held[step : residence.first] += size
        self.in_use.add(buffer)
        return True

    def _fetch(self, residence: _Residence, step: int) -> None:
        buffer = residence.buffer
        self.instructions.append(Instruction(Action.FETCH, buffer))
        seconds = self.link.read_seconds(self.graph.buffers[buffer].bytes)
        self.link_free = max(self.link_free, self.now) + seconds
        self.now += self.link.compute_share * seconds
        self.ready_at[buffer] = self.link_free
        self.held[step : residence.first] += self.at.size[buffer]
        self.in_use.add(buffer)

    def _chosen_overwrite(self, step: int) -> tuple[int, int] | None:
        """Return how a step works in place, if it does: not where that waits and memory is left."""
        overwrite = self.at.overwrites[step]
        if overwrite is not None and self.written_at.get(overwrite[1], 0.0) > self.now:
            size = self.at.size[overwrite[0]]
            if self.held[step] + self.tail_bytes + size <= self.budget_bytes:
                return None
        return overwrite
