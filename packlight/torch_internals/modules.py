"""What torch keeps of modules."""

from __future__ import annotations

from torch import nn


def hooks_of_all_modules() -> list[int]:
    """Return the numbers of the hooks that torch runs for every module, new ones for new hooks.

    Relied upon: torch keeps them in dictionaries of the module, by numbers that it counts on.
    """
    kept = nn.modules.module
    return [
        *kept._global_forward_pre_hooks, *kept._global_forward_hooks,
        *kept._global_backward_pre_hooks, *kept._global_backward_hooks,
    ]


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile(model)` returns; another model as it is."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner
