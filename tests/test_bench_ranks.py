"""The table of the benchmark on two ranks."""

from __future__ import annotations

from benchmarks.ranks.modes import MODES
from benchmarks.ranks.report import report
from benchmarks.ranks.turns import Record

TOLD = {
    "cores": 2, "hardware": "a CPU", "versions": {"torch": "2.13.0"}, "load_at_start": 0.1,
    "command": "python -m benchmarks.ranks",
}


def record(mode: str, turn: int, seconds: float, predicted: float | None = None) -> Record:
    num_bytes = None if predicted is None else 60 * 2**20
    return Record(
        mode, turn, None, 60 * 2**20, num_bytes, predicted, seconds, 1.0, 77, 77, dict(TOLD)
    )


def test_seconds_are_compared_within_a_round() -> None:
    lines = report([
        record("DDP", 0, 1.0), record("ours", 0, 1.5, 1.5),
        record("DDP", 1, 2.0), record("ours", 1, 2.0, 1.0),
    ])
    (ours,) = (line for line in lines if line.startswith("| ours"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells == [
        "ours", "60.0", "60.0", "1750", "1.25 (1.12 to 1.38)", "0.75", "77 of 77",
    ]
    assert "2 rounds" in lines[-1]


def test_every_mode_has_a_name_of_its_own() -> None:
    names = [mode.name for mode in MODES]
    assert len({*names}) == len(names)
    assert names[0] == "DDP"  # the others are compared with it
