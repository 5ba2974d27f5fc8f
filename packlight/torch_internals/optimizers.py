"""An optimizer's step without what torch wraps around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def step_post_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the hooks that run after an optimizer's step, in order.

    Relied upon: they lie in the second of `STEP_HOOKS`, by their handles' numbers.
    """
    return list(optimizer.__dict__.get(STEP_HOOKS[1], {}).values())


class BeforeAnyStep:
    """A hook of our own before whichever optimizer steps next: what it does needs no gradients.

    Args:
        call: called without arguments.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, *_: Any) -> None:
        """Do it."""
        self.call()


def has_global_step_hooks() -> bool:
    """Whether hooks of others are registered that run in every optimizer's step."""
    registered = (
        *torch_optimizer._global_optimizer_pre_hooks.values(),
        *torch_optimizer._global_optimizer_post_hooks.values(),
    )
    return any(not isinstance(hook, BeforeAnyStep) for hook in registered)


def plain_step(optimizer_class: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return a class's `step` without the wrapper in which torch runs hooks and profiles.

    Relied upon: the wrapper has `hooked` and `__wrapped__`.
    """
    step: Any = optimizer_class.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def is_replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an object's `step` is neither its class's nor that of torch's LR schedulers.

    Relied upon: theirs has `_wrapped_by_lr_sched`, and the class's as `__wrapped__`.
    """
    patched = optimizer.__dict__.get("step")
    is_of_scheduler = getattr(patched, "_wrapped_by_lr_sched", False)
    is_class_step = getattr(patched, "__wrapped__", None) is type(optimizer).step
    return patched is not None and not (is_of_scheduler and is_class_step)


def overflows(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
) -> dict[torch.device, torch.Tensor]:
    """Return what `unscale_` found, which may be changed: not 0 where gradients are not finite.

    Relied upon: the scaler looks at these tensors, of one element for each device, in `update`.
    """
    found: dict[torch.device, torch.Tensor] = scaler._per_optimizer_states[id(optimizer)][
        "found_inf_per_device"
    ]
    return found


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Note on an optimizer that it was stepped: LR schedulers warn if they step before it."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
