"""From tensors to what kernels get: elements in memory's order, groups, threads' shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from packlight.errors import OptionError
from packlight.extras import require_numba

GROUP = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this, waking a thread takes longer than what it would do.
MIN_GROUPS_PER_THREAD = 256
# float16 is widened to float32 in pieces of so many groups.
PIECE_GROUPS = 1024


def compiled() -> Any:
    """Return the module of compiled kernels.

    Raises:
        MissingExtraError: numba is not installed.
    """
    require_numba("lossy", "packlight.lossy")
    from packlight.lossy import cpu_kernel

    return cpu_kernel


def is_dense(values: torch.Tensor) -> bool:
    """Whether a tensor has no gaps in memory, and no element twice: its dims may be in any order.

    >>> is_dense(torch.empty(3, 4).t()), is_dense(torch.empty(3, 4)[:, :2])
    (True, False)
    """
    expected = 1
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size != 1 and stride != expected:
            return values.numel() == 0
        expected *= size
    return True


def laid_out(values: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Return a tensor with other strides: itself, or a copy."""
    if tuple(values.stride()) == tuple(stride):
        return values
    made = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device)
    return made.copy_(values)


def check_layout(values: torch.Tensor) -> None:
    """Refuse what kernels do not take.

    Raises:
        OptionError: another dtype than `DTYPES`, or gaps in memory.
    """
    if values.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise OptionError(f"a tensor of {values.dtype} cannot be packed\nhint: known are {known}")
    if not is_dense(values):
        raise OptionError(
            f"a tensor of shape {tuple(values.shape)} and strides {values.stride()} has gaps in "
            "memory\nhint: pack values.contiguous()"
        )


def words_of(elements: torch.Tensor) -> tuple[Any, int]:
    """Return an array of integers of which each, shifted left by a number, is float32's bits."""
    if elements.dtype is torch.float16:
        elements = elements.float()
    if elements.dtype is torch.bfloat16:
        return elements.view(torch.uint16).numpy(), 16
    return elements.view(torch.uint32).numpy(), 0


def pieces(values: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield from which group to which one a kernel works at once."""
    num_groups = -(-values.numel() // GROUP)
    size = PIECE_GROUPS if values.dtype is torch.float16 else num_groups
    for first in range(0, num_groups, max(1, size)):
        yield first, min(first + size, num_groups)


def shares(first: int, last: int) -> list[tuple[int, int]]:
    """Return each thread's groups."""
    count = last - first
    num = max(1, min(torch.get_num_threads(), count // MIN_GROUPS_PER_THREAD))
    ends = [first + count * i // num for i in range(num + 1)]
    return list(zip(ends, ends[1:], strict=False))
