"""A pool of threads for compiled kernels that let go of Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def run_in_threads(kernel: Callable[..., None], pieces: Sequence[Sequence[Any]]) -> None:
    """Call a kernel with each piece's arguments, the first in this thread; wait for all.

    Args:
        kernel: something compiled, which runs without Python's lock.
        pieces: at least one; as many threads are used.
    """
    others = [_threads(len(pieces) - 1).submit(kernel, *piece) for piece in pieces[1:]]
    try:
        kernel(*pieces[0])
    finally:  # nothing may be freed under a running kernel
        for other in others:
            other.result()


def _threads(num_threads: int) -> ThreadPoolExecutor:
    """Return a pool of at least so many threads, made once in each process."""
    global _pool
    if _pool is None or _pool[0] != os.getpid() or _pool[1] < num_threads:
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="packlight-kernel")
        _pool = (os.getpid(), num_threads, pool)
    return _pool[2]
