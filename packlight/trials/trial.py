"""One trial, in a process of its own: its point, its plan, its training.

The kernel refuses the process more memory than its step was planned for (and some slack for the
objects of capture and planning), so a trial cannot take what another one was admitted with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import packlight
from packlight.capture.returned import loss_of
from packlight.costs.peak import measure_peak
from packlight.errors import (
    GraphBreakError,
    InfeasibleBudgetError,
    NonFiniteLossError,
    OptionError,
    PacklightError,
)
from packlight.example import (
    NUM_VALIDATION_BATCHES,
    BatchStream,
    Example,
    build,
    error_of,
    seed_everything,
)
from packlight.moves.registry import exact_move_names, move_names
from packlight.run.train_step import TrainStep
from packlight.trials.limits import data_bytes, give_back, limit_data
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
from packlight.trials.point import checked_point, fit_options, with_point
from packlight.trials.records import Outcome, Record, write_record
from packlight.trials.settings import Settings
from packlight.updates.accounting import batch_bytes


class _AskedTrial:
    """Stands in for Optuna's trial: the study, in another process, answers."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self.number, self.num_asked = connection, number, 0

    def suggest_float(self, *args: Any, **kwargs: Any) -> Any:
        """As `optuna.Trial.suggest_float`."""
        return self._ask("suggest_float", args, kwargs)

    def suggest_int(self, *args: Any, **kwargs: Any) -> Any:
        """As `optuna.Trial.suggest_int`."""
        return self._ask("suggest_int", args, kwargs)

    def suggest_categorical(self, *args: Any, **kwargs: Any) -> Any:
        """As `optuna.Trial.suggest_categorical`."""
        return self._ask("suggest_categorical", args, kwargs)

    def _ask(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reply = _exchange(self._connection, Ask(method, args, kwargs))
        if reply.error:
            raise ValueError(reply.error)
        self.num_asked += 1
        return reply.value


class _LeaveError(Exception):
    """The study has no more use for this process."""


@dataclass
class _Trained:
    """What training has shown so far."""

    losses: list[float]
    reports: dict[int, float]
    measured_peak_bytes: int | None = None
    seconds: float = 0.0


class TrialProcess:
    """Runs a trial as far as the study lets it.

    Args:
        example: the FILE.
        settings: of the study.
        job: what this process was started for.
        connection: to the study.
    """

    def __init__(
        self, example: Example, settings: Settings, job: Job, connection: Connection
    ) -> None:
        self.example, self.settings, self.job = example, settings, job
        self.connection = connection
        self.point: dict[str, Any] = {}
        self.planned: Planned | None = None
        self.trained = _Trained([], {})
        self._start_bytes, self._beside_bytes = data_bytes(), 0

    def run(self) -> None:
        """Do what there is to do and say how it ended."""
        job, settings = self.job, self.settings
        torch.set_num_threads(settings.threads)
        try:
            self._limit(job.step_bytes)
            self.point = self._asked_point()
            _exchange(self.connection, Point(self.point))
            example = with_point(self.example, self.point)
            self._train(example, *self._prepared(example))
            self._end(Outcome.COMPLETE)
        except _PrunedError as pruned:
            self._end(Outcome.PRUNED, why=str(pruned))
        except _LeaveError:
            return
        except _RefusedError as refused:
            self.connection.send(Refused(str(refused)))
        except InfeasibleBudgetError as error:
            smallest_bytes = error.smallest_bytes + self._beside_bytes
            self.connection.send(TooSmall(smallest_bytes, str(error)))
        except NonFiniteLossError as error:
            self._end(Outcome.DIVERGED, why=str(error))
        except (EOFError, BrokenPipeError):  # whoever started the study has gone
            os._exit(1)
        except Exception as error:
            if is_out_of_memory(error):
                self.connection.send(OutOfMemory(str(error)))
                return
            is_own = isinstance(error, PacklightError)
            self._end(Outcome.FAILED, str(error) if is_own else f"{type(error).__name__}: {error}")

    def _asked_point(self) -> dict[str, Any]:
        trial = _AskedTrial(self.connection, self.job.number)
        try:
            values = require_space(self.example)(trial)
            point = checked_point(values, str(self.example.path), trial.num_asked)
            with_point(self.example, point)
        except OptionError as error:
            raise _RefusedError(str(error)) from None
        return point

    def _prepared(self, example: Example) -> tuple[torch.nn.Module, TrainStep, Any, Any]:
        """Return the model, its planned step, a first batch and those that follow."""
        settings, started = self.settings, time.perf_counter()
        model, optimizer = build(example, settings.device, settings.seed)
        stream = BatchStream(example, "train", settings.device, settings.seed)
        batch = next(stream)
        options = {
            "moves": exact_move_names() if settings.exact else move_names(),
            "allow": settings.allow,
            **fit_options(self.point),
        }
        self._beside_bytes = beside_bytes = batch_bytes(batch)  # the next one, while this is there
        budget_bytes = self.job.step_bytes - beside_bytes
        if budget_bytes <= 0:
            raise MemoryError(f"a batch takes {beside_bytes} bytes")
        step = packlight.fit(
            model, example.loss, optimizer, batch, budget_bytes, progress=False, **options
        )
        resident_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        evaluation = measure_peak(lambda: self._error(model, example, num_batches=1))
        planned = self.planned = self._facts(
            step, resident_bytes + evaluation.peak_bytes, time.perf_counter() - started
        )
        _exchange(self.connection, planned)
        give_back()
        self._limit(planned.peak_bytes)
        return model, step, batch, stream

    def _facts(self, step: TrainStep, evaluation_bytes: int, planning_seconds: float) -> Planned:
        """Return what is known of a step before it runs."""
        num_steps, budget_bytes = self.settings.steps, self.job.step_bytes
        try:
            way = step.way
        except GraphBreakError:  # in pieces, which are planned while they run
            return Planned(
                budget_bytes, budget_bytes, 0.0, None, 0.0, budget_bytes, planning_seconds
            )
        beside_bytes = self._beside_bytes
        plain_bytes = way.memory.peak_bytes(step.plan.plain_peak_bytes) + beside_bytes
        return Planned(
            max(step.peak_bytes + beside_bytes, evaluation_bytes), step.peak_bytes,
            num_steps * way.seconds, max(plain_bytes, evaluation_bytes),
            num_steps * way.seconds / way.slowdown, budget_bytes, planning_seconds,
        )

    def _limit(self, step_bytes: int) -> None:
        """Let the kernel refuse what goes beyond the step's bytes and the slack."""
        limit_data(self._start_bytes + step_bytes + self.job.slack_bytes)

    def _train(
        self, example: Example, model: torch.nn.Module, step: TrainStep, batch: Any, stream: Any
    ) -> None:
        settings, trained = self.settings, self.trained
        seed_everything(settings.seed)  # capture may have drawn numbers
        started = time.perf_counter()
        for done in range(1, settings.steps + 1):
            if self.connection.poll():  # nothing is ever sent unasked: the study is gone
                raise EOFError
            if done == min(2, settings.steps):  # the optimizer's state is there after the first
                measured = step.measured(batch)
                trained.measured_peak_bytes = measured.peak_bytes
                trained.losses.append(float(measured.loss))
            else:
                trained.losses.append(float(loss_of(step(batch))))
            if done in settings.reported_steps:
                error = self._error(model, example)
                trained.reports[done] = error
                trained.seconds = time.perf_counter() - started
                if error != error:  # the loss was finite, and what it is judged by is not
                    raise NonFiniteLossError(done, error)
                reply = _exchange(self.connection, Report(done, error), may_end=False)
                if not reply.goes_on and done < settings.steps:
                    raise _PrunedError(f"after step {done}, with an error of {error:.4g}")
            if done < settings.steps:
                batch = next(stream)
        trained.seconds = time.perf_counter() - started

    def _error(
        self, model: torch.nn.Module, example: Example, num_batches: int = NUM_VALIDATION_BATCHES
    ) -> float:
        settings = self.settings
        return error_of(model, example, settings.device, settings.seed, num_batches)

    def _end(self, outcome: Outcome, why: str = "") -> None:
        trained = self.trained
        error = list(trained.reports.values())[-1] if trained.reports else None
        is_judged = outcome in (Outcome.COMPLETE, Outcome.PRUNED)
        record = Record(
            self.job.number, outcome, self.point, error if is_judged else None, trained.losses,
            {k: v for k, v in trained.reports.items() if v == v}, self.planned,
            trained.measured_peak_bytes, trained.seconds, why,
        )
        write_record(Path(self.job.result_path), record)
        self.connection.send(Ended())


class _PrunedError(Exception):
    """The study does not want the rest of the trial."""


class _RefusedError(Exception):
    """The FILE cannot be searched."""


def require_space(example: Example) -> Callable[[Any], Any]:
    """Return what a FILE searches.

    Raises:
        OptionError: it does not say.
    """
    if example.space is None:
        raise OptionError(
            f"{example.path} lacks space()\n"
            'hint: def space(trial): return {"width": trial.suggest_int("width", 8, 64)}'
        )
    return example.space


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the kernel gave an allocation nothing, as torch or Python say it."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _exchange(connection: Connection, message: Any, may_end: bool = True) -> Reply:
    """Send a message and return the answer."""
    connection.send(message)
    reply: Reply = connection.recv()
    if may_end and not reply.goes_on:
        raise _LeaveError
    return reply
