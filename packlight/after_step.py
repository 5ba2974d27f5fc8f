"""Step hooks of an optimizer that need no gradients.

Whoever updates parameters one by one, as soon as their gradients are complete, cannot call hooks
that expect all gradients at once. One that says it needs none is called when all are updated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class AfterStep:
    """A step post-hook that needs no gradients: `optimizer.register_step_post_hook(AfterStep(f))`.

    Args:
        call: called without arguments after each step.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Do it."""
        self.call()


def hooks_after_step(optimizer: torch.optim.Optimizer) -> list[AfterStep]:
    """Return the hooks of this kind that an optimizer has, in order."""
    hooks = optimizer.__dict__.get("_optimizer_step_post_hooks", {}).values()
    return [hook for hook in hooks if isinstance(hook, AfterStep)]
