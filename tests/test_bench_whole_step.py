"""The whole-step benchmark: cells, lines, tables. Nothing here looks at how long anything takes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from benchmarks.common import append_line, write_lines
from benchmarks.models import adamw
from benchmarks.peers.checkpointing import per_block
from benchmarks.whole_step import tables
from benchmarks.whole_step.cases import CASES, Case
from benchmarks.whole_step.measure import VARIANTS, Bench
from benchmarks.whole_step.records import (
    EAGER,
    JOINT,
    SMALLEST,
    Record,
    read_records,
)
from benchmarks.whole_step.report import full_report, main, measured, plot_name
from benchmarks.workbench import accumulated
from tests.models import make

MIB = 2**20
MADE = {
    "hardware": "a machine", "versions": {"torch": "2"}, "commit": "abc", "seed": 0,
    "timestamp": "today",
}


def record(variant: str, setting: str = "", budget: int | None = None, **values: object) -> Record:
    budget_bytes = None if budget is None else budget * MIB
    made = {"provenance": MADE, "parameter_bytes": 10 * MIB, **values}
    return Record("net", "a net", variant, setting, budget_bytes, **made)  # type: ignore[arg-type]


def ran(peak: int, ratio: float) -> dict[str, object]:
    return {
        "first_peak_bytes": (peak - 1) * MIB, "later_peak_bytes": peak * MIB,
        "predicted_peak_bytes": peak * MIB, "ratio_median": ratio,
        "ratio_quartiles": (ratio - 0.01, ratio + 0.01), "num_rounds": 3, "seconds_median": 1.0,
        "eager_seconds_median": 1.0, "predicted_seconds": 1.0, "fit_seconds": 2.0,
        "same_bits": {"loss": True, "parameters": True},
    }


@pytest.fixture
def records() -> list[Record]:
    return [
        record(EAGER, **ran(100, 1.0)),
        record("by hand: 4 microbatches", **ran(60, 1.3)),
        record(JOINT, "50%", 50, moves=["update-in-backward"], **ran(49, 1.1)),
        record(JOINT, "70%", 70, moves=["update-in-backward"], **ran(71, 1.05)),
        record(JOINT, "20%", 20, error="InfeasibleBudgetError: too small\n more",
               smallest_bytes=40 * MIB),
        record(JOINT, SMALLEST, 40, moves=["9 operations recomputed"], num_trained_steps=2,
               validation_loss=1.5, eager_validation_loss=1.5, **ran(40, 1.5)),
        record("recompute only", "50%", 50, error="InfeasibleBudgetError: too small",
               smallest_bytes=55 * MIB),
    ]  # fmt: skip


# -- records and tables


def test_appended_lines_are_read_back(tmp_path: Path, records: list[Record]) -> None:
    path = tmp_path / "lines.jsonl"
    for one in records:
        append_line(path, one)
    again = read_records(path)
    lists = [dataclasses.replace(r, ratio_quartiles=tuple(r.ratio_quartiles or ()) or None)  # type: ignore[arg-type]
             for r in again]
    assert lists == records


def test_the_larger_of_both_peaks_counts_against_the_budget() -> None:
    one = record(JOINT, "50%", 50, first_peak_bytes=51 * MIB, later_peak_bytes=40 * MIB)
    assert one.peak_bytes == 51 * MIB
    assert one.is_over_budget
    assert not record(JOINT, "50%", 50).is_over_budget


def test_broken_budgets_are_counted_and_named(records: list[Record]) -> None:
    first, *named = tables.budget_lines(records)
    assert first.startswith("2 of 3 cells kept to their budget")
    assert [line.split(":")[0] for line in named] == ["- net, 70%, all moves"]


def test_the_budget_table_has_every_cell_the_largest_budget_first(records: list[Record]) -> None:
    rows = tables.budget_table(records)[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 70%", "| 50%", "| smallest", "| 20%"]
    assert "71.0 **over** | 71% | 61.0" in rows[0]
    assert "1.100 (1.090 to 1.110)" in rows[1]
    assert "infeasible; 40.0 MiB would do" in rows[3]


def test_variants_stand_beside_all_moves_at_their_budget(records: list[Record]) -> None:
    rows = [row.split(" | ")[:2] for row in tables.variant_table(records)[2:]]
    assert rows == [["| 50%", "all moves"], ["| 50%", "recompute only"]]


def test_the_summary_has_the_smallest_budget_that_ran(records: list[Record]) -> None:
    (row,) = tables.summary_table(records)[2:]
    assert row.split(" | ")[3:] == ["1.05x", "1.10x", "-", "40.0", "40%", "1.50x |"]


def test_all_tables_have_as_many_cells_in_each_row_as_in_the_header(records: list[Record]) -> None:
    widths: set[int] = set()
    for line in full_report(records):
        if line.startswith("| "):
            widths.add(line.count("|"))
            assert len(widths) == 1, line
        else:
            widths.clear()


def test_a_model_without_an_eager_line_is_left_out(records: list[Record]) -> None:
    assert measured(records) == records
    assert measured(records[1:]) == []


def test_the_report_is_written_between_markers(
    tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "benchmarks" / "whole_step" / "README.md"
    readme.parent.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    markers = "<!-- whole-step:begin (x) -->\nold\n<!-- whole-step:end -->\n"
    readme.write_text(f"before\n{markers}after\n")
    write_lines(tmp_path / "lines.jsonl", records)
    arguments = ["--results", str(tmp_path / "lines.jsonl"), "--root", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "\n".join(tables.budget_table(records)) in text
    assert all((tmp_path / "docs" / plot_name(name)).exists() for name in ("all", "net"))


# -- what is measured


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_step_that_trains(name: str) -> None:
    case = CASES[name]
    built = case.build(True, "cpu", 0)
    optimizer = case.optimizer(built.model)
    built.loss_fn(built.model, built.batch).backward()
    optimizer.step()
    assert any(
        not torch.equal(p, built.initial[n]) for n, p in built.model.named_parameters()
    )
    assert set(case.variants) <= set(VARIANTS)
    assert list(case.percents) == sorted(case.percents, reverse=True)


def test_microbatches_by_hand_give_the_gradients_of_the_whole_batch() -> None:
    model, batch, loss_fn = make("reference_gpt", **CASES["reference_gpt"].quick_sizes)
    twin = copy.deepcopy(model)
    whole = loss_fn(twin, batch)
    whole.backward()
    cut = accumulated(loss_fn, 4)(model, batch)
    cut.backward()
    torch.testing.assert_close(cut, whole)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_checkpointing_by_hand_composes_with_microbatches() -> None:
    built = CASES["reference_gpt"].build(True, "cpu", 0)
    accumulated(per_block(built), 2)(built.model, built.batch).backward()
    assert all(p.grad is not None for p in built.model.parameters())


def test_cells_keep_to_budgets_and_are_not_measured_twice(tmp_path: Path) -> None:
    sizes = {"layers": 2, "width": 48, "length": 32, "vocabulary": 64, "batch_size": 2}
    case = Case(
        "tiny", "a tiny GPT", "reference_gpt", adamw, sizes, percents=(100, 10),
        variants=("recompute only",), variant_percents=(70,), microbatches_by_hand=2,
    )
    out = tmp_path / "lines.jsonl"

    def bench() -> Bench:
        return Bench(case, out, False, 1, "cpu", 0, "a test", Progress(disable=True))

    num_added = bench().run()
    found = {r.key: r for r in read_records(out)}
    assert len(found) == num_added
    eager = found[EAGER, ""]
    # AdamW's two moments, the parameters and all gradients are there when the plain step ends.
    assert (eager.peak_bytes or 0) > 4 * eager.parameter_bytes
    cells = [r for r in found.values() if r.variant == JOINT and r.error is None]
    assert len(cells) >= 2
    for cell in cells:
        assert not cell.is_over_budget
        assert cell.predicted_peak_bytes == pytest.approx(cell.peak_bytes, rel=0.01)
        assert cell.loss_difference is not None and cell.loss_difference < 1e-5
        assert cell.update_error is not None and cell.update_error < 1e-4
    assert (JOINT, SMALLEST) in found

    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")  # as if it had been interrupted
    assert bench().run() == 1
    assert [r.key for r in read_records(out)] == list(found)
