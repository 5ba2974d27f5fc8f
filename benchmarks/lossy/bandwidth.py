"""Packing and unpacking beside a copy: bytes read and written in a second, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from packlight.lossy import few_bit
from packlight.lossy.packing import BITS, pack_values, unpack_values

NUM_ELEMENTS = 1 << 23


def measured(num_threads: int, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (case, medians and spread of the share of a copy's bytes per second)."""
    torch.set_num_threads(num_threads)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(NUM_ELEMENTS).to(dtype)
        target = torch.empty_like(values)
        calls: dict[str, tuple[Callable[[], object], int]] = {}
        for bits in BITS:
            packed = pack_values(values, bits, 0, (1,))
            moved = values.nbytes + packed.nbytes
            calls[f"pack to {bits} bits"] = (
                lambda bits=bits: pack_values(values, bits, 0, (1,)), moved
            )
            calls[f"unpack {bits} bits"] = (
                lambda bits=bits, packed=packed: unpack_values(packed, bits, (NUM_ELEMENTS,), (1,), dtype),
                moved,
            )
        table = few_bit.optimal_table("gelu", 3)
        codes = few_bit.derivative_codes(values, table.edges, table.codes, 3, (1,))
        calls["GELU's codes in 3 bits"] = (
            lambda: few_bit.derivative_codes(values, table.edges, table.codes, 3, (1,)),
            values.nbytes + codes.nbytes,
        )
        calls["times GELU's derivative in 3 bits"] = (
            lambda codes=codes: few_bit.times_derivative(target, codes, table.levels, 3, (1,)),
            2 * values.nbytes + codes.nbytes,
        )
        for name, (call, moved) in calls.items():
            call()
            shares = []
            for _ in range(rounds):
                copied = 2 * values.nbytes / _seconds(lambda: target.copy_(values))
                shares.append(moved / _seconds(call) / copied)
            yield f"{name}, {str(dtype).removeprefix('torch.')}", {
                "share_of_copy": round(statistics.median(shares), 3),
                "least": round(min(shares), 3), "most": round(max(shares), 3),
                "copy_bytes_per_second": round(copied),
            }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
