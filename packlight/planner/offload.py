"""Plans that hold, recompute or transfer: which of the three for what, and what that costs.

A buffer that is not in memory where it is needed comes back in one of two ways: its maker runs
again, or it is fetched from the far tier. `TransferRetention` knows for each buffer which of them
and gives it a price in seconds: a recomputation costs its seconds, a fetch the seconds of the link
for it and its write, times the price of a second of the link. With price p, those buffers are
fetched whose makers take more than p seconds per second of the link; the rest is recomputed. The
local moves of `refine.py` then decide where to hold what, as they do without a link.

The link's right price (0: it is idle anyway; 1: operations always wait for it) and how much memory
transfers need besides are not known beforehand: several of both are tried, placed in time
(`transfers.py`) and judged by the simulator. What waits or recomputes most in the best of them is
then changed one by one. Joint planning of both is due to POFO (Beaumont et al. 2021), whose dynamic
program works on chains; this works on any graph.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from packlight.planner.refine import (
    Effort,
    droppable,
    improve,
    lower,
    repair,
    ruin_and_recreate,
)
from packlight.planner.retention import Interval, Retention
from packlight.planner.search import Found, View
from packlight.planner.segments import replace_id, restore_ids
from packlight.planner.transfers import UNLIMITED_BYTES, Placement, fetch_of, fetched_by
from packlight.step import Action, Device, Link, Schedule, StepGraph, simulate

PRICES = (0.03, 0.15, 0.4, 0.7)
STREAMING_PRICES = (0.05, 0.3, 1.0)
REPLACING_PRICE = 0.05
PARTS = (0.15, 0.25, 0.4, 0.55, 0.75, 1.0)
SHARES, STREAMING_SHARES = (0.95, 0.88, 0.8), (0.9, 0.8, 0.7, 0.6)
MAX_SWEPT = 64
MOVES, MANY_MOVES = 48, 300
SEED = 0
POLISHED = 2
HURRIES, FEW_HURRIES = (1.0, 2.0, 4.0, math.inf), (2.0, math.inf)
EVALUATIONS = 4_000
SMALL_SHARE = 0.001


class TransferRetention(Retention):
    """Intervals, where some of the buffers that are not held are fetched instead of recomputed.

    The fetch of a buffer is an operation that reads nothing and makes it. Its id is negative
    (`fetch_of`), so that Python's lists find its facts at their ends.

    Attributes:
        fetched: the buffers that are fetched.
    """

    def __init__(self, graph: StepGraph, link: Link, fetched: Iterable[int], price: float) -> None:
        super().__init__(graph)
        self.fetched: set[int] = set()
        backwards = range(len(graph.buffers) - 1, -1, -1)
        stored = set(graph.stored)
        self.reads += [()] * (len(graph.buffers) + 1)
        self.overwrites += [()] * (len(graph.buffers) + 1)
        self.workspace += [0] * (len(graph.buffers) + 1)
        self.can_recompute += [True] * (len(graph.buffers) + 1)
        self.last_chance += [self.num_positions] * (len(graph.buffers) + 1)
        self.creates += [*((b,) for b in backwards), ()]
        self.grows += [*(self.size[b] for b in backwards), 0]
        self.seconds += [
            *(price * link_seconds(link, graph.buffers[b].bytes, b in stored) for b in backwards),
            0.0,
        ]
        self._was_fixed = list(self.is_fixed)
        for buffer in fetched:
            self._turn(buffer)

    def _turn(self, buffer: int) -> None:
        if buffer not in self.fetched:
            self.fetched.add(buffer)
            self.maker[buffer] = fetch_of(buffer)
            self.is_fixed[buffer] = False
        else:
            self.fetched.discard(buffer)
            self.maker[buffer] = self.origin[buffer]
            self.is_fixed[buffer] = self._was_fixed[buffer]

    def turn(self, buffer: int) -> bool:
        """Fetch a buffer instead of recomputing it, or the reverse; return whether that can be."""
        places = set(self.rerun_at.get(self.maker[buffer], ()))
        self._journal.append((buffer, None, None))
        self._turn(buffer)
        ok = True
        for position in sorted(places):
            ok = self.evaluate(position) and ok
        return ok

    def arranged(self, rerun: set[int], position: int) -> tuple[int, ...]:
        """Return recomputations in order, each fetch just before the first that reads it."""
        sequence = sorted(rerun)
        if sequence[0] >= 0:
            return tuple(sequence)
        fetches = {fetched_by(i): i for i in sequence if i < 0}
        result: list[int] = []
        for index in sequence:
            if index >= 0:
                result.extend(fetches.pop(b) for b in self.reads[index] if b in fetches)
                result.append(index)
        return (*result, *fetches.values())

    def hold_nothing(self) -> None:
        """Drop every buffer wherever that is possible."""
        for buffer, intervals in enumerate(self.intervals):
            if intervals and not self.is_fixed[buffer]:
                start = intervals[0][0]
                due = [(max(d - 1, start), d) for d in self.due.get(buffer, ())]
                new: list[Interval] = [i for i in due if i[1] > i[0]]
                mark = self.mark()
                if not self.set_intervals(buffer, new):
                    self.undo_to(mark)


def link_seconds(link: Link, num_bytes: int, is_stored: bool) -> float:
    """Return how long the link is busy for one absence of a buffer."""
    write = 0.0 if is_stored else link.write_seconds(num_bytes)
    return write + link.read_seconds(num_bytes)


@dataclass(frozen=True)
class Seed:
    """An order from which intervals are made, and the view whose ids it has."""

    view: View
    order: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """Intervals, and the best schedule that they led to."""

    found: Found
    view: View
    retention: TransferRetention


class OffloadSearch:
    """Plans one graph on one device, for any number of budgets."""

    def __init__(
        self, graph: StepGraph, device: Device, views: Callable[[], Sequence[View]]
    ) -> None:
        """Prepare the search.

        Args:
            graph: the step; with `stored` buffers, these are streamed.
            device: `links[0]` is used.
            views: returns views of the same graph, with nothing stored, when first needed.
        """
        self.graph, self.device, self.link = graph, device, device.links[0]
        self.stored = frozenset(graph.stored)
        self._views = views
        self._is_small = len(graph.operations) <= MAX_SWEPT
        self._hurries = HURRIES if self._is_small else FEW_HURRIES
        kept = {*graph.forward_outputs} | graph.resident | self.stored
        self._movable = [b.id for b in graph.buffers if b.id not in kept and b.bytes > 0]
        self._maker = {b: o for o in graph.operations for b in o.creates}

    @cached_property
    def _plain(self) -> list[Seed]:
        order = tuple(range(len(self.graph.operations)))
        return [
            Seed(View(replace(v.graph, stored=self.graph.stored), v.old_ids, []), order)
            for v in self._views()
        ]

    def _seed_of(self, schedule: Schedule) -> Seed:
        """Return the order of a schedule of this graph, its first runs numbered as they come."""
        order = [i.target for i in schedule.instructions if i.action is Action.COMPUTE]
        old_ids = list(dict.fromkeys(order))
        new_ids = {old: new for new, old in enumerate(old_ids)}
        operations = tuple(replace_id(self.graph.operations[old], new_ids[old]) for old in old_ids)
        view = View(replace(self.graph, operations=operations), old_ids, [])
        return Seed(view, tuple(new_ids[old] for old in order))

    # -- what to fetch

    def _seconds_of(self, buffer: int) -> float:
        """Return how long the link is busy for one absence of a buffer."""
        return link_seconds(self.link, self.graph.buffers[buffer].bytes, buffer in self.stored)

    def _price(self, of_waiting: float) -> float:
        """Return the price of a second of the link: what it takes from computing, and waiting."""
        return self.link.compute_share + (1 - self.link.compute_share) * of_waiting

    def _worth(self, price: float, smallest_bytes: float) -> frozenset[int]:
        """Return the buffers whose fetch, at a price of the link, costs less than recomputing."""
        found = set(self.stored)
        for buffer in self._movable:
            maker = self._maker[buffer]
            if self.graph.buffers[buffer].bytes >= smallest_bytes:
                if not maker.can_recompute or maker.seconds >= price * self._seconds_of(buffer):
                    found.add(buffer)
        return frozenset(found)

    def _replacements(self, seed: Seed, smallest_bytes: float) -> Iterator[frozenset[int]]:
        """Yield ever larger sets of what an order recomputes, the dearest to recompute first."""
        counts = Counter(seed.order)
        again = {seed.view.old_ids[i]: count - 1 for i, count in counts.items() if count > 1}
        cost = {}
        for buffer in self._movable:
            maker = self._maker[buffer]
            if maker.id in again and self.graph.buffers[buffer].bytes >= smallest_bytes:
                cost[buffer] = again[maker.id] * maker.seconds / self._seconds_of(buffer)
        ranked = sorted(cost, key=lambda b: (-cost[b], self._maker[b].id, b))
        total = sum(self._seconds_of(b) for b in ranked)
        for part in PARTS:
            chosen, left = set(self.stored), part * total
            for buffer in ranked:
                left -= self._seconds_of(buffer)
                if left < 0:
                    break
                chosen.add(buffer)
            yield frozenset(chosen)

    # -- one schedule

    def judged(
        self, view: View, order: Sequence[int], budget_bytes: int,
        hurries: Sequence[float] = HURRIES,
    ) -> Found:
        """Return the fastest schedule behind an order, over some hurries."""
        placement = Placement(view.graph, order, self.link)
        tried = hurries if placement.residences else hurries[:1]
        placed = [placement.schedule(budget_bytes, hurry) for hurry in tried]
        schedule = restore_ids(min(placed, key=lambda p: p[1])[0], view.old_ids)
        timeline = simulate(self.graph, schedule, self.device)
        return Found(schedule, timeline.seconds, timeline.peak_bytes)

    def plain(self) -> Found:
        """Return the fastest step without recomputation, in as much memory as it likes."""
        order = tuple(range(len(self.graph.operations)))
        best: Found | None = None
        for seed in [Seed(View(self.graph, list(order), []), order), *self._plain]:
            retention = TransferRetention(seed.view.graph, self.link, self.stored, 1.0)
            retention.load(order)
            effort = Effort(0)
            effort.more(retention, 10 * EVALUATIONS)
            improve(retention, UNLIMITED_BYTES, effort)
            found = self.judged(seed.view, retention.order(), UNLIMITED_BYTES)
            if best is None or found.seconds < best.seconds:
                best = found
        assert best is not None
        return best

    # -- one budget

    def fastest(self, budget_bytes: int, recomputing: Iterable[Schedule]) -> list[Found]:
        """Return schedules within a budget, the last one the fastest; empty if none was found.

        Args:
            budget_bytes: for what the schedule allocates.
            recomputing: schedules without transfers of about this budget, to start from.
        """
        seeds = [self._seed_of(schedule) for schedule in recomputing]
        trials = self._sweep(seeds, budget_bytes)
        trials.sort(key=lambda t: _rank(t.found, budget_bytes))
        num_moves = (MANY_MOVES if self._is_small else MOVES) // POLISHED
        polished = [self._polished(t, budget_bytes, num_moves) for t in trials[:POLISHED]]
        found = [t.found for t in (*trials, *polished) if t.found.peak_bytes <= budget_bytes]
        return sorted(found, key=lambda f: -f.seconds)

    def _sweep(self, seeds: list[Seed], budget_bytes: int) -> list[Trial]:
        smallest_bytes = SMALL_SHARE * budget_bytes
        plain = self._plain if self._is_small else self._plain[:1]
        tried = [
            (seed, self._worth(price, smallest_bytes), price)
            for price in map(self._price, STREAMING_PRICES if self.stored else PRICES)
            for seed in [*plain, *seeds]
        ]
        # Streamed steps wait for parameters more than they recompute.
        for seed in [] if self.stored and not self._is_small else seeds:
            sets = list(self._replacements(seed, smallest_bytes))[:: 1 if self._is_small else 2]
            tried.extend((seed, fetched, self._price(REPLACING_PRICE)) for fetched in sets)
        trials: list[Trial] = []
        ranks: list[tuple[tuple[bool, float, int], int]] = []
        for number, (seed, fetched, price) in enumerate(tried):
            trial = self._trial(seed, fetched, price, budget_bytes, 1.0)
            if trial is not None:
                trials.append(trial)
                ranks.append((_rank(trial.found, budget_bytes), number))
        # Transfers need memory besides: leave some, from large graphs' seeds at their best price.
        best_of_seed: dict[int, int] = {}
        for _, number in sorted(ranks):
            best_of_seed.setdefault(number if self._is_small else id(tried[number][0]), number)
        for number in best_of_seed.values():
            seed, fetched, price = tried[number]
            for share in STREAMING_SHARES if self.stored else SHARES:
                trial = self._trial(seed, fetched, price, budget_bytes, share)
                if trial is not None:
                    trials.append(trial)
        return trials

    def _trial(
        self, seed: Seed, fetched: frozenset[int], price: float, budget_bytes: int, share: float
    ) -> Trial | None:
        retention = TransferRetention(seed.view.graph, self.link, fetched, price)
        retention.load(seed.order)
        effort = Effort(0)
        effort.more(retention, EVALUATIONS)
        if not repair(retention, int(share * budget_bytes), effort):
            return None
        improve(retention, int(share * budget_bytes), effort)
        found = self.judged(seed.view, retention.order(), budget_bytes, self._hurries)
        return Trial(found, seed.view, retention)

    def _polished(self, trial: Trial, budget_bytes: int, num_moves: int) -> Trial:
        """Make small changes and keep what turned out faster.

        In turn: fetch a buffer instead of recomputing it (or the reverse), and drop a few buffers
        at random and refill, now and then leaving more memory for transfers.
        """
        retention, best = trial.retention, trial.found
        generator = random.Random(SEED)
        effort = Effort(0)
        tabu: set[int] = set()
        for move in range(num_moves):
            if best.seconds <= self.graph.seconds:
                break
            limit = int(budget_bytes * generator.choice((1.0, 1.0, 0.93)))
            mark = retention.mark()
            effort.more(retention, EVALUATIONS // 10)
            buffer = self._next_to_turn(retention, tabu) if move % 2 == 0 else None
            if buffer is not None:
                tabu.add(buffer)
                feasible = retention.turn(buffer) and repair(retention, limit, effort)
                if feasible:
                    improve(retention, limit, effort)
            else:
                held = droppable(retention)
                feasible = bool(held) and ruin_and_recreate(
                    retention, held, limit, effort, generator
                )
            if feasible:
                found = self.judged(trial.view, retention.order(), budget_bytes, self._hurries)
                if _rank(found, budget_bytes) < _rank(best, budget_bytes):
                    best = found
                    continue
            retention.undo_to(mark)
        found = self.judged(trial.view, retention.order(), budget_bytes)
        best = min(best, found, key=lambda f: _rank(f, budget_bytes))
        return Trial(best, trial.view, retention)

    def _next_to_turn(self, retention: TransferRetention, tabu: set[int]) -> int | None:
        """Return the buffer that costs most and was not turned yet: by turns of both kinds."""
        best: tuple[float, int] | None = None
        for buffer in self._movable:
            places = retention.rerun_at.get(retention.maker[buffer])
            if buffer in tabu or not places:
                continue
            maker = self._maker[buffer]
            fetch = self._seconds_of(buffer)
            if buffer in retention.fetched:
                if not maker.can_recompute:
                    continue
                gain = len(places) * (fetch - maker.seconds)
            else:
                gain = len(places) * maker.seconds
            if best is None or (gain, -buffer) > best:
                best = (gain, -buffer)
        return None if best is None else -best[1]

    def smallest(self) -> list[Found]:
        """Return schedules with small peaks."""
        found = []
        fetched = self._worth(0.0, 0.0)
        for seed in self._plain:
            retention = TransferRetention(seed.view.graph, self.link, fetched, 1.0)
            retention.load(seed.order)
            effort = Effort(0)
            effort.more(retention, 2 * EVALUATIONS)
            retention.hold_nothing()
            lower(retention, effort)
            found.append(self.judged(seed.view, retention.order(), retention.peak_bytes))
        return found


def _rank(found: Found, budget_bytes: int) -> tuple[bool, float, int]:
    return found.peak_bytes > budget_bytes, found.seconds, found.peak_bytes
