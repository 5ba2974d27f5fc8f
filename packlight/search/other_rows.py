"""A way that one rank found, run by those whose parts of the batch have other rows.

Where parameters lie in pieces all ranks gather them in one order, that of one schedule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from packlight.errors import RankMismatchError, ScheduleError
from packlight.moves.move import Stage
from packlight.search.judge import judged
from packlight.search.plan_way import WayPlanner
from packlight.search.ready import Ready, ReadyPart
from packlight.search.way import PartPlan, Way
from packlight.step.digest import order_digest, structure_digest
from packlight.units import format_bytes

SAME_ROWS = "with parameters in pieces all ranks gather in one order (drop_last=True)"


@dataclass(frozen=True)
class Order:
    """What a rank found for its part of the batch, for those whose parts have other rows.

    Attributes:
        rank: it.
        num_rows: of its part.
        digest: of the order of its step's operations.
    """

    rank: int
    num_rows: int | None
    digest: str

    @classmethod
    def of(cls, ready: Ready, rank: int, num_rows: int | None) -> Order:
        """Return that of a way, whose parts all have one order."""
        return cls(rank, num_rows, order_digest(ready.parts[0].step.joint.graph))


def for_other_rows(way: Way, order: Order, planner: WayPlanner, num_rows: int | None) -> Ready:
    """Return a way that another rank found, bound to this rank's part of the batch.

    Args:
        way: whose first part's schedule this rank runs.
        order: of the other rank.
        planner: of this rank.
        num_rows: of this rank's part.

    Raises:
        RankMismatchError: it does not suit so many rows.
    """
    assert planner.request.ranks is not None
    rank = planner.request.ranks.rank

    def unsuited(why: str) -> RankMismatchError:
        what, hint = "the number of rows of its part of the batch", f"{why}: {SAME_ROWS}"
        return RankMismatchError(what, rank, order.num_rows, num_rows, hint, order.rank)

    moves = tuple(move for move in way.moves if move.stage is not Stage.LOSS)
    sizes = Counter(planner.sizes(moves))
    if sum(sizes.values()) != way.num_microbatches:
        raise unsuited(f"they are too few for {way.num_microbatches} microbatches")
    parts: list[ReadyPart] = []
    for size in sizes:
        draft = planner.draft(moves, size)
        step = planner.completed(draft)
        if order_digest(step.joint.graph) != order.digest:
            raise unsuited(f"{size or num_rows} rows are traced as other operations")
        try:
            plan = judged(way.parts[0].plan, step, draft)
        except (ScheduleError, IndexError) as error:
            raise unsuited(f"they need another schedule ({error})") from error
        parts.append(planner.part(draft, step, plan))
    plans = tuple(
        PartPlan(size, count, structure_digest(part.step.joint.graph), part.plan)
        for (size, count), part in zip(sizes.items(), parts, strict=True)
    )
    draft = planner.draft(moves)
    way = replace(way, parts=plans, memory=planner.memory(draft), machine=draft.machine)
    budget_bytes = planner.request.budget_bytes
    if budget_bytes is not None and way.peak_bytes > budget_bytes:
        raise unsuited(f"they need {format_bytes(way.peak_bytes)} ({way.peak_bytes} bytes)")
    return planner.bound(way, parts)
