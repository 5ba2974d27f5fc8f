"""The move: a batch in so many microbatches, whose weighted losses add up to the whole one's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from packlight.capture.whole_step import Consumption
from packlight.costs.cache import Cache
from packlight.errors import BatchError, MicrobatchError
from packlight.moves.draft import Draft
from packlight.moves.microbatch.batch_statistics import batch_statistics
from packlight.moves.microbatch.denominator import Denominator
from packlight.moves.microbatch.extras import check_extras
from packlight.moves.microbatch.independence import alternatives, few_rows, settle
from packlight.moves.microbatch.loss_weight import find_denominator
from packlight.moves.microbatch.split import LossWeight, leaves_of_primals, num_rows, split
from packlight.moves.move import Effect, Move, Refusal, Room, Stage
from packlight.torch_internals.autograd import has_gradient_hooks

MICROBATCH_BATCH_NORM = "microbatch-batch-norm"


@dataclass(frozen=True)
class Microbatch(Move):
    """The batch in parts, one after the other; their gradients are added up.

    Attributes:
        count: of microbatches.
        weight_index: which of the denominators that the loss's graph leaves open weighs them.
        normalises: batch norm sees microbatches only, which was allowed by name. Its statistics are
            the noisier the more there are.
    """

    name: ClassVar[str] = "microbatch"
    effect: ClassVar[Effect] = Effect.REORDERS_SUMS
    stage: ClassVar[Stage] = Stage.BATCH
    techniques: ClassVar[tuple[str, ...]] = (MICROBATCH_BATCH_NORM,)

    count: int
    weight_index: int = 0
    normalises: bool = False

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Microbatch | Refusal]:
        """Yield powers of two, up to one row each."""
        try:
            rows = num_rows(draft.batch)
            count = 2
            while count < 2 * rows:
                index, normalises = draft.asked(settled)
                yield cls(min(count, rows), index, normalises)
                count *= 2
        except (MicrobatchError, BatchError) as error:
            yield Refusal(str(error))

    def apply(self, draft: Draft) -> Draft:
        """Return the draft of one microbatch among several; it is traced anew."""
        return draft.changed(
            num_repeats=self.count, gradients=Consumption.ACCUMULATE, traced=None, module=None
        )

    def describe(self, draft: Draft) -> str:
        """Return how many of how many rows."""
        sizes = Counter(num_rows(part) for part in self.pieces(draft.batch))
        parts = " + ".join(f"{count} x {rows} rows" for rows, count in sizes.items())
        return f"{self.count} microbatches ({parts})"

    @classmethod
    def between(cls, mild: Microbatch | None, strong: Microbatch) -> Microbatch | None:
        """With batch norm, fewer microbatches are better ones, whatever their number."""
        fewest = 1 if mild is None else mild.count
        if not strong.normalises or strong.count - fewest < 2:
            return None
        return replace(strong, count=(fewest + strong.count) // 2)

    @property
    def penalty(self) -> float:
        """The standard error of batch norm's statistics grows with the square root of the count."""
        return math.sqrt(self.count) if self.normalises else 1.0

    def pieces(self, batch: Any) -> list[Any]:
        """Return the microbatches of a batch."""
        return split(batch, self.count)

    def loss_weight(self, whole: Draft) -> LossWeight:
        """Return what weighs the microbatches' losses.

        Args:
            whole: the draft of the whole batch.
        """
        return alternatives(open_weight(whole))[self.weight_index]


def open_weight(draft: Draft) -> LossWeight:
    """Return what the user says that weighs microbatches, or what the loss's graph does."""
    if draft.request.loss_weight is not None:
        return draft.request.loss_weight

    def found() -> LossWeight:
        loss, rows = draft.loss, num_rows(draft.batch)
        leaf_of = leaves_of_primals(loss.arguments, draft.batch)
        return find_denominator(
            loss.joint, loss.num_forward_outputs, rows, leaf_of, loss.arguments, loss.loss_index
        )

    return draft.once("denominator", found)


def settled(draft: Draft) -> tuple[int, bool]:
    """Return which denominator holds, and whether layers normalise over microbatches then.

    Raises:
        MicrobatchError: microbatches would not have the whole batch's gradients.
    """
    request, loss = draft.request, draft.loss
    if loss.assigned:
        raise MicrobatchError(
            "the forward assigns tensors to attributes, which would be the last microbatch's",
            hint="write into registered buffers",
        )
    changed = draft.costs.changed_parameter(loss)
    if changed is not None:
        raise MicrobatchError(f"the forward changes {changed!r} itself", hint="")
    hooked = [n for n, p in request.model.named_parameters() if has_gradient_hooks(p)]
    if hooked:
        raise MicrobatchError(
            f"hooks on {hooked[0]!r} and {len(hooked) - 1} other parameters are meant to be called "
            "with the gradients of the whole batch",
            hint="",
        )
    rows = num_rows(draft.batch)
    statistics = batch_statistics(loss.joint, rows)
    if statistics and MICROBATCH_BATCH_NORM not in request.allow:
        raise MicrobatchError(
            f"{statistics[0]} and {len(statistics) - 1} other layers normalise over the batch",
            hint=f"allow={{{MICROBATCH_BATCH_NORM!r}}} lets them normalise over microbatches",
        )
    if loss.written_back and not statistics:
        written = {id(loss.arguments[primal]) for primal in loss.written_back.values()}
        names = [n for n, b in request.model.named_buffers() if id(b) in written]
        raise MicrobatchError(
            f"the forward changes {names[0] if names else 'a tensor'!r} and {len(written) - 1} "
            "other buffers, which every microbatch would do anew",
            hint="change them outside of the loss",
        )
    weight = open_weight(draft)
    return observed_weight(draft, weight), bool(statistics)


def observed_weight(draft: Draft, weight: LossWeight, *, cuts_extras: bool = True) -> int:
    """Return which alternative of a weight a few rows agree with; of a graph, found out once.

    Args:
        draft: of the whole batch.
        weight: with alternatives.
        cuts_extras: what is returned beside the loss is put together again from microbatches.

    Raises:
        MicrobatchError: none.
    """
    if draft.request.is_weightless:
        raise MicrobatchError(
            "whether rows look at one another cannot be seen of a model without values",
            hint="plan one that has some",
        )
    rows, key = num_rows(draft.batch), draft.loss.key

    def observe() -> int:
        # Few rows: these forwards and backwards are eager PyTorch's and in nobody's plan.
        rows_looked_at = few_rows(draft.batch, weight, max_rows=max(2, min(4, rows // 2)))
        chosen = settle(
            draft.request.model,
            draft.loss_fn,
            rows_looked_at,
            weight,
            looks_back=key is None or not draft.loss.is_derivative,
            check_first=check_extras if cuts_extras else None,
        )
        return alternatives(weight).index(chosen)

    if key is None or not isinstance(weight, (str, Denominator)):
        return observe()
    if draft.request.is_tensor_parallel:  # all of them look, whatever one of them remembers
        return observe()
    cache = Cache("rows", draft.costs.device)
    # A denominator that was found is read from the graph.
    question = f"{key} {rows} rows, {weight if isinstance(weight, str) else 'found'}, {cuts_extras}"
    if question not in cache:
        cache[question] = observe()
        cache.save()
    return int(cache[question])
