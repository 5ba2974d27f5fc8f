"""Each rival beside Packlight at that rival's own measured peak, and why it wins where it does."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.front import best_within
from benchmarks.peers.ours import BACKEND, EXACT_ROW, fair_rows
from benchmarks.peers.records import EAGER, FOLDER, Record

REASONS = FOLDER / "reasons.toml"


@dataclass(frozen=True)
class Duel:
    """A rival, and the fastest of Packlight's cells that hold no more.

    Attributes:
        rival: its record.
        exact: with exact moves only, by `fit`; None where they do not get there.
        ours: that changes no more than the rival does; None where Packlight does not get there.
        smallest_bytes: the smallest peak of the cells that `ours` is chosen from, None for none.
    """

    rival: Record
    exact: Record | None
    ours: Record | None
    smallest_bytes: int | None

    @property
    def is_within_spread(self) -> bool:
        """Whether the interquartile ranges of the two overlap."""
        mine = None if self.ours is None else self.ours.ratio_quartiles
        theirs = self.rival.ratio_quartiles
        if mine is None or theirs is None:
            return False
        return mine[0] <= theirs[1] and theirs[0] <= mine[1]

    @property
    def is_lost(self) -> bool:
        """Whether the rival is smaller, or faster beyond the spread."""
        if self.ours is None:
            return True
        return self.rival.ratio < self.ours.ratio and not self.is_within_spread

    @property
    def verdict(self) -> str:
        """Return who is better, and in what."""
        if self.ours is None:
            return "rival is smaller"
        winner = "rival" if self.rival.ratio < self.ours.ratio else "Packlight"
        return winner + (", within the spread" if self.is_within_spread else "")


def duels_of(records: Sequence[Record]) -> list[Duel]:
    """Return one model's duels, the rival with the largest peak first."""
    rivals = [r for r in records if not r.is_ours and r.tool != EAGER and r.was_timed]
    found = []
    for rival in sorted(rivals, key=lambda r: -(r.peak_bytes or 0)):
        fair = fair_rows(rival.changes)
        ours = [r for r in records if r.is_ours and r.tool in fair and r.was_timed]
        exact = [r for r in ours if r.tool in (EXACT_ROW.tool, BACKEND)]
        peak_bytes = rival.peak_bytes or 0
        found.append(
            Duel(
                rival, best_within(exact, peak_bytes), best_within(ours, peak_bytes),
                min((r.peak_bytes or 0 for r in ours), default=None),
            )
        )
    return found


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
