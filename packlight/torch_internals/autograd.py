"""What autograd's engine is doing, and the hooks that it calls."""

from __future__ import annotations

from collections.abc import Callable

import torch


def is_graph_retained() -> bool:
    """Whether the backward that is running was asked to keep its graph (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Have something called when the backward that is running has done everything.

    Relied upon: `queue_callback` of autograd's engine.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether autograd would call hooks with a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def through_hooks(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return what a parameter's hooks make of its gradient, as autograd calls them.

    Relied upon: they lie in `_backward_hooks`, in order; one that returns a tensor replaces it.
    """
    for hook in tuple((parameter._backward_hooks or {}).values()):
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    return gradient


def after_accumulation(parameter: torch.Tensor) -> None:
    """Call the hooks that autograd calls once a parameter's `grad` is there."""
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)
