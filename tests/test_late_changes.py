"""What changes after a step was planned is noticed: losses and weights stay eager PyTorch's.

Dynamo's guards are asked at every step, and Packlight adds those that dynamo leaves out. A change
that a planned step cannot follow is refused, with nothing trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import packlight
from packlight.errors import PacklightError, UnsupportedModelError

# Of torch itself, about hooks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

NUM_STEPS, CHANGED_AFTER = 4, 2


class Gate(nn.Module):
    """A module whose forward is in another method."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


class Block(nn.Module):
    """Attention after batch norm, with dropout, a gate and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.drop = nn.Linear(16, 48), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.gate, self.same = Gate(), nn.Identity()
        self.settings = {"scale": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(4, 4, 2, 24).transpose(1, 2).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(16, 16)
        return x + self.gate(self.same(self.drop(mixed))) * self.settings["scale"]


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(self.first(x)))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# Each returns what undoes it, where others would be disturbed.
Undo = Callable[[], None]
Change = Callable[[Model], Undo | None]


def patched(owner: Any, name: str, new: Any) -> Undo:
    old = vars(owner)[name]
    setattr(owner, name, new)
    return lambda: setattr(owner, name, old)


def forward_hook(model: Model) -> None:
    model.blocks[0].gate.register_forward_hook(lambda module, inputs, output: output * 0.5)


def hook_of_a_container(model: Model) -> None:
    model.blocks.register_forward_hook(lambda module, inputs, output: output * 0.5)


def hook_of_the_model(model: Model) -> None:
    model.register_forward_hook(lambda module, inputs, output: output * 0.5)


def hook_with_keywords(model: Model) -> None:
    model.last.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 0.5,), kwargs), with_kwargs=True
    )


def forward_hook_of_all_modules(model: Model) -> Undo:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 0.5 if isinstance(module, nn.Linear) else None

    return all_modules.register_module_forward_hook(hook).remove


def pre_hook_of_all_modules(model: Model) -> Undo:
    def hook(module: nn.Module, inputs: Any) -> Any:
        return (inputs[0] * 0.5,) if isinstance(module, Gate) else None

    return all_modules.register_module_forward_pre_hook(hook).remove


def method_of_a_class(model: Model) -> Undo:
    return patched(Gate, "scaled", lambda self, x: x * 0.5)


def forward_of_a_class(model: Model) -> Undo:
    return patched(Block, "forward", lambda self, x: x + self.norm(x))


def forward_of_torchs_class(model: Model) -> Undo:
    return patched(nn.Identity, "forward", lambda self, x: x * 0.5)


def code_reloaded_in_place(model: Model) -> Undo:  # as notebooks' autoreload does
    old = Gate.scaled.__code__
    Gate.scaled.__code__ = (lambda self, x: x * 0.5).__code__
    return lambda: setattr(Gate.scaled, "__code__", old)


def forward_of_an_object(model: Model) -> None:
    old = model.last.forward
    model.last.forward = lambda x: old(x) * 0.5  # type: ignore[method-assign]


def module_replaced(model: Model) -> None:
    model.blocks[0].same = nn.Tanh()


def module_appended(model: Model) -> None:
    model.blocks.append(nn.Tanh())


def one_module_in_eval_mode(model: Model) -> None:
    model.blocks[1].eval()


def one_parameter_frozen(model: Model) -> None:
    model.first.bias.requires_grad_(False)


def buffers_become_one(model: Model) -> None:
    model.blocks[1].norm.running_mean = model.blocks[0].norm.running_mean


def setting_in_a_dictionary(model: Model) -> None:
    model.blocks[0].settings["scale"] = 2.0


def kernel_of_attention(model: Model) -> Undo:
    torch.backends.cuda.enable_flash_sdp(False)
    return lambda: torch.backends.cuda.enable_flash_sdp(True)


def default_dtype(model: Model) -> Undo:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


CHANGES: list[Change] = [
    forward_hook, hook_of_a_container, hook_of_the_model, hook_with_keywords,
    forward_hook_of_all_modules, pre_hook_of_all_modules, method_of_a_class, forward_of_a_class,
    forward_of_torchs_class, code_reloaded_in_place, forward_of_an_object, module_replaced,
    module_appended, one_module_in_eval_mode, one_parameter_frozen, buffers_become_one,
    setting_in_a_dictionary, kernel_of_attention, default_dtype,
]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 8, generator=made), torch.randint(0, 4, (16,), generator=made))
        for _ in range(NUM_STEPS)
    ]


def make() -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(
    model: Model,
    step: Callable[[Any], torch.Tensor],
    change: Change,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[list[float], dict[str, Any]]:
    """Train, change something after two steps, train on; return losses and the model's state."""
    losses, undo = [], None
    try:
        for index, batch in enumerate(batches()):
            torch.manual_seed(index)
            with around() if index >= CHANGED_AFTER else nullcontext():
                losses.append(float(step(batch)))
            if index == CHANGED_AFTER - 1:
                undo = change(model)
    finally:
        if undo is not None:
            undo()
    return losses, copy.deepcopy(model.state_dict())


def in_a_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[Any], torch.Tensor]:
    def step(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def by(door: str, model: Model, optimizer: torch.optim.Optimizer) -> Callable[[Any], torch.Tensor]:
    if door == "fit":
        return packlight.fit(
            model, loss_fn, optimizer, batches()[0], budget="8MiB", moves=packlight.EXACT_MOVES,
            progress=False,
        )
    options = {"budget": "8MiB", "progress": False}
    return in_a_loop(torch.compile(model, backend="packlight", options=options), optimizer)


def assert_same(mine: tuple[list[float], dict[str, Any]], eager: Any) -> None:
    assert mine[0] == eager[0]
    assert all(torch.equal(mine[1][name], value) for name, value in eager[1].items())


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("door", ["fit", "backend"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_planning_has_eagers_bits(change: Change, door: str) -> None:
    model, optimizer = make()
    eager = trained(model, in_a_loop(model, optimizer), change)
    model, optimizer = make()
    assert_same(trained(model, by(door, model, optimizer), change), eager)


def backward_hook(model: Model) -> None:
    model.blocks[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))


def backward_hook_of_all_modules(model: Model) -> Undo:
    def hook(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return (inputs[0] * 0.5,) if isinstance(module, Gate) else None

    return all_modules.register_module_full_backward_hook(hook).remove


def parameter_hook(model: Model) -> None:
    model.last.weight.register_hook(lambda gradient: gradient * 0.5)


def post_accumulate_hook(model: Model) -> None:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    model.last.weight.register_post_accumulate_grad_hook(hook)


def parameter_replaced(model: Model) -> None:
    model.last.weight = nn.Parameter(torch.ones(4, 16))


def weight_norm(model: Model) -> None:
    parametrizations.weight_norm(model.last)


@pytest.mark.parametrize(
    "change",
    [backward_hook, backward_hook_of_all_modules, parameter_hook, post_accumulate_hook,
     parameter_replaced, weight_norm],
    ids=lambda change: change.__name__,
)
def test_a_change_that_a_planned_step_cannot_follow_trains_nothing_wrong(change: Change) -> None:
    model, optimizer = make()
    eager = trained(model, in_a_loop(model, optimizer), change)
    model, optimizer = make()
    step = by("fit", model, optimizer)
    before: dict[str, Any] = {}

    def noting(model: Model) -> Undo | None:
        undo = change(model)
        before.update(copy.deepcopy(model.state_dict()))
        return undo

    try:
        assert_same(trained(model, step, noting), eager)
    except PacklightError:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class PassingOn(TorchDispatchMode):
    """Sees every call, as FLOP counters do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def stance(name: str) -> Iterator[None]:
    torch.compiler.set_stance(name)
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    "around", [PassingOn, lambda: stance("force_eager")], ids=["dispatch mode", "stance"]
)
def test_where_nothing_is_compiled_the_step_says_so(
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    model, optimizer = make()
    step = by("fit", model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with around(), pytest.raises(UnsupportedModelError, match="switched off"):
        step(batches()[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_step_in_a_function_that_is_compiled_itself_trains_as_ever() -> None:
    model, optimizer = make()
    eager = trained(model, in_a_loop(model, optimizer), lambda model: None)
    model, optimizer = make()
    step = by("fit", model, optimizer)
    epoch = torch.compile(lambda batch: step(batch) + 0, backend="eager")
    assert_same(trained(model, epoch, lambda model: None), eager)
