"""Each rival beside Packlight at that rival's own measured peak, and why it wins where it does."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.front import best_within
from benchmarks.peers.ours import BACKEND, EXACT_ROW, fair_rows
from benchmarks.peers.records import EAGER, FOLDER, Record, Rematch

REASONS = FOLDER / "reasons.toml"
# Times that are as close as this, each relative to eager steps of its own rounds, may have come
# about by the machine's drift.
CLOSE_TIMES = 0.1


@dataclass(frozen=True)
class Duel:
    """A rival, and the fastest of Packlight's cells that hold no more.

    Attributes:
        rival: its record.
        exact: with exact moves only, by `fit`; None where they do not get there.
        ours: that changes no more than the rival does; None where Packlight does not get there.
        planned: of those, the one that the planner expects to be fastest.
        smallest_bytes: the smallest peak of the cells that `ours` is chosen from, None for none.
        rematch: the two side by side, where that was done; it decides, and where it was done with
            several cells of Packlight's, the fastest is `ours`.
    """

    rival: Record
    exact: Record | None
    ours: Record | None
    planned: Record | None
    smallest_bytes: int | None
    rematch: Rematch | None = None

    @property
    def ratio(self) -> float:
        """Packlight's time over the rival's."""
        if self.rematch is not None:
            return self.rematch.ratio
        assert self.ours is not None
        return self.ours.ratio / self.rival.ratio

    @property
    def is_close(self) -> bool:
        """Whether the two have to be timed side by side to tell who is faster."""
        if self.ours is None:
            return False
        first = self.ours.ratio / self.rival.ratio
        return first > 1 or 1 / first <= 1 + CLOSE_TIMES

    @property
    def is_within_spread(self) -> bool:
        """Whether the two's interquartile ranges overlap, or side by side the ratio's holds 1."""
        if self.rematch is not None and self.rematch.ratio_quartiles is not None:
            low, high = self.rematch.ratio_quartiles
            return low <= 1 <= high
        mine = None if self.ours is None else self.ours.ratio_quartiles
        theirs = self.rival.ratio_quartiles
        if mine is None or theirs is None:
            return False
        return mine[0] <= theirs[1] and theirs[0] <= mine[1]

    @property
    def is_lost(self) -> bool:
        """Whether the rival is smaller, or faster beyond the spread."""
        return self.ours is None or (self.ratio > 1 and not self.is_within_spread)

    @property
    def verdict(self) -> str:
        """Return who is better, and in what."""
        if self.ours is None:
            return "rival is smaller"
        winner = "rival" if self.ratio > 1 else "Packlight"
        return winner + (", within the spread" if self.is_within_spread else "")


def duels_of(records: Sequence[Record], rematches: Sequence[Rematch] = ()) -> list[Duel]:
    """Return one model's duels, the rival with the largest peak first."""
    by_key = {r.key: r for r in rematches if not r.has_failed}
    rivals = [r for r in records if not r.is_ours and r.tool != EAGER and r.was_timed]
    found = []
    for rival in sorted(rivals, key=lambda r: -(r.peak_bytes or 0)):
        fair = fair_rows(rival.changes)
        mine = [r for r in records if r.is_ours and r.tool in fair and r.was_timed]
        exact = [r for r in mine if r.tool in (EXACT_ROW.tool, BACKEND)]
        peak_bytes = rival.peak_bytes or 0
        within = [r for r in mine if (r.peak_bytes or 0) <= peak_bytes]
        ours = best_within(within, peak_bytes)
        again = [(by_key[key], r) for r in within if (key := rematch_key(rival, r)) in by_key]
        rematch, ours = min(again, key=lambda pair: pair[0].ratio, default=(None, ours))
        planned = min(
            (r for r in within if r.predicted_seconds), key=lambda r: r.predicted_seconds or 0,
            default=None,
        )
        found.append(
            Duel(
                rival, best_within(exact, peak_bytes), ours, planned,
                min((r.peak_bytes or 0 for r in mine), default=None), rematch,
            )
        )
    return found


def rematch_key(rival: Record, ours: Record) -> tuple[str, str, str, str]:
    """Return the key of the two side by side."""
    return rival.model, rival.title, rival.name, ours.name


def read_reasons(path: Path = REASONS) -> dict[str, dict[str, str]]:
    """Return model -> rival's name -> why it wins, as written down by a person.

    What stands under "every model" holds for those that have no line of their own.
    """
    with path.open("rb") as file:
        return tomllib.load(file)


def reason_for(reasons: dict[str, dict[str, str]], rival: Record) -> str:
    """Return why a rival wins, or that nobody has said so yet."""
    for group in (rival.model, "every model"):
        if rival.name in reasons.get(group, {}):
            return reasons[group][rival.name]
    return "not looked into"
