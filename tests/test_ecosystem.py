"""Scripts for other libraries: one line keeps them to a budget, and changes no bit of the result.

The oracle is the script itself without its marked line.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

import packlight
from packlight.errors import InfeasibleBudgetError, UnsupportedModelError
from tests.oracles.eager_loop import assert_same_bits, twins

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MARK = "# the one line"
# What a script needs beside the project's own dependencies: module, extra.
NEEDED = {
    "plain_loop": [],
    "hf_trainer": [("transformers", "hf"), ("accelerate", "hf")],
    "accelerate_loop": [("transformers", "hf"), ("accelerate", "hf")],
    "lightning_module": [("lightning", "lightning")],
}
MIXED = {
    "plain_loop": "bf16", "hf_trainer": "bf16", "accelerate_loop": "bf16",
    "lightning_module": "bf16-mixed",
}
NUM_UPDATES = 2


@dataclass
class Run:
    """What a script left.

    Attributes:
        output: lines that name losses.
        peak_bytes: as it says itself.
        tensors: all that it saved, by file and place.
    """

    output: list[str]
    peak_bytes: float
    tensors: dict[str, torch.Tensor]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the examples' models afresh and make them small; yield what sets their dropout."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    char_gpt = importlib.import_module("char_gpt")
    char_gpt.WIDTH, char_gpt.CONTEXT, char_gpt.NUM_LAYERS, char_gpt.BATCH = 64, 32, 2, 8
    hf_gpt2 = None
    if importlib.util.find_spec("transformers"):
        hf_gpt2 = importlib.import_module("hf_gpt2")
        hf_gpt2.CONTEXT = 32
        hf_gpt2.CONFIG.n_embd, hf_gpt2.CONFIG.n_layer = 48, 2

    def set_dropout(rate: float) -> None:
        char_gpt.DROPOUT = rate
        if hf_gpt2 is not None:
            for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
                setattr(hf_gpt2.CONFIG, name, rate)

    yield set_dropout
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def require(script: str) -> None:
    for module, extra in NEEDED[script]:
        pytest.importorskip(module, reason=f"needs the extra {extra!r}")


def run(script: str, folder: Path, with_line: bool, budget: int, precision: str) -> Run:
    """Run a script, with or without its marked line, in a namespace of its own."""
    torch._dynamo.reset()
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    if not with_line:
        text = "".join(line for line in text.splitlines(True) if MARK not in line)
    arguments = ["--budget", str(budget), "--save", str(folder)]
    arguments += ["--precision", precision] if precision else []
    arguments += ["--steps" if script == "hf_trainer" else "--updates", str(NUM_UPDATES)]
    output, argv = io.StringIO(), sys.argv
    sys.argv = [script, *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(text, f"{script}.py", "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = argv
    said = output.getvalue()
    (peak,) = re.findall(r"measured peak ([\d.]+) MiB", said)
    losses = re.findall(r"(?<!train_)loss'?:? '?[\d.]+", said)
    return Run(losses, float(peak) * 2**20, saved_tensors(folder))


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every file that a script saved, but for random generators' states."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        elif path.suffix in (".pt", ".ckpt") or path.name in ("optimizer.bin", "scheduler.bin"):
            held = torch.load(path, weights_only=False)
        else:
            continue
        for place, leaf in pytree.tree_flatten_with_path(held)[0]:
            if isinstance(leaf, torch.Tensor):
                tensors[path.name + pytree.keystr(place)] = leaf
    return tensors


def assert_equal(ours: Run, theirs: Run) -> None:
    assert ours.output == theirs.output and len(ours.output) >= NUM_UPDATES
    assert ours.tensors.keys() == theirs.tensors.keys() and len(ours.tensors) > 10
    assert [n for n, t in ours.tensors.items() if not torch.equal(t, theirs.tensors[n])] == []


def compared(script: str, precision: str, folder: Path) -> Run:
    """Run a script with and without its line; return what it left with it."""
    theirs = run(script, folder / "theirs", False, 2**40, precision)
    budget = int(0.8 * theirs.peak_bytes)
    ours = run(script, folder / "ours", True, budget, precision)
    assert_equal(ours, theirs)
    assert ours.peak_bytes <= budget + 0.05 * 2**20, "printed in tenths"
    return ours


# What these libraries warn of is theirs.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", NEEDED)
def test_one_line_keeps_a_script_to_a_budget_and_changes_no_bit(
    script: str, small: Any, tmp_path: Path
) -> None:
    """With dropout, clipping, accumulated gradients, a schedule; an average of the weights."""
    require(script)
    compared(script, "", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", NEEDED)
def test_mixed_precision_of_a_script_is_kept_to_the_bit(
    script: str, small: Any, tmp_path: Path
) -> None:
    """Without dropout: traced, it draws other bfloat16 numbers than eager PyTorch does."""
    require(script)
    small(0.0)
    compared(script, MIXED[script], tmp_path)


def test_a_loss_scaler_in_a_loop_of_ones_own(small: Any, tmp_path: Path) -> None:
    small(0.0)
    compared("plain_loop", "fp16", tmp_path)


def test_what_a_script_saved_can_be_loaded_again(small: Any, tmp_path: Path) -> None:
    ours = run("plain_loop", tmp_path, True, 2**40, "")
    model = importlib.import_module("char_gpt").model()
    load_model(model, str(tmp_path / "model.safetensors"))
    state = torch.load(tmp_path / "training.pt")
    assert model.state_dict().keys() == state["model"].keys(), "no name has a prefix"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name])
        assert torch.equal(tensor, ours.tensors[f"model.safetensors['{name}']"])
    assert any(not torch.equal(t, state["average"][n]) for n, t in state["model"].items())


@pytest.mark.parametrize("script", NEEDED)
def test_a_script_has_one_line_that_is_marked(script: str) -> None:
    lines = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8").splitlines()
    assert sum(MARK in line for line in lines) == 1


# -- packlight.fit beside the same libraries


def network() -> nn.Module:
    torch.manual_seed(0)
    wide = nn.Linear(512, 512)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), wide, nn.GELU(), nn.Linear(512, 8))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(64, 64, generator=generator), torch.randint(8, (64,), generator=generator))
        for _ in range(NUM_UPDATES)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fit_trains_what_accelerate_prepared_with_the_optimizer_inside(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    mine, eager = twins(network(), loss_of, adamw)
    for training in (mine, eager):
        training.model, training.optimizer = accelerator.prepare(
            training.model, training.optimizer
        )
    groups = mine.optimizer.param_groups
    with pytest.raises(UnsupportedModelError, match="fit the optimizer inside, optimizer.optim"):
        packlight.fit(mine.model, loss_of, mine.optimizer, batches()[0], progress=False)
    assert mine.optimizer.param_groups is groups, "looking at it has changed nothing"
    inside = mine.optimizer.optimizer
    step = packlight.fit(mine.model, loss_of, inside, batches()[0], progress=False)
    for batch in batches():
        assert step(batch).item() == eager.step(batch).item()
    assert_same_bits(mine, eager)
    accelerate.state.AcceleratorState._reset_state(True)


def test_parameters_on_the_disk_are_averaged_saved_and_loaded(tmp_path: Path) -> None:
    mine, eager = twins(network(), loss_of, adamw)
    disk = {"moves": packlight.EXACT_MOVES, "offload_directory": tmp_path, "progress": False}
    arguments = (mine.model, loss_of, mine.optimizer, batches()[0])
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(*arguments, 1024, **disk)
    step = packlight.fit(*arguments, caught.value.smallest_bytes, **disk)
    assert step.is_on_disk(mine.model[2].weight)
    averages = [
        AveragedModel(t.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for t in (mine, eager)
    ]
    for batch in batches():
        assert step(batch).item() == eager.step(batch).item()
        for training, average in zip((mine, eager), averages, strict=True):
            average.update_parameters(training.model)
    ours, theirs = (average.state_dict() for average in averages)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    save_model(mine.model, str(tmp_path / "model.safetensors"))
    torch.save((mine.model.state_dict(), mine.optimizer.state_dict()), tmp_path / "training.pt")
    assert (tmp_path / "training.pt").stat().st_size < 1.1 * 3 * sum(
        p.nbytes for p in mine.model.parameters()
    ), "tensors, and not the file that they lie in"
    again = network()
    load_model(again, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), eager.model.parameters(),
                                                 strict=True))
    # Back to the start, and to the end again.
    mine.model.load_state_dict(network().state_dict())
    weights, state = torch.load(tmp_path / "training.pt")
    mine.model.load_state_dict(weights)
    mine.optimizer.load_state_dict(state)
    assert step.is_on_disk(mine.model[2].weight)
    assert step(batches()[0]).item() == eager.step(batches()[0]).item()
    assert_same_bits(mine, eager)
