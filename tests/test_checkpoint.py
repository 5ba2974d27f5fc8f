"""A checkpoint returns every bit of a run, appears whole or not at all, and is checked."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from packlight.errors import FormatError, PacklightError
from packlight.run import checkpoint as checkpoint_module
from packlight.run.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint

OptimizerMaker = Callable[[nn.Module], torch.optim.Optimizer]


class TiedNet(nn.Module):
    """Dropout, batch statistics, tied weights and a channels_last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number per sample."""
        hidden = self.drop(self.norm(self.conv(x)).relu()).flatten(1)
        return self.second(self.first(hidden).tanh()).sum(1)


OPTIMIZERS: dict[str, OptimizerMaker] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "two_groups": lambda m: torch.optim.Adam(
        [
            {"params": [p for p in m.parameters() if p.ndim > 1], "lr": 1e-2, "betas": (0.8, 0.9)},
            {"params": [p for p in m.parameters() if p.ndim == 1], "lr": 3e-3},
        ],
        amsgrad=True,
    ),
}


def make(name: str, seed: int = 0) -> tuple[TiedNet, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = TiedNet()
    return model, OPTIMIZERS[name](model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """Return losses; data come from all three global generators, as careless user code does."""
    losses = []
    for _ in range(num_steps):
        scale = random.random() + float(np.random.rand())
        loss = (model(torch.randn(5, 3, 4, 4)) * scale).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def bits(model: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_steps_and_two_after_resuming_equal_four_to_the_bit(name: str, tmp_path: Path) -> None:
    random.seed(5), np.random.seed(6)
    model, optimizer = make(name)
    straight = train(model, optimizer, 4)

    random.seed(5), np.random.seed(6)
    first_model, first_optimizer = make(name)
    losses = train(first_model, first_optimizer, 2)
    save_checkpoint(tmp_path, first_model, first_optimizer, step=2, extra={"data_position": 2})

    random.seed(77), np.random.seed(78)
    resumed_model, resumed_optimizer = make(name, seed=123)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 2 and found.extra == {"data_position": 2}
    found.restore(resumed_model, resumed_optimizer)
    found.restore_rng()
    losses += train(resumed_model, resumed_optimizer, 2)

    assert losses == straight
    assert bits(resumed_model) == bits(model)
    assert resumed_model.second.weight is resumed_model.first.weight


def test_optimizer_state_keeps_layout_and_precision(tmp_path: Path) -> None:
    """Torch's own load_state_dict casts fp32 state of bf16 parameters to bf16."""
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(torch.bfloat16))
    weight.data = weight.data.to(memory_format=torch.channels_last)
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    momentum = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    optimizer.state[weight]["momentum_buffer"] = momentum
    path = save_checkpoint(tmp_path, model, optimizer, step=1)

    other = nn.ParameterList([nn.Parameter(torch.zeros_like(weight))])
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.1)
    read_checkpoint(path).restore(other, other_optimizer)
    returned = other_optimizer.state[other[0]]["momentum_buffer"]
    assert returned.dtype == torch.float32
    assert torch.equal(returned, momentum)
    assert returned.stride() == momentum.stride()
    assert other_optimizer.param_groups[0]["lr"] == 0.1


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, optimizer = make("sgd")
    path = save_checkpoint(tmp_path, model, optimizer, step=1)
    tied = model.first.weight.nbytes
    all_tensors = sum(v.nbytes for v in model.state_dict().values())
    stored = sum(t.nbytes for n, t in read_checkpoint(path)._tensors.items() if "model" in n)
    assert stored == all_tensors - tied


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = make("sgd")
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, model, optimizer, step=step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000010.safetensors", "step-00000100.safetensors"]


@pytest.mark.parametrize("at", ["header", "tensors", "end"])
def test_a_damaged_newest_checkpoint_names_the_whole_one_before_it(at: str, tmp_path: Path) -> None:
    model, optimizer = make("adamw")
    save_checkpoint(tmp_path, model, optimizer, step=3)
    newest = save_checkpoint(tmp_path, model, optimizer, step=6)
    content = bytearray(newest.read_bytes())
    if at == "end":
        content = content[:-10]
    else:
        content[200 if at == "header" else -10] ^= 1
    newest.write_bytes(content)
    before = bits(model)
    with pytest.raises(FormatError) as caught:
        newest_checkpoint(tmp_path)
    message = str(caught.value)
    assert str(newest) in message
    assert "step-00000003.safetensors is whole" in message
    assert "delete step-00000006.safetensors to resume from step 3" in message
    assert bits(model) == before
    newest.unlink()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 3


def test_every_single_flipped_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    path = save_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters()), step=1)
    content = path.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for position in range(header_bytes, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="digest does not match"):
            read_checkpoint(path)


def test_an_empty_file_and_another_safetensors_file_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="no older checkpoint is left"):
        newest_checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="no checkpoint of Packlight"):
        read_checkpoint(path)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make("sgd")
    old = save_checkpoint(tmp_path, model, optimizer, step=1)

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_flush", fail)
    with pytest.raises(PacklightError, match="No space left.*\n.*needs.*are free"):
        save_checkpoint(tmp_path, model, optimizer, step=2)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert read_checkpoint(old).step == 1


KILLED_WRITER = """
import os, sys
import torch
from packlight.run import checkpoint
checkpoint._flush = lambda path: os._exit(9)
model = torch.nn.Linear(2, 2)
checkpoint.save_checkpoint(sys.argv[1], model, torch.optim.SGD(model.parameters()), step=2)
"""


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The half-written file has another name until it is complete; the next save removes it."""
    model, optimizer = make("sgd")
    save_checkpoint(tmp_path, model, optimizer, step=1)
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    save_checkpoint(tmp_path, model, optimizer, step=2)
    assert not any(path.name.endswith(".tmp") for path in tmp_path.iterdir())


def test_another_model_or_optimizer_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, optimizer = make("sgd")
    train(model, optimizer, 1)
    found = read_checkpoint(save_checkpoint(tmp_path, model, optimizer, step=1))

    wider = nn.Linear(3, 3)
    before = bits(wider)
    with pytest.raises(FormatError, match="another model(.|\n)*has no 'conv.weight'"):
        found.restore(wider, torch.optim.SGD(wider.parameters(), lr=0.1))
    assert bits(wider) == before

    same, adam = make("adamw", seed=9)
    before = bits(same)
    with pytest.raises(FormatError, match="another optimizer(.|\n)*saved from SGD, not AdamW"):
        found.restore(same, adam)
    assert bits(same) == before

    reshaped, sgd = make("sgd")
    reshaped.norm = nn.BatchNorm2d(7)
    with pytest.raises(FormatError, match=r"\[4\] float32 in the checkpoint, \[7\] float32 in"):
        found.restore(reshaped, sgd)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
