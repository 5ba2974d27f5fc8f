"""Whether a model and its optimizer are ones that can be trained; who is left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from packlight.errors import UnsupportedModelError
from packlight.updates.several import parts_of
from packlight.updates.twin import forwards_to


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise where a model or an optimizer is none that can be trained.

    Raises:
        UnsupportedModelError: says which and why.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UnsupportedModelError("no parameter of the model needs a gradient: nothing to train")
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModelError(
            f"the model{f' has {scripted[0]!r}, which' if scripted[0] else ''} is a ScriptModule: "
            "TorchScript runs it, and its operations cannot be planned\n"
            "hint: fit the module that was scripted or traced"
        )
    for part in parts_of(optimizer):
        _refuse_forwarding(part)


def name_parameters_left(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, others: Iterable[object] = ()
) -> None:
    """Warn of parameters that need gradients which nobody gets.

    Args:
        model: with the parameters.
        optimizer: of the step.
        others: of the loop; those that an optimizer of another step holds are no mistake.
    """
    if optimizer is None:
        return
    known = [*parts_of(optimizer), *(o for o in others if isinstance(o, torch.optim.Optimizer))]
    groups = [group for part in known for group in part.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left:
        warnings.warn(
            f"{len(left)} parameters need gradients that the optimizer does not hold, the first of "
            f"them {left[0]!r}: a planned step does not keep their gradients\n"
            "hint: requires_grad_(False), or give them to the optimizer",
            stacklevel=5,
        )


def _refuse_forwarding(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer that hands everything on decides when to step: a planned step cannot ask it."""
    inside = forwards_to(optimizer)
    if inside is None:
        return
    name = type(optimizer).__name__
    held = f"that it holds as {inside!r}" if inside else "of another object"
    hint = f"fit the optimizer inside, optimizer.{inside}" if inside else "fit that one"
    raise UnsupportedModelError(
        f"{name} has no parameters and state of its own, but those {held}\nhint: {hint}; "
        "accumulating gradients over batches is fit's own (accumulate=True), as are clipping and "
        "scaling (clip_grad_norm=, scaler=)"
    )
