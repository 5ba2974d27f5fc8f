"""A study in Optuna's journal: trials asked for, told, and found again after a kill.

One process, the study's own, talks to Optuna; trials' processes know nothing of it. A trial that
was under way is run again under its own number, at its own point.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight.errors import OptionError
from packlight.extras import require_optuna
from packlight.trials.messages import Ask, Planned
from packlight.trials.records import Outcome, Record
from packlight.trials.settings import Settings, as_json

if TYPE_CHECKING:
    import optuna

NAME = "packlight"
# What a trial asks Optuna for.
_METHODS = ("suggest_float", "suggest_int", "suggest_categorical")
CONSTRAINT = "memory_bytes"


class Storage:
    """A study's trials as Optuna knows them.

    Args:
        directory: of the study.
        settings: of its trials.
        file: that defines them.
        step_bytes: what there is for steps: what a trial needs beyond that violates a constraint.

    Raises:
        MissingExtraError: Optuna is not installed.
        OptionError: the directory is of a study with other settings, or another search runs there.
    """

    def __init__(
        self, directory: Path, settings: Settings, file: str, step_bytes: int
    ) -> None:
        optuna = require_optuna("packlight.trials")
        self.directory, self.step_bytes = directory, step_bytes
        journal = directory / "journal.log"
        _mend(journal)
        backend = optuna.storages.journal.JournalFileBackend(str(journal), _NoLock())
        self._store = optuna.storages.JournalStorage(backend)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            study_name=NAME, storage=self._store, load_if_exists=True, pruner=_pruner(settings)
        )
        self._check_same(settings, file)
        # A sampler that started from the same numbers again would ask for the same points again.
        seed = settings.seed + len(self.study.get_trials(deepcopy=False))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)

    def _check_same(self, settings: Settings, file: str) -> None:
        wanted = {"file": Path(file).name, **as_json(settings)}
        saved = self.study.user_attrs.get("settings")
        if saved is None:
            self.study.set_user_attr("settings", wanted)
            return
        for name, value in wanted.items():
            if saved.get(name) != value:
                raise OptionError(
                    f"{self.directory} is of a study with {name} {saved.get(name)!r}, not "
                    f"{value!r}\nhint: give this study a directory of its own"
                )

    @property
    def num_trials(self) -> int:
        """How many trials were asked for."""
        return len(self.study.get_trials(deepcopy=False))

    def under_way(self) -> list[optuna.Trial]:
        """Return the trials that were asked for and have not been told of."""
        import optuna

        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        return [optuna.Trial(self.study, self._place(trial.number)) for trial in running]

    def ask(self) -> optuna.Trial:
        """Return a new trial."""
        trial: optuna.Trial = self.study.ask()
        return trial

    def answer(self, trial: optuna.Trial, asked: Ask) -> Any:
        """Return what Optuna suggests.

        Raises:
            ValueError, TypeError: it does not take such a question.
        """
        assert asked.method in _METHODS
        return getattr(trial, asked.method)(*asked.args, **asked.kwargs)

    def note_need(self, trial: optuna.Trial, needed_bytes: int) -> None:
        """Tell the sampler what a trial takes of the memory that there is."""
        if CONSTRAINT not in self._frozen(trial).constraints:
            trial.set_constraint(CONSTRAINT, needed_bytes - self.step_bytes)

    def note_planned(self, trial: optuna.Trial, planned: Planned) -> None:
        """Write what is known of a trial before it runs."""
        trial.set_user_attr("planned", vars(planned))

    def report(self, trial: optuna.Trial, step: int, error: float) -> bool:
        """Tell of an error, and return whether the trial is worth going on with."""
        if step not in self._frozen(trial).intermediate_values:
            trial.report(error, step)
        return not trial.should_prune()

    def tell(self, trial: optuna.Trial, record: Record) -> None:
        """Say how a trial ended."""
        from optuna.trial import TrialState

        trial.set_user_attr("outcome", record.outcome.value)
        if record.why:
            trial.set_user_attr("why", record.why)
        if record.same_as is not None:
            trial.set_user_attr("same_as", record.same_as)
        if record.outcome is Outcome.COMPLETE:
            self.study.tell(trial, record.error)
            return
        # A trial that failed says nothing about its point; one that diverged or does not fit does.
        is_failed = record.outcome is Outcome.FAILED
        self.study.tell(trial, state=TrialState.FAIL if is_failed else TrialState.PRUNED)

    def importances(self) -> dict[str, float]:
        """Return how much each parameter matters for the error, the one that does most first."""
        import optuna
        from optuna.importance import get_param_importances

        complete = self.study.get_trials(
            deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)
        )
        errors = {trial.value for trial in complete}
        if len(errors) < 2:
            return {}
        try:
            return dict(get_param_importances(self.study))
        except (RuntimeError, ValueError):  # parameters that all trials share have one value
            return {}

    def _frozen(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
        frozen: optuna.trial.FrozenTrial = self._store.get_trial(self._place(trial.number))
        return frozen

    def _place(self, number: int) -> int:
        """Return what the journal calls a trial."""
        study = self._store.get_study_id_from_name(NAME)
        place: int = self._store.get_trial_id_from_study_id_trial_number(study, number)
        return place


class _NoLock:
    """The journal's own lock files outlive a killed process; this study is locked as a whole."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def locked(directory: Path, seconds_to_wait: float = 5.0) -> Iterator[int]:
    """Keep other searches out of a directory; yield the lock's descriptor.

    Processes that inherit it hold the lock, too: it is free once the last of them has gone, which
    takes a moment after a kill.

    Raises:
        OptionError: another search is there.
    """
    descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR)
    try:
        deadline = time.monotonic() + seconds_to_wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OptionError(
                        f"another search runs in {directory}\nhint: wait for its end, or give this "
                        "study a directory of its own"
                    ) from None
                time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def _mend(journal: Path) -> None:
    """Cut off a last line that a killed process has not written to its end.

    What is appended to half a line would make both unreadable, and with them the study.
    """
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)


def _pruner(settings: Settings) -> Any:
    import optuna

    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5)
    if settings.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=settings.reported_steps[0])
    return optuna.pruners.NopPruner()


def key_of(point: dict[str, Any]) -> str:
    """Return what two trials at the same point have in common."""
    return json.dumps(point, sort_keys=True)
