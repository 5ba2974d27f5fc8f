"""Bytes that stay between steps, and the gradients between backward and update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import packlight
from examples import wrn_cifar10

Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], torch.Size]


def wide_mlp() -> nn.Module:
    """Return two layers of 8192 by 8192."""
    return nn.Sequential(nn.Linear(8192, 8192), nn.ReLU(), nn.Linear(8192, 8192))


CASES: dict[str, Case] = {
    "MLP of 8192-wide layers, AdamW": (
        wide_mlp, lambda m: torch.optim.AdamW(m.parameters()), torch.Size([8, 8192])
    ),
    "WRN-28-2, SGD with momentum": (
        wrn_cifar10.model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        torch.Size([2, 3, 32, 32]),
    ),
}


def measured(case: str, density: float | None, method: str) -> dict[str, int]:
    """Return what a model holds after a step, by the allocator, and what that is made of.

    Args:
        case: one of `CASES`.
        density: None for dense.
        method: of sparse training.
    """
    make, make_optimizer, shape = CASES[case]
    torch.manual_seed(0)
    model = make()
    settings = None if density is None else packlight.sparsify(model, density, method)
    optimizer = make_optimizer(model)
    if settings is not None:
        settings.attach(optimizer)
    x = torch.randn(shape)
    for _ in range(2):  # state is made in the first
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    kept = list(_storages(model, optimizer))
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    parts = {} if settings is None else settings.bytes_held()
    return {
        "resident_bytes": sum(kept), "gradient_bytes": gradients,
        "held_bytes": sum(kept) + gradients,
        **{f"{name.replace(' ', '_')}_bytes": size for name, size in parts.items()},
    }


def _storages(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Yield the size of each storage of parameters, buffers and optimizer state, once."""
    state = (v for s in optimizer.state.values() for v in s.values())
    seen = set()
    for tensor in [*model.parameters(), *model.buffers(), *state]:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage.nbytes()
