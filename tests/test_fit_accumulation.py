"""Gradients of several batches and several losses, added up with `fit(..., accumulate=True)`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import packlight
from packlight.costs.peak import measure_peak
from packlight.errors import (
    InfeasibleBudgetError,
    NonFiniteLossError,
    OptionError,
    UnsupportedModelError,
)
from packlight.updates.accounting import tensors_bytes
from tests.oracles.eager_loop import Training, assert_close, assert_same_bits

EXACT = ("update-in-backward", "pack")
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Net(nn.Module):
    """A trunk with dropout, an actor's and a critic's head, a weight that few losses read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.Tanh())
        self.actor, self.critic = nn.Linear(48, 4), nn.Linear(48, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.actor(F.dropout(self.trunk(x), 0.1, self.training))


def batch_of(seed: int = 0, rows: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    return x, torch.randint(0, 4, (rows,), generator=generator)


def classify(model: Any, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def value(model: Any, batch: Batch) -> torch.Tensor:
    return (model.critic(model.trunk(batch[0])).squeeze(1) - batch[1]).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def pair(loss_fn: Any = classify, make: Any = adamw) -> tuple[Training, Training]:
    """Return two trainings of the same net."""
    models = Net(), Net()
    mine, eager = (Training(model, make(model), loss_fn) for model in models)
    return mine, eager


def smallest(*arguments: Any, **options: Any) -> int:
    """Return the smallest budget that an error names."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(*arguments, 1, progress=False, **options)
    return caught.value.smallest_bytes


def fit(
    mine: Training, budget: int | str | None = None, batch: Any = None, **options: Any
) -> packlight.TrainStep:
    """Return a step that accumulates."""
    options = {"moves": EXACT, "accumulate": True, **options}
    example = batch_of() if batch is None else batch
    arguments = mine.model, mine.loss_fn, mine.optimizer, example
    if budget == "smallest":
        budget = smallest(*arguments, **options)
    return packlight.fit(*arguments, budget, progress=False, **options)


def held_bytes(mine: Training, batch: Batch, *more: torch.Tensor) -> int:
    """Return what a loop has in memory: parameters, gradients, states, a batch, and more."""
    states = [v for s in mine.optimizer.state.values() for v in s.values()]
    gradients = [p.grad for p in mine.model.parameters() if p.grad is not None]
    tensors = [*mine.model.parameters(), *mine.model.buffers(), *gradients, *batch, *more]
    return tensors_bytes([*tensors, *(v for v in states if isinstance(v, torch.Tensor))])


def within(step: packlight.TrainStep, mine: Training, batch: Batch, run: Callable[[], Any]) -> Any:
    """Run part of a step; assert that with all that is there it keeps to what was promised."""
    before = held_bytes(mine, batch)
    peak = measure_peak(run, torch.device("cpu"))
    assert before + peak.peak_bytes <= (step.budget_bytes or step.peak_bytes)
    return peak.result


def assert_same_gradients(mine: Training, eager: Training) -> None:
    for (name, ours), theirs in zip(
        mine.model.named_parameters(), eager.model.parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


# -- several batches


@pytest.mark.parametrize("clipped", [{}, {"clip_grad_norm": 0.5, "clip_grad_value": 0.05}])
def test_weighted_batches_have_the_gradients_of_an_eager_loop(clipped: dict[str, float]) -> None:
    mine, eager = pair()
    step = fit(mine, None if clipped else "smallest", **clipped)
    for _ in range(2):
        for number in range(3):  # the last one of another size
            batch = batch_of(number, 24 - 8 * (number == 2))
            torch.manual_seed(number)
            loss = within(step, mine, batch, partial(step.backward, batch, 1 / 3))
            torch.manual_seed(number)
            expected = classify(eager.model, batch)
            (expected / 3).backward()
            assert loss.item() == expected.item()
            assert_same_gradients(mine, eager)
        within(step, mine, batch, step.update)
        if clipped:
            nn.utils.clip_grad_value_(eager.model.parameters(), clipped["clip_grad_value"])
            nn.utils.clip_grad_norm_(eager.model.parameters(), clipped["clip_grad_norm"])
        eager.optimizer.step()
        eager.optimizer.zero_grad()
        assert_same_bits(mine, eager)


def test_a_call_adds_to_what_is_there_and_updates() -> None:
    mine, eager = pair()
    step = fit(mine)
    for number in range(4):
        torch.manual_seed(number)
        measured = None
        if number % 2:
            measured = step.measured(batch_of(number))
        else:
            step.backward(batch_of(number))
        assert measured is None or measured.peak_bytes <= step.peak_bytes
        torch.manual_seed(number)
        classify(eager.model, batch_of(number)).backward()
        if number % 2:
            eager.optimizer.step()
            eager.optimizer.zero_grad()
    assert_same_bits(mine, eager)


def test_the_optimizer_may_be_stepped_by_the_loop_and_gradients_be_changed() -> None:
    mine, eager = pair()
    step = fit(mine, None)
    for number in range(2):
        torch.manual_seed(number)
        step.backward(batch_of(number))
        torch.manual_seed(number)
        classify(eager.model, batch_of(number)).backward()
        for training in (mine, eager):
            for parameter in training.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
    for training in (mine, eager):
        training.optimizer.step()
        training.optimizer.zero_grad()
    assert_same_bits(mine, eager)


def test_microbatches_within_an_accumulation_have_its_gradients() -> None:
    mine, eager = pair()
    for training in (mine, eager):
        training.model.eval()  # of dropout each microbatch would draw another mask
    moves = ("update-in-backward", "microbatch")
    options = {"moves": moves, "accumulate": True}
    example = batch_of(0, 256)
    least = smallest(mine.model, classify, mine.optimizer, example, **options)
    step = fit(mine, least, example, moves=moves)
    assert step.way.num_microbatches > 1
    for number in range(2):
        batch = batch_of(number, 256)
        within(step, mine, batch, partial(step.backward, batch, 0.5))
        (classify(eager.model, batch) * 0.5).backward()
    within(step, mine, batch, step.update)
    eager.optimizer.step()
    assert_close(mine, eager, 1e-4)


def test_state_on_the_disk_is_updated_from_accumulated_gradients(tmp_path: Path) -> None:
    mine, eager = pair()
    moves = (*EXACT, "offload")
    options: dict[str, Any] = {"moves": moves, "offload_directory": tmp_path}
    step = fit(mine, "smallest", **options)
    assert step.budget_bytes is not None
    assert step.budget_bytes < smallest(
        eager.model, classify, eager.optimizer, batch_of(), accumulate=True, moves=EXACT
    )
    for _ in range(2):
        for number in range(2):
            torch.manual_seed(number)
            step.backward(batch_of(number))
            torch.manual_seed(number)
            classify(eager.model, batch_of(number)).backward()
        step.update()
        eager.optimizer.step()
        eager.optimizer.zero_grad()
    assert any(
        step.is_on_disk(v) for s in mine.optimizer.state.values() for v in s.values()
    )
    assert_same_bits(mine, eager)


def test_a_scaled_loss_is_unscaled_once_and_skipped_where_it_overflows() -> None:
    mine, eager = pair(make=lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    step = fit(mine, scaler=scalers[0], clip_grad_norm=0.5)
    for update in range(3):
        for number in range(2):
            batch = batch_of(number)
            torch.manual_seed(number)
            step.backward(batch, 0.5)
            torch.manual_seed(number)
            scalers[1].scale(classify(eager.model, batch) * 0.5).backward()
        if update == 1:  # something that overflows
            for training in (mine, eager):
                training.model.actor.bias.grad.fill_(torch.inf)
        step.update()
        scalers[1].unscale_(eager.optimizer)
        nn.utils.clip_grad_norm_(eager.model.parameters(), 0.5)
        scalers[1].step(eager.optimizer)
        scalers[1].update()
        eager.optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same_bits(mine, eager)


def talking(model: Any, batch: Batch) -> torch.Tensor:
    hidden = model.trunk(batch[0])
    if hidden.mean() > 1e9:  # a break
        warnings.warn("large", stacklevel=1)
    return F.cross_entropy(model.actor(hidden), batch[1])


def test_a_loss_that_breaks_accumulates_too() -> None:
    mine, eager = pair(talking)
    peaks: list[int] = []
    for budget in (None, "peak"):
        step = fit(mine, int(1.1 * max(peaks)) if budget else None)  # the update counts, too
        for _ in range(3):
            for number in range(2):
                batch = batch_of(number)
                before = held_bytes(mine, batch)
                peak = measure_peak(partial(step.backward, batch, 0.5), torch.device("cpu"))
                peaks.append(before + peak.peak_bytes)
                assert step.budget_bytes is None or peaks[-1] <= step.budget_bytes
                expected = talking(eager.model, batch)
                (expected * 0.5).backward()
                assert peak.result.item() == expected.item()
                assert_same_gradients(mine, eager)
            step.update()
            eager.optimizer.step()
            eager.optimizer.zero_grad()
    assert_same_bits(mine, eager)


# -- several losses


def test_losses_with_one_optimizer_add_up_in_the_parameters_they_share() -> None:
    mine, eager = pair()
    critics = Training(mine.model, mine.optimizer, value)
    actor, critic = fit(mine), fit(critics)
    for number in range(3):
        batch = batch_of(number)
        torch.manual_seed(number)
        losses = [within(s, mine, batch, partial(s.backward, batch)) for s in (actor, critic)]
        torch.manual_seed(number)
        expected = [loss_fn(eager.model, batch) for loss_fn in (classify, value)]
        for loss, theirs in zip(losses, expected, strict=True):
            theirs.backward()
            assert loss.item() == theirs.item()
        assert_same_gradients(mine, eager)
        within(critic, mine, batch, (actor, critic)[number % 2].update)
        eager.optimizer.step()
        eager.optimizer.zero_grad()
    assert_same_bits(mine, eager)


class Gan(nn.Module):
    """A generator of rows and a critic of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 16))
        self.critic = nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


def critic_loss(gan: Gan, batch: Batch) -> torch.Tensor:
    real, noise = batch
    fake = gan.generator(noise).detach()
    return F.softplus(-gan.critic(real)).mean() + F.softplus(gan.critic(fake)).mean()


def generator_loss(gan: Gan, batch: Batch) -> torch.Tensor:
    return F.softplus(-gan.critic(gan.generator(batch[1]))).mean()


def gan_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 16, generator=generator), torch.randn(16, 8, generator=generator)


def adams(gan: Gan) -> dict[str, torch.optim.Optimizer]:
    return {
        name: torch.optim.Adam(getattr(gan, name).parameters(), 1e-2, betas=(0.5, 0.99))
        for name in ("critic", "generator")
    }


def test_a_gans_two_steps_count_each_others_optimizers() -> None:
    mine, eager = Gan(), Gan()
    ours, theirs = adams(mine), adams(eager)
    losses = {"critic": critic_loss, "generator": generator_loss}
    steps = {}
    for name, other in (("critic", "generator"), ("generator", "critic")):
        arguments = mine, losses[name], ours[name], gan_batch()
        options: dict[str, Any] = {"moves": (), "beside": ours[other]}
        steps[name] = packlight.fit(*arguments, progress=False, **options)
        # Both moments of what the other one steps, and a number of steps for each parameter.
        parameters = list(getattr(mine, other).parameters())
        kept_bytes = sum(2 * p.nbytes + 4 for p in parameters)
        assert steps[name].way.memory.beside_bytes == kept_bytes
        assert "beside the step" in steps[name].describe()
    for number in range(2):
        for name in ("critic", "critic", "generator"):
            batch = gan_batch(number)
            states = [v for o in ours.values() for s in o.state.values() for v in s.values()]
            before = tensors_bytes([*mine.parameters(), *states, *batch])
            peak = measure_peak(partial(steps[name], batch), torch.device("cpu"))
            assert before + peak.peak_bytes <= steps[name].peak_bytes
            theirs[name].zero_grad()
            loss = losses[name](eager, batch)
            loss.backward()
            theirs[name].step()
            assert peak.result.item() == loss.item()
    for a, b in zip(mine.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_else_a_loop_keeps_is_counted_once() -> None:
    mine, _ = pair()
    average = AveragedModel(mine.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    queue = torch.zeros(100, 16)

    def beside_bytes(loss_fn: Any, beside: Any) -> int:
        arguments = mine.model, loss_fn, mine.optimizer, batch_of()
        profile = packlight.profile(*arguments, beside=beside, progress=False)
        assert profile.memory.resident_bytes >= profile.memory.beside_bytes
        return profile.memory.beside_bytes

    copies = tensors_bytes([*average.parameters(), *average.buffers()])
    kept = [average, queue, mine.model, mine.optimizer, *mine.model.parameters()]
    assert beside_bytes(classify, kept) == copies + queue.nbytes

    def distilled(model: Any, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = average(batch[0])
        return classify(model, batch) + F.mse_loss(model(batch[0]), wanted)

    unread = [average.n_averaged, *average.module.critic.parameters()]
    assert beside_bytes(distilled, average) == tensors_bytes(unread)


# -- loops as a whole

Run = Callable[[Batch], torch.Tensor]


@torch.no_grad()
def climb(model: nn.Module, steps: list[torch.Tensor]) -> None:
    """Go uphill along the gradients, into `steps`, and drop those (Foret et al., 2021, eq. 2)."""
    parameters = list(model.parameters())
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for parameter, gradient, step in zip(parameters, gradients, steps, strict=True):
        torch.div(gradient, norm / 0.05, out=step)
        parameter.add_(step)
        parameter.grad = None


def sharpness_aware(
    model: nn.Module, batch: Batch, backward: Run, update: Callable[[], Any],
    steps: list[torch.Tensor],
) -> list[float]:
    """One step of sharpness-aware minimisation: two backwards of the same batch, one update."""
    torch.manual_seed(5)
    first = backward(batch)
    climb(model, steps)
    torch.manual_seed(5)
    second = backward(batch)
    with torch.no_grad():
        for parameter, step in zip(model.parameters(), steps, strict=True):
            parameter.sub_(step)
    update()
    return [first.item(), second.item()]


def test_a_sharpness_aware_loop_has_eager_bits_within_its_budget() -> None:
    mine, eager = pair()
    steps = [torch.zeros_like(p) for p in mine.model.parameters()]
    batch = batch_of()
    step = fit(mine, "smallest", beside=steps)
    budget = step.budget_bytes
    assert budget is not None

    def eager_backward(batch: Batch) -> torch.Tensor:
        loss = eager.loss_fn(eager.model, batch)
        loss.backward()
        return loss.detach()

    def eager_update() -> None:
        eager.optimizer.step()
        eager.optimizer.zero_grad()

    def whole() -> list[float]:
        return sharpness_aware(mine.model, batch, step.backward, step.update, steps)

    theirs = [torch.zeros_like(s) for s in steps]
    for number in range(3):
        batch = batch_of(number)
        before = held_bytes(mine, batch, *steps)
        peak = measure_peak(whole, torch.device("cpu"))
        assert before + peak.peak_bytes <= budget
        expected = sharpness_aware(eager.model, batch, eager_backward, eager_update, theirs)
        assert peak.result == expected and expected[1] > expected[0]
    assert_same_bits(mine, eager)


def test_an_average_learns_beside_the_budget_of_a_whole_loop() -> None:
    """Steps, schedule, average and its evaluation: all of it within what `fit` was given."""
    mine, eager = pair()
    averages = {
        t.model: AveragedModel(t.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for t in (mine, eager)
    }
    average = averages[mine.model]
    arguments = mine.model, mine.loss_fn, mine.optimizer, batch_of()
    options: dict[str, Any] = {"moves": EXACT, "beside": average}
    budget = smallest(*arguments, **options)
    step = packlight.fit(*arguments, budget, progress=False, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(t.optimizer, 0.9) for t in (mine, eager)]
    for number in range(3):
        batch = batch_of(number)
        before = held_bytes(mine, batch, *average.parameters(), *average.buffers())

        def turn(batch: Batch = batch) -> torch.Tensor:
            loss = step(batch)
            average.update_parameters(mine.model)
            return loss

        torch.manual_seed(number)
        peak = measure_peak(turn, torch.device("cpu"))
        assert before + peak.peak_bytes <= budget
        torch.manual_seed(number)
        assert peak.result.item() == eager.step(batch).item()
        averages[eager.model].update_parameters(eager.model)
        for schedule in schedules:
            schedule.step()
    assert_same_bits(mine, eager)
    ours, theirs = (averages[t.model].state_dict() for t in (mine, eager))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# -- what goes wrong


def test_an_error_updates_nothing_and_drops_what_was_added_up() -> None:
    mine, _ = pair()
    before = copy.deepcopy(mine.model.state_dict())
    step = fit(mine, "200 kB")
    step.backward(batch_of())
    x, y = batch_of()
    with pytest.raises(NonFiniteLossError):
        step.backward((x * torch.nan, y))
    assert all(p.grad is None for p in mine.model.parameters())
    step.backward(batch_of())
    with pytest.raises(InfeasibleBudgetError):  # nothing has run
        step.backward(batch_of(0, 4096))
    assert all(p.grad is not None for p in (*mine.model.trunk.parameters(),))
    assert all(torch.equal(before[name], t) for name, t in mine.model.state_dict().items())




def test_what_cannot_be_accumulated_says_so() -> None:
    mine, _ = pair()
    plain = fit(mine, None, accumulate=False)
    for call in (lambda: plain.backward(batch_of()), plain.update):
        with pytest.raises(OptionError, match="accumulate=True"):
            call()
    mine.model.actor.weight.grad = torch.zeros_like(mine.model.actor.weight)
    with pytest.raises(UnsupportedModelError, match="accumulate=True"):
        plain(batch_of())
    with pytest.raises(OptionError, match="beside= has a str"):
        fit(mine, None, beside=["ema"])
