"""`packlight compress`: a search that keeps the best file, goes on where it was, names misses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import packlight.compress as compress
from packlight.cli import main
from packlight.cli.compress import parsed_target
from packlight.compress.errors import TargetError
from packlight.compress.search import Trial, best_of, density_that_fits, search
from packlight.errors import BudgetFormatError, OptionError
from packlight.run.checkpoint import save_checkpoint

EXAMPLE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

def loss(model, batch):
    return (model(batch) - batch[:, :2]).square().mean()

def optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)

def batches(split="train"):
    count = 0
    while split == "train" or count < 3:
        count += 1
        yield torch.randn(32, 20)
"""


def trained(num_steps: int = 150) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    train(model, "dense", lambda share_done: None, num_steps)
    return model


def train(
    model: nn.Module, stage: str, on_step: Callable[[float], None], num_steps: int = 40
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        on_step(step / num_steps)
        inputs = torch.randn(32, 20)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :2]).square().mean().backward()
        optimizer.step()


def error_of(model: nn.Module) -> float:
    inputs = torch.randn(500, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(inputs) - inputs[:, :2]).square().mean())


def test_the_file_that_is_kept_is_the_best_within_the_target(tmp_path: Path) -> None:
    model = trained()
    outcome = search(model, 600, tmp_path / "m.plc", train, error_of, num_values=(8, 4))
    assert [trial.num_values for trial in outcome.trials] == [8, 4]
    assert outcome.best is best_of(outcome.trials, 600)
    assert outcome.report.file_bytes == (tmp_path / "m.plc").stat().st_size
    assert outcome.best.file_bytes == outcome.report.file_bytes
    fresh = trained(0)
    compress.load(tmp_path / "m.plc", into=fresh)
    assert error_of(fresh) == error_of(model) == outcome.best.error
    assert abs(outcome.report.file_bytes - 600) < 150, "the estimate is near"


def test_best_is_by_error_within_the_target_and_else_by_size() -> None:
    trials = [Trial(0.1, 8, size, error, 1.0) for size, error in ((100, 5), (200, 2), (300, 1))]
    assert best_of(trials, 250) is trials[1]
    assert best_of(trials, 50) is trials[0]


def test_an_interrupted_search_goes_on_behind_its_last_trial(tmp_path: Path) -> None:
    output = tmp_path / "m.plc"
    num_stages = 0

    def interrupted(model: nn.Module, stage: str, on_step: Callable[[float], None]) -> None:
        nonlocal num_stages
        num_stages += 1
        if num_stages == 3:
            raise KeyboardInterrupt
        train(model, stage, on_step)

    dense = trained()
    model = trained()
    with pytest.raises(KeyboardInterrupt):
        search(model, 600, output, interrupted, error_of, num_values=(8, 4))
    kept = output.read_bytes()
    assert compress.inspect(output).file_bytes == len(kept)
    assert list(model.state_dict()) == list(dense.state_dict()), "the model is plain"
    seen = []
    outcome = search(
        dense, 600, output, train, error_of, num_values=(8, 4), on_trial=seen.append
    )
    assert [trial.num_values for trial in seen] == [4]
    assert [trial.num_values for trial in outcome.trials] == [8, 4]
    again = search(trained(), 700, output, train, error_of, num_values=(4,))
    assert len(again.trials) == 1, "another target is another search"


def test_a_target_below_everything_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="0.1% of the weights"):
        search(trained(0), 100, tmp_path / "m.plc", train, error_of)
    assert density_that_fits(trained(0), 10**6, 8, ["0.weight"]) == 1.0


def test_targets_are_ratios_or_bytes() -> None:
    assert parsed_target("2.5x", 1000) == 400
    assert parsed_target("1KiB", 10) == 1024
    with pytest.raises(OptionError, match="larger"):
        parsed_target("0.5x", 10)
    with pytest.raises(BudgetFormatError):
        parsed_target("forty", 10)


def test_the_command_writes_file_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    model = trained()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    save_checkpoint(tmp_path / "ckpt", model, optimizer, step=150, extra={})
    command = [
        "compress", str(file), "--checkpoint", str(tmp_path / "ckpt"), "--target", "8x",
        "--output", str(tmp_path / "m.plc"), "--steps", "40", "--values", "8",
        "--report", str(tmp_path / "report"),
    ]  # fmt: skip
    assert main([*command, "--max-error", "10"]) == 0
    shown = capsys.readouterr().out
    size = (tmp_path / "m.plc").stat().st_size
    assert f"{size} bytes" in shown and "0.weight" in shown
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Error against bytes" in page and str(size) in page
    (line,) = (tmp_path / "m.plc.trials.jsonl").read_text().splitlines()
    assert json.loads(line)["file_bytes"] == size
    assert main([*command, "--max-error", "-100"]) == 1, "nothing is as good as that"
    assert "not met: the error rose" in capsys.readouterr().out
    command[3] = str(tmp_path / "nothing")
    assert main(command) == 2
    assert "no checkpoint there" in capsys.readouterr().err
