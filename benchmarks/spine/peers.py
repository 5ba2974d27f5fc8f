"""The rivals: each turns a loss function into one that needs less memory for its backward.

All but the rows called "inductor" run the same kernels as eager PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.models import Built, LossFn
from benchmarks.peers.checkpointing import in_segments, per_block, selective
from benchmarks.peers.compiled import eager_kernels, inductor
from benchmarks.spine.cases import Case

EAGER = "eager"
CHECKPOINT = "torch.utils.checkpoint"
SEQUENTIAL = "checkpoint_sequential"
SELECTIVE = "selective checkpoint"
MEMORY_BUDGET = "activation_memory_budget"
INDUCTOR = "inductor"


@dataclass(frozen=True)
class Peer:
    """One rival at one setting.

    Attributes:
        prepare: built model -> its loss function; called once, may compile lazily.
        is_compiled: its first step is unlike the others.
        compile_limit_seconds: give up if that takes longer.
    """

    tool: str
    setting: str
    prepare: Callable[[Built], LossFn]
    is_compiled: bool = False
    compile_limit_seconds: float | None = None


def peers_of(case: Case) -> list[Peer]:
    """Return every rival at every setting that a case is run with."""
    peers = [
        Peer(CHECKPOINT, "per block", per_block),
        Peer(SELECTIVE, "matmul and attention saved", selective),
    ]
    peers += [
        Peer(SEQUENTIAL, f"{n} segments", functools.partial(in_segments, num_segments=n))
        for n in case.segments
    ]
    peers += [
        Peer(MEMORY_BUDGET, f"{b:g}", functools.partial(eager_kernels, ratio=b), is_compiled=True)
        for b in case.memory_budgets
    ]
    peers += [
        Peer(INDUCTOR, "no budget" if b == 1.0 else f"{MEMORY_BUDGET} {b:g}",
             functools.partial(inductor, ratio=b), is_compiled=True, compile_limit_seconds=60.0)
        for b in case.inductor_budgets
    ]
    return peers
