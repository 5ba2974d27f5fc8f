"""The benchmark of sparse weights: what is counted, and its tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.sparse import memory, report
from benchmarks.sparse.records import Record, read_records

pytest.importorskip("numba", reason="sparse kernels need the extra 'sparse'")


def test_bytes_of_a_sparse_model_are_those_that_a_hand_count_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case: Any = (
        lambda: nn.Sequential(nn.Linear(500, 100)),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        torch.Size([4, 500]),
    )
    monkeypatch.setitem(memory.CASES, "layer", case)
    dense, sparse = memory.measured("layer", None, "dense"), memory.measured("layer", 0.1, "set")
    assert dense["resident_bytes"] == 2 * 4 * 50_100 and dense["gradient_bytes"] == 4 * 50_100
    assert sparse["values_bytes"] == sparse["optimizer_state_bytes"] == 4 * 5000
    assert sparse["index_bytes"] == 5000 + 100 * 2
    assert sparse["resident_bytes"] == 2 * 4 * 5100 + 5200


def test_tables_are_those_of_the_lines() -> None:
    records = read_records()
    made: dict[str, Any] = {
        "hardware": "a machine", "cores": 2, "versions": {"torch": "2"}, "commit": "abc",
        "load_at_start": 1.0,
    }
    sizes = {"resident_bytes": 1000, "held_bytes": 1500}
    parts = {"values_bytes": 100, "index_bytes": 26, "optimizer_state_bytes": 100}
    less = {**parts, "resident_bytes": 120, "held_bytes": 165}
    lines = report.memory_table([
        Record("memory", "a", "dense", 1.0, made, sizes),
        Record("memory", "a", "dsr", 0.1, made, less),
    ])
    assert "| 12.00% | 11.00% | 10.87% |" in lines[3]
    accuracy = [r for r in records if r.question == "accuracy"]
    seeds = {r.seed for r in accuracy}
    for method in {r.method for r in accuracy}:
        assert {r.seed for r in accuracy if r.method == method} == seeds
    text = (report.FOLDER / "README.md").read_text(encoding="utf-8")
    for question, table in (("accuracy", report.accuracy_table), ("speed", report.speed_table)):
        chosen = [r for r in records if r.question == question]
        assert "\n".join(table(chosen)) in text
