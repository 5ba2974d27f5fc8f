"""Packlight's rows: which moves, optimizer and precision, and whose peaks are its budgets."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers import optimizers
from benchmarks.peers.rivals import BF16, DISK, EXACT, LOW_BIT, SUMS
from packlight import EXACT_MOVES, MOVES


@dataclass(frozen=True)
class Ours:
    """One way to use Packlight.

    Attributes:
        tool: what the tables call it.
        changes: what it changes beside memory and time, all of it.
        moves, allow: arguments of `fit`.
        optimizer: a name in `optimizers`.
        in_bf16: weights, and so activations and gradients, are in bfloat16.
        against: rivals that change one of these give it their peaks as budgets.
        has_smallest: it is also run in as little as it takes.
    """

    tool: str
    changes: tuple[str, ...]
    moves: tuple[str, ...]
    allow: tuple[str, ...] = ()
    optimizer: str = optimizers.TORCH
    in_bf16: bool = False
    against: tuple[str, ...] = ()
    has_smallest: bool = True

    @property
    def has_disk(self) -> bool:
        """Whether it gets a folder to offload to."""
        return "offload" in self.moves


def _in_memory(moves: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in moves if name != "offload")


EXACT_ROW = Ours("Packlight, exact", (EXACT,), _in_memory(EXACT_MOVES), against=(EXACT, SUMS))
# Also stands in at a rival's peak where the exact moves do not get there.
ALL_ROW = Ours("Packlight, all moves", (SUMS,), _in_memory(MOVES))
BACKEND = "Packlight, torch.compile backend"
ROWS = (
    EXACT_ROW,
    ALL_ROW,
    Ours(
        "Packlight, 8-bit optimizer", (SUMS, LOW_BIT), _in_memory(MOVES),
        optimizer=optimizers.PACKLIGHT, against=(LOW_BIT,),
    ),
    Ours(
        "Packlight, bf16 autocast", (SUMS, BF16), _in_memory(MOVES), ("bf16",), against=(BF16,),
        has_smallest=False,
    ),
    Ours(
        "Packlight, bf16 weights with stochastic rounding, 8-bit optimizer", (SUMS, BF16, LOW_BIT),
        _in_memory(MOVES), optimizer=optimizers.PACKLIGHT, in_bf16=True, against=(BF16,),
    ),
    Ours(
        "Packlight, exact, disk", (EXACT, DISK), EXACT_MOVES, against=(DISK,), has_smallest=False
    ),
)


def fair_rows(changes: str) -> set[str]:
    """Return the tools of Packlight's that change no more than a rival does.

    Where a rival changes precision, the order of sums is no change that counts.
    """
    allowed = {EXACT, changes}
    if changes in (LOW_BIT, BF16):
        allowed.add(SUMS)
    return {row.tool for row in ROWS if set(row.changes) <= allowed} | {BACKEND}
