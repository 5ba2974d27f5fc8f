"""The table of Sohoni et al.: rows that can be made, counts, and runs that resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import nn

pytest.importorskip("numba", reason="low-bit optimizers need the extra 'optim'")

from benchmarks.sohoni import measure  # noqa: E402
from benchmarks.sohoni.measure import Trainee, Training, example_batch  # noqa: E402
from benchmarks.sohoni.records import Record  # noqa: E402
from benchmarks.sohoni.report import results_section  # noqa: E402
from benchmarks.sohoni.rows import ROWS, Row  # noqa: E402
from examples import wrn_cifar10  # noqa: E402


def test_low_precision_rows_hold_two_bytes_per_weight_and_batch_norms_in_float32() -> None:
    model = ROWS["bf16"].model(0)
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert {p.dtype for p in norms} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in norms} == {torch.bfloat16}
    weights = sum(p.numel() for p in model.parameters())
    assert weights == 1_467_610  # as counted in the paper's model
    optimizer = ROWS["bf16"].optimizer(model, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values()
                if isinstance(t, torch.Tensor))
    assert 2 * weights <= state <= 2.1 * weights


def test_the_papers_way_of_counting_agrees_with_its_count() -> None:
    """953,472 saved elements per sample and three numbers per weight (references: 399.0 MB)."""
    record = Record("fp32")
    row = ROWS["fp32"]
    batch = example_batch()
    model = row.model(0)
    record.paper_bytes = 3 * sum(p.nbytes for p in model.parameters()) + measure._saved_bytes(
        model, batch
    )
    assert record.paper_bytes == pytest.approx(399.0e6, rel=0.01)


class Tiny(nn.Module):
    """One convolution with a batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean((2, 3)))


def test_a_run_that_was_cut_short_ends_where_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (300,))
    monkeypatch.setattr(wrn_cifar10, "model", Tiny)
    monkeypatch.setattr(wrn_cifar10, "read_cifar10", lambda is_train: (images, labels))
    training = Training(num_images=200, num_epochs=3, num_tested=200)
    records = [Record("bf16-microbatch", seed=1) for _ in range(2)]
    with Progress(disable=True) as progress:
        measure.train(records[0], training, tmp_path / "whole", progress)
        real, num_saved = measure.save_checkpoint, []

        def stop_after_one(*arguments: object, **options: object) -> None:
            real(*arguments, **options)
            num_saved.append(1)
            raise KeyboardInterrupt

        monkeypatch.setattr(measure, "save_checkpoint", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            measure.train(records[1], training, tmp_path / "cut", progress)
        monkeypatch.setattr(measure, "save_checkpoint", real)
        measure.train(records[1], training, tmp_path / "cut", progress)
    assert len(records[0].losses) == 3
    assert records[1].losses == records[0].losses
    assert records[1].accuracy == records[0].accuracy


def test_a_row_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrn_cifar10, "model", Tiny)
    row = Row("tiny", "tiny", None, torch.bfloat16, budget_bytes=3_000_000,
              allow=frozenset({"microbatch-batch-norm"}))
    trainee = Trainee(row, 0, 0.1, example_batch())
    batch = row.batch(*example_batch())
    before = trainee.resident_bytes(batch)
    peak = before + measure.packlight.measure_peak(lambda: trainee.step(batch)).peak_bytes
    assert peak <= 3_000_000


def test_the_table_says_what_failed() -> None:
    made = {"versions": {"torch": "2"}, "hardware": "cpu", "commit": "x"}
    good = Record("fp32", peak_bytes=404_800_000, paper_bytes=399_000_000, provenance=made)
    bad = Record("bf16", error="InfeasibleBudgetError: too small", provenance=made)
    run = Record("fp32", seed=0, accuracy=91.5, provenance=made,
                 schedule={"num_images": 200, "num_epochs": 1, "num_tested": 200})
    text = "\n".join(results_section([good, bad, run]))
    assert "404.8" in text and "91.50" in text and "too small" in text
