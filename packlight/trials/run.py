"""`search`: a study from a FILE, in a directory, within one limit of memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from packlight.trials.coordinator import Coordinator, Watcher
from packlight.trials.records import Study
from packlight.trials.settings import Settings
from packlight.trials.storage import locked
from packlight.trials.workers import Nursery
from packlight.units import parse_bytes


def search(
    file: str,
    memory: str | int,
    num_trials: int,
    directory: str | Path,
    *,
    num_workers: int = 1,
    settings: Settings | None = None,
    watch: Watcher | None = None,
) -> Study:
    """Search for the hyper-parameters with the least validation error, within one limit of memory.

    A trial is captured and planned before it runs. Trials run beside one another while the sum of
    their planned peaks fits; one that fits only with recomputation is recomputed; one that does not
    fit at all is not run, and the sampler learns by how much (TPE with the constraint `planned peak
    - memory`: Watanabe & Hutter 2023, arXiv 2211.14411). Where the directory holds a study it is
    gone on with: finished trials are not run again, and those that were under way are.

    Args:
        file: a Python file with model(), loss(), optimizer(), batches() as for `packlight train`,
            and space(trial), which returns the trial's values by name. The functions take those of
            them that they have arguments for.
        memory: bytes, or a string such as "1GiB", for all processes together.
        num_trials: that the study has in the end, earlier ones included.
        directory: of the study's files; made if it is not there.
        num_workers: how many trials may run side by side.
        settings: of each trial.
        watch: called whenever something has changed.

    Raises:
        OptionError: the memory is too small for any trial, or the directory is of another study.
        NoFeasibleTrialError: no trial fits; names the smallest memory with which one would.
        MissingExtraError: Optuna is not installed.
        ExampleError: the FILE cannot be loaded.
    """
    path = Path(directory)
    (path / "trials").mkdir(parents=True, exist_ok=True)
    with locked(path) as lock, closing(Nursery(file, lock)) as workers:
        return Coordinator(
            file, parse_bytes(memory), num_trials, path, workers, num_workers,
            settings or Settings(), watch,
        ).run()
