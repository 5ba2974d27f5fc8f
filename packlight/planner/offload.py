"""Plans that hold, recompute or transfer: which of the three for what, and what that costs.

A buffer that is not in memory where it is needed comes back by one of its makers: its computation
runs again, or a read brings it from another memory. `TransferRetention` knows for each buffer which
of them and gives it a price in seconds: a recomputation costs its seconds, a read the seconds that
the lanes work for it and its write, times the price of a second of the lanes. With price p, those
buffers are read whose computations take more than p seconds per second of the lanes; the rest is
recomputed. The local moves of `refine.py` then decide where to hold what, as they do without
transfers.

The lanes' right price (0: they are idle anyway; 1: operations always wait for them) and how much
memory transfers need besides are not known beforehand: several of both are tried, placed in time
(`placement.py`, `transfers.py`) and judged by the simulator. What waits or recomputes most in the
best of them is then changed one by one. Joint planning of both is due to POFO (Beaumont et al.
2021), whose dynamic program works on chains; this works on any graph.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from packlight.planner.intervals import Interval
from packlight.planner.placement import Placement, peak_of_reading_anew
from packlight.planner.refine import (
    Effort,
    droppable,
    improve,
    lower,
    repair,
    ruin_and_recreate,
)
from packlight.planner.rests import with_reads
from packlight.planner.retention import Retention
from packlight.planner.routes import Routes
from packlight.planner.search import Found, View
from packlight.planner.segments import replace_id, restore_ids
from packlight.planner.transfers import UNLIMITED_BYTES, scheduled
from packlight.step import Machine, Operation, Schedule, StepGraph, simulate

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
    """Intervals, where some of the buffers that are not held are read instead of recomputed.

    To it, a read is an operation that reads nothing and makes a buffer.

    Attributes:
        moved: the buffers that are read.
    """

    def __init__(
        self, graph: StepGraph, routes: Routes, moved: Iterable[int], price: float
    ) -> None:
        super().__init__(graph)
        self.moved: set[int] = set()
        self._routes = routes
        num = len(routes.brings)
        self.reads += [()] * num
        self.overwrites += [()] * num
        self.can_recompute += [True] * num
        self.first_chance += [-1] * num
        self.last_chance += [self.num_positions] * num
        self.creates += routes.brings
        self.grows += [sum(self.size[b] for b in brought) for brought in routes.brings]
        self.seconds += [price * seconds for seconds in routes.transfer_seconds]
        self._was_fixed = list(self.is_fixed)
        for buffer in moved:
            self._turn(buffer)

    def _turn(self, buffer: int) -> None:
        if buffer not in self.moved:
            self.moved.add(buffer)
            self.comes_from(buffer, self._routes.read(buffer).id, is_fixed=False)
        else:
            self.moved.discard(buffer)
            self.comes_from(buffer, self.origin[buffer], self._was_fixed[buffer])

    def turn(self, buffer: int) -> bool:
        """Read a buffer instead of recomputing it, or the reverse; return whether that can be."""
        places = set(self.rerun_at.get(self.maker[buffer], ()))
        self._journal.append((buffer, None, None))
        self._turn(buffer)
        ok = True
        for position in sorted(places):
            ok = self.evaluate(position) and ok
        return ok

    def arranged(self, rerun: list[int], position: int) -> tuple[int, ...]:
        """Return recomputations in order, each read just before the first that uses it."""
        num, sequence = self.num_positions, sorted(rerun)
        if sequence[-1] < num:
            return tuple(sequence)
        reads = {self.creates[i][0]: i for i in sequence if i >= num}
        result: list[int] = []
        for index in sequence:
            if index < num:
                result.extend(reads.pop(b) for b in self.reads[index] if b in reads)
                result.append(index)
        return (*result, *sorted(reads.values(), key=lambda i: -self.creates[i][0]))

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
    """Plans one graph with transfers on one machine, for any number of budgets."""

    def __init__(
        self, graph: StepGraph, machine: Machine, views: Callable[[], Sequence[View]]
    ) -> None:
        """Prepare the search.

        Args:
            graph: the step; what rests in another memory is streamed.
            machine: with the lanes of its transfers.
            views: returns views of the same computations, when first needed.
        """
        self.graph, self.machine, self.routes = graph, machine, Routes(graph, machine)
        self.resting = self.routes.resting
        self._views = views
        self._is_small = graph.num_computations <= MAX_SWEPT
        self._hurries = HURRIES if self._is_small else FEW_HURRIES
        kept = {*graph.forward_outputs} | self.resting
        self._movable = [b for b in self.routes.of if b not in kept]
        self._maker = {b: graph.makers(b)[0] for b in self._movable}
        self._moved_ids = list(range(graph.num_computations, len(graph.operations)))

    @cached_property
    def _plain(self) -> list[Seed]:
        order = tuple(range(self.graph.num_computations))
        return [
            Seed(self._view(v.graph.computations, v.old_ids), order) for v in self._views()
        ]

    def _view(self, computations: Sequence[Operation], old_ids: Sequence[int]) -> View:
        """Return the graph with its computations in another order."""
        graph = self.graph.with_computations(computations)
        return View(graph, [*old_ids, *self._moved_ids], [])

    def _seed_of(self, schedule: Schedule) -> Seed:
        """Return the order of a schedule of this graph, its first runs numbered as they come."""
        order = [run for run in schedule.runs() if run < self.graph.num_computations]
        old_ids = list(dict.fromkeys(order))
        new_ids = {old: new for new, old in enumerate(old_ids)}
        computations = [replace_id(self.graph.operations[old], new_ids[old]) for old in old_ids]
        return Seed(self._view(computations, old_ids), tuple(new_ids[old] for old in order))

    # -- what to read instead of recomputing it

    def _worth(self, price: float, smallest_bytes: float) -> frozenset[int]:
        """Return the buffers whose read, at a price of the lanes, costs less than recomputing."""
        found = set(self.resting)
        for buffer in self._movable:
            maker = self._maker[buffer]
            if self.graph.buffers[buffer].bytes >= smallest_bytes:
                if not maker.can_recompute or maker.seconds >= price * self.routes.seconds(buffer):
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
                cost[buffer] = again[maker.id] * maker.seconds / self.routes.seconds(buffer)
        ranked = sorted(cost, key=lambda b: (-cost[b], self._maker[b].id, b))
        total = sum(self.routes.seconds(b) for b in ranked)
        for part in PARTS:
            chosen, left = set(self.resting), part * total
            for buffer in ranked:
                left -= self.routes.seconds(buffer)
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
        placement = Placement(view.graph, order, self.routes)
        tried = hurries if placement.residences else hurries[:1]
        placed = [scheduled(placement, budget_bytes, hurry) for hurry in tried]
        schedule = restore_ids(min(placed, key=lambda p: p[1])[0], view.old_ids)
        timeline = simulate(self.graph, schedule, self.machine)
        if self.routes.overflow(timeline):
            return Found(schedule, math.inf, UNLIMITED_BYTES)
        return Found(schedule, timeline.seconds, timeline.peak_bytes)

    def plain(self) -> Found:
        """Return the fastest step without recomputation, in as much memory as it likes."""
        order = tuple(range(self.graph.num_computations))
        best: Found | None = None
        for seed in [Seed(self._view(self.graph.computations, order), order), *self._plain]:
            retention = TransferRetention(seed.view.graph, self.routes, self.resting, 1.0)
            retention.load(order)
            effort = Effort(0)
            effort.more(retention, 10 * EVALUATIONS)
            improve(retention, UNLIMITED_BYTES, effort)
            found = self.judged(seed.view, retention.order(), UNLIMITED_BYTES)
            if best is None or found.seconds < best.seconds:
                best = found
        assert best is not None
        return best

    def peak_of_reading_anew(self) -> int:
        """See `placement.peak_of_reading_anew`."""
        return peak_of_reading_anew(self.graph, self.routes)

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
        found = [t.found for t in (*trials, *polished)]
        for seed in [self._plain[0], *seeds] if self.resting else []:
            for again in (False, True):
                order = with_reads(seed.view.graph, self.routes, seed.order, again)
                found.append(self.judged(seed.view, order, budget_bytes, self._hurries))
        fitting = [one for one in found if one.peak_bytes <= budget_bytes]
        return sorted(fitting, key=lambda f: -f.seconds)

    def _sweep(self, seeds: list[Seed], budget_bytes: int) -> list[Trial]:
        smallest_bytes = SMALL_SHARE * budget_bytes
        plain = self._plain if self._is_small else self._plain[:1]
        tried = [
            (seed, self._worth(price, smallest_bytes), price)
            for price in map(self.routes.price, STREAMING_PRICES if self.resting else PRICES)
            for seed in [*plain, *seeds]
        ]
        # Streamed steps wait for parameters more than they recompute.
        for seed in [] if self.resting and not self._is_small else seeds:
            sets = list(self._replacements(seed, smallest_bytes))[:: 1 if self._is_small else 2]
            tried.extend((seed, moved, self.routes.price(REPLACING_PRICE)) for moved in sets)
        trials: list[Trial] = []
        ranks: list[tuple[tuple[bool, float, int], int]] = []
        for number, (seed, moved, price) in enumerate(tried):
            trial = self._trial(seed, moved, price, budget_bytes, 1.0)
            if trial is not None:
                trials.append(trial)
                ranks.append((_rank(trial.found, budget_bytes), number))
        # Transfers need memory besides: leave some, from large graphs' seeds at their best price.
        best_of_seed: dict[int, int] = {}
        for _, number in sorted(ranks):
            best_of_seed.setdefault(number if self._is_small else id(tried[number][0]), number)
        for number in best_of_seed.values():
            seed, moved, price = tried[number]
            for share in STREAMING_SHARES if self.resting else SHARES:
                trial = self._trial(seed, moved, price, budget_bytes, share)
                if trial is not None:
                    trials.append(trial)
        return trials

    def _trial(
        self, seed: Seed, moved: frozenset[int], price: float, budget_bytes: int, share: float
    ) -> Trial | None:
        retention = TransferRetention(seed.view.graph, self.routes, moved, price)
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

        In turn: read a buffer instead of recomputing it (or the reverse), and drop a few buffers
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
            if buffer in retention.moved:
                if not maker.can_recompute:
                    continue
                gain = len(places) * (self.routes.seconds(buffer) - maker.seconds)
            else:
                gain = len(places) * maker.seconds
            if best is None or (gain, -buffer) > best:
                best = (gain, -buffer)
        return None if best is None else -best[1]

    def smallest(self) -> list[Found]:
        """Return schedules with small peaks."""
        found = []
        moved = self._worth(0.0, 0.0)
        for seed in self._plain:
            retention = TransferRetention(seed.view.graph, self.routes, moved, 1.0)
            retention.load(seed.order)
            effort = Effort(0)
            effort.more(retention, 2 * EVALUATIONS)
            retention.hold_nothing()
            lower(retention, effort)
            found.append(self.judged(seed.view, retention.order(), retention.peak_bytes))
        return found


def _rank(found: Found, budget_bytes: int) -> tuple[bool, float, int]:
    return found.peak_bytes > budget_bytes, found.seconds, found.peak_bytes
