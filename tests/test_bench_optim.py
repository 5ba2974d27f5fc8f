"""The benchmark of optimizers counts bytes as they are, and keeps what failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.optim.__main__ import report
from benchmarks.optim.cases import CASES, Case
from benchmarks.optim.measure import measure

EIGHT_BIT = "packlight: adamw, states 8bit, weights fp32"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_bytes_of_known_optimizers_and_their_table() -> None:
    records = [
        measure(key, 2**16, 2, 1, 0, "test")
        for key in ("torch: AdamW, fused=True", "torch: AdamW", EIGHT_BIT)
    ]
    fused, plain, ours = records
    assert fused.state_bytes == plain.state_bytes == 2 * 4 * 2**16 + 4
    assert fused.transient_bytes < 64  # a step counter
    assert 8 * 2**16 <= plain.transient_bytes < 8 * 2**16 + 64
    assert ours.state_bytes == 2 * (2**16 + 4 * 2**8)
    rows = report(records)[2:5]
    assert [row.split(" | ")[3] for row in rows] == ["8.000", "8.000", "2.031"]
    assert all(record.ratio_median for record in records)


def test_a_library_that_is_not_there_is_a_row_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(_: object) -> torch.optim.Optimizer:
        raise ImportError("no such | library")

    monkeypatch.setitem(CASES, "x: y", Case("x", "y", make))
    record = measure("x: y", 2**16, 2, 1, 0, "test")
    assert "ImportError: no such / library" in report([record])[2]
