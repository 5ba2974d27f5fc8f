"""Gradients beside one optimizer's step: hooks, gradients inside a loss, several optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import lr_scheduler

import packlight
from packlight.errors import InfeasibleBudgetError, OptionError, PacklightError
from tests.oracles.eager_loop import Training, assert_no_gradients, assert_same_bits

EXACT = ("update-in-backward", "pack")
ROWS = 32
Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[nn.Module, Batch], Any]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was seen in another test is known."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 4)]
    return nn.Sequential(*layers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def batch_of(seed: int = 0, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    return x, torch.randint(0, 4, (rows,), generator=generator)


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def both(make: Callable[[], tuple[nn.Module, Any, Any]]) -> tuple[Training, Training]:
    """Return two trainings of the same, each with hooks and losses of its own."""
    return Training(*make()), Training(*make())


def compare(mine: Training, eager: Training, *, moves: Any = EXACT, **options: Any) -> Any:
    """Train both, without a budget and within the smallest, and compare bits and bytes."""
    arguments = mine.model, mine.loss_fn, mine.optimizer, batch_of()
    options = {"moves": moves, "progress": False, **options}
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.plan(*arguments, 1, **options)
    step = None
    for budget in (None, caught.value.smallest_bytes):
        step = packlight.fit(*arguments, budget, **options)
        for seed in range(2):
            torch.manual_seed(seed)
            measured = step.measured(batch_of(seed))
            torch.manual_seed(seed)
            loss = eager_step(eager, batch_of(seed))
            assert measured.loss.item() == loss.item()
            assert budget is None or measured.peak_bytes <= budget
    assert_same_models(mine, eager)
    return step


def eager_step(eager: Training, batch: Batch) -> torch.Tensor:
    optimizers = eager.optimizer if isinstance(eager.optimizer, list) else [eager.optimizer]
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = eager.loss_fn(eager.model, batch)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def assert_same_models(mine: Training, eager: Training) -> None:
    if not isinstance(mine.optimizer, list):
        assert_same_bits(mine, eager)
    ours, theirs = mine.model.state_dict(), eager.model.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert_no_gradients(mine.model)


# -- losses of gradients


def penalty_of_inputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, batch[1]) + gradient.square().sum(1).mean()


def wasserstein(model: nn.Module, batch: Batch) -> torch.Tensor:
    between = (0.3 * batch[0] + 0.7 * batch[0].flip(0)).requires_grad_(True)
    out = model(between)
    (gradient,) = torch.autograd.grad(
        outputs=out, inputs=between, grad_outputs=torch.ones_like(out), create_graph=True,
        retain_graph=True, only_inputs=True,
    )
    return model(batch[0]).mean() + ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def penalty_of_parameters(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = classify(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in gradients)


def adversarial(model: nn.Module, batch: Batch) -> torch.Tensor:
    x = batch[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classify(model, (x, batch[1])), x)
    return classify(model, (batch[0] + 0.1 * gradient.sign(), batch[1]))


def meta(model: nn.Module, batch: Batch) -> torch.Tensor:
    weights = dict(model.named_parameters())
    inner = F.cross_entropy(functional_call(model, weights, batch[0]), batch[1])
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    stepped = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(model, stepped, batch[0]), batch[1])


def forces(model: nn.Module, batch: Batch) -> torch.Tensor:
    positions = batch[0].detach().requires_grad_()
    energy = model(positions).sum()
    force = -torch.autograd.grad(energy, positions, create_graph=True)[0]
    return (energy - 1).square() + (force - batch[0]).square().mean()


def weighed_by_its_norm(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = classify(model, batch)
    gradient = torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0]
    return loss * (1 + gradient.norm())


LOSSES: list[Loss] = [
    penalty_of_inputs, wasserstein, penalty_of_parameters, adversarial, meta, forces,
    weighed_by_its_norm,
]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_gradients_inside_a_loss(loss_fn: Loss) -> None:
    mine, eager = both(lambda: ((m := net()), sgd(m), loss_fn))
    compare(mine, eager)


def test_a_loss_that_calls_backward_is_told_whose_that_is() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = classify(model, batch)
        loss.backward(retain_graph=True)
        return loss

    model = net()
    with pytest.raises(PacklightError, match="backward.* is called.*\nhint: return the sum"):
        packlight.fit(model, loss_fn, sgd(model), batch_of(), progress=False)
    assert_no_gradients(model)


def test_behind_a_break_a_loss_that_calls_backward_is_told_too_and_nothing_is_updated() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = classify(model, batch)
        print(end="")
        loss.backward(retain_graph=True)
        return loss

    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    step = packlight.fit(model, loss_fn, sgd(model), batch_of(), progress=False)
    with pytest.raises(PacklightError, match="loss calls backward"):
        step(batch_of())
    assert_no_gradients(model)
    assert all(map(torch.equal, model.parameters(), before))
    classify(model, batch_of()).backward()
    with pytest.raises(PacklightError, match="hold gradients already"):
        step(batch_of())


# -- hooks of parameters


def scaled(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 0.5


def normalised(gradient: torch.Tensor) -> torch.Tensor:
    return gradient / (gradient.norm() + 1e-3)


def in_place(gradient: torch.Tensor) -> None:
    gradient.mul_(0.25)


def halved_afterwards(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def dropped_afterwards(parameter: torch.Tensor) -> None:
    parameter.grad = None


@pytest.mark.parametrize("moves", [EXACT, ()])
@pytest.mark.parametrize(
    "hooks, after",
    [
        ([scaled, normalised], []),
        ([in_place], [halved_afterwards]),
        ([], [halved_afterwards, halved_afterwards]),
        ([scaled], [dropped_afterwards]),
    ],
)
def test_hooks_of_parameters_are_called_as_autograd_calls_them(
    hooks: list[Any], after: list[Any], moves: Any
) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        model = net()
        for parameter in (model[0].weight, model[0].bias, model[4].weight):
            for hook in hooks:
                parameter.register_hook(hook)
            for hook in after:
                parameter.register_post_accumulate_grad_hook(hook)
        return model, torch.optim.AdamW(model.parameters(), 1e-2), classify

    compare(*both(make), moves=moves)


def test_hooks_see_what_they_would_and_may_come_and_go() -> None:
    seen: dict[int, list[float]] = {}

    def make() -> tuple[nn.Module, Any, Any]:
        model = net()
        norms: list[float] = seen.setdefault(len(seen), [])
        model.handles = [  # type: ignore[assignment]
            p.register_hook(lambda g, norms=norms: norms.append(g.norm().item()))
            for p in (model[0].weight, model[2].bias)
        ]
        return model, sgd(model), classify

    mine, eager = both(make)
    step = packlight.fit(
        mine.model, classify, mine.optimizer, batch_of(), moves=EXACT, progress=False
    )
    for seed in range(6):
        if seed == 3:
            for training in (mine, eager):
                for handle in training.model.handles:
                    handle.remove()
        if seed == 4:
            for training in (mine, eager):
                training.model[4].weight.register_hook(scaled)
        assert step(batch_of(seed)).item() == eager_step(eager, batch_of(seed)).item()
    assert_same_bits(mine, eager)
    assert sorted(seen[0]) == sorted(seen[1]) and len(seen[0]) == 6


def test_hooks_keep_a_batch_whole() -> None:
    model = net()
    model[0].weight.register_hook(normalised)
    with pytest.raises(InfeasibleBudgetError, match="without microbatch: .*hooks on '0.weight'"):
        packlight.fit(model, classify, sgd(model), batch_of(), 1, progress=False)


# -- parameters that are not the model's, or that the forward changes


class Uncertain(nn.Module):
    """A criterion with weights of its own for its terms (Kendall, Gal and Cipolla)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(2))
        self.scale = nn.Linear(4, 4)

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        out = self.scale(model(batch[0]))
        first, second = torch.exp(-self.log_variances)
        terms = first * F.cross_entropy(out, batch[1]) + second * out.square().mean()
        return terms + self.log_variances.sum()


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}])
def test_a_criterion_may_have_parameters_of_its_own(options: Any) -> None:
    criteria: list[Uncertain] = []

    def make() -> tuple[nn.Module, Any, Any]:
        model, criterion = net(), Uncertain()
        criteria.append(criterion)
        groups = [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 0.01}]
        return model, torch.optim.SGD(groups, 0.1, momentum=0.9), criterion

    mine, eager = both(make)
    if options:
        plain = eager.loss_fn
        held = [*eager.model.parameters(), *criteria[1].parameters()]
        step = packlight.fit(
            mine.model, mine.loss_fn, mine.optimizer, batch_of(), progress=False, **options
        )
        for seed in range(3):
            eager.optimizer.zero_grad()
            loss = plain(eager.model, batch_of(seed))
            loss.backward()
            nn.utils.clip_grad_norm_(held, 0.1)
            eager.optimizer.step()
            eager.optimizer.zero_grad()
            assert step(batch_of(seed)).item() == loss.item()
        assert_same_bits(mine, eager)
    else:
        compare(mine, eager)
    ours, theirs = (c.state_dict() for c in criteria)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["log_variances"], torch.zeros(2))


class Bounded(nn.Module):
    """Rows of an embedding are renormalised as they are read; a temperature is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(4, 16, max_norm=1.0), nn.Linear(16, 4)
        self.temperature = nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0, 2.0)
        return self.out(self.words(y) + x) * self.temperature.exp()


def test_parameters_that_the_forward_changes_in_place() -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(*batch), batch[1])

    def make() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = Bounded()
        return model, torch.optim.AdamW(model.parameters(), 0.05), loss_fn

    mine, eager = both(make)
    step = compare(mine, eager)
    assert "the forward changes" in step.describe()
    with pytest.raises(InfeasibleBudgetError, match="without microbatch: .*changes 'temperature'"):
        packlight.fit(mine.model, loss_fn, mine.optimizer, batch_of(), 1, progress=False)


# -- several optimizers


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, 1e-2), torch.optim.AdamW(others, 1e-2)]


def of_each_layer(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Adagrad(model[0].parameters(), 1e-2),
        torch.optim.SGD(model[2].parameters(), 0.1, momentum=0.9),
        torch.optim.Adafactor(model[4].parameters(), 1e-2),
    ]


@pytest.mark.parametrize("moves", [EXACT, ()])
@pytest.mark.parametrize("make_optimizers", [muon_and_adamw, of_each_layer])
def test_several_optimizers_step_one_model(make_optimizers: Any, moves: Any) -> None:
    mine, eager = both(lambda: ((m := net()), make_optimizers(m), classify))
    compare(mine, eager, moves=moves)
    for ours, theirs in zip(mine.optimizer, eager.optimizer, strict=True):
        a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
        assert list(a) == list(b)
        for index, held in a.items():
            for name, value in held.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[index][name]))


def test_several_optimizers_with_schedules_a_scaler_and_offloaded_state(tmp_path: Path) -> None:
    mine, eager = both(lambda: ((m := net()), muon_and_adamw(m), classify))
    schedules = [
        lr_scheduler.StepLR(o, 1, 0.5) for t in (mine, eager) for o in t.optimizer
    ]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    step = packlight.fit(
        mine.model, classify, mine.optimizer, batch_of(), scaler=scalers[0], progress=False,
        offload_directory=tmp_path,
    )
    for seed in range(3):
        for optimizer in eager.optimizer:
            optimizer.zero_grad()
        loss = classify(eager.model, batch_of(seed))
        scalers[1].scale(loss).backward()
        for optimizer in eager.optimizer:
            scalers[1].unscale_(optimizer)
            scalers[1].step(optimizer)
        scalers[1].update()
        for optimizer in eager.optimizer:
            optimizer.zero_grad()
        assert step(batch_of(seed)).item() == loss.item()
        for schedule in schedules:
            schedule.step()
    assert_same_models(mine, eager)


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = net()
    optimizers = [sgd(model), torch.optim.AdamW(model[0].parameters())]
    with pytest.raises(OptionError, match=r"\(48, 16\) is in two optimizers: SGD and AdamW"):
        packlight.fit(model, classify, optimizers, batch_of(), progress=False)


def test_optimizers_that_look_at_the_loss_again_are_named() -> None:
    class Sharpness(torch.optim.SGD):
        """Steps twice, as SAM does."""

        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    class Asserting(torch.optim.SGD):
        """Says itself that it cannot do without."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert closure is not None, "needs a closure"

    class Perturbing(torch.optim.SGD):
        """Has no other step than its two parts."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise NotImplementedError("call first_step and second_step, or pass a closure")

    model = net()
    kinds = (Sharpness, Asserting, Perturbing)
    steppers = [torch.optim.LBFGS(model.parameters()), *(k(model.parameters(), 0.1) for k in kinds)]
    for optimizer in steppers:
        with pytest.raises(PacklightError, match=f"{type(optimizer).__name__}.*closure"):
            packlight.fit(model, classify, optimizer, batch_of(), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_kernel_that_leaves_elements_alone_is_refused(dtype: torch.dtype) -> None:
    """As torch 2.13's SGD does on the CPU; not where the kernel is right or is not asked for."""

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch.to(next(model.parameters()).dtype)).float().square().mean()

    model, batch = nn.Linear(8, 8).to(dtype), torch.randn(4, 8)
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True, **options)
        with pytest.raises(PacklightError, match=r"SGD\(fused=True\) leaves .*\nhint: fused=False"):
            packlight.fit(model, loss_fn, optimizer, batch, progress=False)
    packlight.fit(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1), batch, progress=False)
    model.float()
    fused = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    packlight.fit(model, loss_fn, fused, batch, progress=False)


def test_what_torchscript_runs_is_refused_by_name() -> None:
    model = net()
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        whole, part = torch.jit.script(model), torch.jit.script(model[1:])
    optimizer = sgd(model)
    mixed = nn.Sequential(model[0], part)
    for scripted, name in ((whole, "the model is a "), (mixed, "has '1'.*")):
        with pytest.raises(PacklightError, match=f"{name}ScriptModule.*\nhint: fit the module"):
            packlight.fit(scripted, classify, optimizer, batch_of(), progress=False)
