"""How fast codecs are on one core, and up to which network speed they save time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import provenance, write_lines
from packlight.comm import compressor_of

NUM_ELEMENTS = 2**22
CODECS = [
    "q8+noef", "q4+noef", "q2+noef", "q1+noef", "q8+stochastic", "qsgd:4", "ternary", "sign",
    "topk:0.01+noef", "topk:0.001+noef", "topk:0.001+q2+noef", "threshold:3+noef",
    "randk:0.01+noef", "qsgd:4+ans", "sketch:0.01+noef",
]  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """One codec.

    Attributes:
        compress, combine: GB of fp32 gradient per second, on one core: the best round, and the
            median.
        share: size of the message beside the gradient.
        break_even: Gbit/s of a link between two ranks above which fp32 would be there sooner.
    """

    codec: str
    num_elements: int
    compress_gigabytes_per_second: float
    compress_median: float
    combine_gigabytes_per_second: float
    combine_median: float
    share: float
    break_even_gigabits_per_second: float
    provenance: dict[str, Any]


def measure(out: Path, num_rounds: int, num_elements: int, command: str) -> list[Speed]:
    """Measure all codecs and write a line for each."""
    torch.set_num_threads(1)
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(0))
    found = []
    for text in CODECS:
        compressor = compressor_of(text)
        state = compressor.init(gradient)
        seconds: dict[str, list[float]] = {"compress": [], "combine": []}
        for _ in range(num_rounds + 1):  # the first one compiles
            begin = time.perf_counter()
            message, state = compressor.compress(gradient, state)
            middle = time.perf_counter()
            compressor.combine([message])
            seconds["compress"].append(middle - begin)
            seconds["combine"].append(time.perf_counter() - middle)
        size = 4 * num_elements
        best = {name: min(all_of[1:]) for name, all_of in seconds.items()}
        median = {name: statistics.median(all_of[1:]) for name, all_of in seconds.items()}
        share = message.num_bytes / size
        # One message goes out and one comes in, at once; both are decoded.
        both = (best["compress"] + 2 * best["combine"]) / size
        found.append(Speed(
            text, num_elements, size / best["compress"] / 1e9, size / median["compress"] / 1e9,
            size / best["combine"] / 1e9, size / median["combine"] / 1e9, share,
            8e-9 * (1 - share) / both, provenance(0, "cpu", command, ["numba", "constriction"]),
        ))
        write_lines(out, found)
    return found
