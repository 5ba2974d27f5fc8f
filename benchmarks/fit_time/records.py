"""Results as JSON lines: one line for each fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "fit_time-quick.jsonl"

# What an earlier process has left in the cache's folder.
COLD, WARM, SAVED = "nothing", "times of calls", "the way itself"
BASELINE, MINE = "baseline", "this checkout"


@dataclass
class Record:
    """One `fit` in a fresh process.

    Attributes:
        case: its name in `cases.CASES`.
        side: whose code ran.
        state: what there was in the cache.
        commit: of that code.
        round_index: which repetition.
        seconds: of `fit`.
        cpu_seconds: of all threads of the process meanwhile.
        import_seconds, import_cpu_seconds: of `from packlight import fit` where torch is loaded.
        parts: part of fit -> processor seconds of the main thread, see `where.py`.
        budget_bytes: of the last fit.
        peak_bytes, predicted_seconds, moves: of the step that was found.
        smallest_bytes: named by the last error, where there was one.
        error: of a process that ended otherwise.
        provenance: see `benchmarks.common.provenance`.
    """

    case: str
    side: str
    state: str
    commit: str
    round_index: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    import_seconds: float = 0.0
    import_cpu_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_seconds: float | None = None
    moves: str | None = None
    smallest_bytes: int | None = None
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
