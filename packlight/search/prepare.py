"""From a batch's shapes and a budget to a step that can run: which moves, which schedule.

Every way to run the step (how many microbatches, masks packed or not, loss head and layers in how
many chunks, updates in the backward or after it, what lies on the disk) is planned by the one
planner; the fastest way that fits is taken. Ways that change how sums are rounded (microbatches,
chunks) must be faster by a margin than ways that keep every bit. Where batch norm sees microbatches
only, its statistics are the noisier the more there are, and more of them must be worth that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from packlight.costs.link import measure_link
from packlight.costs.profiler import CallProfiler
from packlight.errors import (
    BatchError,
    InfeasibleBudgetError,
    MicrobatchError,
    UnsupportedModelError,
)
from packlight.moves.microbatch.batch_statistics import batch_statistics
from packlight.moves.microbatch.independence import few_rows, settle
from packlight.moves.microbatch.loss_weight import find_denominator
from packlight.moves.microbatch.split import LossWeight, leaves_of_primals, num_rows
from packlight.moves.stream.parameters import why_not_all
from packlight.moves.stream.streamed import StreamedTensors, Streaming
from packlight.search.plan_way import Choice, HopelessError, WayPlanner
from packlight.search.step_costs import StepCosts
from packlight.search.ways import (
    MICROBATCH_BATCH_NORM,
    ROUNDING_MARGIN,
    Request,
    Rewriting,
    Way,
)
from packlight.step import Device

LINK_PROBE_BYTES = 16 * 2**20
# Parameters are streamed where all else takes this many times as long as the plain step.
MUCH_SLOWER = 2.0


class Preparer:
    """Finds the fastest way to run a step within the budget, for one batch signature at a time.

    Args:
        request: what `fit` was asked for.
        streamed: what an earlier one of the same step has on the disk.
    """

    def __init__(self, request: Request, streamed: StreamedTensors | None = None) -> None:
        self.request = request
        self.streamed = streamed
        self.costs = StepCosts(request)
        self.device = self.costs.device
        self._linked: Device | None = None
        directory = request.offload_directory
        if directory is not None and "offload" in request.moves:
            link = measure_link(directory, LINK_PROBE_BYTES)
            self._linked = Device(str(self.device), request.budget_bytes or 0, links=(link,))

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is a file's."""
        return self.streamed is not None and self.streamed.is_on_disk(tensor)

    def prepare(self, batch: Any) -> Way:
        """Return the fastest way found to train on a batch like this within the budget.

        Raises:
            InfeasibleBudgetError: with the smallest whole-step budget of all ways looked at.
        """
        not_made: dict[str, str] = {}
        reason = self._why_no_update_in_backward()
        if reason is not None:
            not_made["update-in-backward"] = reason
        planner = WayPlanner(self.request, self.costs, self._linked, batch, reason is None)
        try:
            with CallProfiler(self.request.progress) as profiler:
                way = _Search(planner, profiler, not_made).fastest()
        finally:
            planner.forget()
        if way.num_microbatches == 1:
            not_made.setdefault("microbatch", "not needed")
        return replace(way, not_made=not_made)

    def _why_no_update_in_backward(self) -> str | None:
        request = self.request
        if "update-in-backward" not in request.moves:
            return "not among the moves"
        if self.costs.updates is None:
            return "there is no optimizer"
        if request.clipping.norm is not None:
            return (
                "clipping by the norm of all gradients needs all of them first (clip_grad_value "
                "does not)"
            )
        if request.scaler is not None:
            return "the loss scaler looks at all gradients before it lets the optimizer step"
        return self.costs.updates.refusal


class _Search:
    """Looks through the ways to run one batch's step.

    Args:
        planner: plans them.
        profiler: observes calls.
        not_made: takes reasons, move -> why it could not be made.
    """

    def __init__(
        self, planner: WayPlanner, profiler: CallProfiler, not_made: dict[str, str]
    ) -> None:
        self.planner, self.profiler, self.not_made = planner, profiler, not_made
        self.request = planner.request
        self.found: dict[Choice, Way] = {}
        self.errors: list[InfeasibleBudgetError] = []
        # Ways that cannot fit whatever the schedule, by kind: how much they would need takes long
        # to find out, and matters only if nothing fits.
        self.hopeless: dict[tuple[int, bool, bool], list[Choice]] = {}
        self._loss_weight: LossWeight | None = None
        self._normalises_microbatches = False

    def fastest(self) -> Way:
        """Return the fastest way found.

        Raises:
            InfeasibleBudgetError: there is none.
        """
        too_few = 0
        for num_microbatches in self._counts():
            try:
                ways = self._with_microbatches(num_microbatches)
            except UnsupportedModelError as error:
                if num_microbatches == 1:
                    raise
                # Some models do not run on so few rows.
                self.not_made["microbatch"] = f"{num_microbatches} of them: {error}"
                break
            if self.found and not ways and self._is_full_at_once(Choice(num_microbatches)):
                break  # gradients are accumulated: more microbatches hold no less
            self.found.update(ways)
            if not self.found:
                too_few = num_microbatches
            if ways and self._is_enough(ways.values()):
                break
        if self._normalises_microbatches and self.found:
            self._look_for_fewer_microbatches(too_few)
        if not self.found:
            self._explain_hopeless()
            raise self._with_reasons(min(self.errors, key=lambda error: error.smallest_bytes))
        rehearsed: set[Choice] = set()
        while True:
            # A rehearsal takes several steps: only ways that may win are worth it. The others stay
            # with times estimated from calls alone.
            best = min(self.found, key=lambda c: self._handicapped_seconds(self.found[c]))
            if best in rehearsed:
                return self.found[best]
            rehearsed.add(best)
            try:
                self.found[best] = self._way(best, rehearses=True)
            except InfeasibleBudgetError:
                pass  # other times led the search elsewhere: what was found before still fits

    def _explain_hopeless(self) -> None:
        """Find out how much those would need that may need least, the most rewritten ones first.

        Rewriting costs a little where what it cuts is not the most that is held, so of each kind
        the least thoroughly rewritten is looked at, too.
        """
        ends = [*(choices[-1] for choices in self.hopeless.values()),
                *(choices[0] for choices in self.hopeless.values())]
        for choice in sorted(dict.fromkeys(ends), key=self._resident_bytes):
            smallest = min((e.smallest_bytes for e in self.errors), default=math.inf)
            if self._resident_bytes(choice) < smallest:
                try:
                    self._way(choice, hopeless_above=smallest)
                except HopelessError:
                    pass
                except InfeasibleBudgetError as error:
                    self.errors.append(error)

    def _way(
        self, choice: Choice, *, rehearses: bool = False, hopeless_above: float | None = None
    ) -> Way:
        return self.planner.way(
            choice, self._loss_weight, self.profiler, rehearses=rehearses,
            hopeless_above=hopeless_above,
        )

    def _try(self, choice: Choice, found: dict[Choice, Way]) -> None:
        try:
            if self._is_full_at_once(choice):
                raise HopelessError
            found[choice] = self._way(choice)
        except HopelessError:
            streaming = choice.streaming
            kind = (choice.num_microbatches, bool(streaming.states), bool(streaming.parameters))
            self.hopeless.setdefault(kind, []).append(choice)
        except InfeasibleBudgetError as error:
            self.errors.append(error)

    def _is_enough(self, latest: Iterable[Way]) -> bool:
        """Whether more microbatches, which have to be captured first, are not worth looking at."""
        way = min(latest, key=self._handicapped_seconds)
        best = min(map(self._handicapped_seconds, self.found.values()))
        return way.slowdown <= ROUNDING_MARGIN or self._handicapped_seconds(way) > 1.1 * best

    def _handicapped_seconds(self, way: Way) -> float:
        """Return a way's duration, longer by as much as it is worth to do without what it changes.

        The standard error of batch norm's statistics grows with the square root of the number of
        microbatches, and so does what they cost here.
        """
        seconds = way.seconds * (1.0 if way.is_bit_exact else ROUNDING_MARGIN)
        return seconds * (math.sqrt(way.num_microbatches) if self._normalises_microbatches else 1.0)

    def _with_reasons(self, error: InfeasibleBudgetError) -> InfeasibleBudgetError:
        hints = [f"without {name}: {why}" for name, why in self.not_made.items()]
        hint = "\n  ".join(filter(None, [error.hint, *hints]))
        return InfeasibleBudgetError(
            error.budget_bytes, error.smallest_bytes, error.peak_operation, error.peak_buffers, hint
        )

    # -- what to try

    def _with_microbatches(self, num_microbatches: int) -> dict[Choice, Way]:
        """Return ways with a number of microbatches, the whole graph's first."""
        found: dict[Choice, Way] = {}
        fastest: dict[Rewriting, Way] = {}
        rewriter = self.planner.captured(num_microbatches).rewriter
        for rewriting in rewriter.candidates(fastest):
            for streaming in self._streamings(num_microbatches, found):
                choice = Choice(num_microbatches, rewriting, streaming)
                self._try(choice, found)
                way = found.get(choice)
                if way and (rewriting not in fastest or way.seconds < fastest[rewriting].seconds):
                    fastest[rewriting] = way
        self.not_made.update(rewriter.why_not)
        return found

    def _is_full_at_once(self, choice: Choice) -> bool:
        """Whether a way holds as much as the budget before it starts."""
        budget_bytes = self.request.budget_bytes
        return budget_bytes is not None and self._resident_bytes(choice) >= budget_bytes

    def _resident_bytes(self, choice: Choice) -> int:
        return self.planner.resident_bytes(choice.num_microbatches, choice.streaming)

    def _streamings(
        self, num_microbatches: int, found: Mapping[Choice, Way]
    ) -> Iterator[Streaming]:
        """Yield what could lie on the disk: nothing, optimizer state, parameters as well."""
        yield Streaming()
        if self.planner.linked is None or any(way.is_plain for way in found.values()):
            return
        if num_microbatches > 1 and found:
            return
        all_of_it = self.planner.streamable(num_microbatches)
        if all_of_it.states:
            yield Streaming(all_of_it.states)
        if any(way.slowdown < MUCH_SLOWER for way in found.values()):
            return
        reason = why_not_all(self.request.model, all_of_it.parameters)
        if reason is not None:
            self.not_made["streaming all parameters"] = reason
        if all_of_it.parameters:
            yield all_of_it

    # -- microbatches

    def _counts(self) -> Iterator[int]:
        """Yield numbers of microbatches to look at, as long as they are possible."""
        yield 1
        if "microbatch" not in self.request.moves:
            self.not_made["microbatch"] = "not among the moves"
            return
        try:
            rows = num_rows(self.planner.batch)
        except BatchError as error:
            self.not_made["microbatch"] = str(error)
            return
        count = 2
        while count < 2 * rows:
            if not self._may_split():
                return
            yield min(count, rows)
            count *= 2

    def _look_for_fewer_microbatches(self, too_few: int) -> None:
        """Look between the largest number that did not fit and the fewest that did."""
        fewest = min(choice.num_microbatches for choice in self.found)
        while fewest - too_few > 1:
            between = (too_few + fewest) // 2
            ways = self._with_microbatches(between)
            self.found.update(ways)
            too_few, fewest = (too_few, between) if ways else (between, fewest)

    def _may_split(self) -> bool:
        """Whether microbatches give the whole batch's gradients; remembers why not."""
        if self._loss_weight is None and "microbatch" not in self.not_made:
            try:
                self._loss_weight = self._find_loss_weight()
            except (MicrobatchError, BatchError) as error:
                self.not_made["microbatch"] = str(error)
        return self._loss_weight is not None

    def _find_loss_weight(self) -> LossWeight:
        request, batch = self.request, self.planner.batch
        loss = self.planner.captured(1).loss
        if loss.assigned:
            raise MicrobatchError(
                "the forward assigns tensors to attributes, which would be the last microbatch's",
                hint="write into registered buffers",
            )
        rows = num_rows(batch)
        statistics = batch_statistics(loss.joint, rows)
        if statistics and MICROBATCH_BATCH_NORM not in request.allow:
            raise MicrobatchError(
                f"{statistics[0]} and {len(statistics) - 1} other layers normalise over the batch",
                hint=f"allow={{{MICROBATCH_BATCH_NORM!r}}} lets them normalise over microbatches",
            )
        self._normalises_microbatches = bool(statistics)
        weight: LossWeight
        if request.loss_weight is not None:
            weight = request.loss_weight
        else:
            leaf_of = leaves_of_primals(loss.arguments, batch)
            weight = find_denominator(
                loss.joint, loss.num_forward_outputs, rows, leaf_of, loss.arguments
            )
        # Few rows: this forward is eager PyTorch's and in nobody's plan.
        rows_looked_at = few_rows(batch, weight, max_rows=2 if rows <= 8 else 4)
        return settle(request.model, request.loss_fn, rows_looked_at, weight)
