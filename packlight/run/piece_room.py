"""Where a step takes a way that is not planned, each section is fitted into what is left.

A forward runs under an order that keeps little. If that does not fit beside what other runs keep,
they let go of what they can: their backwards recompute more. What then does not fit is refused
before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from packlight.capture.pieces import Piece
from packlight.errors import InfeasibleBudgetError
from packlight.lower.emit import emit
from packlight.planner.path import Order, order_of, piece_schedule
from packlight.planner.pieces import keeping_little
from packlight.planner.plain import plain_schedule
from packlight.planner.shrink import backward_peak_bytes, with_smaller_backward
from packlight.planner.smallest import smallest_schedules
from packlight.run.in_flight import RunsInFlight
from packlight.run.piece_record import ReadyPiece, Run
from packlight.step import Schedule, simulate


def ready_piece(piece: Piece, order: Order, schedule: Schedule | None = None) -> ReadyPiece:
    """Return a piece with an order, and the code that runs it.

    Args:
        piece: which.
        order: of its operations.
        schedule: that has the order, if there is one already.
    """
    if order not in piece.ready:
        schedule = schedule or piece_schedule(piece.step.graph, order)
        cuts = (schedule.num_forward,) if piece.has_backward else ()
        piece.ready[order] = ReadyPiece(order, schedule, emit(piece.step, schedule, cuts))
    ready: ReadyPiece = piece.ready[order]
    return ready


class Room:
    """What is left of a budget in the middle of a step.

    Args:
        in_flight: the runs that keep something.
        budget_bytes: for what a step allocates; None for no limit.
    """

    def __init__(self, in_flight: RunsInFlight, budget_bytes: Callable[[], int | None]) -> None:
        self._in_flight, self._budget_bytes = in_flight, budget_bytes
        self._small_orders: dict[tuple[str, bool], Order] = {}

    def small(self, piece: Piece, smallest: bool = False) -> ReadyPiece:
        """Return a piece with an order that keeps little, or that with the smallest peak."""
        return ready_piece(piece, self._small_order(piece, smallest))

    def _small_order(self, piece: Piece, smallest: bool) -> Order:
        graph, key = piece.step.graph, (piece.form, smallest)
        if key not in self._small_orders:  # the pieces of equal layers are equal
            if self._budget_bytes() is None or not piece.has_backward:
                order = order_of(graph, plain_schedule(graph))
            elif smallest:
                order = order_of(graph, smallest_schedules(graph)[0])
            else:
                order = keeping_little(graph)
            self._small_orders[key] = order
        return self._small_orders[key]

    def _candidates(self, piece: Piece) -> Iterator[ReadyPiece]:
        """Yield ways to run a piece, that which keeps least first."""
        yield self.small(piece)
        yield self.small(piece, smallest=True)
        if piece.plan is not None:
            yield ready_piece(piece, order_of(piece.step.graph, piece.plan.schedule))

    def make(self, run: Run) -> None:
        """Choose how a forward runs by what is left; let others go of what they can, if need be.

        Raises:
            InfeasibleBudgetError: it is known not to fit.
        """
        budget_bytes = self._budget_bytes()
        if budget_bytes is None:
            return
        for _ in self._growing(None):
            used_bytes = self._in_flight.used_bytes()
            for ready in self._candidates(run.piece):
                run.ready = ready
                inside_bytes = simulate(run.piece.step.graph, run.ready.schedule).peak_bytes
                if used_bytes + inside_bytes <= budget_bytes:
                    return
        raise self._does_not_fit(run, budget_bytes, used_bytes, inside_bytes)

    def make_for_backward(self, run: Run, tangents: Sequence[Any]) -> None:
        """Let others go of what they can, and the run itself, if a backward needs it.

        Raises:
            InfeasibleBudgetError: it is known not to fit.
        """
        budget_bytes = self._budget_bytes()
        if budget_bytes is None:
            return
        for _ in self._growing(run):
            used_bytes = self._in_flight.used_bytes(run, tangents)
            inside_bytes = backward_peak_bytes(run.piece.step.graph, run.ready.schedule)
            if used_bytes + inside_bytes <= budget_bytes:
                return
        raise self._does_not_fit(run, budget_bytes, used_bytes, inside_bytes)

    def _growing(self, last: Run | None) -> Iterator[None]:
        """Yield once as things are, then each time a run has let go of something."""
        yield
        for smallest in (False, True):
            runs = self._in_flight.alive()
            for run in sorted(runs, key=lambda run: (run is last, -run.kept_bytes)):
                if self._shrink(run, smallest):
                    yield

    def _shrink(self, run: Run, smallest: bool) -> bool:
        """Have a run keep less for its backward, which recomputes more; return whether it does."""
        frame, piece = run.frame, run.piece
        assert frame is not None
        wanted = self._small_order(piece, smallest)
        order = with_smaller_backward(piece.step.graph, run.ready.order, wanted, frame.values)
        if order is None or order == run.ready.order:
            return False
        ready = ready_piece(piece, order)
        continued = frame.continued_by(ready.program)
        if continued is None:
            return False
        run.ready, run.frame = ready, continued
        return True

    def _does_not_fit(
        self, run: Run, budget_bytes: int, used_bytes: int, inside_bytes: int
    ) -> InfeasibleBudgetError:
        others = (other for other in self._in_flight.alive() if other is not run)
        kept_bytes = min(used_bytes, sum(other.kept_bytes for other in others))
        what = [
            (f"piece {run.index + 1}", inside_bytes),
            ("kept by others for their backwards", kept_bytes),
            ("results of others", used_bytes - kept_bytes),
        ]
        return InfeasibleBudgetError(
            budget_bytes, used_bytes + inside_bytes, f"piece {run.index + 1} of the step",
            [(name, size) for name, size in what if size],
            "the step is not over there: it may need more",
        )
