"""Which of the trials that wait starts now: strip packing, bytes wide and seconds long.

A limit of memory is a strip; each trial is a rectangle of its planned peak and its predicted
seconds, or one of two (recomputed in few bytes, plain in more). Few trials wait at a time, so
orders and rectangles are tried one by one: trial by trial is placed where it ends earliest, and
what is over first is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# So many trials have all their orders tried, with all their options; of more, a few sorted ones.
MOST_PERMUTED = 4


@dataclass(frozen=True)
class Option:
    """One way to run a trial."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Waiting:
    """A trial that could start.

    Attributes:
        options: the ways to run it.
        num_passed: how many trials that came later have started before it.
    """

    options: tuple[Option, ...]
    num_passed: int = 0


@dataclass(frozen=True)
class Placed:
    """What lies where in the strip."""

    start: float
    end: float
    bytes: int


@dataclass(frozen=True)
class Start:
    """The trial to start now, by its place among those that wait, and how."""

    index: int
    option: Option


def choose(
    running: Sequence[Option],
    waiting: Sequence[Waiting],
    total_bytes: int,
    num_workers: int,
    most_passed: int,
) -> Start | None:
    """Return what to start now so that all of it ends as early as can be; None to wait.

    Args:
        running: bytes and remaining seconds of what is running.
        waiting: what could start, the oldest first.
        total_bytes: the strip's width.
        num_workers: how many may lie beside one another.
        most_passed: a trial that was passed over so often comes before all others.
    """
    fixed = [Placed(0.0, option.seconds, option.bytes) for option in running]
    if not waiting or len(fixed) >= num_workers:
        return None
    best: tuple[tuple[float, float], Start | None] | None = None
    for order, options in itertools.product(
        _orders(waiting, most_passed), list(_choices(waiting))
    ):
        placed, first = list(fixed), None
        for index in order:
            piece, option = _earliest(placed, options[index], total_bytes, num_workers)
            placed.append(piece)
            if piece.start == 0.0 and first is None:
                first = Start(index, option)
        cost = max(p.end for p in placed), sum(p.end for p in placed)
        if best is None or cost < best[0]:
            best = cost, first
    assert best is not None
    return best[1]


def _orders(waiting: Sequence[Waiting], most_passed: int) -> Iterator[tuple[int, ...]]:
    """Yield orders of those that wait, with the ones that have waited too long in front."""
    indices = range(len(waiting))
    late = [i for i in indices if waiting[i].num_passed >= most_passed]
    others = [i for i in indices if waiting[i].num_passed < most_passed]

    def area(i: int) -> float:
        return -min(option.bytes * option.seconds for option in waiting[i].options)

    def seconds(i: int) -> float:
        return -min(option.seconds for option in waiting[i].options)

    def width(i: int) -> float:
        return -min(option.bytes for option in waiting[i].options)

    if len(others) <= MOST_PERMUTED:
        for order in itertools.permutations(others):
            yield (*late, *order)
    else:
        for key in (area, seconds, width, lambda i: i):
            yield (*late, *sorted(others, key=key))


def _choices(waiting: Sequence[Waiting]) -> Iterator[Sequence[tuple[Option, ...]]]:
    """Yield the options that each of those that wait may take: all of them, or a certain one."""
    yield [trial.options for trial in waiting]
    if len(waiting) <= MOST_PERMUTED:
        for chosen in itertools.product(*(trial.options for trial in waiting)):
            yield [(option,) for option in chosen]
    else:
        yield [(min(trial.options, key=lambda o: o.bytes),) for trial in waiting]


def _earliest(
    placed: Sequence[Placed], options: Sequence[Option], total_bytes: int, num_workers: int
) -> tuple[Placed, Option]:
    """Return where a trial ends earliest beside what is placed, and by which option."""
    found: tuple[tuple[float, int], Placed, Option] | None = None
    for option in options:
        if option.bytes > total_bytes:
            continue
        for start in sorted({0.0, *(p.end for p in placed)}):
            end = start + option.seconds
            if _fits(placed, start, end, option.bytes, total_bytes, num_workers):
                key = end, option.bytes
                if found is None or key < found[0]:
                    found = key, Placed(start, end, option.bytes), option
                break
    if found is None:  # wider than the strip: the study has refused it, or it runs alone
        end = max((p.end for p in placed), default=0.0)
        option = min(options, key=lambda option: option.bytes)
        return Placed(end, end + option.seconds, option.bytes), option
    return found[1], found[2]


def _fits(
    placed: Sequence[Placed],
    start: float,
    end: float,
    num_bytes: int,
    total_bytes: int,
    num_workers: int,
) -> bool:
    """Whether there is room from one time to another."""
    for moment in (start, *(p.start for p in placed if start < p.start < end)):
        beside = [p for p in placed if p.start <= moment < p.end]
        used_bytes = sum(p.bytes for p in beside)
        if len(beside) >= num_workers or used_bytes + num_bytes > total_bytes:
            return False
    return True


