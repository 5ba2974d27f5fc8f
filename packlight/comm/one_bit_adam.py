"""The optimizer of 1-bit Adam, whose second phase steps with an averaged momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from packlight.errors import OptionError


class OneBitAdam(torch.optim.Optimizer):
    """Adam whose second moment is frozen after a warm-up (Tang et al. 2021).

    Goes with `OneBitMomentum` of the same `warmup_steps` and beta1, as the hook's compressor: it
    puts averaged gradients into `.grad` at first and the averaged momentum afterwards.

        hook(model, OneBitMomentum(warmup_steps=500))
        optimizer = OneBitAdam(model.parameters(), lr=1e-3, warmup_steps=500)

    In the first phase it is AdamW. In the second w <- w - lr m / (sqrt(v) + eps), v being corrected
    for its start as of the last step of the first; where v is 0, no gradient was ever seen, and
    nothing moves: one bit would make a full step of it.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the two averages.
        eps: added to the denominator.
        weight_decay: decoupled.
        warmup_steps: of the first phase, at least 1.

    Raises:
        OptionError: a number outside of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        warmup_steps: int,
    ) -> None:
        if not isinstance(warmup_steps, int) or warmup_steps < 1:
            raise OptionError(
                f"warmup_steps={warmup_steps!r}; it must be a whole number, 1 or larger: the "
                "second moment is learnt in it"
            )
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise OptionError(f"lr={lr!r}, betas={betas!r}; lr from 0, betas from 0 and below 1")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(group, parameter, parameter.grad)
        return loss

    def _step_one(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if step <= group["warmup_steps"]:
            first.lerp_(gradient, 1 - beta1)
            second.lerp_(gradient.square(), 1 - beta2)
            rate = group["lr"] / (1 - beta1**step)
        else:
            first.copy_(gradient)
            rate = group["lr"]
        seen = min(step, group["warmup_steps"])
        root = second.div(1 - beta2**seen).sqrt_().add_(group["eps"])
        update = first.div(root).masked_fill_(second == 0, 0.0)
        parameter.sub_(update, alpha=rate)
