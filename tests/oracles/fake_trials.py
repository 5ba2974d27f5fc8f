"""Trials without torch, as threads that say what a trial's process would: for tests of studies.

    python -m tests.oracles.fake_trials DIRECTORY NUM_TRIALS NUM_WORKERS

runs a study of them, to be killed: every start of training is a line in DIRECTORY/started.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from packlight.trials.coordinator import OWN_SLACK_BYTES, SLACK_BYTES, Coordinator
from packlight.trials.limits import anonymous_bytes
from packlight.trials.messages import (
    Ask,
    Ended,
    Job,
    OutOfMemory,
    Planned,
    Point,
    Report,
    TooSmall,
)
from packlight.trials.records import Outcome, Record, write_record
from packlight.trials.settings import Settings

MIB = 2**20
STEP_BYTES = 650 * MIB

Behave = Callable[[dict[str, Any]], dict[str, Any]]


class FakeWorkers:
    """Runs fake trials.

    Args:
        behave: returns for a point what the trial is like: `plain` and `floor` bytes, `error`,
            `ends` ("fails", "diverges", "dies" or "grows" beyond what it was given once).
        space: asks a trial, by `ask(method, *args)`, and returns its point.
        started: called with a trial's number when it starts to train.
    """

    own_bytes, trial_bytes = 100 * MIB, 50 * MIB

    def __init__(
        self, behave: Behave, space: Callable[[Callable[..., Any], int], dict[str, Any]],
        started: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.behave, self.space, self.started = behave, space, started
        self.trained: list[int] = []
        self.limits: list[tuple[int, int]] = []

    def start(self, settings: Settings, job: Job) -> Connection:
        ours, theirs = Pipe()
        threading.Thread(target=self._run, args=(theirs, settings, job), daemon=True).start()
        return ours

    def close(self) -> None:
        pass

    def _run(self, connection: Connection, settings: Settings, job: Job) -> None:
        with connection:
            try:
                self._trial(connection, settings, job)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                pass

    def _trial(self, connection: Connection, settings: Settings, job: Job) -> None:
        def exchange(message: Any) -> Any:
            connection.send(message)
            return connection.recv()

        def end(outcome: Outcome, why: str = "") -> None:
            error = list(reports.values())[-1] if reports else None
            record = Record(job.number, outcome, point, error, [], reports, planned, why=why)
            write_record(Path(job.result_path), record)
            connection.send(Ended())

        reports: dict[int, float] = {}
        planned: Planned | None = None
        point = self.space(
            lambda method, *args: exchange(Ask(method, args, {})).value, job.number
        )
        if not exchange(Point(point)).goes_on:
            return
        trial = self.behave(point)
        plain, floor = trial.get("plain", MIB), trial.get("floor", MIB)
        if floor > job.step_bytes:
            connection.send(TooSmall(floor, f"{floor} bytes are the least"))
            return
        peak = min(plain, job.step_bytes)
        seconds = 1.0 if peak == plain else 1.5
        planned = Planned(peak, peak, seconds, plain, 1.0, job.step_bytes, 0.1)
        if not exchange(planned).goes_on:
            return
        self.limits.append((job.number, job.step_bytes))
        self.trained.append(job.number)
        self.started(job.number)
        ends = trial.get("ends")
        if ends == "dies":
            return
        if ends == "grows" and len([n for n in self.trained if n == job.number]) == 1:
            connection.send(OutOfMemory("cannot allocate memory"))
            return
        if ends in ("fails", "diverges"):
            end(Outcome.FAILED if ends == "fails" else Outcome.DIVERGED, f"it {ends}")
            return
        for step in settings.reported_steps:
            reports[step] = trial["error"] + 1.0 / step
            if not exchange(Report(step, reports[step])).goes_on and step < settings.steps:
                end(Outcome.PRUNED, f"after step {step}")
                return
        end(Outcome.COMPLETE)


def study(
    directory: Path, workers: FakeWorkers, num_trials: int, num_workers: int = 2, **options: Any
) -> Coordinator:
    """Return a study of fake trials; by default with `STEP_BYTES`, whatever this process holds."""
    (directory / "trials").mkdir(parents=True, exist_ok=True)
    settings = options.pop("settings", Settings(steps=10))
    fixed_bytes = anonymous_bytes() + OWN_SLACK_BYTES + workers.own_bytes
    each_bytes = workers.trial_bytes + SLACK_BYTES
    memory_bytes = options.pop("memory", fixed_bytes + num_workers * each_bytes + STEP_BYTES)
    return Coordinator(
        "fake.py", memory_bytes, num_trials, directory, workers,
        num_workers, settings, **options,
    )


def smooth_space(ask: Callable[..., Any], number: int) -> dict[str, Any]:
    """A space in which trials of the larger widths do not fit."""
    return {"width": ask("suggest_int", "width", 1, 400), "x": ask("suggest_float", "x", -1.0, 1.0)}


def smooth(point: dict[str, Any]) -> dict[str, Any]:
    """The error is least at the largest width that fits."""
    plain = 3 * point["width"] * MIB
    return {"plain": plain, "floor": plain // 2, "error": point["x"] ** 2 + 1 / point["width"]}


def main() -> None:
    """See the head of this file."""
    directory, num_trials, num_workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log = os.open(directory / "started", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    workers = FakeWorkers(
        smooth, smooth_space, lambda number: print_line(log, number)
    )
    study(directory, workers, num_trials, num_workers).run()


def print_line(log: int, number: int) -> None:
    """Append a number; one write is whole or not there."""
    os.write(log, f"{number}\n".encode())


if __name__ == "__main__":
    main()
