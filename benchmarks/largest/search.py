"""The greatest depth that works, found with few trials: each takes minutes."""

from __future__ import annotations

from collections.abc import Callable

# Between the depth that works and the next one tried that does not, at most so much of the depth.
RESOLUTION = 0.02


def greatest(works: Callable[[int], bool], guess: int, largest: int) -> int:
    """Return the greatest depth that works, 0 if none does.

    Strides from the guess double until one depth works and a greater one does not; then the
    interval between them is halved, until it is one block or `RESOLUTION` of the depth.

    Args:
        works: whether a depth does; if one does, so do all smaller ones.
        guess: where to begin, at least 1.
        largest: nothing greater is tried.

    >>> tried = []
    >>> greatest(lambda depth: bool(tried.append(depth) or depth <= 13), guess=10, largest=1000)
    13
    >>> tried
    [10, 11, 13, 17, 15, 14]
    """
    works_at, fails_at = 0, largest + 1
    depth, stride = min(guess, largest), 1 + guess // 50
    while not works_at or fails_at > largest:
        if works(depth):
            works_at = depth
            if fails_at <= largest or works_at == largest:
                break
            depth = min(depth + stride, largest)
        else:
            fails_at = depth
            if works_at or fails_at == 1:
                break
            depth = max(depth - stride, 1)
        stride *= 2
    while fails_at - works_at > max(1, int(RESOLUTION * works_at)) and fails_at <= largest:
        depth = (works_at + fails_at) // 2
        if works(depth):
            works_at = depth
        else:
            fails_at = depth
    return works_at


def extrapolated(known: list[tuple[int, int]], limit_bytes: int) -> int:
    """Return the depth on the line through the last two of `known`.

    Args:
        known: limits in bytes, ascending, and the depth that each holds; at least two.
        limit_bytes: the one asked about.

    >>> extrapolated([(200, 1), (2_000, 11), (4_000, 31)], 8_000)
    71
    """
    (less, shallow), (more, deep) = known[-2:]
    return int(deep + (limit_bytes - more) * (deep - shallow) / (more - less))
