"""From a batch's shapes and a budget to a step that can run: which moves, which schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from packlight.capture.sizes import Changing
from packlight.capture.step_capture import StepCapture
from packlight.capture.whole_step import Consumption
from packlight.costs.lane import measure_lane
from packlight.costs.profiler import CallProfiler
from packlight.errors import WayError
from packlight.memory.far import far_memory
from packlight.moves.draft import Draft
from packlight.moves.move import Move, Refusal, Room, Stage
from packlight.moves.registry import of_package, of_stage
from packlight.moves.request import Request
from packlight.moves.step_costs import StepCosts
from packlight.ranks.link import in_groups, measure_link
from packlight.search.agree import agreed
from packlight.search.plan_way import WayPlanner
from packlight.search.ready import Ready
from packlight.search.restore import restored
from packlight.search.reuse import Bucket
from packlight.search.saved import cache_key, cached_way, remember_way
from packlight.search.search import Search
from packlight.search.way import Way
from packlight.step import Machine

LANE_PROBE_BYTES = 16 * 2**20


class Preparer:
    """Finds the fastest way to run a step within the budget, for one batch signature at a time.

    Args:
        request: what `fit` was asked for.
        way: to run the step, for batches of the first signature; it is not looked for then.
    """

    def __init__(self, request: Request, way: Way | None = None) -> None:
        self.request, self._given = request, way
        self.costs = StepCosts(request)
        self.device = self.costs.device
        machine: Machine | None = None
        far = far_memory(self.device, request.offload_directory)
        if far is not None and "offload" in request.moves:
            lane = measure_lane(far.directory, LANE_PROBE_BYTES, self.device)
            machine = Machine.with_one_lane(lane)
        gradients = Consumption.ACCUMULATE if request.accumulates else Consumption.TOGETHER
        self._base = Draft(
            request, self.costs, request.loss_fn, None, machine, gradients=gradients
        )
        self._loss_moves: tuple[Move, ...] = ()
        room = Room(None, {})
        for kind in of_stage(Stage.LOSS):
            with of_package(kind):
                for move in kind.space(self._base, room):
                    if not isinstance(move, Refusal):
                        self._base = move.apply(self._base)
                        self._loss_moves = (*self._loss_moves, move)

    @property
    def loss_fn(self) -> Any:
        """What is traced: the user's loss as moves shaped it."""
        return self._base.loss_fn

    def prepare(
        self,
        batch: Any,
        captures: dict[int | None, StepCapture],
        bucket: Bucket,
        changing: Changing | None = None,
    ) -> Ready:
        """Return the fastest way found to train on a batch like this within the budget.

        Args:
            batch: an example.
            captures: those of batches of the same tensors so far, by rows of the microbatch.
            bucket: ways that were searched for batches of other sizes.
            changing: the sizes of the batch's tensors that change from batch to batch.

        Raises:
            InfeasibleBudgetError: with the smallest whole-step budget of all ways looked at.
            WayError: the way that was given is not one for this step.
        """
        ranks = self.request.ranks
        self._look_at_network()
        with CallProfiler(self.request.progress) as profiler:
            base = self._base.changed(batch=batch, profiler=profiler)
            planner = WayPlanner(base, self._loss_moves, profiler, captures, changing)
            try:
                if ranks is not None:
                    return agreed(planner, lambda: self._found(planner, bucket))
                return self._found(planner, bucket)
            finally:
                planner.forget()

    def _look_at_network(self) -> None:
        request, costs = self.request, self.costs
        if request.modelled is not None:
            costs.network = request.modelled.lane
        if request.data_ranks is not None:
            costs.network = measure_link(request.data_ranks, self.device, request.ranks)
        if request.replica_ranks is not None:
            assert costs.network is not None and request.shard_ranks is not None
            within, across = (
                measure_link(ranks, self.device, request.ranks)
                for ranks in (request.shard_ranks, request.replica_ranks)
            )
            costs.network = in_groups(costs.network, within, across, request.shard_ranks.size)
        if request.tensor_ranks is not None:
            costs.exchanges = measure_link(request.tensor_ranks, self.device, request.ranks)
        elif request.is_talkative:
            costs.exchanges = costs.network

    def _found(self, planner: WayPlanner, bucket: Bucket) -> Ready:
        if self._given is not None:
            way, self._given = self._given, None
            return restored(way, planner)
        known = self._remembered(planner) or bucket.way_for(planner)
        if known is not None:
            return known
        bucket.add(ready := self._searched(planner))
        return ready

    def _remembered(self, planner: WayPlanner) -> Ready | None:
        """Return the way that this or another process found for such a step before."""
        key = cache_key(planner.draft(()))
        way = None if key is None else cached_way(key)
        try:
            return None if way is None else restored(way, planner)
        except WayError:  # the key does not tell everything
            return None

    def _searched(self, planner: WayPlanner) -> Ready:
        search = Search(planner)
        ready = search.fastest()
        not_made = search.not_made
        if ready.way.num_microbatches == 1:
            not_made.setdefault("microbatch", "not needed")
        ready = replace(ready, way=replace(ready.way, not_made=not_made))
        key = cache_key(planner.draft(()))
        if key is not None:
            remember_way(key, ready.way)
        return ready
