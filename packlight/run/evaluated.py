"""A loss in eval mode, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from packlight.capture.batch import fresh
from packlight.capture.returned import loss_of, with_loss
from packlight.capture.step_capture import LossFunction
from packlight.moves.precision import blaming_precision


def evaluated(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Any:
    """Return what a loss function does for a batch in eval mode; modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            # Eager PyTorch may call kernels that a traced step does not.
            copied = fresh(batch)
            returned = blaming_precision("the eager forward", loss_fn, lambda f: f(model, copied))
            return with_loss(returned, loss_of(returned).detach())
    finally:
        for module, was_training in modes:
            module.training = was_training
