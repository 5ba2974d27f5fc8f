"""Parameters stepped one by one, in slices too, against `optimizer.step()`, bit by bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from packlight.after_step import AfterStep
from packlight.costs.peak import allocator_peak
from packlight.errors import UnsupportedModelError
from packlight.updates import update
from packlight.updates.accounting import measure_optimizer, tensors_bytes
from packlight.updates.slices import like_eager
from packlight.updates.update import ParameterUpdates

OptimizerMaker = Callable[[Any], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is observed of an optimizer here was not seen by another test, or another version."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Net(nn.Module):
    """Parameters of 0 to 4 dimensions, one of them not contiguous; matrices of several slices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(150, 24)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(24)
        self.wide = nn.Linear(24, 300)
        self.narrow = nn.Linear(300, 1)
        self.transposed = nn.Parameter(torch.randn(24, 24).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.long = nn.Parameter(torch.randn(3001))

    def forward(self, tokens: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embedding(tokens) @ self.transposed)
        pooled = self.conv(images).mean((2, 3)).sum(1, keepdim=True)
        scored = self.narrow(torch.tanh(self.wide(hidden))) * self.scale + pooled
        return scored.square().mean() + torch.sin(self.long).mean()


class Lion(torch.optim.Optimizer):
    """Elementwise, and it puts a new tensor into its state instead of updating the old one."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                old = state.get("average", torch.zeros_like(p)).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, old, group["betas"][0]).sign())
                state["average"] = torch.lerp(p.grad, old, group["betas"][1])


class GroupCounter(torch.optim.Optimizer):
    """Keeps its step counter in the group, as some third-party optimizers do."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / group["step"])


class SelfCounter(GroupCounter):
    """Keeps its step counter in an attribute."""

    num_steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / self.num_steps)


class GloballyClipped(GroupCounter):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = sum(p.grad.square().sum() for p in parameters) ** 0.5
        for p in parameters:
            p.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])


class Lamb(GroupCounter):
    """Scales a parameter's update by the parameter's norm: not elementwise."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * p.norm(), alpha=group["lr"])


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer."""

    def __init__(self, params: Any) -> None:
        self.base = optim.SGD(list(params), lr=0.1)
        super().__init__(self.base.param_groups, {})

    def step(self, closure: None = None) -> None:
        self.base.step()


OPTIMIZERS: dict[str, OptimizerMaker] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd_fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2),
    "adamw_tensor_lr": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2)),
    "adamw_amsgrad": lambda p: optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw_foreach": lambda p: optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_fused": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: optim.Adadelta(p, lr=1e-2),
    "adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "nadam": lambda p: optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: optim.RAdam(p, lr=1e-2),
    "adafactor": lambda p: optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "lion": lambda p: Lion(p),
    "lamb": lambda p: Lamb(p),
}
NO_WORKSPACE = {"momentum", "sgd_fused", "adamw_fused", "asgd"}
NOT_ELEMENTWISE = {"adafactor", "lamb"}
SMALL_BYTES = 4096
SHARED_STATE_BYTES = 32  # a few scalars that each slice gets a copy of


def make(maker: OptimizerMaker, dtype: torch.dtype = torch.float32) -> tuple[Net, Any, Any]:
    """Return a model, an optimizer with two groups, and a schedule from a warm-up's start."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = maker([{"params": decayed}, {"params": others, "lr": _tensor_like(maker)}])
    return model, optimizer, optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)


def _tensor_like(maker: OptimizerMaker) -> Any:
    return torch.tensor(0.02) if maker is OPTIMIZERS["adamw_tensor_lr"] else 0.02


def batches(num_steps: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        tokens = torch.randint(0, 150, (5, 7), generator=generator)
        yield tokens, torch.randn(7, 3, 6, 6, generator=generator).to(dtype)


def gradients(model: Net, batch: tuple[Any, Any]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    parameters = list(model.parameters())
    return list(zip(parameters, torch.autograd.grad(model(*batch), parameters), strict=True))


def step_eagerly(model: Net, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_one_by_one(model: Net, updates: ParameterUpdates, batch: Any) -> None:
    updates.begin_step()
    for parameter, gradient in reversed(gradients(model, batch)):
        updates.apply(parameter, gradient)
        assert parameter.grad is None


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for mine, other in zip(a, b, strict=True):
            assert_same(mine, other)
    else:
        assert a == b


def in_bits(state: Any) -> Any:
    """Return bfloat16 tensors, which numpy does not know, as integers."""
    is_bfloat16 = lambda v: isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16  # noqa: E731
    convert = lambda v: v.view(torch.int16) if is_bfloat16(v) else v  # noqa: E731
    return torch.utils._pytree.tree_map(convert, state)


def assert_equal_training(model: Net, optimizer: Any, other: Net, other_optimizer: Any) -> None:
    assert_same(in_bits(model.state_dict()), in_bits(other.state_dict()))
    mine, eager = optimizer.state_dict(), other_optimizer.state_dict()
    # Eager makes states in the order of the parameters, a backward in another.
    mine["state"] = {k: mine["state"][k] for k in sorted(mine["state"])}
    eager["state"] = {k: eager["state"][k] for k in sorted(eager["state"])}
    assert_same(in_bits(mine), in_bits(eager))


@pytest.mark.parametrize("max_workspace_bytes", [None, SMALL_BYTES])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_by_one_gives_the_bits_of_a_step(name: str, max_workspace_bytes: int | None) -> None:
    maker = OPTIMIZERS[name]
    model, optimizer, scheduler = make(maker)
    eager_model, eager_optimizer, eager_scheduler = make(maker)
    updates = ParameterUpdates(optimizer, max_workspace_bytes)
    assert updates.refusal is None
    if max_workspace_bytes is not None:
        for parameter in (model.wide.weight, model.long):
            is_sliced = updates.cost(parameter).num_slices > 1
            assert is_sliced == (name not in NO_WORKSPACE | NOT_ELEMENTWISE)
        for parameter in (model.narrow.weight, model.transposed, model.scale):
            assert updates.cost(parameter).num_slices == 1  # one row, not contiguous, no rows
    for batch in batches(7):
        step_one_by_one(model, updates, batch)
        scheduler.step()
        step_eagerly(eager_model, eager_optimizer, batch)
        eager_scheduler.step()
        assert_equal_training(model, optimizer, eager_model, eager_optimizer)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw_fused", "rmsprop", "adafactor"])
def test_bfloat16_parameters_get_the_bits_of_a_step(name: str) -> None:
    model, optimizer, _ = make(OPTIMIZERS[name], torch.bfloat16)
    eager_model, eager_optimizer, _ = make(OPTIMIZERS[name], torch.bfloat16)
    updates = ParameterUpdates(optimizer, SMALL_BYTES)
    for batch in batches(5, torch.bfloat16):
        step_one_by_one(model, updates, batch)
        step_eagerly(eager_model, eager_optimizer, batch)
        assert_equal_training(model, optimizer, eager_model, eager_optimizer)


def test_muon_steps_its_matrices_whole() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(40, 24)), nn.Parameter(torch.randn(24, 40))]
    eager_weights = copy.deepcopy(weights)
    optimizer, eager = optim.Muon(weights, lr=0.1), optim.Muon(eager_weights, lr=0.1)
    updates = ParameterUpdates(optimizer, SMALL_BYTES)
    assert updates.cost(weights[0]).num_slices == 1
    for _ in range(5):
        updates.begin_step()
        for mine, other in zip(weights, eager_weights, strict=True):
            other.grad = torch.randn_like(other)
            updates.apply(mine, other.grad.clone())
        eager.step()
    assert_same(weights, eager_weights)
    assert_same(optimizer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw_amsgrad", "adafactor", "lion"])
def test_a_state_dict_saved_and_loaded_midway_goes_on_with_the_same_bits(name: str) -> None:
    maker = OPTIMIZERS[name]
    model, optimizer, scheduler = make(maker)
    eager_model, eager_optimizer, eager_scheduler = make(maker)
    updates = ParameterUpdates(optimizer, SMALL_BYTES)
    for index, batch in enumerate(batches(6)):
        if index == 3:
            saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, scheduler)]
            model, optimizer, scheduler = make(maker)
            updates = ParameterUpdates(optimizer, SMALL_BYTES)
            for target, state in zip((model, optimizer, scheduler), saved, strict=True):
                target.load_state_dict(state)
        step_one_by_one(model, updates, batch)
        scheduler.step()
        step_eagerly(eager_model, eager_optimizer, batch)
        eager_scheduler.step()
    assert_equal_training(model, optimizer, eager_model, eager_optimizer)


@pytest.mark.parametrize("max_workspace_bytes", [None, SMALL_BYTES])
def test_gradients_in_another_layout_give_the_bits_of_eager(
    max_workspace_bytes: int | None,
) -> None:
    torch.manual_seed(0)
    weight, eager_weight = (nn.Parameter(torch.ones(70, 50)) for _ in range(2))
    optimizer, eager = (optim.AdamW([w], lr=0.1, fused=False) for w in (weight, eager_weight))
    updates = ParameterUpdates(optimizer, max_workspace_bytes)
    cost = updates.cost(weight, gradient_stride=(1, 70))
    for index in range(4):
        x = torch.randn(50, 70)
        (eager_weight * x.t()).sum().backward()
        eager.step()
        eager.zero_grad()
        updates.begin_step()
        peak_bytes, end_bytes = peak_and_end(updates, weight, x.t())
        assert_same(weight, eager_weight)
        if index == 0:
            assert peak_bytes - end_bytes <= cost.workspace_bytes
        else:
            later_cost = updates.cost(weight, gradient_stride=(1, 70))
            assert peak_bytes == later_cost.workspace_bytes


def test_a_gradient_takes_the_layout_that_eager_accumulates_in() -> None:
    dense = nn.Parameter(torch.randn(6, 4).t())
    gappy = nn.Parameter(torch.randn(4, 6, 2)[..., 0])
    for parameter in (dense, gappy):
        for gradient in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(()).expand(4, 6)):
            (parameter * gradient).sum().backward()
            eager, parameter.grad = parameter.grad, None
            assert eager is not None
            assert like_eager(gradient, parameter).stride() == eager.stride()


@pytest.mark.parametrize("max_workspace_bytes", [None, SMALL_BYTES])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_update_allocates_is_its_cost(name: str, max_workspace_bytes: int | None) -> None:
    model, optimizer, _ = make(OPTIMIZERS[name])
    updates = ParameterUpdates(optimizer, max_workspace_bytes)
    before = {p: updates.cost(p) for p in model.parameters()}
    assert not optimizer.state or name == "adagrad"  # which makes its state when it is made
    updates.begin_step()
    for parameter, gradient in gradients(model, next(batches(1))):
        gradient = like_eager(gradient, parameter)
        cost = before[parameter]
        had_bytes = _state_bytes(optimizer, parameter)
        first_peak_bytes, made_bytes = peak_and_end(updates, parameter, gradient)
        assert had_bytes + made_bytes == cost.state_bytes == _state_bytes(optimizer, parameter)
        later_bytes, _ = peak_and_end(updates, parameter, gradient)
        assert later_bytes == updates.cost(parameter).workspace_bytes
        assert max(first_peak_bytes - made_bytes, later_bytes) == cost.workspace_bytes
        if cost.num_slices > 1 and max_workspace_bytes is not None:
            assert cost.workspace_bytes <= max_workspace_bytes + SHARED_STATE_BYTES


def peak_and_end(
    updates: ParameterUpdates, parameter: torch.Tensor, gradient: torch.Tensor
) -> tuple[int, int]:
    """Return the peak and the end of what one update allocates, without collecting garbage."""
    gc.disable()
    try:
        apply = lambda: updates.apply(parameter, gradient)  # noqa: E731
        return allocator_peak(apply, parameter.device)[1:]
    finally:
        gc.enable()


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    state = optimizer.state.get(parameter, {})
    return tensors_bytes(v for v in state.values() if isinstance(v, torch.Tensor))


def test_costs_add_up_to_the_state_of_the_whole_optimizer() -> None:
    model, optimizer, _ = make(OPTIMIZERS["adamw"])
    updates = ParameterUpdates(optimizer)
    state_bytes = sum(updates.cost(p).state_bytes for p in model.parameters())
    assert state_bytes == measure_optimizer(optimizer).state_bytes
    assert state_bytes == sum(2 * p.nbytes + 4 for p in model.parameters())


def test_equal_parameters_are_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    updates = ParameterUpdates(optim.Adam(weights))
    calls = []
    measure = ParameterUpdates._measure
    monkeypatch.setattr(
        ParameterUpdates, "_measure", lambda *args: calls.append(1) or measure(*args)
    )
    assert len({updates.cost(w) for w in weights}) == len(calls) == 1


def test_what_was_seen_of_torchs_optimizers_is_remembered_on_disk_and_of_others_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class MySGD(optim.SGD):
        """Inherits every line of torch's, and is nobody's whose version is known."""

    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    calls: list[Any] = []
    measure, why_not_alone = ParameterUpdates._measure, update.why_not_alone
    monkeypatch.setattr(
        ParameterUpdates, "_measure", lambda *args: calls.append(1) or measure(*args)
    )
    monkeypatch.setattr(
        update, "why_not_alone", lambda *args: calls.append(2) or why_not_alone(*args)
    )
    for make_optimizer, num_times in ((optim.SGD, 1), (MySGD, 3)):
        costs = []
        for momentum in (0.9, 0.9, 0.8):  # that it is not zero matters, not its value
            weight = nn.Parameter(torch.randn(64, 64))
            updates = ParameterUpdates(
                make_optimizer([weight], lr=0.1, momentum=momentum), SMALL_BYTES
            )
            costs.append(updates.cost(weight))
            updates.begin_step()  # slices that were promised are the remembered ones
            updates.apply(weight, torch.randn(64, 64))
        assert calls.count(1) == calls.count(2) == num_times
        assert len({(c.state_bytes, c.workspace_bytes, c.num_slices) for c in costs}) == 1
        calls.clear()
    ParameterUpdates(optim.SGD([nn.Parameter(torch.randn(64, 64))], lr=0.1), SMALL_BYTES)
    assert calls == [2], "without momentum it is another optimizer"


def test_planning_leaves_the_generator_and_the_optimizer_as_they_were() -> None:
    model, optimizer, _ = make(OPTIMIZERS["adamw"])
    state, groups = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    values = copy.deepcopy(model.state_dict())
    updates = ParameterUpdates(optimizer, SMALL_BYTES)
    for parameter in model.parameters():
        updates.cost(parameter)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(groups, optimizer.state_dict())
    assert_same(dict(values), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("maker", "words"),
    [
        (lambda p: optim.LBFGS([q for g in p for q in g["params"]]), "needs a closure"),
        (lambda p: optim.SparseAdam(p), "failed on small copies"),
        (GroupCounter, r"writes group\['step'\]"),
        (SelfCounter, "writes self.num_steps"),
        (GloballyClipped, "does not give the bits of stepping them together"),
        (Wrapping, "steps another optimizer, its attribute 'base'"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(maker: OptimizerMaker, words: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = maker([{"params": list(model.parameters())}])
    values = copy.deepcopy(model.state_dict())
    updates = ParameterUpdates(optimizer)
    assert updates.refusal is not None
    assert updates.refusal.startswith(f"{type(optimizer).__name__} cannot step one parameter")
    with pytest.raises(UnsupportedModelError, match=words):
        updates.begin_step()
    with pytest.raises(UnsupportedModelError, match=words):
        updates.cost(model.weight)
    assert_same(dict(values), dict(model.state_dict()))


def test_hooks_that_need_no_gradients_are_called_once_after_each_step() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    seen: list[list[float]] = []
    optimizer.register_step_post_hook(AfterStep(lambda: seen.append(weights[0].tolist())))
    updates = ParameterUpdates(optimizer)
    updates.begin_step()
    for weight in weights:
        updates.apply(weight, torch.ones(3))
    updates.end_step()
    weights[0].grad = torch.ones(3)
    updates.begin_step()
    optimizer.step()  # as a loss scaler calls it: that runs hooks by itself
    updates.end_step()
    assert seen == [[0.5] * 3, [0.0] * 3]


def test_hooks_on_the_optimizer_are_refused_also_between_steps() -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    updates = ParameterUpdates(optimizer)
    updates.begin_step()
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert "hooks" in (ParameterUpdates(optimizer).refusal or "")
            with pytest.raises(UnsupportedModelError, match="hooks are registered"):
                updates.begin_step()
        finally:
            handle.remove()
        updates.begin_step()


def test_a_step_replaced_on_the_object_is_refused_but_not_a_schedulers() -> None:
    optimizer = optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    optim.lr_scheduler.ConstantLR(optimizer)
    assert ParameterUpdates(optimizer).refusal is None
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    assert "step() was replaced" in (ParameterUpdates(optimizer).refusal or "")


def test_a_hyperparameter_that_starts_to_count_is_observed_anew() -> None:
    class Trusting(Lamb):
        """Elementwise until it is told to trust norms."""

        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.param_groups[0]["trust"] = 0.0

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        factor = p.norm() if group["trust"] else 1
                        p.sub_(p.grad * factor, alpha=group["lr"])

    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = Trusting([weight])
    updates = ParameterUpdates(optimizer, SMALL_BYTES)
    assert updates.cost(weight).num_slices > 1
    updates.begin_step()
    optimizer.param_groups[0]["lr"] *= 0.5
    updates.begin_step()
    optimizer.param_groups[0]["trust"] = 1.0
    with pytest.raises(UnsupportedModelError, match=r"shape \(64, 64\) in slices"):
        updates.begin_step()


def test_an_optimizer_that_stores_large_states_differently_is_stepped_whole() -> None:
    class Widening(Lion):
        """Keeps the averages of large parameters in another precision."""

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            super().step()
            for p, state in self.state.items():
                if p.numel() > 8192:
                    state["average"] = state["average"].bfloat16().float().bfloat16()

    weight = nn.Parameter(torch.randn(512, 512))
    updates = ParameterUpdates(Widening([weight]), 2**18)
    assert updates.cost(weight).num_slices == 1


def test_slices_write_through_autograds_version_counter() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    loss = weight.square().sum()
    updates = ParameterUpdates(optim.SGD([weight], lr=0.1, weight_decay=0.1), SMALL_BYTES)
    assert updates.cost(weight).num_slices > 1
    updates.begin_step()
    updates.apply(weight, torch.randn(64, 64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_kernels_that_threads_would_split_elsewhere_are_not_sliced() -> None:
    weight = nn.Parameter(torch.randn(512, 64).bfloat16())
    optimizer = optim.SGD([weight], lr=0.1, weight_decay=0.1)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        updates = ParameterUpdates(optimizer, SMALL_BYTES)
        assert updates.cost(weight).num_slices > 1
        torch.set_num_threads(2)
        assert ParameterUpdates(optimizer, SMALL_BYTES).cost(weight).num_slices == 1
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="the number of threads"):
                updates.begin_step()
        torch.set_num_threads(1)
        updates.begin_step()
    finally:
        torch.set_num_threads(num_threads)
