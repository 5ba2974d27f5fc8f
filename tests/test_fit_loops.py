"""What people do around a training step means the same with `fit`; eager loops are the oracle."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import packlight
from benchmarks.zoo.outcome import traced
from packlight.errors import UnsupportedModelError
from packlight.search.prepare import Preparer
from tests.oracles.eager_loop import (
    Training,
    assert_equal_losses,
    assert_no_gradients,
    assert_same_bits,
    twins,
)

IN_BACKWARD = ("update-in-backward",)
Batch = dict[str, torch.Tensor]


class Net(nn.Module):
    """Dropout, batch norm, a shared and a frozen layer, parameters that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(16, 24), nn.Linear(24, 24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4, bias=False)
        self.one, self.other = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(24))
        self.outside = nn.Parameter(torch.randn(24))  # in no optimizer
        self.unused = nn.Parameter(torch.randn(3))  # gets no gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.gelu(self.first(x)), 0.1, self.training)
        # Two parameters with one and the same gradient.
        x = self.frozen(torch.tanh(self.shared(x) + (self.one + self.other)))
        return self.head(self.norm(self.shared(x)) * self.outside)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def batch_of(seed: int = 0, rows: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 16, generator=generator),
        "y": torch.randint(0, 4, (rows,), generator=generator),
    }


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters in the optimizer, in the model's order."""
    return [p for n, p in model.named_parameters() if n != "outside"]


def two_groups(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW with groups of their own hyperparameters, in another order than the model's."""
    parameters = trained(model)
    groups = [{"params": parameters[3:], "lr": 1e-2}, {"params": parameters[:3], "lr": 3e-3}]
    return torch.optim.AdamW(groups, **{"weight_decay": 0.1, **options})


def fit(mine: Training, example: Any, **options: Any) -> packlight.TrainStep:
    options = {"moves": IN_BACKWARD, "progress": False, **options}
    return packlight.fit(mine.model, mine.loss_fn, mine.optimizer, example, **options)


def compare(
    mine: Training,
    eager: Training,
    batches: list[Any],
    between: Callable[[int, Training], Any] = lambda index, training: None,
    before_update: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> packlight.TrainStep:
    """Train both on the batches and assert that no bit differs; return the planned step."""
    step = fit(mine, batches[0], **options)
    losses = []
    for index, batch in enumerate(batches):
        torch.manual_seed(100 + index)
        between(index, mine)
        losses.append(step(batch))
        assert_no_gradients(mine.model)
        torch.manual_seed(100 + index)
        between(index, eager)
        assert losses[-1].item() == eager.step(batch, before_update).item(), index
        assert losses[-1].shape == () and not losses[-1].requires_grad
    assert_same_bits(mine, eager)
    return step


BATCHES = [batch_of(seed) for seed in range(4)]


@pytest.fixture
def num_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each step that is planned."""
    plans: list[Any] = []
    prepare = Preparer.prepare

    def counted(self: Preparer, batch: Any, *others: Any) -> Any:
        plans.append(batch)
        return prepare(self, batch, *others)

    monkeypatch.setattr(Preparer, "prepare", counted)
    return plans


@pytest.mark.parametrize("moves", [IN_BACKWARD, ()])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True, "maximize": True}])
def test_groups_frozen_outside_shared_and_unused_parameters(options: Any, moves: Any) -> None:
    mine, eager = twins(net(), loss_of, lambda model: two_groups(model, **options))
    before = mine.model.outside.clone()
    compare(mine, eager, BATCHES, moves=moves)
    assert torch.equal(mine.model.outside, before)
    assert eager.optimizer.state.keys() == {
        p for p in trained(eager.model) if p.requires_grad and p is not eager.model.unused
    }


class Overwriting(torch.optim.SGD):
    """An optimizer that scales gradients in place, as gradient centralization and others do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.mul_(0.5), alpha=-group["lr"])


@pytest.mark.parametrize("moves", [IN_BACKWARD, ()])
def test_a_gradient_of_two_parameters_is_overwritten_for_each_alone(moves: Any) -> None:
    mine, eager = twins(net(), loss_of, lambda model: Overwriting(trained(model), lr=0.1))
    compare(mine, eager, BATCHES, moves=moves)


def test_schedulers_step_between_the_steps() -> None:
    mine, eager = twins(net(), loss_of, two_groups)
    schedulers = {
        id(t): lr_scheduler.OneCycleLR(t.optimizer, [0.01, 0.02], total_steps=9)
        for t in (mine, eager)
    }
    seen = []

    def between(index: int, training: Training) -> None:
        if index > 0:  # torch warns if it sees no step of the optimizer before this
            schedulers[id(training)].step()
        seen.append(training.optimizer.param_groups[0]["lr"])

    compare(mine, eager, BATCHES, between)
    assert len(set(seen)) == len(BATCHES)


@pytest.mark.parametrize("is_fitted_first", [True, False])
def test_training_is_resumed_exactly(is_fitted_first: bool) -> None:
    def made() -> Training:
        model = net()
        return Training(model, two_groups(model), loss_of)

    eager, first, second = made(), made(), made()
    torch.manual_seed(7)
    expected = [eager.step(batch) for batch in BATCHES]

    torch.manual_seed(7)
    step = fit(first, BATCHES[0])
    torch.manual_seed(7)
    losses = [step(batch) for batch in BATCHES[:2]]
    generator = torch.get_rng_state()
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    if is_fitted_first:
        step = fit(second, BATCHES[0])
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    if not is_fitted_first:
        step = fit(second, BATCHES[0])
    torch.set_rng_state(generator)
    losses += [step(batch) for batch in BATCHES[2:]]
    assert_equal_losses(losses, expected)
    assert_same_bits(second, eager)


@pytest.mark.parametrize("moves", [IN_BACKWARD, ()])
def test_clipping_is_what_the_functions_of_torch_do(moves: Any) -> None:
    for limit, options, function in (
        (0.05, {"clip_grad_norm": 0.05}, nn.utils.clip_grad_norm_),
        (0.002, {"clip_grad_value": 0.002}, nn.utils.clip_grad_value_),
    ):
        mine, eager = twins(net(), loss_of, two_groups)
        step = compare(
            mine, eager, BATCHES, before_update=lambda m: function(trained(m), limit),  # noqa: B023
            moves=moves, **options,
        )
        if moves and "clip_grad_norm" in options:
            assert "clipping by the norm of all gradients needs all of them" in step.describe()


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_a_loss_scaler_scales_and_skips_as_in_the_usual_loop(max_norm: float | None) -> None:
    def scaler() -> torch.amp.GradScaler:
        # So large that the first gradients are infinite.
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)

    def clip(model: nn.Module) -> None:
        if max_norm is not None:
            nn.utils.clip_grad_norm_(trained(model), max_norm)

    mine, eager = twins(net(), loss_of, two_groups)
    my_scaler, eager_scaler = scaler(), scaler()
    step = fit(mine, BATCHES[0], scaler=my_scaler, clip_grad_norm=max_norm)
    num_skipped = 0
    for index in range(8):
        batch = BATCHES[index % 4]
        before = eager.model.head.weight.clone()
        for training in (mine, eager):
            torch.manual_seed(index)
            if training is mine:
                loss = step(batch)
            else:
                assert loss.item() == eager.step(batch, clip, eager_scaler).item()
        assert my_scaler.state_dict() == eager_scaler.state_dict()
        num_skipped += torch.equal(eager.model.head.weight, before)
        assert_same_bits(mine, eager)
    assert 0 < num_skipped < 8


def test_step_hooks_are_called_and_keep_updates_out_of_the_backward() -> None:
    mine, eager = twins(net(), loss_of, two_groups)
    seen: dict[int, list[int]] = {id(mine.optimizer): [], id(eager.optimizer): []}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        seen[id(optimizer)].append(len(held))

    for training in (mine, eager):
        training.optimizer.register_step_pre_hook(hook)
    step = compare(mine, eager, BATCHES)
    assert "without update-in-backward" in step.describe() and "hooks" in step.describe()
    assert seen[id(mine.optimizer)] == seen[id(eager.optimizer)] != []


def test_an_average_of_the_weights_is_updated_by_the_user() -> None:
    mine, eager = twins(net(), loss_of, two_groups)
    averages = {
        id(t): AveragedModel(t.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for t in (mine, eager)
    }
    compare(mine, eager, BATCHES, lambda _, t: averages[id(t)].update_parameters(t.model))
    ours, theirs = (averages[id(t)].state_dict() for t in (mine, eager))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_modes_are_followed_and_evaluation_leaves_them(num_plans: list[Any]) -> None:
    mine, eager = twins(net(), loss_of, two_groups)
    step = fit(mine, BATCHES[0])
    for index, is_training in enumerate([True, False, True, False]):
        for training in (mine, eager):
            training.model.train(is_training)
        torch.manual_seed(index)
        loss = step(BATCHES[index])
        torch.manual_seed(index)
        assert loss.item() == eager.step(BATCHES[index]).item()
        for training in (mine, eager):
            training.model.norm.eval()
        modes = [module.training for module in mine.model.modules()]
        evaluated = step.evaluate(BATCHES[0])
        assert [module.training for module in mine.model.modules()] == modes
        eager.model.eval()
        with torch.no_grad():
            assert evaluated.item() == loss_of(eager.model, BATCHES[0]).item()
    assert_same_bits(mine, eager)
    assert len(num_plans) == 2, "one plan for each mode"


def test_layers_frozen_and_freed_and_groups_added_later() -> None:
    def head_only(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([model.head.weight, model.shared.weight])

    def between(index: int, training: Training) -> None:
        model = training.model
        if index == 0:
            model.shared.weight.requires_grad_(False)
        elif index == 1:
            model.shared.weight.requires_grad_(True)
        elif index == 2:
            training.optimizer.add_param_group({"params": model.first.parameters(), "lr": 0.1})
        else:
            model.head.weight.requires_grad_(False)

    mine, eager = twins(net(), loss_of, head_only)
    before = mine.model.first.weight.clone()
    compare(mine, eager, BATCHES, between)
    assert not torch.equal(mine.model.first.weight, before)


@pytest.mark.parametrize("moves", [packlight.EXACT_MOVES, ()])
def test_the_state_of_frozen_layers_still_counts(moves: Any) -> None:
    """What an optimizer remembers of a layer stays in memory when the layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(4, 32)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    step = packlight.fit(model, loss_fn, optimizer, batch, moves=moves, progress=False)
    step(batch)
    model[0].requires_grad_(False)
    step.prepare(batch)
    states = [t for state in optimizer.state.values() for t in state.values()]
    resident = sum(t.nbytes for t in (*model.parameters(), *states, batch))
    measured = packlight.measure_peak(lambda: step(batch))
    assert resident + measured.peak_bytes <= step.peak_bytes


def test_two_shapes_of_batches_alternate_and_are_planned_once(num_plans: list[Any]) -> None:
    mine, eager = twins(net(), loss_of, two_groups)
    compare(mine, eager, [batch_of(seed, rows) for seed, rows in enumerate([12, 8, 12, 8, 12])])
    assert len(num_plans) == 2


@dataclass
class Pair:
    """A batch."""

    x: torch.Tensor
    y: torch.Tensor


def batch_encoding(x: torch.Tensor, y: torch.Tensor) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"x": x, "y": y})


CONTAINERS: dict[str, Callable[..., Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "nested": lambda x, y: {"inputs": {"x": x}, "targets": (y, "a plain value")},
    "mapping": lambda x, y: UserDict(x=x, y=y),
    "BatchEncoding": batch_encoding,
    "nested BatchEncoding": lambda x, y: (batch_encoding(x, y),),
    "dataclass": Pair,
    "named tuple": namedtuple("Named", "x y"),
    "object": lambda x, y: SimpleNamespace(x=x, y=y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
}


def unpacked(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(batch, "x"):
        return batch.x, batch.y
    if isinstance(batch, (tuple, list)):
        return unpacked(batch[0]) if len(batch) == 1 else tuple(map(torch.as_tensor, batch))
    return (batch["x"], batch["y"]) if "x" in batch else (batch["inputs"]["x"], batch["targets"][0])


@pytest.mark.parametrize("container", CONTAINERS)
def test_batches_of_any_container_are_planned_once_and_counted(
    container: str, num_plans: list[Any]
) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = unpacked(batch)
        return F.cross_entropy(model(x), y)

    torch.manual_seed(0)
    mine, eager = twins(
        nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), loss_fn,
        lambda model: torch.optim.SGD(model.parameters(), 0.1),
    )
    batches = [CONTAINERS[container](**batch) for batch in BATCHES]
    step = compare(mine, eager, batches)
    assert len(num_plans) == 1
    held = step.profile.memory
    num_bytes = sum(t.nbytes for t in BATCHES[0].values())
    if container == "arrays":  # read by the loss, as a teacher's weights would be
        assert held.state_bytes == num_bytes
    else:
        assert 0 <= held.input_bytes - num_bytes <= 512


def test_gradients_of_the_user_are_refused_until_they_are_gone_and_never_added_to() -> None:
    mine, eager = twins(net(), loss_of, two_groups)

    def make_gradients(index: int, training: Training) -> None:
        loss_of(training.model, BATCHES[0]).backward()
        training.optimizer.zero_grad()
        training.model.outside.grad = None

    compare(mine, eager, BATCHES, make_gradients)
    step = packlight.fit(mine.model, loss_of, mine.optimizer, BATCHES[0], progress=False)
    loss_of(mine.model, BATCHES[0]).backward()
    before = copy.deepcopy(mine.model.state_dict())
    with pytest.raises(UnsupportedModelError, match="hold gradients already"):
        step(BATCHES[0])
    assert all(torch.equal(before[n], t) for n, t in mine.model.state_dict().items())


def test_mixed_precision_inside_the_loss() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    mine, eager = twins(net(), loss_fn, two_groups)
    # Traced, a shared layer's weight is cast once for each use: the oracle is the captured graph
    # run as it is.
    eager.loss_fn = traced(loss_fn)
    compare(mine, eager, BATCHES)


def test_losses_that_are_sums_and_read_the_parameters() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        penalty = sum(p.sum() ** 2 for p in trained(model) if p.requires_grad)
        return model(batch["x"]).square().sum() + 1e-3 * penalty

    for options in ({}, {"clip_grad_value": 1e9}):
        mine, eager = twins(net(), loss_fn, two_groups)
        compare(mine, eager, BATCHES, **options)


def test_a_teacher_that_the_loss_reads_is_in_the_account() -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 4)).requires_grad_(False)

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.mse_loss(model(batch["x"]), teacher(batch["x"]))

    mine, eager = twins(net(), loss_fn, two_groups)
    step = compare(mine, eager, BATCHES)
    buffers_bytes = sum(b.nbytes for b in mine.model.buffers())
    teacher_bytes = sum(p.nbytes for p in teacher.parameters())
    assert step.profile.memory.state_bytes == buffers_bytes + teacher_bytes
