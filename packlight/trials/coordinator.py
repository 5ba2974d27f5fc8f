"""A study at work: trials asked for, planned, admitted beside one another, told of as they end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight.errors import NoFeasibleTrialError, OptionError
from packlight.trials.limits import anonymous_bytes
from packlight.trials.messages import (
    Ask,
    Ended,
    Job,
    OutOfMemory,
    Planned,
    Point,
    Refused,
    Reply,
    Report,
    TooSmall,
)
from packlight.trials.packing import Option, Waiting, choose
from packlight.trials.records import (
    Outcome,
    Record,
    Study,
    read_record,
    record_path,
    write_record,
)
from packlight.trials.settings import Settings
from packlight.trials.storage import Storage, key_of
from packlight.trials.under_way import Active, Pending
from packlight.trials.workers import Workers
from packlight.units import format_bytes

if TYPE_CHECKING:
    import optuna

# What a process may hold beside its step: the objects of capture and planning.
SLACK_BYTES = 32 * 2**20
# ... and this one: Optuna's trials.
OWN_SLACK_BYTES = 16 * 2**20
# A plan that costs less than this is not worth waiting for more memory.
FREE_SLOWDOWN = 1.02
# A step whose time nobody knows yet, in terms of what is known of others.
UNKNOWN_SECONDS = 60.0

Watcher = Callable[["Coordinator"], None]


class Coordinator:
    """Runs a study; see `search` for its arguments.

    Attributes:
        records: of the trials that ended, by number.
        active: by connection.
        waiting: planned trials for which there is no room, the oldest first.
    """

    def __init__(
        self, file: str, memory_bytes: int, num_trials: int, directory: Path, workers: Workers,
        num_workers: int, settings: Settings, watch: Watcher | None = None,
    ) -> None:
        self.file, self.directory, self.workers = file, directory, workers
        self.memory_bytes, self.num_trials, self.num_workers = memory_bytes, num_trials, num_workers
        self.settings, self._watch = settings, watch or (lambda _: None)
        self.step_bytes = self._left_for_steps()
        self.storage = Storage(directory, settings, file, self.step_bytes)
        self.records: dict[int, Record] = {}
        self.active: dict[Connection, Active] = {}
        self.waiting: list[Pending] = []
        self.num_retried = 0
        self._unplanned: list[Pending] = []
        self._by_point: dict[str, int] = {}
        self._twins: dict[int, list[Pending]] = {}
        self._planning_seconds: list[float] = []

    def _left_for_steps(self) -> int:
        workers, own_bytes = self.workers, anonymous_bytes() + OWN_SLACK_BYTES
        fixed_bytes = own_bytes + workers.own_bytes
        each_bytes = workers.trial_bytes + SLACK_BYTES
        left_bytes = self.memory_bytes - fixed_bytes - self.num_workers * each_bytes
        if left_bytes <= 0:
            most = max(0, (self.memory_bytes - fixed_bytes - 1) // each_bytes)
            least = fixed_bytes + self.num_workers * each_bytes
            fewer = f"; --workers {most} would have some" if most else ""
            raise OptionError(
                f"{format_bytes(self.memory_bytes)} leave nothing for training steps: the study "
                f"and what its workers share take {format_bytes(fixed_bytes)}, and each worker "
                f"{format_bytes(each_bytes)}\n"
                f"hint: more than {format_bytes(least)}{fewer}"
            )
        return left_bytes

    @property
    def share_bytes(self) -> int:
        """What a step may hold for which others need not make room."""
        return self.step_bytes // self.num_workers

    @property
    def held_bytes(self) -> int:
        """What is set aside for steps."""
        return sum(active.held_bytes for active in self.active.values())

    # -- the loop

    def run(self) -> Study:
        """Run the study to its end and return it."""
        self._take_up()
        self._fill()
        while self.active:
            self._watch(self)
            for connection in wait(list(self.active)):
                assert isinstance(connection, Connection)
                self._hear(connection)
            self._fill()
        assert not self.waiting and not self._unplanned
        self._watch(self)
        study = Study(
            self.directory, self.memory_bytes, self.step_bytes,
            dict(sorted(self.records.items())), self.storage.importances(), self.num_retried,
        )
        self._refuse_if_nothing_fits()
        return study

    def _take_up(self) -> None:
        """Find out what an earlier run has done, and go on with what it was doing."""
        for trial in self.storage.study.get_trials(deepcopy=False):
            record = read_record(record_path(self.directory, trial.number))
            if record is not None:
                self.records[trial.number] = record
                if record.outcome in (Outcome.COMPLETE, Outcome.PRUNED, Outcome.DIVERGED):
                    self._by_point.setdefault(key_of(record.point), trial.number)
        for trial in self.storage.under_way():
            if trial.number in self.records:  # finished, but for saying so
                self._note(trial, self.records[trial.number])
            else:
                self._unplanned.append(Pending(trial))

    def _fill(self) -> None:
        """Start what there is room for: trials that wait, else the planning of others."""
        while len(self.active) < self.num_workers:
            if self._start_waiting() or self._start_planning():
                continue
            return

    def _start_waiting(self) -> bool:
        chosen = self._choose(self.waiting)
        if chosen is None:
            return False
        pending, option = chosen
        self._take(pending)
        self._start(pending, option.bytes, option.seconds, is_admitted=True)
        return True

    def _start_planning(self) -> bool:
        """Start to plan a trial, if that may be done beside what is running."""
        if self.held_bytes + self.share_bytes > self.step_bytes:
            return False
        if len(self.waiting) >= self.num_workers:  # enough to choose from
            return False
        if not self._unplanned:
            if self.storage.num_trials >= self.num_trials:
                return False
            self._unplanned.append(Pending(self.storage.ask()))
        pending = self._unplanned.pop(0)
        seconds = self._planning_seconds or [UNKNOWN_SECONDS]
        self._start(pending, self.share_bytes, sum(seconds) / len(seconds), is_admitted=False)
        return True

    def _choose(
        self, waiting: list[Pending], besides: Connection | None = None
    ) -> tuple[Pending, Option] | None:
        """Return which of some trials to start now, and how, beside what is running."""
        now = time.monotonic()
        running = [a.remaining(now) for c, a in self.active.items() if c is not besides]
        candidates = [Waiting(p.options or (), p.num_passed) for p in waiting]
        start = choose(
            running, candidates, self.step_bytes, self.num_workers, 2 * self.num_workers
        )
        return None if start is None else (waiting[start.index], start.option)

    def _take(self, pending: Pending) -> None:
        """Take a trial from those that wait; it has passed over those that have waited longer."""
        place = self.waiting.index(pending)
        for older in self.waiting[:place]:
            older.num_passed += 1
        self.waiting.remove(pending)

    def _start(
        self, pending: Pending, step_bytes: int, seconds: float, *, is_admitted: bool
    ) -> None:
        path = record_path(self.directory, pending.trial.number)
        job = Job(pending.trial.number, step_bytes, SLACK_BYTES, str(path))
        connection = self.workers.start(self.settings, job)
        self.active[connection] = Active(
            pending, step_bytes, seconds, time.monotonic(), is_admitted
        )

    # -- what trials' processes say

    def _hear(self, connection: Connection) -> None:
        """Take a message of a process, and answer it."""
        active = self.active[connection]
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            self._end_failed(connection, "its process has ended without a word")
            return
        match message:
            case Ask():
                connection.send(self._answer(active.pending, message))
            case Point():
                self._hear_point(connection, active, message.values)
            case Planned():
                self._hear_plan(connection, active, message)
            case Report():
                is_wanted = self.storage.report(active.pending.trial, message.step, message.error)
                connection.send(Reply(goes_on=is_wanted))
            case Ended():
                record = read_record(record_path(self.directory, active.pending.trial.number))
                assert record is not None
                self._leave(connection)
                self._note(active.pending.trial, record)
            case TooSmall():
                self._hear_too_small(connection, active, message.smallest_bytes, message.why)
            case OutOfMemory():
                self._hear_out_of_memory(connection, active, message.text)
            case Refused():
                raise OptionError(message.text)
            case _:
                raise AssertionError(message)

    def _answer(self, pending: Pending, asked: Ask) -> Reply:
        try:
            return Reply(self.storage.answer(pending.trial, asked))
        except (TypeError, ValueError) as error:
            return Reply(error=str(error))

    def _hear_point(
        self, connection: Connection, active: Active, values: dict[str, Any]
    ) -> None:
        """Let a trial go on, or wait for the one that is at the same point."""
        pending, number = active.pending, active.pending.trial.number
        pending.point = values
        first = self._by_point.setdefault(key_of(values), number)
        connection.send(Reply(goes_on=first == number))
        if first == number:
            return
        self._leave(connection)
        if first in self.records:
            self._repeat(pending, self.records[first])
        else:
            self._twins.setdefault(first, []).append(pending)

    def _hear_plan(self, connection: Connection, active: Active, planned: Planned) -> None:
        """Admit a planned trial if it is the one to start now, else have it wait."""
        pending = active.pending
        self.storage.note_planned(pending.trial, planned)
        active.planned = planned
        if not active.is_admitted:
            self._planning_seconds.append(planned.planning_seconds)
            pending.options = self._options(planned)
            chosen = self._choose([*self.waiting, pending], besides=connection)
            if chosen is None or chosen[0] is not pending or chosen[1] != pending.options[0]:
                self._leave(connection, Reply(goes_on=False))
                self.waiting.append(pending)
                return
            for older in self.waiting:
                older.num_passed += 1
        active.is_admitted, active.held_bytes = True, planned.peak_bytes
        active.seconds, active.since = planned.seconds, time.monotonic()
        connection.send(Reply())

    def _options(self, planned: Planned) -> tuple[Option, ...]:
        """Return the ways to run a trial: as planned, or without recomputation in more memory."""
        options = [Option(planned.peak_bytes, planned.seconds)]
        plain_bytes = planned.plain_peak_bytes
        if planned.slowdown > FREE_SLOWDOWN and plain_bytes is not None:
            options.append(Option(min(plain_bytes, self.step_bytes), planned.plain_seconds))
        return tuple(options)

    def _hear_too_small(
        self, connection: Connection, active: Active, smallest_bytes: int, why: str
    ) -> None:
        """Have a trial wait for more memory, if there is enough; else it is not run."""
        pending = active.pending
        self._leave(connection)
        if smallest_bytes <= self.step_bytes and active.held_bytes < self.step_bytes:
            self._wait_for_all(pending)
            return
        self.storage.note_need(pending.trial, max(smallest_bytes, self.step_bytes + 1))
        number = pending.trial.number
        record = Record(
            number, Outcome.INFEASIBLE, pending.point, why=why, smallest_bytes=smallest_bytes
        )
        self._write(pending, record)

    def _hear_out_of_memory(self, connection: Connection, active: Active, text: str) -> None:
        """Have a trial try again with all the memory; without more of it, it is not run."""
        pending = active.pending
        self._leave(connection)
        if active.held_bytes < self.step_bytes:
            self.num_retried += 1
            self._wait_for_all(pending)
            return
        # How much it would need is not known: more than twice as much, for the sampler.
        self.storage.note_need(pending.trial, 2 * self.step_bytes)
        number, why = pending.trial.number, f"the kernel has no more for it: {text}"
        self._write(pending, Record(number, Outcome.INFEASIBLE, pending.point, why=why))

    def _wait_for_all(self, pending: Pending) -> None:
        """Have a trial wait until it can have all the memory."""
        known = [a.seconds for a in self.active.values()] or [UNKNOWN_SECONDS]
        pending.options = (Option(self.step_bytes, sum(known) / len(known)),)
        self.waiting.append(pending)

    def _end_failed(self, connection: Connection, why: str) -> None:
        pending = self.active[connection].pending
        self._leave(connection)
        record = read_record(record_path(self.directory, pending.trial.number))
        if record is None:
            record = Record(pending.trial.number, Outcome.FAILED, pending.point, why=why)
            write_record(record_path(self.directory, record.number), record)
        self._note(pending.trial, record)

    def _leave(self, connection: Connection, reply: Reply | None = None) -> None:
        """Let go of a process."""
        del self.active[connection]
        if reply is not None:
            connection.send(reply)
        connection.close()

    # -- how trials end

    def _write(self, pending: Pending, record: Record) -> None:
        write_record(record_path(self.directory, record.number), record)
        self._note(pending.trial, record)

    def _note(self, trial: optuna.Trial, record: Record) -> None:
        """Tell Optuna how a trial ended, and those at the same point."""
        if record.planned is not None:
            self.storage.note_need(trial, record.planned.peak_bytes)
        for step, error in record.reports.items():
            self.storage.report(trial, step, error)
        self.storage.tell(trial, record)
        self.records[record.number] = record
        for twin in self._twins.pop(record.number, ()):
            self._repeat(twin, record)

    def _repeat(self, pending: Pending, record: Record) -> None:
        """End a trial as one at the same point has."""
        same = replace(record, number=pending.trial.number, same_as=record.number)
        if record.smallest_bytes is not None:
            self.storage.note_need(pending.trial, record.smallest_bytes)
        self._write(pending, same)

    def _refuse_if_nothing_fits(self) -> None:
        outcomes = {record.outcome for record in self.records.values()}
        if outcomes == {Outcome.INFEASIBLE}:
            known = [r for r in self.records.values() if r.smallest_bytes is not None]
            least = min(known, key=lambda r: r.smallest_bytes or 0, default=None)
            raise NoFeasibleTrialError(
                self.memory_bytes, len(self.records),
                None if least is None or least.smallest_bytes is None
                else self.memory_bytes - self.step_bytes + least.smallest_bytes,
                None if least is None else least.number,
            )
