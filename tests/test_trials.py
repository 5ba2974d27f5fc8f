"""`packlight search` with real trials: planned, enforced by the kernel, eager PyTorch's bits."""

from __future__ import annotations

import fcntl
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

pytest.importorskip("optuna", reason="needs the extra 'search'")

from packlight.cli import main  # noqa: E402
from packlight.errors import MissingExtraError, OptionError  # noqa: E402
from packlight.example import BatchStream, build, load_example, seed_everything  # noqa: E402
from packlight.trials.coordinator import OWN_SLACK_BYTES, SLACK_BYTES  # noqa: E402
from packlight.trials.limits import anonymous_bytes  # noqa: E402
from packlight.trials.point import checked_point, fit_options, with_point  # noqa: E402
from packlight.trials.records import Outcome, Record, read_record, record_path  # noqa: E402
from packlight.trials.workers import Nursery  # noqa: E402

NUM_STEPS = 4
STEP_BYTES = 24 * 2**20
KINDS = ["plain", "same", "recomputed", "raises", "diverges", "hungry", "huge"]

FILE = '''
import torch
from torch import nn

KINDS = ["plain", "same", "recomputed", "raises", "diverges", "hungry", "huge"]

def space(trial):
    rate = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
    kind = KINDS[trial.number % len(KINDS)]
    if kind == "same":
        return {"kind": "plain", "rows": 64, "rate": 1e-2}
    if kind == "plain":
        rate = 1e-2
    rows = 40_000 if kind == "recomputed" else 64
    return {"kind": kind, "rows": rows, "rate": rate}

def model(kind="plain"):
    if kind == "raises":
        raise RuntimeError("no such model")
    hungry = torch.ones(500_000_000) if kind == "hungry" else None  # bytes times four
    if kind == "huge":  # with AdamW's state 47 MiB
        return nn.Sequential(nn.Linear(6, 1000), *(nn.Linear(1000, 1000) for _ in range(4)))
    layers = []
    for _ in range(6):
        layers += [nn.Linear(24, 24), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(nn.Linear(6, 24), *layers, nn.Linear(24, 1))

def loss(model, batch, kind="plain"):
    x, y = batch
    value = (model(x) - y).square().mean()
    return value.log() * float("nan") if kind == "diverges" else value

def optimizer(model, rate=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=rate)

def batches(split="train", rows=64):
    while True:
        x = torch.randn(rows if split == "train" else 64, 6)
        yield x, x.sum(1, keepdim=True)
'''


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Run one study by the command line, in which each trial is of another kind."""
    directory = tmp_path_factory.mktemp("study")
    file = directory / "objective.py"
    file.write_text(FILE)
    with closing(Nursery(str(file))) as nursery, pytest.MonkeyPatch.context() as patch:
        # Its size is that of torch: what is left for steps is to be the same with any of them.
        fixed_bytes = anonymous_bytes() + nursery.own_bytes + nursery.trial_bytes
        memory_bytes = fixed_bytes + OWN_SLACK_BYTES + SLACK_BYTES + STEP_BYTES
        patch.setattr("packlight.trials.run.Nursery", lambda file, lock: nursery)
        code = main([
            "search", str(file), "--memory", str(memory_bytes), "--trials", str(len(KINDS)),
            "--threads", str(torch.get_num_threads()), "--steps", str(NUM_STEPS),
            "--report-every", "2", "--study", str(directory / "study"),
            "--report", str(directory / "report"),
        ])  # fmt: skip
    assert code == 0
    found = {}
    for number, kind in enumerate(KINDS):
        record = read_record(record_path(directory / "study", number))
        assert record is not None, kind
        found[kind] = record
    page = (directory / "report" / "index.html").read_text()
    assert page.count("<section>") >= 4 and "no such model" in page
    return found


@pytest.mark.parametrize("kind", ["plain", "recomputed"])
def test_losses_are_those_of_eager_pytorch_to_the_last_bit(
    records: dict[str, Record], kind: str, tmp_path: Path
) -> None:
    record = records[kind]
    assert record.outcome is Outcome.COMPLETE, record.why
    path = tmp_path / "objective.py"
    path.write_text(FILE)
    example = with_point(load_example(str(path)), record.point)
    model, optimizer = build(example, "cpu", 0)
    stream = BatchStream(example, "train", "cpu", 0)
    seed_everything(0)
    losses = []
    for _, batch in zip(range(NUM_STEPS), stream, strict=False):
        optimizer.zero_grad()
        loss = example.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert record.losses == losses
    assert sorted(record.reports) == [2, 4] and record.error == record.reports[4]


def test_what_does_not_fit_plain_is_recomputed_and_its_price_is_known(
    records: dict[str, Record]
) -> None:
    plain, recomputed = records["plain"].planned, records["recomputed"].planned
    assert plain is not None and recomputed is not None
    assert plain.slowdown == 1.0 and plain.plain_peak_bytes == plain.peak_bytes
    assert 1.0 < recomputed.slowdown < 3.0
    assert recomputed.plain_peak_bytes is not None
    assert recomputed.peak_bytes < recomputed.plain_peak_bytes
    assert recomputed.peak_bytes <= recomputed.budget_bytes


def test_predicted_peaks_are_the_measured_ones(records: dict[str, Record]) -> None:
    record = records["recomputed"]
    assert record.planned is not None and record.measured_peak_bytes is not None
    assert record.measured_peak_bytes <= record.planned.step_peak_bytes
    assert record.measured_peak_bytes >= 0.99 * record.planned.step_peak_bytes


def test_what_cannot_run_is_recorded_and_the_study_goes_on(records: dict[str, Record]) -> None:
    assert records["raises"].outcome is Outcome.FAILED
    assert "objective.py:" in records["raises"].why and "no such model" in records["raises"].why
    assert records["diverges"].outcome is Outcome.DIVERGED
    assert "nan" in records["diverges"].why
    huge = records["huge"]
    assert huge.outcome is Outcome.INFEASIBLE and not huge.losses
    # Where not even its calls could be looked at in this memory, how much it takes is not known.
    assert (huge.smallest_bytes or STEP_BYTES + 1) > STEP_BYTES and huge.why


def test_the_kernel_refuses_what_goes_beyond_and_only_that_trial_ends(
    records: dict[str, Record]
) -> None:
    hungry = records["hungry"]
    assert hungry.outcome is Outcome.INFEASIBLE and "allocate memory" in hungry.why
    assert not hungry.losses


def test_a_point_that_was_run_is_not_run_again(records: dict[str, Record]) -> None:
    same, plain = records["same"], records["plain"]
    assert same.same_as == plain.number and same.losses == plain.losses


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_no_process_and_is_gone_on_with(tmp_path: Path) -> None:
    file, directory = tmp_path / "objective.py", tmp_path / "study"
    file.write_text(FILE)
    words = ["search", str(file), "--memory", "1GiB", "--trials", "3", "--workers", "2",
             "--steps", "3", "--study", str(directory)]  # fmt: skip
    command = [sys.executable, "-m", "packlight.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert next(line for line in process.stdout if line.startswith("trial "))
        process.kill()
    with (directory / "lock").open() as lock:  # every process of the study keeps it
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = {path: path.read_text() for path in (directory / "trials").glob("*.json")}
    assert done
    assert main(words) == 0
    assert len(list((directory / "trials").glob("*.json"))) == 3
    assert {path: path.read_text() for path in done} == done


# -- the FILE


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("def space(trial): return {'rows': 8}", "asks the trial for nothing"),
        ("def space(trial): return [trial.suggest_int('rows', 1, 8)]", "returned a list"),
        (
            "def space(trial): return {'row': trial.suggest_int('row', 1, 8)}",
            "'row', which no function takes",
        ),
        ("", "lacks space()"),
    ],
)
def test_a_file_that_cannot_be_searched_is_refused(
    tmp_path: Path, space: str, told: str
) -> None:
    path = tmp_path / "objective.py"
    path.write_text(FILE.replace("def space", "def other_space") + "\n" + space)
    example = load_example(str(path))

    class Trial:
        num_asked = 0

        def suggest_int(self, name: str, low: int, high: int) -> int:
            self.num_asked += 1
            return high

    trial = Trial()
    with pytest.raises(OptionError) as caught:
        if example.space is None:
            from packlight.trials.trial import require_space

            require_space(example)
        assert example.space is not None
        point = checked_point(example.space(trial), str(path), trial.num_asked)
        with_point(example, point)
    assert told in str(caught.value) and "hint: " in str(caught.value)


def test_values_go_to_the_functions_that_take_them(tmp_path: Path) -> None:
    path = tmp_path / "objective.py"
    path.write_text(FILE)
    point = {"kind": "plain", "rows": 5, "rate": 0.5, "allow": "bf16", "moves": "pack,offload"}
    example = with_point(load_example(str(path)), point)
    model = example.model()
    assert example.optimizer(model).param_groups[0]["lr"] == 0.5
    assert len(next(example.batches("train"))[0]) == 5
    assert math.isfinite(example.loss(model, next(example.batches("train"))).item())
    assert fit_options(point) == {"allow": ("bf16",), "moves": ("pack", "offload")}
    assert fit_options({"allow": ""}) == {"allow": ()}


def test_the_example_can_be_searched() -> None:
    class Lowest:
        def suggest_int(self, name: str, low: int, high: int, step: int = 1) -> int:
            return low

        def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
            return low

        def suggest_categorical(self, name: str, choices: list[int]) -> int:
            return choices[0]

    root = Path(__file__).resolve().parent.parent
    plain = load_example(str(root / "examples" / "char_gpt_search.py"))
    assert plain.space is not None
    point = plain.space(Lowest())
    example = with_point(plain, point)
    model, optimizer = build(example, "cpu", 0)
    batch = next(BatchStream(example, "train", "cpu", 0))
    assert optimizer.param_groups[0]["lr"] == point["learning_rate"]
    assert batch[0].shape == (point["batch"], 64)
    # Untrained, all 65 characters are about equally likely.
    assert abs(example.loss(model, batch).item() - math.log(65)) < 1.0


def test_without_optuna_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    path = tmp_path / "objective.py"
    path.write_text(FILE)
    assert main(["search", str(path), "--memory", "1GiB"]) == 2
    assert "pip install 'packlight[search]'" in capsys.readouterr().err
    assert issubclass(MissingExtraError, ImportError) and torch is not None
