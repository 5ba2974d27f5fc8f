"""The table of the benchmark on two ranks."""

from __future__ import annotations

import math

from benchmarks.ranks.kills import Kill
from benchmarks.ranks.modes import MODES
from benchmarks.ranks.parity import Cell, worst
from benchmarks.ranks.report import report
from benchmarks.ranks.tables import kills_lines, parity_lines
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


def test_an_error_is_that_of_the_worst_tensor_over_all_ranks() -> None:
    one = {"large": (0.0, 4.0), "wrong": (0.25, 0.5)}
    other = {"large": (0.0, 4.0), "wrong": (0.0, 0.5)}
    assert worst([one, other]) == (0.5, "wrong")
    # What is next to nothing is measured by what the others are.
    assert worst([{"large": (0.0, 1e6), "nothing": (1e-2, 1e-30)}]) == (0.1, "nothing")
    assert math.isnan(worst([{"large": (1.0, 1.0), "broken": (math.nan, 1.0)}])[0])


def test_the_matrix_says_what_differs_what_is_refused_and_what_overruns() -> None:
    def cell(strategy: str, status: str, error: float | None, peak: int = 5) -> Cell:
        errors = {} if error is None else {"losses": error / 10, "state": error}
        return Cell("MLP", strategy, "fp32", status, errors, {}, peak, 6, 5)

    lines = parity_lines([
        cell("data", "equal", 1e-6), cell("zero1", "differs", 0.5), cell("zero2", "equal", 1e-6, 7),
        cell("tensor", "OptionError: no", None),
    ])
    text = "\n".join(lines)
    assert "| MLP | data | 1e-06 |" in text and "| MLP | zero1 | **differs**: 5e-01 |" in text
    assert "| MLP | tensor | (1) |" in text and "(1) OptionError: no" in lines
    assert "2 of 3 cells that train" in text and "Of 3 cells with a budget, 1 are" in text


def test_kills_are_counted_by_what_ranks_did() -> None:
    def kill(seed: int, how: str, num_hung: int) -> Kill:
        return Kill(seed, how, 1, num_hung, 0, [], True, 1.5, 3)

    rows = kills_lines([kill(0, "2, state", 0), kill(1, "2, state", 1), kill(2, "3, whole", 0)])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert cells == [
        ["2, state", "2", "1", "0", "0", "1.5"], ["3, whole", "1", "0", "0", "0", "1.5"],
    ]
