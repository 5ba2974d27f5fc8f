"""One plan for all ranks: they compare what they were asked for, one of them plans, all check.

    each rank    traces its step; what it was asked for and its graph are compared, whoever differs
                 is named
    rank 0       searches; each way that it looks at, the others look at, too, so that the slowest
                 rank's costs count
    all          get the way as JSON, bind it to their own capture, and have `simulate` judge it

Ranks whose part of the batch has another size have another graph. The first rank with each graph
plans for those that share it; buckets of gradients are those of rank 0 on all of them. Where
parameters lie in pieces, all ranks run the schedule of the largest part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packlight.capture.whole_step import WholeStep
from packlight.costs.profiler import Known
from packlight.errors import BatchError, MicrobatchError
from packlight.moves.data_parallel import DataParallel
from packlight.moves.draft import Draft
from packlight.ranks.group import Ranks
from packlight.search.identity import Identity, compare, compare_graphs
from packlight.search.other_rows import Order, for_other_rows
from packlight.search.plan_way import Moves, WayPlanner, environment
from packlight.search.ready import Ready
from packlight.search.restore import restored
from packlight.search.saved import way_from_json, way_to_json
from packlight.search.slowest import slowest
from packlight.search.way import Way
from packlight.step import Schedule


def agreed(planner: WayPlanner, find: Callable[[], Ready]) -> Ready:
    """Return how this rank runs its part of the step; called on all ranks at once.

    Args:
        planner: of this rank's part of the batch.
        find: looks for the fastest way, on the ranks that plan.

    Raises:
        RankMismatchError: ranks were asked for different things.
        Exception: planning failed on one rank: its error, on all.
    """
    ranks = planner.request.ranks
    assert ranks is not None
    identities = ranks.gather(lambda: Identity.of(planner))
    compare(identities)
    planner.costs.are_compared = True
    leader_of = {
        digest: next(rank for rank, other in enumerate(identities) if other.digest == digest)
        for digest in dict.fromkeys(identity.digest for identity in identities)
    }
    compare_graphs(ranks, planner, identities)
    if planner.request.shards:  # all gather parameters in one order: that of one schedule
        most = max(range(ranks.size), key=lambda rank: identities[rank].num_rows or 0)
        leader_of = {identities[most].digest: most}
    mine: Ready | None = None
    for digest, leader in leader_of.items():
        team = _Team(ranks, planner, identities, digest, leader)
        found = team.led(find) if ranks.rank == leader else team.follow()
        mine = found or mine
        planner.costs.agreed_buckets = team.buckets
    planner.costs.agreed_buckets = None
    assert mine is not None, "every rank is in one team"
    return mine


# -- one plans, the others look


@dataclass(frozen=True)
class _Observe:
    moves: Moves
    size: int | None


@dataclass(frozen=True)
class _Ask:
    """A question about the whole step, which runs the model: its ranks talk to one another."""

    question: Callable[[Draft], Any]


@dataclass(frozen=True)
class _Rehearse:
    moves: Moves
    size: int | None
    schedule: Schedule


@dataclass(frozen=True)
class _Found:
    """What the planning rank found: a way as JSON text, and what was agreed on the way."""

    way: str
    known: Known
    order: Order


@dataclass(frozen=True)
class _Failed:
    """It found nothing; the error is gathered."""


class _Team:
    """Ranks with one graph: one of them plans, all of them look at what it looks at.

    Ranks that are not in the team listen; with parameters in pieces they run the same schedule for
    another number of rows.

    Attributes:
        buckets: of gradients, once a way was found.
    """

    def __init__(
        self, ranks: Ranks, planner: WayPlanner, identities: Sequence[Identity], digest: str,
        leader: int,
    ) -> None:
        self.ranks, self.planner, self.leader = ranks, planner, leader
        self.num_rows = identities[ranks.rank].num_rows
        self.is_in_it = identities[ranks.rank].digest == digest
        self.buckets: tuple[tuple[str, ...], ...] | None = None
        self._observed: set[tuple[Moves, int | None]] = set()

    # -- on the rank that plans (see `Partners`)

    def led(self, find: Callable[[], Ready]) -> Ready:
        """Return the way found, once all others have bound it."""
        self.planner.partners = self
        if self.planner.request.is_tensor_parallel:
            self.planner.costs.ask_together = self._ask
        error: Exception | None = None
        try:
            ready = find()
        except Exception as raised:
            error = raised
            self._say(_Failed())
        finally:
            self.planner.partners = self.planner.costs.ask_together = None
        if error is not None:
            self._raise(error)
        order = Order.of(ready, self.leader, self.num_rows)
        self._say(_Found(way_to_json(ready.way), self.planner.profiler.known, order))
        self._note(ready.way)
        self.ranks.gather(lambda: None)
        return ready

    def observe(self, moves: Moves, size: int | None) -> None:
        """Have the profiler know what calls cost on the slowest rank."""
        if (moves, size) in self._observed:
            return
        self._observed.add((moves, size))
        self._say(_Observe(moves, size))
        self.planner.profiler.take(slowest(self.ranks.gather(lambda: self._seen(moves, size))))

    def rehearse(
        self, moves: Moves, size: int | None, step: WholeStep, schedule: Schedule
    ) -> dict[int, float]:
        """Return seconds of operations inside a step, on the slowest rank."""
        self._say(_Rehearse(moves, size, schedule))
        draft = self.planner.draft(moves, size)
        everybody = self.ranks.gather(lambda: self.planner.rehearsal(draft, step, schedule))
        return {
            index: max(seconds.get(index, 0.0) for seconds in everybody)
            for index in everybody[self.leader]
        }

    def _ask(self, question: Callable[[Draft], Any]) -> Any:
        self._say(_Ask(question))
        answer = self._answer(question)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _say(self, message: Any) -> None:
        self.ranks.broadcast(message, self.leader)

    # -- on the others

    def follow(self) -> Ready | None:
        """Look at what the planning rank looks at; return the way bound to this rank's step."""
        while True:
            message: Any = self.ranks.broadcast(None, self.leader)
            if isinstance(message, _Failed):
                self._raise(None)
            if isinstance(message, _Found):
                found: list[Ready | None] = []
                self.ranks.gather(lambda: found.append(self._bound(message)))  # noqa: B023
                return found[0]
            try:
                if isinstance(message, _Observe):
                    seen = self.ranks.gather(lambda: self._seen(message.moves, message.size))  # noqa: B023
                    if self.is_in_it:
                        self.planner.profiler.take(slowest(seen))
                elif isinstance(message, _Ask):
                    self._answer(message.question)
                else:
                    self.ranks.gather(lambda: self._rehearsed(message))  # noqa: B023
            except Exception:  # the planning rank has it, too, and goes on or fails
                continue

    def _bound(self, found: _Found) -> Ready | None:
        way = way_from_json(found.way)
        self._note(way)
        if not self.is_in_it:
            if not self.planner.request.shards:
                return None
            return for_other_rows(way, found.order, self.planner, self.num_rows)
        self.planner.profiler.take(found.known)
        # Its seconds are the slowest rank's, wherever that is.
        here = environment(self.planner.costs.device)
        return restored(replace(way, environment=here), self.planner)

    def _rehearsed(self, message: _Rehearse) -> dict[int, float]:
        if not self.is_in_it:
            return {}
        draft = self.planner.draft(message.moves, message.size)
        return self.planner.rehearsal(draft, self.planner.completed(draft), message.schedule)

    # -- on all

    def _seen(self, moves: Moves, size: int | None) -> Known:
        """Return what this rank knows of a step's calls."""
        if not self.is_in_it:
            return Known({}, {})
        self.planner.completed(self.planner.draft(moves, size))
        return self.planner.profiler.known

    def _answer(self, question: Callable[[Draft], Any]) -> Any:
        """Return this rank's answer, or why it has none: the planning rank's is what counts."""
        answers: list[Any] = []

        def look() -> None:
            try:
                answers.append(question(self.planner.draft(())))
            except (MicrobatchError, BatchError) as error:
                answers.append(error)

        self.ranks.gather(look)
        return answers[0]

    def _note(self, way: Way) -> None:
        parallel = way.made(DataParallel)
        if isinstance(parallel, DataParallel):
            self.buckets = parallel.buckets

    def _raise(self, error: Exception | None) -> None:
        def fail() -> None:
            if error is not None:
                raise error

        self.ranks.gather(fail)
        raise AssertionError("the planning rank has raised its error")
