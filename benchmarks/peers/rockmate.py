"""Rockmate (Zhao et al. 2023), from PyPI, in an environment of its own.

    pip install --target rockmate_site --no-deps rockmate rkgb pulp==2.7.0 configmypy astunparse \
        psutil ruamel.yaml six wheel
    python -m benchmarks.peers --rockmate rockmate_site

The benchmark starts a process with that folder first on its path and runs nothing else in it. What
is run is what is published: no line of it is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.models import Built, LossFn

# It plans for what is left of a GPU's memory where it gets no budget; half is its middle ground.
BUDGET_SHARE = 0.5


class _WithLoss(nn.Module):
    """A model and its loss as one module that takes tensors, which is what Rockmate asks for."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, spec: Any) -> None:
        super().__init__()
        self.model, self.loss_fn, self.spec = model, loss_fn, spec

    def forward(self, *leaves: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return self.loss_fn(self.model, pytree.tree_unflatten(list(leaves), self.spec))


def rockmate(built: Built) -> LossFn:
    """Return the loss by Rockmate, planned for half of what a plain forward and backward take.

    Raises:
        Exception: whatever it raises; it becomes the row.
    """
    import rockmate as library

    from packlight import measure_peak

    leaves, spec = pytree.tree_flatten(built.batch)
    whole = _WithLoss(built.model, built.loss_fn, spec)
    plain = measure_peak(lambda: whole(*leaves).backward())
    built.model.zero_grad(set_to_none=True)
    planned = library.Rockmate(whole, leaves, int(BUDGET_SHARE * plain.peak_bytes))

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return planned(*pytree.tree_leaves(batch))

    return loss_fn
