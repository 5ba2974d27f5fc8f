"""Low-bit optimizers in use: their bytes, what is saved of them, what they refuse, and `fit`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import (
    MissingExtraError,
    OptimizerStateError,
    OptionError,
    UnsupportedParameterError,
)
from packlight.optim import (
    WEIGHT_FORMATS,
    AdamW4bit,
    AdamW8bit,
    Lion8bit,
    LowBit,
    SGD8bit,
    adamw,
    lion,
    sgd,
)
from packlight.run.checkpoint import newest_checkpoint, save_checkpoint
from packlight.updates.update import ParameterUpdates
from tests.test_optim import gradients, run, started

MANY = (1024, 512)


# -- bytes


@pytest.mark.parametrize(
    ("states", "weights", "bytes_per_parameter"),
    [
        ("fp32", "fp32", 8.0),
        ("bf16", "fp32", 4.0),
        ("8bit", "fp32", 2 + 8 / 256),
        ("4bit", "fp32", 1 + 8 / 128),
        ({"exp_avg": "4bit", "exp_avg_sq": "8bit"}, "fp32", 1.5 + 4 / 128 + 4 / 256),
        ("8bit", "bf16-stochastic", 2 + 8 / 256),
        ("8bit", "bf16-kahan", 4 + 8 / 256),
        ("8bit", "bf16+8bit", 3 + 8 / 256),
    ],
)
def test_a_step_holds_its_state_and_a_few_kibibytes(
    states: Any, weights: str, bytes_per_parameter: float
) -> None:
    parameter = started(weights, MANY)
    parameter.grad = gradients(1, MANY)[0].to(parameter.dtype)
    optimizer = LowBit([parameter], adamw(), states, weights)
    first = packlight.measure_peak(optimizer.step)
    later = packlight.measure_peak(optimizer.step)
    expected = bytes_per_parameter * parameter.numel()
    assert first.end_bytes == pytest.approx(expected, abs=16)
    for transient_bytes in (first.peak_bytes - first.end_bytes, later.peak_bytes):
        assert transient_bytes <= torch.get_num_threads() * 8192
    assert f"{bytes_per_parameter:.2f} bytes for each" in optimizer.summary()


def test_small_parameters_stay_in_fp32_and_the_summary_says_so() -> None:
    large, small = nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.zeros(4095))
    optimizer = AdamW8bit([large, small])
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[large]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert "1 with fewer than 4096 elements (4095 in all)" in optimizer.summary()


# -- saving and loading


OPTIMIZERS = {
    "AdamW8bit": lambda p: AdamW8bit(p, 0.01, weights="bf16-stochastic", seed=3),
    "AdamW4bit": lambda p: AdamW4bit(p, 0.01, weights="bf16-kahan"),
    "Lion8bit": lambda p: Lion8bit(p, 0.01, weights="bf16+8bit"),
    "SGD8bit": lambda p: SGD8bit(p, 0.01, weights="bf16-stochastic"),
    "bf16": lambda p: LowBit(p, adamw(0.01), "bf16", "bf16-stochastic"),
}


def pair(name: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    parameters = [started("bf16-stochastic"), started("bf16-stochastic", (7, 5))]
    return OPTIMIZERS[name](parameters), parameters


def train(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], first: int, last: int
) -> None:
    for step in range(first, last):
        for p in parameters:
            p.grad = gradients(6, tuple(p.shape))[step].to(p.dtype)
        optimizer.step()


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


@pytest.mark.parametrize("how", ["state_dict", "torch.save", "checkpoint"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(name: str, how: str, tmp_path: Path) -> None:
    optimizer, parameters = pair(name)
    model = nn.ParameterList(parameters)
    train(optimizer, parameters, 0, 3)
    fresh, others = pair(name)
    if how == "checkpoint":
        save_checkpoint(tmp_path, model, optimizer, step=3)
        found = newest_checkpoint(tmp_path)
        assert found is not None
        found.restore(nn.ParameterList(others), fresh)
    else:
        for p, q in zip(parameters, others, strict=True):
            q.data.copy_(p.data)
        saved = optimizer.state_dict()
        if how == "torch.save":
            torch.save(saved, tmp_path / "state")
            saved = torch.load(tmp_path / "state")
        fresh.load_state_dict(saved)
    assert same_state(fresh.state_dict(), optimizer.state_dict())
    train(optimizer, parameters, 3, 6)
    train(fresh, others, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))
    assert same_state(fresh.state_dict(), optimizer.state_dict())


def test_state_of_another_form_is_refused_by_name_and_nothing_changes() -> None:
    parameter = started()
    eight = AdamW8bit([parameter], lr=0.01)
    run(eight, parameter, gradients(1))
    four = AdamW4bit([started()], lr=0.5)
    before = copy.deepcopy(four.state_dict())
    with pytest.raises(OptimizerStateError, match="'8bit', that of this optimizer '4bit'") as error:
        four.load_state_dict(eight.state_dict())
    assert (error.value.saved, error.value.expected) == ("8bit", "4bit")
    assert same_state(four.state_dict(), before)
    with pytest.raises(OptimizerStateError, match="'adamw', that of this optimizer 'lion'"):
        Lion8bit([started()]).load_state_dict(eight.state_dict())
    ours = torch.optim.AdamW([parameter])
    with pytest.raises(OptimizerStateError, match="'rule' of group 0"):
        eight.load_state_dict(ours.state_dict())
    with pytest.raises(OptimizerStateError, match=r"of parameter 0, of shape \(80, 80\)"):
        AdamW8bit([started(shape=(80, 80))]).load_state_dict(eight.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        eight.load_state_dict({"state": {}, "param_groups": []})


# -- as any torch optimizer


def test_learning_rate_schedulers_and_groups_act_as_on_torchs() -> None:
    def trained(make: Any) -> list[torch.Tensor]:
        parameters = [started(), started(shape=(50, 3))]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]
        optimizer = make(groups)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.05], total_steps=8)
        for step in range(6):
            train(optimizer, parameters, step, step + 1)
            scheduler.step()
        return parameters

    mine = trained(lambda groups: LowBit(groups, adamw(0.01), "fp32"))
    theirs = trained(lambda groups: torch.optim.AdamW(groups, lr=0.01))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-7)


def test_a_group_may_have_a_rule_and_formats_of_its_own() -> None:
    matrix, late, bias = started("bf16-kahan"), started(), started(shape=(9,))
    optimizer = LowBit([matrix], adamw(0.01), "4bit", "bf16-kahan")
    optimizer.add_param_group({"params": [late], "rule": lion(0.02), "weights": "fp32"})
    optimizer.add_param_group({"params": [bias], "rule": sgd(0.1), "weights": "fp32"})
    alone = started()
    run(LowBit([alone], lion(0.02), "4bit"), alone, gradients(2))
    for parameter in (matrix, late, bias):
        shape = tuple(parameter.shape)
        run(optimizer, parameter, gradients(2, shape))
        parameter.grad = None
    assert torch.equal(late, alone)
    assert optimizer.state[matrix].keys() >= {"exp_avg_sq", "exp_avg_sq_scale", "residual"}
    assert "residual" not in optimizer.state[late] and "exp_avg_sq" not in optimizer.state[late]
    assert [line.split(",")[0].strip() for line in optimizer.summary().splitlines()[1::]] == [
        "adamw", "lion", "sgd"
    ]  # fmt: skip


def test_a_closure_is_called_with_gradients_on() -> None:
    parameter = started()
    optimizer = AdamW8bit([parameter])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(parameter, before)


def test_autograd_notices_that_a_step_wrote_a_weight() -> None:
    parameter = started()
    result = parameter.square().sum()
    parameter.grad = torch.ones_like(parameter)
    AdamW8bit([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rule="adamw"), "make one: rule=packlight.optim.adamw"),
        (dict(states="6bit"), "known: fp32, bf16, 8bit, 4bit"),
        (dict(weights="bf16"), "known: fp32, bf16-nearest, bf16-stochastic, fp16-stochastic"),
        (dict(states={"exp_avg": "8bit"}), "adamw keeps: exp_avg, exp_avg_sq"),
        (dict(states={"exp_avg": "8bit", "exp_avg_sq": "2bit"}), "unknown states='2bit'"),
        (dict(seed=-1), "from 0 to 2\\^32 - 1"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        LowBit([started()], **{"rule": adamw(), **arguments})


def test_numbers_outside_of_their_range_are_refused() -> None:
    for make in (
        lambda: adamw(lr=-1.0), lambda: adamw(eps=float("nan")), lambda: adamw(betas=(0.9, 1.0)),
        lambda: sgd(0.1, momentum=1.0), lambda: sgd(0.1, nesterov=True),
        lambda: lion(weight_decay=-0.1),
    ):
        with pytest.raises(OptionError):
            make()


def test_parameters_that_a_format_cannot_store_are_refused_and_not_added() -> None:
    optimizer = AdamW8bit([started()])
    for parameter, message in (
        (started("bf16-kahan"), "weights='bf16-nearest' or 'bf16-stochastic' or 'bf16-kahan'"),
        (nn.Parameter(torch.zeros(3, dtype=torch.float64)), "convert it to torch.float32"),
        (nn.Parameter(torch.zeros(8, 8)[:, ::2]), "has gaps"),
        (nn.Parameter(torch.zeros(3, device="meta")), "is on no device with a kernel"),
    ):
        with pytest.raises(UnsupportedParameterError, match=message) as error:
            optimizer.add_param_group({"params": [parameter]})
        assert error.value.shape == tuple(parameter.shape)
        assert len(optimizer.param_groups) == 1


def test_sparse_gradients_and_parameters_converted_later_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW8bit(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedParameterError, match="sparse=False in nn.Embedding"):
        optimizer.step()
    model = nn.Linear(80, 80)
    optimizer = AdamW8bit(model.parameters())
    model.to(torch.bfloat16)
    model(torch.ones(1, 80, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(UnsupportedParameterError, match="cannot be stored as 'fp32'"):
        optimizer.step()


def test_a_state_that_does_not_fit_its_parameter_is_never_read() -> None:
    """Kernels read memory by address."""
    parameter = started()
    optimizer = AdamW8bit([parameter])
    run(optimizer, parameter, gradients(1))
    parameter.grad = None
    parameter.data = torch.zeros(200, 200)
    parameter.grad = torch.ones(200, 200)
    with pytest.raises(UnsupportedParameterError, match="has a state 'exp_avg'.*5183.*40000"):
        optimizer.step()


def test_a_missing_compiler_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from packlight.optim import backend

    monkeypatch.setattr(backend, "_kernel", None)
    monkeypatch.setitem(sys.modules, "numba", None)
    parameter = started()
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(MissingExtraError, match=r"packlight\[optim\]"):
        AdamW8bit([parameter]).step()


# -- in Packlight's steps


class Net(nn.Module):
    """Matrices large enough to be quantized beside vectors that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.wide = nn.Linear(64, 256)
        self.norm = nn.LayerNorm(256)
        self.narrow = nn.Linear(256, 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.wide(self.embedding(tokens))))
        return self.narrow(hidden)


def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize(
    ("states", "weights"),
    [("8bit", "fp32"), ("4bit", "bf16-kahan"), ("8bit", "bf16-stochastic"), ("bf16", "bf16+8bit")],
)
def test_fit_updates_in_the_backward_with_the_bits_of_step(
    states: str, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    eager = Net().to(WEIGHT_FORMATS[weights].dtype)
    mine = copy.deepcopy(eager)
    optimizers = [
        LowBit(model.parameters(), adamw(0.01), states, weights, seed=2) for model in (eager, mine)
    ]
    batches = [torch.randint(0, 100, (8, 32)) for _ in range(3)]
    moves = ("update-in-backward",)
    with pytest.raises(packlight.errors.InfeasibleBudgetError) as error:
        packlight.fit(mine, loss_fn, optimizers[1], batches[0], 1, moves=moves, progress=False)
    budget = error.value.smallest_bytes
    step = packlight.fit(
        mine, loss_fn, optimizers[1], batches[0], budget, moves=moves, progress=False
    )
    assert "update-in-backward" in step.describe()
    for batch in batches:
        optimizers[0].zero_grad()
        expected = loss_fn(eager, batch)
        expected.backward()
        optimizers[0].step()
        measured = step.measured(batch)
        assert torch.equal(measured.loss, expected)
        assert measured.peak_bytes <= budget
    for a, b in zip(eager.parameters(), mine.parameters(), strict=True):
        assert torch.equal(a, b)
    assert same_state(optimizers[1].state_dict(), optimizers[0].state_dict())


@pytest.mark.parametrize("rule", [sgd(0.1), sgd(0.1, 0.9), adamw(), lion()], ids=lambda r: r.name)
def test_the_runtime_sees_that_parameters_may_be_stepped_one_by_one(rule: Any) -> None:
    model = Net().bfloat16()
    updates = ParameterUpdates(LowBit(model.parameters(), rule, "bf16", "bf16-stochastic"))
    assert updates.refusal is None
    assert all(updates.cost(p).workspace_bytes <= 8192 for p in model.parameters())
    assert all(updates.cost(p).num_slices == 1 for p in model.parameters())
