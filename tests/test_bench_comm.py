"""benchmarks/comm: what its tables say of lines, and that a run counts what is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.comm import codecs, report
from benchmarks.comm.methods import ADAMW, METHODS
from benchmarks.comm.train import Record, run
from benchmarks.common import read_lines

MADE = {
    "hardware": "CPU", "cores": 2, "load_at_start": 1.0, "versions": {"torch": "2"},
    "commit": "c", "timestamp": "t", "command": "python -m benchmarks.comm",
}  # fmt: skip


def record(method: str, seed: int, loss: float, sent: float, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "method": method, "library": "l", "baseline": "base", "network": "", "num_workers": 4,
        "num_steps": 10, "seed": seed, "num_parameters": 5, "validation_loss": loss,
        "bytes_per_step": sent, "losses": [], "seconds": 1.0, "provenance": MADE,
    }  # fmt: skip
    return Record(**{**values, **changes})


def test_methods_are_compared_to_their_baseline_of_the_same_seed() -> None:
    lines = report.table_of_methods([
        record("base", 0, 2.0, 6000), record("base", 1, 4.0, 6000),
        record("less", 0, 2.02, 10), record("less", 1, 4.0, 10),
    ])  # fmt: skip
    assert lines[3].split(" | ")[2:7] == ["10", "1/600", "3.0100", "+0.50%", "+0.00 to +1.00"]


def test_rates_are_columns() -> None:
    lines = report.table_of_network([
        record("base", 0, 2.0, 1, network="100mbit"), record("base", 0, 2.0, 1, network="1gbit"),
    ])
    assert lines[0] == "| ms a step | 100mbit | 1gbit |" and lines[2] == "| base | 100 | 100 |"


def test_every_method_has_a_baseline_that_is_a_method() -> None:
    assert {method.baseline for method in METHODS.values()} <= set(METHODS)


def test_codecs_are_measured_with_their_share(tmp_path: Path) -> None:
    speeds = codecs.measure(tmp_path / "codecs.jsonl", 1, 2**14, "test")
    share = {s.codec: s.share for s in speeds}
    assert 8.1 / 32 < share["q8+noef"] < 8.2 / 32 and share["sign"] == 1 / 32
    assert len(report.table_of_codecs(read_lines(tmp_path / "codecs.jsonl", codecs.Speed))) > 15


@pytest.mark.slow
def test_a_run_counts_what_the_kernel_saw(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert run([ADAMW, "local, 10 steps, 3% q1"], 2, 10, [0], out, "test")
    plain, less = read_lines(out, Record)
    dense = 4 * plain.num_parameters  # a ring of two sends half twice
    assert dense <= plain.bytes_per_step <= 1.02 * dense
    assert less.bytes_per_step < plain.bytes_per_step / 300
