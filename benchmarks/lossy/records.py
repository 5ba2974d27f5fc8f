"""One line of results.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import read_lines

RESULTS = Path(__file__).resolve().parent / "results.jsonl"


@dataclass
class Record:
    """One measurement.

    Attributes:
        question: "bandwidth" or "quality".
        case: what was measured.
        provenance: see `benchmarks.common.provenance`.
        values: what was measured, by name; names carry their units.
        seed: of the run, where there are several.
    """

    question: str
    case: str
    provenance: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


def read_records() -> list[Record]:
    """Return what has been measured."""
    return read_lines(RESULTS, Record)
