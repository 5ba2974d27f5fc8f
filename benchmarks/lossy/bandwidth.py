"""Packing and unpacking beside a copy: bytes read and written in a second, interleaved.

With one thread, seconds are those of the thread on the processor, so that what else runs there
counts less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from packlight.lossy import few_bit
from packlight.lossy.packing import BITS, pack_values, unpack_values

NUM_ELEMENTS = 1 << 23


def measured(num_threads: int, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (case, median and spread of the share of a copy's bytes per second)."""
    torch.set_num_threads(num_threads)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(NUM_ELEMENTS).to(dtype)
        target = torch.empty_like(values)
        for name, call, moved in _calls(values):
            call()
            shares, copied = [], []
            for _ in range(rounds):
                copied.append(2 * values.nbytes / _seconds(lambda: target.copy_(values)))  # noqa: B023
                shares.append(moved / _seconds(call) / copied[-1])
            yield f"{name}, {str(dtype).removeprefix('torch.')}", {
                "share_of_copy": round(statistics.median(shares), 3),
                "least": round(min(shares), 3), "most": round(max(shares), 3),
                "copy_bytes_per_second": round(statistics.median(copied)),
                "threads": num_threads,
            }


def _calls(values: torch.Tensor) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Yield (name, call, bytes that it reads and writes)."""
    size, dtype = (NUM_ELEMENTS,), values.dtype
    for bits in BITS:
        packed = pack_values(values, bits, 0, (1,))
        moved = values.nbytes + packed.nbytes
        yield f"pack to {bits} bits", partial(pack_values, values, bits, 0, (1,)), moved
        unpack = partial(unpack_values, packed, bits, size, (1,), dtype)
        yield f"unpack {bits} bits", unpack, moved
    table = few_bit.optimal_table("gelu", 3)
    encode = partial(few_bit.derivative_codes, values, table.edges, table.codes, 3, (1,))
    codes = encode()
    yield "GELU's codes in 3 bits", encode, values.nbytes + codes.nbytes
    multiply = partial(few_bit.times_derivative, values, codes, table.levels, 3, (1,))
    yield "times GELU's derivative in 3 bits", multiply, 2 * values.nbytes + codes.nbytes


def _seconds(call: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start
