"""From a placement to a schedule: when each transfer is issued.

Between its last use before a read and that read, a buffer need not be in memory, but may: its write
takes time, and its read should be over when somebody uses it. Both are placed by running the
schedule in the mind:

    write   when the buffer is made; its memory is taken away as soon as it is written, or earlier
            than that, by waiting, where something else needs the memory
    read    on each lane in the order of use, no earlier than its due date, when there is memory
            from then on until its use. The due date is the latest at which the lane would be in
            time for this and all later reads (scheduled backwards, as late as possible), times some
            hurry.

What is still in memory, its write pending, when its read is due, simply stays.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from packlight.planner.placement import Placement, Residence
from packlight.step import Action, Instruction, Operation, Schedule

UNLIMITED_BYTES = 1 << 60


def scheduled(placement: Placement, budget_bytes: int, hurry: float) -> tuple[Schedule, float]:
    """Return the schedule of a placement and how long it takes.

    Args:
        placement: what to run and to move.
        budget_bytes: for everything; kept wherever `base_bytes` is within it.
        hurry: how much earlier than just in time a read may be issued: 1.0 for not at all,
            2.0 for twice the time ahead, infinity for as early as there is memory.
    """
    run = _Run(placement, budget_bytes, hurry)
    schedule = run.run()
    return schedule, max(run.now, *run.free_at.values())


class _Run:
    """Runs a placement in the mind."""

    def __init__(self, placement: Placement, budget_bytes: int, hurry: float) -> None:
        self.at, self.graph = placement, placement.graph
        self.num_lanes = len(placement.routes.lanes)
        self.budget_bytes = budget_bytes
        self.instructions: list[Instruction] = []
        self.now = 0.0
        self.free_at = dict.fromkeys(placement.routes.lanes, 0.0)
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
            self.instructions.append(Instruction(Action.RUN, index, overwrite))
            self.now += operation.seconds
            for buffer in operation.creates:
                self.in_use.add(buffer)
                if buffer in at.written and buffer not in self.written_at:
                    self._write(buffer)
            for buffer in operation.mutates:
                if at.last_update.get(buffer) == step:
                    self._write(buffer)
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

    def _hand_over(self, transfer: Operation, ready_at: float) -> float:
        """Hand a transfer to its lane; return when it is over."""
        self.instructions.append(Instruction(Action.RUN, transfer.id))
        lane, seconds = transfer.lane, transfer.seconds
        self.free_at[lane] = max(self.free_at[lane], self.now, ready_at) + seconds
        self.now += self.at.routes.share[lane] * seconds
        return self.free_at[lane]

    def _write(self, buffer: int) -> None:
        transfer = self.at.route[buffer].write
        assert transfer is not None, f"nothing writes buffer {buffer}"
        self.written_at[buffer] = self._hand_over(transfer, 0.0)

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
        """Make memory for a step, read what it needs, and what others will where that fits."""
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
            self._read(residence, step)
        nominal = self.at.nominal[step]
        rest: list[Residence] = []
        not_yet: set[str] = set()
        place = num_due
        while place < len(self.waiting) and len(not_yet) < self.num_lanes:
            residence = self.waiting[place]
            lane = self.at.route[residence.buffer].read.lane
            if lane in not_yet or residence.issue_from > nominal:
                not_yet.add(lane)  # on each lane, one after the other
                rest.append(residence)
            elif residence.earliest > step or not self._is_away(residence.buffer):
                rest.append(residence)
            elif not self._has_room(residence, step):
                break  # those that are used later must not take its memory
            elif not self._stays(residence, step):
                self._read(residence, step)
            place += 1
        self.waiting = rest + self.waiting[place:]

    def _is_away(self, buffer: int) -> bool:
        """Whether a buffer has been made and is not in use any more."""
        if buffer in self.in_use:
            return False
        return buffer in self.at.routes.resting or buffer in self.written_at

    def _has_room(self, residence: Residence, step: int) -> bool:
        size = self.at.size[residence.buffer]
        tail_bytes = self.tail_bytes - (size if residence.buffer in self.tails else 0)
        if self.held[step] + tail_bytes + size > self.budget_bytes:
            return False
        return int(self.held[step : residence.first].max()) + size <= self.budget_bytes

    def _stays(self, residence: Residence, step: int) -> bool:
        """Keep a buffer that is still in memory, its write pending; return whether it was."""
        buffer, size = residence.buffer, self.at.size[residence.buffer]
        if buffer not in self.tails:
            return False
        del self.tails[buffer]
        self.tail_bytes -= size
        self.held[step : residence.first] += size
        self.in_use.add(buffer)
        return True

    def _read(self, residence: Residence, step: int) -> None:
        buffer = residence.buffer
        written_at = self.written_at.get(buffer, 0.0)
        self.ready_at[buffer] = self._hand_over(self.at.route[buffer].read, written_at)
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
