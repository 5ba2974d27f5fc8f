"""A fast slice of the zoo, and what its harness makes of lines: counts, failures, the matrix."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.common import write_lines
from benchmarks.zoo import __main__ as run
from benchmarks.zoo import measure, outcome, report
from benchmarks.zoo.in_pieces import StepInPieces
from benchmarks.zoo.measure import CompiledStep, cells_to_measure, measure_family, new_record
from benchmarks.zoo.outcome import (
    MAX_TRACED_ERROR,
    NUM_WARM_UPS,
    LossFn,
    norm_of_difference,
    observe,
)
from benchmarks.zoo.records import (
    ALL,
    COMPILE,
    CONFIGS,
    EXACT,
    GENERATOR_BYTES,
    HALF_WAY,
    SHARES,
    SMALLEST,
    Cell,
    Config,
    Record,
    all_cells,
    read_records,
)
from benchmarks.zoo.whole_step import measure_fit
from tests.zoo.families import BREAKING, FAMILIES, KNOWN

FP32, BF16 = Config(0.1, "fp32"), Config(0.1, "bf16")
MADE: dict[str, Any] = {
    "versions": {"torch": "2"}, "hardware": "cpu", "commit": "x", "seed": 0, "timestamp": "now",
}

# -- the slice: families of different kinds, cheap ones, at one budget each

SLICE = (
    ("gpt_neo", FP32, SMALLEST, "eager"),
    ("gru_cell", FP32, "10%", "eager"),
    ("in_place", FP32, SMALLEST, "eager"),
    ("checkpointed", FP32, SMALLEST, "eager"),
    ("siamese", FP32, "60%", "eager"),
    ("lora", FP32, "30%", "eager"),
    ("custom_function", BF16, SMALLEST, "eager"),
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))


# What dynamo does with autograd functions that a model defines.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("name", "config", "setting", "bits"), SLICE, ids=[c[0] for c in SLICE])
def test_a_family_keeps_to_its_budget_with_the_bits_of_an_unplanned_step(
    name: str, config: Config, setting: str, bits: str
) -> None:
    record = new_record(name, Cell(config, COMPILE, setting), {})
    CompiledStep(name, config, 0).measure(record)
    assert record.failure is None
    assert record.bits == bits
    assert record.peak_bytes is not None and record.plain_peak_bytes is not None
    assert record.peak_bytes <= record.plain_peak_bytes


def test_a_whole_step_half_way_has_eagers_parameters() -> None:
    record = new_record("siamese", Cell(FP32, EXACT, HALF_WAY), {})
    measure_fit(record, 0)
    assert record.failure is None
    assert record.bits == "eager" and record.relative_error == 0.0


def test_reasons_are_given_for_families_that_there_are() -> None:
    assert set(KNOWN) | set(BREAKING) <= set(FAMILIES)


# -- what breaks


class Interrupted(nn.Module):
    """Python looks at a number between its layers; some of what it draws is NumPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(nn.functional.gelu(layer(x)), 0.1)
            x = x / (1 + x.detach().amax().item() + float(np.random.random()))
        return x


def test_what_breaks_is_measured_in_pieces_captured_once_for_all_budgets() -> None:
    torch.manual_seed(0)
    model, batch = Interrupted(), torch.randn(64, 32)
    eager, steps = observe(model, batch, summed), StepInPieces(model, batch, summed)
    measured = []
    for setting in (SMALLEST, "60%"):
        mine = record(setting=setting, budget_bytes=None, num_operations=None)
        outcome = steps.measure(mine)
        assert outcome.differences(eager) == []
        assert mine.budget_bytes is not None and outcome.peak_bytes <= mine.budget_bytes
        assert mine.predicted_peak_bytes is not None
        assert 0 <= mine.predicted_peak_bytes - outcome.peak_bytes <= GENERATOR_BYTES
        assert mine.num_pieces == 5 and any("item" in cause for cause in mine.breaks)
        measured.append(outcome.peak_bytes)
    assert measured[0] < measured[1] <= steps.plain_bytes
    pieces = steps.backend.loop.pieces
    assert pieces is not None and pieces.num_captured == 0, "for the second budget nothing is"


def test_a_family_that_breaks_has_its_pieces_in_the_matrix_and_its_reason_below() -> None:
    found = {"net": [record(num_pieces=5, breaks=["item()"])], "whole": [record("whole")]}
    assert "eager, 25%, 5 pieces" in report.matrix(found)[2]
    assert report.breaks(found, {"net": "It asks.", "whole": "?"}) == ["- **net**: It asks."]
    assert report.breaks(found, {}) == ["- **net**: item()"]


# -- what an outcome is


class Counting(nn.Module):
    """Counts its calls in a buffer that its state dict does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.count, torch.Tensor)
        self.count.add_(1)
        return nn.functional.dropout(self.layer(x) * self.count, 0.5)


def summed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).sum()


def test_an_outcome_is_that_of_the_first_call_and_leaves_the_model_as_it_was() -> None:
    model, batch = Counting(), torch.ones(2, 4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    first, second = observe(model, batch, summed), observe(model, batch, summed, 0)
    assert first.differences(second) == []
    count = first.results["buffer count"]
    assert count is not None and float(count) == 1.0
    assert float(model.count) == 0.0 and model.layer.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert first.draws


def test_every_bit_of_loss_gradients_buffers_and_generator_is_compared() -> None:
    model, batch = Counting(), torch.ones(2, 4)
    outcome = observe(model, batch, summed)
    assert set(outcome.results) == {
        "loss", "gradient of layer.weight", "gradient of layer.bias", "buffer count", "generator",
    }
    for name, value in outcome.results.items():
        assert value is not None
        other = value.clone()
        other.view(-1)[:1] += 1
        changed = dataclasses.replace(outcome, results={**outcome.results, name: other})
        assert changed.differences(outcome) == [name]
        lacking = dataclasses.replace(outcome, results={**outcome.results, name: None})
        assert lacking.differences(outcome) == [name]


def test_a_step_that_gives_nans_is_a_failure_and_no_comparison() -> None:
    def nan(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum() * float("nan")

    with pytest.raises(measure.NotFiniteError, match="loss, gradient of layer.weight and 1 more"):
        measure.finite(observe(Counting(), torch.ones(2, 4), nan))


def test_a_loss_is_called_as_often_as_it_is_warmed_up_and_once_more() -> None:
    calls = []

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return summed(model, batch)

    observe(Counting(), torch.ones(2, 4), loss_fn)
    assert len(calls) == NUM_WARM_UPS + 1


@pytest.mark.parametrize(
    ("factor", "is_by_torch"), [(1.0, True), (1 + 2 * MAX_TRACED_ERROR, False)]
)
def test_a_traced_step_of_pytorchs_that_computes_something_else_is_no_reference(
    monkeypatch: pytest.MonkeyPatch, factor: float, is_by_torch: bool
) -> None:
    def off(loss_fn: LossFn, fullgraph: bool) -> LossFn:
        return lambda model, batch: factor * loss_fn(model, batch)

    monkeypatch.setattr(outcome, "traced", off)
    compiled = measure.CompiledStep("running_state", Config(0.1, "bf16"), seed=0)
    reference, was_by_torch = compiled.traced
    assert was_by_torch == is_by_torch
    assert reference.gradient_error(compiled.eager) < 0.01


def test_a_gradient_that_is_lacking_is_as_far_off_as_zeros() -> None:
    theirs = {"a": torch.full((4,), 3.0), "b": torch.full((4,), 4.0), "frozen": None}
    assert norm_of_difference(theirs, theirs) == 0.0
    assert norm_of_difference({**theirs, "b": None}, theirs) == pytest.approx(4 / 5)


# -- lines


def record(
    family: str = "net", config: Config = FP32, path: str = COMPILE, setting: str = SMALLEST,
    **values: Any,
) -> Record:
    """A cell that went well, but for what is said."""
    well = {"budget_bytes": 100, "peak_bytes": 100, "predicted_peak_bytes": 100,
            "eager_peak_bytes": 400, "plain_peak_bytes": 380, "differences": [],
            "num_operations": 7, "plan_seconds": 0.5, "provenance": MADE}
    return Record(family, "own", *config, path, setting, **(well | values))


@pytest.mark.parametrize(
    ("values", "failure", "bits"),
    [
        ({}, None, "eager"),
        ({"differences": ["loss"], "traced_differences": []}, None, "traced"),
        ({"differences": ["loss"], "traced_differences": [], "is_traced_by_torch": False}, None,
         "unplanned"),
        ({"differences": ["loss"], "traced_differences": ["loss"]}, "other bits", "other"),
        ({"differences": ["loss"], "traced_differences": ["loss"], "is_exact": False,
          "relative_error": 1e-6}, None, None),
        ({"differences": ["loss"], "is_exact": False, "relative_error": 0.1}, "other gradients",
         None),
        ({"differences": ["loss"], "is_exact": False, "relative_error": float("nan")},
         "other gradients", None),
        ({"differences": ["loss"], "is_exact": False, "relative_error": 0.1, "draws": True}, None,
         None),
        ({"peak_bytes": 101}, "over budget", "eager"),
        ({"predicted_peak_bytes": 90}, "peak mispredicted", "eager"),
        ({"predicted_peak_bytes": 90, "draws": True}, "peak mispredicted", "eager"),
        # A plan may count the generator's state where no random operation runs twice.
        ({"predicted_peak_bytes": 102, "draws": True}, None, "eager"),
        ({"predicted_peak_bytes": 102}, "peak mispredicted", "eager"),
        ({"refused_bytes": [90]}, "refused a budget that it named", "eager"),
        ({"error": "GraphBreakError: at x.py:3", "differences": None}, "GraphBreakError", None),
    ],
)
def test_what_counts_as_a_failure(
    values: dict[str, Any], failure: str | None, bits: str | None
) -> None:
    assert record(**values).failure == failure
    assert record(**values).bits == bits


def test_a_family_has_five_budgets_in_each_configuration_and_two_whole_steps() -> None:
    cells = list(all_cells())
    assert len(cells) == len(set(cells)) == 5 * 4 + 2
    assert {c.config for c in cells if c.path == COMPILE} == set(CONFIGS)
    assert set(all_cells(quick=True)) < set(cells)


def test_lines_in_the_file_are_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    cells = [Cell(FP32, COMPILE, setting) for setting in SHARES]
    write_lines(out, [record(setting=s) for s in list(SHARES)[:3]] + [record("other")])
    assert cells_to_measure("net", cells, out) == cells[3:]
    assert cells_to_measure("other", cells, out) == cells[1:]
    assert read_records(out)[0] == record(setting=SMALLEST)


def test_an_error_is_a_line_and_the_next_cell_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(record: Record, seed: int) -> None:
        raise ValueError(f"{record.setting} is not for me, says /home/me/site-packages/net.py")

    monkeypatch.setattr("benchmarks.zoo.whole_step.measure_fit", refuse)
    out = tmp_path / "lines.jsonl"
    cells = [Cell(FP32, EXACT, HALF_WAY), Cell(FP32, ALL, SMALLEST)]
    measure_family("gpt2", cells, out, 0, "a test", lambda what: None)
    first, second = read_records(out)
    assert first.error == "ValueError: 50% is not for me, says net.py"  # wherever that lies
    assert first.failure == "ValueError"
    assert second.cell == cells[1] and second.provenance["command"] == "a test"


@pytest.mark.parametrize(
    ("status", "trouble"),
    [(None, "TimeLimit"), (-11, "Crash: the process was ended by SIGSEGV"),
     (3, "Crash: the process ended with exit status 3")],
)
def test_a_process_that_hangs_or_dies_leaves_a_line_for_every_cell_it_did_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, trouble: str
) -> None:
    out = tmp_path / "lines.jsonl"
    reached = next(all_cells())

    def die(module: str, arguments: list[str], limit_seconds: float) -> int:
        write_lines(out, [record("gpt2", *reached)])
        if status is None:
            raise subprocess.TimeoutExpired(module, limit_seconds)
        return status

    monkeypatch.setattr(run, "status_apart", die)
    monkeypatch.setattr("sys.argv", ["zoo", "--only", "gpt2", "--out", str(out)])
    assert run.main() == 1
    first, *rest = read_records(out)
    assert first.error is None
    assert [r.cell for r in rest] == list(all_cells())[1:]
    assert all((r.error or "").startswith(trouble) for r in rest)
    assert f"it was at {rest[0].cell}" in (rest[0].error or "")


# -- the matrix


@pytest.fixture
def records() -> list[Record]:
    whole = {"num_operations": None, "plan_seconds": None}
    return [
        *(record(config=c, setting=s) for c in CONFIGS for s in SHARES if c != BF16),
        *(record(config=BF16, setting=s, differences=["loss"], traced_differences=[])
          for s in SHARES),
        record(path=EXACT, setting=HALF_WAY, peak_bytes=60, predicted_peak_bytes=60, **whole),
        record(config=CONFIGS[0], path=ALL, is_exact=False, differences=["loss"],
               traced_differences=["loss"], relative_error=2e-7, **whole),
        record("bad", CONFIGS[0], error="GraphBreakError: at x.py:3\n  because", peak_bytes=None),
        record("bad", CONFIGS[0], setting="10%", peak_bytes=111, predicted_peak_bytes=111),
        record("bad", CONFIGS[0], setting="30%"),
    ]


KINDS = {"net": "own", "bad": "own", "new": "text"}


def test_a_row_has_bits_peaks_predictions_and_both_whole_steps(records: list[Record]) -> None:
    net, bad = report.matrix({n: [r for r in records if r.family == n] for n in ("net", "bad")})[2:]
    assert [cell.strip() for cell in net.strip("| ").split(" | ")] == [
        "net", "7", "eager, 25%", "eager, 25%", "eager, 25%", "traced, 25%", "0.00%", "0.5",
        "eager, 15%", "2e-07, 25%",
    ]
    assert "**GraphBreakError, over budget** (2 of 3)" in bad


def test_all_failures_are_listed_with_their_reasons(records: list[Record]) -> None:
    found = {name: [r for r in records if r.family == name] for name in KINDS}
    lines = report.failures(found, {"bad": "It prints.", "net": "It once failed.", "new": "?"})
    assert lines == [
        "- **net** is listed as failing, and does not: It once failed.",
        "- **bad**, fp32, dropout 0, compile (smallest): GraphBreakError: at x.py:3",
        "- **bad**, fp32, dropout 0, compile (10%): over budget by 11 bytes",
        "  - It prints.",
    ]
    assert "  - No reason is known yet." in report.failures(found, {})


def test_the_summary_counts_every_cell(records: list[Record]) -> None:
    text = "\n".join(report.full_report(records, KINDS, {}, {}))
    assert "2 of 3 families measured in 25 cells, 24 of which ran." in text
    assert "Over their budget: 1 of 24." in text
    assert "18 of 23 cells have eager PyTorch's, 5 those of the traced step" in text
    assert "1 cells round sums in another order: their gradients are off by at most 2e-07" in text
    assert "Families with a failure in any cell: 1" in text
    assert "Not measured yet: new." in text
    assert "| new | - |" in text  # in the matrix all the same


def test_the_matrix_is_written_between_markers(
    tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "zoo.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- zoo:begin (x) -->\nold\n<!-- zoo:end -->\nafter\n")
    write_lines(tmp_path / "lines.jsonl", [dataclasses.replace(r, family="gpt2") for r in records])
    arguments = ["--results", str(tmp_path / "lines.jsonl"), "--root", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    report.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert all(f"| {name} | " in text for name in FAMILIES)
