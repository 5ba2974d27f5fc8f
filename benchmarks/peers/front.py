"""Which rivals' peaks Packlight gets as budgets, and what it reaches at any peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.peers.records import Record

# Two peaks that are as close as this are one budget.
CLOSE = 0.03


def front(records: Iterable[Record]) -> list[Record]:
    """Return the cells than which none is both smaller and faster, the smallest peak first."""
    timed = sorted(
        (r for r in records if r.was_timed), key=lambda r: (r.peak_bytes, r.ratio)
    )
    found: list[Record] = []
    for record in timed:
        if not found or record.ratio < found[-1].ratio:
            found.append(record)
    return found


def distinct_peaks(
    records: Sequence[Record], at_most: int | None = None, close: float = CLOSE
) -> list[Record]:
    """Return the cells whose peaks are budgets: of those with about the same peak, the smallest.

    Args:
        records: cells that ran.
        at_most: where there are more, peaks have to be further apart.
        close: how far.
    """
    found: list[Record] = []
    for record in sorted(records, key=lambda r: r.peak_bytes or 0):
        if not found or (record.peak_bytes or 0) > (1 + close) * (found[-1].peak_bytes or 0):
            found.append(record)
    if at_most is not None and len(found) > at_most:
        return distinct_peaks(records, at_most, 1.3 * close)
    return found


def best_within(records: Iterable[Record], peak_bytes: int) -> Record | None:
    """Return the fastest cell that holds no more than that; None if none does."""
    within = [r for r in records if r.was_timed and (r.peak_bytes or 0) <= peak_bytes]
    return min(within, key=lambda r: r.ratio, default=None)
