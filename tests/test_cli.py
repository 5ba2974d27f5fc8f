"""The command line: what users type, see and get when they are wrong or interrupted."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import packlight
from packlight.cli import main
from packlight.errors import InfeasibleBudgetError, NonFiniteLossError
from packlight.run.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from packlight.run.train_step import MeasuredStep
from packlight.units import parse_bytes

EXAMPLE = '''
import os, random, signal
import numpy as np
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 1))

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)

def batches(split="train"):
    rng = np.random.default_rng(torch.initial_seed() % 2**32)
    count = 0
    while split == "train" or count < 3:
        # Draws from every generator, as user code does.
        x = torch.randn(16, 6) * random.random() + float(np.random.rand()) + float(rng.random())
        count += 1
        yield x, x.sum(1, keepdim=True)

def tokens_per_batch(batch):
    return len(batch[0])

def sample(model):
    return "a sample [of text]"
'''


@dataclass
class EagerStep:
    """Stands in for `packlight.TrainStep`, so that the loop is tested apart from the planner."""

    model: torch.nn.Module
    loss_fn: Callable[..., torch.Tensor]
    optimizer: torch.optim.Optimizer
    budget_bytes: int | None
    num_steps: int = 0
    scaler: torch.amp.GradScaler | None = None
    request = SimpleNamespace(ranks=None)

    def __call__(self, batch: Any) -> torch.Tensor:
        loss = self.loss_fn(self.model, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self.num_steps, float(loss.detach()))
        self.num_steps += 1
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def measured(self, batch: Any) -> MeasuredStep:
        peak = packlight.measure_peak(lambda: self(batch))
        return MeasuredStep(peak.result, peak.peak_bytes)

    def evaluate(self, batch: Any) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            loss = self.loss_fn(self.model, batch)
        self.model.train()
        return loss

    def describe(self) -> str:
        return "an eager step"


@pytest.fixture
def eager_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(
        model: torch.nn.Module,
        loss_fn: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        batch: Any,
        budget: int | None = None,
        **_: Any,
    ) -> EagerStep:
        torch.randn(3)  # A capture may draw numbers; the run must not notice.
        return EagerStep(model, loss_fn, optimizer, budget)

    monkeypatch.setattr(packlight, "fit", fit, raising=False)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE)
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Assert that two checkpoints agree in every bit: weights, optimizer, generators."""
    assert ours._state == theirs._state
    assert ours._tensors.keys() == theirs._tensors.keys()
    for name, tensor in ours._tensors.items():
        assert torch.equal(tensor, theirs._tensors[name]), name


def printed_losses(text: str) -> dict[int, str]:
    """Return {step: loss as printed} from the lines of a run that is not on a terminal."""
    lines = [line.split() for line in text.splitlines() if line.startswith("step ")]
    return {int(words[1].split("/")[0]): words[3] for words in lines}


# Training: resuming, interrupting, failing.


@pytest.mark.usefixtures("eager_fit")
def test_four_steps_equal_two_and_two_resumed_to_the_bit(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", example, "--steps", 4, "--checkpoint", whole) == 0
    straight = printed_losses(capsys.readouterr().out)
    assert run("train", example, "--steps", 2, "--checkpoint", parts) == 0
    pieces = printed_losses(capsys.readouterr().out)
    assert run("train", example, "--steps", 4, "--checkpoint", parts) == 0
    output = capsys.readouterr().out
    assert "resuming from" in output and "step 2" in output
    assert pieces | printed_losses(output) == straight
    assert sorted(straight) == [1, 2, 3, 4]
    ours, theirs = newest_checkpoint(whole), newest_checkpoint(parts)
    assert ours is not None and theirs is not None
    assert_same(ours, theirs)


@pytest.mark.usefixtures("eager_fit")
def test_the_seed_decides_everything(example: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(len(name))
        words = ("train", example, "--steps", 2, "--seed", seed, "--checkpoint", tmp_path / name)
        assert run(*words) == 0
    a, b, c = (newest_checkpoint(tmp_path / name) for name in "abc")
    assert a is not None and b is not None and c is not None
    assert_same(a, b)
    assert not torch.equal(a._tensors["model.0.weight"], c._tensors["model.0.weight"])


@pytest.mark.usefixtures("eager_fit")
def test_ctrl_c_saves_and_the_command_it_prints_resumes_to_the_bit(
    example: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", example, "--steps", 6, "--budget", "4 GiB", "--checkpoint", "whole") == 0
    interrupted = tmp_path / "it's interrupted" / "example.py"
    interrupted.parent.mkdir()
    signal_once = (
        "        if count == 3 and not os.path.exists('sent'):\n"
        "            open('sent', 'w').close(); signal.raise_signal(signal.SIGINT)\n"
        "        yield"
    )
    interrupted.write_text(EXAMPLE.replace("        yield", signal_once))
    capsys.readouterr()
    assert run("train", interrupted, "--steps", 6, "--budget", "4 GiB") == 130
    output = capsys.readouterr().out
    assert "interrupted after step 3; saved" in output
    (command,) = [line for line in output.splitlines() if line.startswith("resume: ")]
    words = shlex.split(command.removeprefix("resume: "))
    assert words[:3] == ["packlight", "train", str(interrupted)]
    assert words[words.index("--budget") + 1] == "4 GiB"
    assert main(words[1:]) == 0
    ours = newest_checkpoint(tmp_path / "whole")
    theirs = newest_checkpoint(words[words.index("--checkpoint") + 1])
    assert ours is not None and theirs is not None and theirs.step == 6
    assert_same(ours, theirs)


@pytest.mark.usefixtures("eager_fit")
def test_an_interrupted_run_never_writes_among_checkpoints_of_another(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example-checkpoint").mkdir()
    signal_later = "if count > 1: signal.raise_signal(signal.SIGINT)\n        yield"
    example.write_text(EXAMPLE.replace("yield", signal_later))
    assert run("train", example, "--steps", 5) == 130
    assert list((tmp_path / "example-checkpoint").iterdir()) == []
    assert newest_checkpoint(tmp_path / "example-checkpoint-2") is not None


@pytest.mark.usefixtures("eager_fit")
def test_ctrl_c_before_the_first_step_has_nothing_to_save(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    example.write_text(EXAMPLE.replace("yield", "signal.raise_signal(signal.SIGINT); yield"))
    assert run("train", example) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == [example]


@pytest.mark.usefixtures("eager_fit")
def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_the_checkpoint(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write_text(EXAMPLE.replace("yield x,", "yield x * (float('nan') if count > 4 else 1),"))
    directory = tmp_path / "run"
    words = ("train", example, "--steps", 9, "--save-every", 2, "--checkpoint", directory)
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the loss of step 5 is nan")
    assert "step-00000004.safetensors is from step 4" in message
    found = newest_checkpoint(directory)
    assert found is not None and found.step == 4
    assert all(t.isfinite().all() for n, t in found._tensors.items() if n.startswith("model"))


@pytest.mark.usefixtures("eager_fit")
def test_a_damaged_newest_checkpoint_is_named_with_the_one_to_go_back_to(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    words = ("train", example, "--save-every", 2, "--checkpoint", directory, "--steps")
    assert run(*words, 4) == 0
    damaged = directory / "step-00000004.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-8])
    capsys.readouterr()
    assert run(*words, 6) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert "step-00000004.safetensors" in message
    assert "step-00000002.safetensors is whole" in message
    assert damaged.read_bytes() == content[:-8]
    damaged.unlink()
    assert run(*words, 6) == 0
    assert run("train", example, "--steps", 6, "--checkpoint", tmp_path / "whole") == 0
    ours, theirs = newest_checkpoint(directory), newest_checkpoint(tmp_path / "whole")
    assert ours is not None and theirs is not None
    assert_same(ours, theirs)


@pytest.mark.usefixtures("eager_fit")
def test_a_checkpoint_of_another_seed_is_not_continued(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", example, "--steps", 1, "--checkpoint", tmp_path / "run") == 0
    words = ("train", example, "--steps", 2, "--seed", 5, "--checkpoint", tmp_path / "run")
    assert run(*words) == 2
    assert "seed 0, not 5" in capsys.readouterr().err


@pytest.mark.usefixtures("eager_fit")
def test_what_is_done_already_is_not_done_again(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", example, "--steps", 2, "--checkpoint", tmp_path / "run")
    assert run(*words) == 0
    capsys.readouterr()
    assert run(*words) == 0
    assert "at step 2 already" in capsys.readouterr().out


@pytest.mark.usefixtures("eager_fit")
def test_training_prints_loss_rate_peak_validation_and_sample(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", example, "--steps", 3, "--budget", "1MiB") == 0
    output = capsys.readouterr().out
    assert "tokens/s" in output
    assert "of 1.0 MiB" in output
    assert "validation loss" in output
    assert "a sample [of text]" in output


@pytest.mark.usefixtures("eager_fit")
def test_data_do_not_depend_on_how_often_the_model_draws(example: Path, tmp_path: Path) -> None:
    """Dropout and data have generators apart: other dropout, the same batches."""
    from packlight.example import BatchStream, load_example

    loaded = load_example(str(example))
    quiet = BatchStream(loaded, "train", "cpu", seed=3)
    noisy = BatchStream(loaded, "train", "cpu", seed=3)
    later = BatchStream(loaded, "train", "cpu", seed=3, num_skipped=2)
    batches = [next(quiet) for _ in range(3)]
    for batch in batches:
        torch.randn(7)
        assert torch.equal(next(noisy)[0], batch[0])
    before = torch.get_rng_state()
    assert torch.equal(next(later)[0], batches[2][0])
    assert torch.equal(torch.get_rng_state(), before)
    assert noisy.num_drawn == later.num_drawn == 3


# Bad input.


def assert_error(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("command", ["profile", "plan", "train"])
def test_a_missing_file_is_an_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(capsys, run(command, "no/such.py"), "no/such.py: no such file")


@pytest.mark.parametrize("name", ["model", "loss", "optimizer", "batches"])
def test_a_file_without_one_of_the_functions_is_an_error(
    name: str, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write_text(EXAMPLE.replace(f"def {name}(", "def other("))
    assert_error(capsys, run("plan", example), f"lacks {name}()", f"hint: define {name}(")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_at_all", ":1: it failed with ModuleNotFoundError: No module named"),
        ("x = 1\ny = 1 / 0\n", ":2: it failed with ZeroDivisionError"),
        ("def model(:\n", ":1: invalid syntax"),
        (EXAMPLE.replace("return nn.Seq", "return str or nn.Seq"), "model() returned type, not a"),
        (EXAMPLE.replace("return torch.optim", "return 3 or torch.optim"), "optimizer() returned"),
        (
            EXAMPLE.replace("return nn.Seq", "raise OSError('no data')\n    return nn.Seq"),
            "model() failed with OSError: no data",
        ),
        (EXAMPLE.replace("x = torch", "1 / 0; x = torch"), "batches() failed with ZeroDivision"),
        (EXAMPLE.replace('split == "train" or', ""), "after 3 batches\nhint: make it endless"),
    ],
)
@pytest.mark.usefixtures("eager_fit")
def test_what_fails_inside_the_file_is_told_with_its_place(
    source: str, message: str, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write_text(source)
    assert_error(capsys, run("train", example, "--steps", 5), "example.py", message)


@pytest.mark.parametrize("budget", ["0", "abc", "12 parsecs", "0.5", "-1GiB"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_bad_budget_is_an_error_before_anything_is_loaded(
    command: str, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(command, "no/such.py", f"--budget={budget}")
    assert_error(capsys, code, f"not a memory budget: {budget!r}", "hint: ")


def test_an_unknown_technique_is_an_error(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_error(capsys, run("train", example, "--allow", "magic"), "'magic'")
    assert_error(capsys, run("plan", example, "--allow", "magic"), "'magic'")


def test_an_unknown_device_is_an_error(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(capsys, run("profile", example, "--device", "abacus"), "--device abacus")
    if not torch.cuda.is_available():
        assert_error(capsys, run("train", example, "--device", "cuda"), "--device cuda")


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_a_bad_number_of_steps_is_a_usage_error(
    steps: str, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("train", example, f"--steps={steps}")
    assert caught.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--report", "--checkpoint", "--offload-directory"])
def test_an_unwritable_directory_is_found_before_the_long_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").write_text("")
    code = run("train", "no/such.py", option, tmp_path / "a_file" / "inside")
    assert_error(capsys, code, f"{option} {tmp_path}/a_file/inside: cannot write there")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_found_before_the_long_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_error(capsys, run("profile", "no/such.py", "--report", tmp_path), "cannot write")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_no_command_prints_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: packlight" in capsys.readouterr().err


# The real thing, on a model small enough for a test.


def test_profile_prints_kinds_and_layers(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", example) == 0
    output = capsys.readouterr().out
    for kind in ("parameters", "optimizer state", "gradients", "activations", "workspace"):
        assert kind in output
    parameter_bytes = 4 * (6 * 32 + 32 + 32 + 1)
    assert f"{parameter_bytes / 1024:.1f} KiB" in output
    assert "whole step" in output and "█" in output


def test_plan_prints_the_promise_and_other_budgets(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", example, "--budget", "1MiB") == 0
    output = capsys.readouterr().out
    for part in ("predicted peak", "lower bound", "search", "Other budgets", "no schedule"):
        assert part in output


def test_an_infeasible_budget_names_one_that_is_feasible(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figure in the message is a budget that works, and one byte less does not."""
    assert_error(capsys, run("plan", example, "--budget", "1KiB"), "smallest feasible peak")
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_within(example, parse_bytes("1KiB"))
    smallest = caught.value.smallest_bytes
    assert plan_within(example, smallest)
    with pytest.raises(InfeasibleBudgetError):
        plan_within(example, smallest - 1)


def plan_within(
    example: Path, budget_bytes: int, moves: tuple[str, ...] = packlight.MOVES
) -> object:
    from packlight.example import BatchStream, build, load_example

    loaded = load_example(str(example))
    model, optimizer = build(loaded, "cpu", 0)
    batch = next(BatchStream(loaded, "train", "cpu", 0))
    return packlight.plan(
        model, loaded.loss, optimizer, batch, budget_bytes, moves=moves, progress=False
    )


def test_training_in_a_budget_equals_training_without_and_resumes_to_the_bit(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_within(example, 1, packlight.EXACT_MOVES)
    budget = caught.value.smallest_bytes
    common = ("train", example, "--save-every", 2, "--exact")
    assert run(*common, "--steps", 4, "--checkpoint", tmp_path / "free") == 0
    tight = (*common, "--budget", budget, "--checkpoint", tmp_path / "tight")
    assert run(*tight, "--steps", 2) == 0
    assert run(*tight, "--steps", 4) == 0
    free = read_checkpoint(tmp_path / "free" / "step-00000004.safetensors")
    assert_same(free, read_checkpoint(tmp_path / "tight" / "step-00000004.safetensors"))


@pytest.fixture
def tier_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a directory to offload to, which may lie in memory here."""
    from packlight.memory import scratch
    from packlight.search import prepare
    from packlight.step import Lane, Speed

    lane = Lane("a disk", "a disk", Speed(2e8, 1e-4), Speed(2e8, 1e-4))
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scratch, "file_system", lambda _: "a disk's")
    monkeypatch.setattr(prepare, "measure_lane", lambda *_: lane)
    return tmp_path / "tier"


def test_offloading_needs_less_memory_and_changes_no_bit(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tier_anywhere: Path
) -> None:
    deeper = "nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)"
    example.write_text(EXAMPLE.replace("nn.Linear(32, 1)", deeper))
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_within(example, 1, packlight.EXACT_MOVES)
    # So far below that offloading activations is not enough while AdamW's state is in memory.
    budget = caught.value.smallest_bytes - 3584
    common = ("train", example, "--exact", "--steps", 3, "--checkpoint")
    assert run(*common, tmp_path / "free") == 0
    assert_error(capsys, run("plan", example, "--exact", "--budget", budget), "smallest feasible")
    tight = ("--budget", budget, "--offload-directory", tier_anywhere)
    assert run("plan", example, "--exact", *tight, "--report", tmp_path / "page") == 0
    output = capsys.readouterr().out
    assert "offloaded; lanes are busy for" in output and "offloaded between updates" in output
    assert ">Transfers</h2>" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert run(*common, tmp_path / "tight", *tight) == 0
    free = read_checkpoint(tmp_path / "free" / "step-00000003.safetensors")
    assert_same(free, read_checkpoint(tmp_path / "tight" / "step-00000003.safetensors"))


@pytest.mark.usefixtures("eager_fit")
def test_the_command_that_resumes_offloads_to_the_same_directory_and_allows_the_same(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    example.write_text(EXAMPLE.replace(
        "yield", "signal.raise_signal(signal.SIGINT) if count == 2 else None; yield"
    ))
    words = ("--offload-directory", "a tier", "--allow", "bf16")
    assert run("train", example, "--steps", 5, *words) == 130
    (command,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("resume: ")]
    typed = shlex.split(command.removeprefix("resume: "))
    assert typed[typed.index("--offload-directory") + 1] == "a tier"
    assert typed[typed.index("--allow") + 1] == "bf16"


# Mixed precision.


def test_profile_and_plan_see_the_precision(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("profile", example, "--allow", "bf16") == 0
    assert "whole step" in capsys.readouterr().out
    assert run("plan", example, "--allow", "bf16") == 0
    assert "bf16 under autocast" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["profile", "plan", "train"])
def test_two_precisions_are_an_error(
    command: str, example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(command, example, "--allow", "bf16", "--allow", "fp16")
    assert_error(capsys, code, "'bf16' and 'fp16'", "hint: ")


def test_fp16_resumes_with_its_loss_scale_to_the_bit(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss of 2**10 times its size overflows at first: the scale has to be remembered."""
    example.write_text(EXAMPLE.replace(".mean()", ".mean() * 2.0**10"))
    words = ("train", example, "--allow", "fp16", "--save-every", 2, "--checkpoint")
    assert run(*words, tmp_path / "whole", "--steps", 12) == 0
    assert run(*words, tmp_path / "parts", "--steps", 4) == 0
    assert run(*words, tmp_path / "parts", "--steps", 12) == 0
    assert "loss scale 65536" in capsys.readouterr().out
    ours, theirs = newest_checkpoint(tmp_path / "whole"), newest_checkpoint(tmp_path / "parts")
    assert ours is not None and theirs is not None
    assert ours.extra["scaler"]["scale"] < 2.0**16
    assert_same(ours, theirs)


def test_a_loss_scale_collapses_in_the_same_step_when_its_run_is_resumed(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A square root of zero: a finite loss whose gradient is not; 40 updates are skipped."""
    zero = "return (model(x) - y).square().mean() + ((model(x) - model(x)) * x.sum()).sqrt().mean()"
    example.write_text(EXAMPLE.replace("return (model(x) - y).square().mean()", zero).replace(
        "nn.Dropout(0.2)", "nn.Identity()"
    ))
    words = ("train", example, "--allow", "fp16", "--steps", 60, "--save-every", 30, "--checkpoint")
    for _ in range(2):  # from the start, then from step 30
        code = run(*words, tmp_path / "run")
        assert_error(capsys, code, "loss scale collapsed", "in step 41", "step-00000030", "bf16")


def test_reports_are_written(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra 'report'")
    for command in ("profile", "plan"):
        assert run(command, example, "--report", tmp_path / command) == 0
        assert "report: " in capsys.readouterr().out
        (page,) = (tmp_path / command).glob("*.html")
        assert "<html" in page.read_text(encoding="utf-8")
