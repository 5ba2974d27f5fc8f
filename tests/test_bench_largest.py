"""The search for the largest model: what is tried, what counts as trained, what the tables say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.largest.records import Record, append_record, found, read_records
from benchmarks.largest.report import chart, depth_table, full_report, promise_lines
from benchmarks.largest.search import RESOLUTION, greatest
from benchmarks.largest.tools import TOOLS, Setting, build
from benchmarks.largest.trial import (
    FAILED,
    OUT_OF_MEMORY,
    OUT_OF_TIME,
    REFUSED,
    TRAINED,
    Trial,
    num_parameters,
    run_trial,
)

GIB = 2**30
PLAIN, EXACT = "plain PyTorch", "Packlight, exact"
MADE = {
    "hardware": "a machine", "cores": 2, "versions": {"torch": "2"}, "commit": "abc", "seed": 0,
    "timestamp": "today",
}


def record(tool: str, depth: int, outcome: str, limit: int = GIB, **values: Any) -> Record:
    trial = Trial(outcome, depth, 10**6 * depth, **values)
    return Record(tool, 768, limit, 60.0, vars(trial), MADE)


@pytest.mark.parametrize("guess", [1, 2, 17, 100, 400])
@pytest.mark.parametrize("largest_that_works", [0, 1, 2, 16, 17, 99, 100, 250, 400])
def test_the_search_finds_the_greatest_depth(largest_that_works: int, guess: int) -> None:
    tried: list[int] = []

    def works(depth: int) -> bool:
        assert depth not in tried and 1 <= depth <= 400
        tried.append(depth)
        return depth <= largest_that_works

    depth = greatest(works, guess, 400)
    assert depth <= largest_that_works <= depth + max(1, int(RESOLUTION * depth)) - 1 + (
        depth == 400
    )
    assert len(tried) <= 20


def test_the_number_of_parameters_is_the_models() -> None:
    setting = Setting(2, 96, None, lambda: 0, Path())
    model, _, _ = build(setting)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(2, 96)


def test_parameters_are_equal_on_the_disk(tmp_path: Path) -> None:
    setting = Setting(2, 96, None, lambda: 0, tmp_path)
    plain, _, _ = build(setting)
    mapped, _, _ = build(setting, on_disk=True)
    for ours, theirs in zip(mapped.parameters(), plain.parameters(), strict=True):
        assert ours.equal(theirs)
    assert list(tmp_path.iterdir()) == [], "files without names"


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs a kernel that counts RLIMIT_DATA"
)
@pytest.mark.filterwarnings("ignore")
def test_a_trial_is_ended_by_the_kernel_or_trains(tmp_path: Path) -> None:
    ran = run_trial(PLAIN, 1, GIB, 300, tmp_path, 96)
    assert (ran.outcome, len(ran.losses)) == (TRAINED, 2), ran.error
    assert ran.held_bytes is not None and ran.held_bytes < GIB
    # 40 blocks of width 768 are 1.1 GiB of parameters alone.
    assert run_trial(PLAIN, 40, GIB, 300, tmp_path, 768).outcome == OUT_OF_MEMORY
    assert run_trial(PLAIN, 1, GIB, 0.01, tmp_path, 96).outcome == OUT_OF_TIME


def test_what_was_found_is_between_what_trained_and_what_did_not() -> None:
    records = [
        record(PLAIN, 8, TRAINED), record(PLAIN, 12, OUT_OF_MEMORY), record(PLAIN, 9, TRAINED),
        record(PLAIN, 10, REFUSED),
    ]
    one = found(records)
    assert one.depth == 9 and one.failed is not None and one.failed.depth == 10
    assert not one.stopped_by_time and one.error is None
    assert found([record(PLAIN, 3, FAILED, error="no such library")]).error == "no such library"
    assert found([record(PLAIN, 3, TRAINED), record(PLAIN, 4, OUT_OF_TIME)]).stopped_by_time


def test_tables_say_what_stopped_a_search_and_which_promises_broke(tmp_path: Path) -> None:
    records = [
        record(PLAIN, 9, TRAINED), record(PLAIN, 10, OUT_OF_MEMORY),
        record(PLAIN, 20, TRAINED, 2 * GIB), record(PLAIN, 21, OUT_OF_TIME, 2 * GIB),
        record(EXACT, 14, TRAINED, predicted_bytes=GIB, moves=["update-in-backward"]),
    ]
    path = tmp_path / "lines.jsonl"
    for one in records:
        append_record(path, one)
    assert read_records(path) == [dataclasses.replace(r) for r in records]
    rows = depth_table(records)[2:]
    assert rows[0] == "| plain PyTorch | nothing | 9 blocks, 9 M | > 20 blocks, 20 M |"
    assert rows[1].endswith(2 * "| >= 14 blocks, 14 M " + "|"), "nothing deeper was tried"
    late = [record(PLAIN, 9, TRAINED), record(EXACT, 20, TRAINED, 2 * GIB)]
    assert depth_table(late)[-1].endswith("| - | >= 20 blocks, 20 M |"), "that needed more memory"
    assert "refused memory to none" in promise_lines(records)[0]
    broken = record(EXACT, 15, OUT_OF_MEMORY, predicted_bytes=GIB)
    assert "to 1 of them: Packlight, exact with 15 blocks" in promise_lines([*records, broken])[0]
    for text in full_report(records):
        assert "None" not in text
    assert len(chart(records).axes[0].patches) == 4
    assert list(TOOLS)[0] == PLAIN
