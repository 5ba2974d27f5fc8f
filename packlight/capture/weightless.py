"""Models without values: parameters on the meta device, given memory that is never there.

What is planned of a model are shapes, and nothing of it runs. So its parameters may lie in pages
that the system hands out when they are first written, which nobody does: a model of any size takes
none, and every tensor is an ordinary one of the CPU, with a storage whose bytes count.
"""

from __future__ import annotations

import mmap

import torch
from torch import nn

from packlight.errors import OptionError

# Of Linux; without it, pages that may be more than there are in all are refused.
NO_RESERVE = 0x4000


def is_weightless(model: nn.Module) -> bool:
    """Whether a model's parameters are on the meta device, or have been."""
    return any(p.is_meta or hasattr(p, "packlight_unwritten") for p in model.parameters())


def give_unwritten_memory(model: nn.Module) -> None:
    """Have parameters and buffers on the meta device be tensors of the CPU that nobody has written.

    They stay the same objects: an optimizer that has them keeps them.

    Raises:
        OptionError: others have values.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    real = [name for name, tensor in tensors if not tensor.is_meta]
    if len(real) == len(tensors):
        return
    if real:
        raise OptionError(
            f"{real[0]!r} and {len(real) - 1} others have values, and {len(tensors) - len(real)} "
            "parameters or buffers are on the meta device\nhint: make all of the model under "
            "torch.device('meta'), or nothing of it"
        )
    for _, tensor in tensors:
        made = unwritten(tensor)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        made.packlight_unwritten = True  # type: ignore[attr-defined]
        torch.utils.swap_tensors(tensor, made)


def unwritten(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU with a tensor's shape, strides and dtype, in memory of its own."""
    num_bytes = like.untyped_storage().nbytes()
    if num_bytes == 0:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    pages = mmap.mmap(-1, num_bytes, flags=flags)
    flat = torch.frombuffer(pages, dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())
