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
from safetensors.torch import load_file, load_model
from torch.utils import _pytree as pytree

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
NUM_UPDATES = 3


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
    char_gpt.WIDTH, char_gpt.CONTEXT, char_gpt.NUM_LAYERS, char_gpt.BATCH = 64, 32, 3, 8
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
