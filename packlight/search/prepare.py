"""From a batch's shapes and a budget to a step that can run: which moves, which schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from packlight.costs.link import measure_link
from packlight.costs.profiler import CallProfiler
from packlight.moves.draft import Draft
from packlight.moves.move import Move, Refusal, Room, Stage
from packlight.moves.registry import of_package, of_stage
from packlight.moves.request import Request
from packlight.moves.step_costs import StepCosts
from packlight.moves.stream.streamed import StreamedTensors
from packlight.search.plan_way import WayPlanner
from packlight.search.ready import Ready
from packlight.search.search import Search
from packlight.step import Device

LINK_PROBE_BYTES = 16 * 2**20


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
        linked: Device | None = None
        directory = request.offload_directory
        if directory is not None and "offload" in request.moves:
            link = measure_link(directory, LINK_PROBE_BYTES)
            linked = Device(str(self.device), request.budget_bytes or 0, links=(link,))
        self._base = Draft(request, self.costs, request.loss_fn, None, linked)
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

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is a file's."""
        return self.streamed is not None and self.streamed.is_on_disk(tensor)

    def prepare(self, batch: Any) -> Ready:
        """Return the fastest way found to train on a batch like this within the budget.

        Raises:
            InfeasibleBudgetError: with the smallest whole-step budget of all ways looked at.
        """
        with CallProfiler(self.request.progress) as profiler:
            planner = WayPlanner(self._base.changed(batch=batch), self._loss_moves, profiler)
            try:
                search = Search(planner)
                ready = search.fastest()
            finally:
                planner.forget()
        not_made = search.not_made
        if ready.way.num_microbatches == 1:
            not_made.setdefault("microbatch", "not needed")
        return replace(ready, way=replace(ready.way, not_made=not_made))
