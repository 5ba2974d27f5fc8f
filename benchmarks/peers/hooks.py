"""What users do with autograd's hooks: saved tensors elsewhere, and updates in the backward."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import Built, LossFn
from benchmarks.workbench import Step, Workbench


def on_cpu(built: Built) -> LossFn:
    """Return the loss whose saved tensors are copied to the CPU's memory (`save_on_cpu`)."""

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            return built.loss_fn(model, batch)

    return loss_fn


class DiskHooks:
    """Writes every saved tensor to a file of its own at once, and reads it when it is asked for.

    Parameters are not written: they stay in memory anyway. A tensor that several operations save
    is written for each of them, as the hooks see no more of it.

    Args:
        model: whose parameters they are.
        directory: where the files are.
    """

    def __init__(self, model: nn.Module, directory: Path) -> None:
        self._directory = directory
        self._resident = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._numbers = itertools.count()

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return where the tensor lies now."""
        if tensor.untyped_storage().data_ptr() in self._resident or not tensor.numel():
            return tensor
        path = self._directory / str(next(self._numbers))
        _bytes_of(tensor.detach().contiguous()).tofile(path)
        return path, tensor.shape, tensor.dtype

    def unpack(self, packed: Any) -> torch.Tensor:
        """Return the tensor; its file goes."""
        if isinstance(packed, torch.Tensor):
            return packed
        path, shape, dtype = packed
        tensor = torch.empty(shape, dtype=dtype)
        with path.open("rb", buffering=0) as file:
            file.readinto(memoryview(_bytes_of(tensor)))
        path.unlink()
        return tensor


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def on_disk(built: Built) -> LossFn:
    """Return the loss whose saved tensors are on disk until the backward asks for them."""
    directory = Path(tempfile.mkdtemp())

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        hooks = DiskHooks(model, directory)
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            return built.loss_fn(model, batch)

    weakref.finalize(loss_fn, shutil.rmtree, directory, ignore_errors=True)
    return loss_fn


def update_in_backward(bench: Workbench, loss_fn: LossFn) -> Step:
    """Return the step in which each parameter is updated when its gradient is complete.

    The bench has an optimizer for each parameter. Hooks are there during the step only, since
    other steps train the same parameters.
    """
    owners = {o.param_groups[0]["params"][0]: o for o in bench.optimizers}

    def update(parameter: torch.Tensor) -> None:
        owners[parameter].step()
        owners[parameter].zero_grad(set_to_none=True)

    def step(batch: Any) -> torch.Tensor:
        handles = [p.register_post_accumulate_grad_hook(update) for p in owners]
        try:
            loss = loss_fn(bench.built.model, batch)
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        return loss.detach()

    return step
