"""`packlight cluster`: a plan in seconds, and errors that say what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from packlight.cli import main

MODEL = ["cluster", "--layers", "24", "--hidden", "2304", "--heads", "24"]
MACHINES = ["--gpus", "32", "--batch", "512"]
OWN = [
    "--gpu", "mine", "--peak-tflops", "100", "--memory", "24GiB", "--memory-speed", "1TB/s",
    "--node-link", "50GB/s", "--network", "3GB/s",
]


def test_a_plan_is_printed_with_what_it_takes_and_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "pipeline.svg"
    assert main([*MODEL, *MACHINES, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for words in ("1.7B parameters", "plan       tensor", "TFLOP/s", "bubble", "peak", "next best:",
                  "no layout is faster than", "rank 0  F"):
        assert words in printed
    assert picture.read_text(encoding="utf-8").count("<svg") == 1


def test_a_machine_of_ones_own_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MODEL, *MACHINES, *OWN, "--zero", "1", "--schedule", "1f1b"]) == 0
    printed = capsys.readouterr().out
    assert "32 mine in nodes of 8" in printed
    assert "of 21.00 GiB on each GPU" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b900"], "known are a100-80gb"),
        (["--gpu", "b900", "--peak-tflops", "5"], "give its own numbers"),
        (["--network", "fast"], "hint: such as 25GB/s"),
        (["--picture", "plan.txt"], "hint: plan.svg"),
        (["--rack-link", "5GB/s"], "--nodes-per-rack 4 --rack-link 10GB/s"),
        (["--per-node", "5"], "hint: 30 or 35 GPUs do"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MODEL, *MACHINES, *arguments]) == 2
    assert message in capsys.readouterr().err
