"""Which way to run a step is fastest within the budget: what is tried, and when to stop.

Moves say themselves which settings they have and what those do; here is policy only. For each
setting of what changes the batch, the joint graph is rewritten by one move after the other, each on
top of what helped so far, and each of these graphs is planned with every placement. All ways are
planned by the one planner and the fastest that fits is taken. Ways that change how sums are
rounded must be faster by a margin than ways that keep every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from packlight.errors import InfeasibleBudgetError, UnsupportedModelError
from packlight.moves.draft import Draft
from packlight.moves.move import ROUNDING_MARGIN, Effect, Move, Refusal, Room, Stage
from packlight.moves.registry import of_package, of_stage, techniques_of
from packlight.search.plan_way import HopelessError, Moves, WayPlanner
from packlight.search.ready import Ready

# Budgets named in turn, each because the one before it was not met.
MOST_CONFIRMATIONS = 4


class Search:
    """Looks through the ways to run one batch's step.

    Args:
        planner: plans them.
        any_will_do: end with the first way found that fits.

    Attributes:
        not_made: what was not possible -> why.
    """

    def __init__(self, planner: WayPlanner, any_will_do: bool = False) -> None:
        self.planner, self.any_will_do = planner, any_will_do
        self.not_made: dict[str, str] = {}
        self.found: dict[Moves, Ready] = {}
        self.errors: list[InfeasibleBudgetError] = []
        # Ways that cannot fit whatever the schedule, by what is not rewriting: how much they would
        # need takes long to find out, and matters only if nothing fits.
        self.hopeless: dict[Moves, list[Moves]] = {}

    def fastest(self) -> Ready:
        """Return the fastest way found.

        Raises:
            InfeasibleBudgetError: there is none.
        """
        too_little: Moves = ()
        for start in self._starts():
            if self.found and self.planner.is_full_untraced(start):
                break  # gradients are accumulated: more microbatches hold no less
            try:
                ways = self._from(start)
            except UnsupportedModelError as error:
                if not start:
                    raise
                # Some models do not run on so few rows.
                count = self.planner.num_repeats(start)
                self.not_made[start[-1].name] = f"{count} of them: {error}"
                break
            if self.found and not ways and self._is_full_at_once(start):
                break
            self.found.update(ways)
            if self.found and self.any_will_do:
                return next(iter(self.found.values()))
            if not self.found:
                too_little = start
            if ways and self._is_enough(ways.values()):
                break
        self._look_between(too_little)
        if not self.found:
            self._explain_hopeless()
            smallest = min(self.errors, key=lambda error: error.smallest_bytes)
            raise smallest if self.any_will_do else self._with_reasons(self._confirmed(smallest))
        rehearsed: set[Moves] = set()
        while True:
            # A rehearsal takes several steps: only ways that may win are worth it. The others stay
            # with times estimated from calls alone.
            best = min(self.found, key=lambda moves: self.found[moves].way.handicapped_seconds)
            if best in rehearsed or not self.planner.is_rehearsing:
                return self.found[best]
            rehearsed.add(best)
            try:
                self.found[best] = self.planner.way(best, rehearses=True)
            except InfeasibleBudgetError:
                pass  # other times led the search elsewhere: what was found before still fits

    def _is_enough(self, latest: Iterable[Ready]) -> bool:
        """Whether smaller batches, which have to be traced first, are not worth looking at."""
        way = min((ready.way for ready in latest), key=lambda w: w.handicapped_seconds)
        best = min(ready.way.handicapped_seconds for ready in self.found.values())
        return way.slowdown <= ROUNDING_MARGIN or way.handicapped_seconds > 1.1 * best

    def _look_between(self, too_little: Moves) -> None:
        """Look between the strongest batch setting that did not fit and the mildest that did."""
        if not self.found:
            return
        fits = min((moves for moves in self.found), key=lambda m: self.planner.num_repeats(m))
        mildest = self._start_of(fits)
        while mildest:
            mild = too_little[-1] if too_little else None
            between = type(mildest[-1]).between(mild, mildest[-1])
            if between is None:
                return
            start = (*mildest[:-1], between)
            ways = self._from(start)
            self.found.update(ways)
            too_little, mildest = (too_little, start) if ways else (start, mildest)

    def _start_of(self, moves: Moves) -> Moves:
        return tuple(move for move in moves if move.stage is Stage.BATCH)

    # -- what to try

    def _draft(self, moves: Moves = ()) -> Draft:
        return self.planner.draft(moves)

    def _is_allowed(self, move: type[Move]) -> bool:
        request = self.planner.request
        if move.effect is Effect.APPROXIMATE and request.allow.isdisjoint(techniques_of(move)):
            return False
        if move.name not in request.moves:
            is_missed = move.stage is not Stage.PLACEMENT and not move.is_on_request
            if is_missed:  # (most steps have nowhere else to place anything)
                self.not_made[move.name] = "not among the moves"
            return False
        return True

    def _settings(self, move: type[Move], base: Moves, room: Room) -> Iterator[Move]:
        """Yield a move's settings on top of others; remember what it refuses."""
        if not self._is_allowed(move):
            return
        with of_package(move):
            for setting in move.space(self._draft(base), room):
                if isinstance(setting, Refusal):
                    self.not_made[setting.what or move.name] = setting.reason
                else:
                    yield setting

    def _starts(self) -> Iterator[Moves]:
        """Yield what becomes of the batch: it runs as a whole, or in ever smaller parts."""
        yield ()
        room = Room(self.planner.left_bytes(()), self.found)
        for move in of_stage(Stage.BATCH):
            for setting in self._settings(move, (), room):
                yield (setting,)

    def _from(self, start: Moves) -> dict[Moves, Ready]:
        """Return the ways that fit with one start, the whole graph's first."""
        found: dict[Moves, Ready] = {}
        base = start
        for move in of_stage(Stage.GRADIENTS):
            room = Room(self.planner.left_bytes(base), found)
            base = (*base, *self._settings(move, base, room))
        room = Room(self.planner.left_bytes(base), found)
        self._place(base, room, found)
        for move in of_stage(Stage.GRAPH):
            if room.has_plain and not move.may_save_time:
                continue
            tried = [base]
            for setting in self._settings(move, base, room):
                tried.append((*base, setting))
                self._place(tried[-1], room, found)
            base = self._best_of(tried, found)
        return found

    def _place(self, base: Moves, room: Room, found: dict[Moves, Ready]) -> None:
        """Plan a rewritten graph with every placement, each on top of those before it."""
        bases = [base]
        for move in of_stage(Stage.PLACEMENT):
            placed = []
            for one in bases:
                for setting in self._settings(move, one, room):
                    placed.append((*one, setting))
                    self._try(placed[-1], found)
            bases = placed or bases
        if bases == [base]:
            self._try(base, found)

    def _best_of(self, tried: Sequence[Moves], found: Mapping[Moves, Ready]) -> Moves:
        """Return the rewritings that later moves start from: the fastest, else the latest."""
        best: tuple[float, Moves] | None = None
        for base in tried:
            for moves, ready in found.items():
                is_on_base = tuple(m for m in moves if m.stage < Stage.PLACEMENT) == base
                if is_on_base and (best is None or ready.seconds < best[0]):
                    best = (ready.seconds, base)
        return tried[-1] if best is None else best[1]

    def _try(self, moves: Moves, found: dict[Moves, Ready]) -> None:
        if self._is_full_at_once(moves):
            self._note_hopeless(moves)
            return
        try:
            found[moves] = self.planner.way(moves)
        except HopelessError:
            self._note_hopeless(moves)
        except InfeasibleBudgetError as error:
            self.errors.append(error)

    def _note_hopeless(self, moves: Moves) -> None:
        kind = tuple(move for move in moves if move.stage is not Stage.GRAPH)
        self.hopeless.setdefault(kind, []).append(moves)

    def _is_full_at_once(self, moves: Moves) -> bool:
        """Whether a way holds as much as the budget before it starts."""
        budget_bytes = self.planner.request.budget_bytes
        return budget_bytes is not None and self.planner.resident_bytes(moves) >= budget_bytes

    # -- what to say where nothing fits

    def _explain_hopeless(self) -> None:
        """Find out how much those would need that may need least, the most rewritten ones first.

        Rewriting costs a little where what it cuts is not the most that is held, so of each kind
        the least thoroughly rewritten is looked at, too.
        """
        ends = [*(ways[-1] for ways in self.hopeless.values()),
                *(ways[0] for ways in self.hopeless.values())]
        for moves in sorted(dict.fromkeys(ends), key=self.planner.resident_bytes):
            smallest = min((e.smallest_bytes for e in self.errors), default=math.inf)
            if self.planner.resident_bytes(moves) < smallest:
                try:
                    self.planner.way(moves, hopeless_above=smallest)
                except HopelessError:
                    pass
                except InfeasibleBudgetError as error:
                    self.errors.append(error)

    def _confirmed(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        """Return an error that names a budget for which a search finds a way.

        What is tried depends on the budget (how many chunks, how many layers): what fits in the one
        that was named may not be looked at when it is asked for.
        """
        named = error
        for _ in range(MOST_CONFIRMATIONS):
            try:
                Search(self.planner.asking(named.smallest_bytes), any_will_do=True).fastest()
                break
            except InfeasibleBudgetError as larger:
                named = larger
        return InfeasibleBudgetError(
            error.budget_bytes, named.smallest_bytes, named.peak_operation, named.peak_buffers,
            error.hint,
        )

    def _with_reasons(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        hints = [f"without {name}: {why}" for name, why in self.not_made.items()]
        hint = "\n  ".join(filter(None, [error.hint, *hints]))
        return InfeasibleBudgetError(
            error.budget_bytes, error.smallest_bytes, error.peak_operation, error.peak_buffers, hint
        )
