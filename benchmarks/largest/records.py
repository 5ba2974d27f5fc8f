"""Results as JSON lines: one line per trial, appended when it ends."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, read_lines
from benchmarks.largest.trial import FAILED, OUT_OF_TIME, TRAINED, Trial

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "largest-quick.jsonl"


@dataclass
class Record:
    """One trial of a tool within a limit.

    Attributes:
        tool: see `tools.TOOLS`.
        width: of the model.
        limit_bytes: what the process may hold.
        time_limit_seconds: after which it was stopped.
        trial: what came of it; the fields of `trial.Trial`.
        provenance: see `benchmarks.common.provenance`.
    """

    tool: str
    width: int
    limit_bytes: int
    time_limit_seconds: float
    trial: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Trial:
        """What came of the trial."""
        return Trial(**self.trial)


@dataclass(frozen=True)
class Found:
    """What all trials of a tool within a limit say.

    Attributes:
        best: the deepest that trained; None if none did.
        failed: the shallowest deeper one that did not; None if none was tried.
    """

    best: Trial | None
    failed: Trial | None

    @property
    def depth(self) -> int:
        """The greatest depth that trained, 0 if none did."""
        return 0 if self.best is None else self.best.depth

    @property
    def stopped_by_time(self) -> bool:
        """Whether greater depths took too long, so that memory was not the end."""
        return self.failed is not None and self.failed.outcome == OUT_OF_TIME

    @property
    def error(self) -> str | None:
        """Why nothing trained for another reason than memory."""
        if self.best is None and self.failed is not None and self.failed.outcome == FAILED:
            return self.failed.error
        return None


def found(records: list[Record]) -> Found:
    """Return what the trials of one tool within one limit say."""
    trials = [record.result for record in records]
    trained = [t for t in trials if t.outcome == TRAINED]
    best = max(trained, key=lambda t: t.depth, default=None)
    depth = 0 if best is None else best.depth
    deeper = [t for t in trials if t.outcome != TRAINED and t.depth > depth]
    return Found(best, min(deeper, key=lambda t: t.depth, default=None))


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; none if it does not exist."""
    return read_lines(path, Record)


def append_record(path: Path, record: Record) -> None:
    """Add one line to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")
