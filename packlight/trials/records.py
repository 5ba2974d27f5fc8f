"""How trials ended, in files; a trial is finished once its file is there.

A study's directory holds `journal.log` (Optuna's), a file for each trial, and the report. A trial's
own process writes its file, whole or not at all, so that a finished trial stays finished whichever
process is killed next.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from packlight.errors import FormatError
from packlight.trials.messages import Planned


class Outcome(Enum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    FAILED = "failed"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Record:
    """A trial that has ended.

    Attributes:
        number: its place in the study.
        outcome: how it ended.
        point: what `space` returned.
        error: on validation batches, of the latest report; None if there was none.
        losses: of its training steps.
        reports: validation errors by the step after which they were looked at.
        planned: what was known before it ran; None where it was not planned to the end.
        measured_peak_bytes: of a training step, everything counted.
        seconds: of training and evaluation.
        why: it did not end as it should have.
        smallest_bytes: with which its step could run, where it is infeasible.
        same_as: the trial at the same point that it took the result of.
    """

    number: int
    outcome: Outcome
    point: dict[str, Any]
    error: float | None = None
    losses: list[float] = field(default_factory=list)
    reports: dict[int, float] = field(default_factory=dict)
    planned: Planned | None = None
    measured_peak_bytes: int | None = None
    seconds: float = 0.0
    why: str = ""
    smallest_bytes: int | None = None
    same_as: int | None = None


@dataclass(frozen=True)
class Study:
    """A study's trials and what they ran in.

    Attributes:
        directory: of its files.
        memory_bytes: what all its processes together may hold.
        step_bytes: what of that is left for steps.
        records: of the trials that ended, by number.
        importances: of parameters for the error (PED-ANOVA: Watanabe et al. 2023, arXiv
            2304.10255), largest first; empty where too few trials were complete.
        num_retried: trials that were started again with more memory, since the kernel had none.
    """

    directory: Path
    memory_bytes: int
    step_bytes: int
    records: dict[int, Record]
    importances: dict[str, float]
    num_retried: int = 0

    @property
    def best(self) -> Record | None:
        """The complete trial with the least error."""
        complete = [r for r in self.records.values() if r.outcome is Outcome.COMPLETE]
        return min(complete, key=lambda r: (r.error, r.number), default=None)

    def count(self, outcome: Outcome) -> int:
        """Return how many trials ended in a way."""
        return sum(record.outcome is outcome for record in self.records.values())


def record_path(directory: Path, number: int) -> Path:
    """Return where a trial's file is."""
    return directory / "trials" / f"{number:05d}.json"


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all, and see it through to the disk."""
    content = asdict(record) | {"outcome": record.outcome.value}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def read_record(path: Path) -> Record | None:
    """Return the record in a file, None if there is no file.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    try:
        planned = content.pop("planned")
        return Record(
            **{
                **content,
                "outcome": Outcome(content["outcome"]),
                "reports": {int(step): error for step, error in content["reports"].items()},
                "planned": None if planned is None else Planned(**planned),
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is no trial's record: {error}") from error
