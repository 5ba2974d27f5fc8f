"""A training step while moves shape it: what is traced, rewritten, repeated, where things lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import fx

from packlight.capture.step_capture import CapturedLoss, LossFunction, StepCapture
from packlight.capture.whole_step import Consumption
from packlight.costs.profiler import CallProfiler
from packlight.moves.reduction import Reduction
from packlight.moves.request import Request
from packlight.moves.step_costs import StepCosts
from packlight.moves.stream.streamed import Streaming
from packlight.step import Machine

Made = TypeVar("Made")


@dataclass(frozen=True)
class Traced:
    """One traced size of batch.

    Attributes:
        capture: runs the program that is installed in the loss's place.
        loss: the joint graph, and the real inputs that it was traced with.
        num_rows: of the microbatch; None for a batch that runs as a whole.
    """

    capture: StepCapture
    loss: CapturedLoss
    num_rows: int | None


@dataclass(frozen=True, eq=False)
class Draft:
    """The step being shaped. Moves return changed copies (`dataclasses.replace`).

    Attributes:
        request: what `fit` was asked for.
        costs: what the user's optimizer and model cost beside the graph.
        loss_fn: what is traced: the user's loss, perhaps under autocast.
        batch: the whole example batch.
        offered: the machine whose lanes transfers may take, if there is one.
        num_repeats: how often a (micro)batch runs for one update.
        gradients: what becomes of them.
        group_bytes: of so many gradients, at most, parameters are updated together.
        traced: the (micro)batch's loss; None until it is traced.
        module: its joint graph, rewritten so far.
        machine: whose lanes the step uses; None where nothing is transferred.
        streaming: what of parameters and optimizer state lies elsewhere between uses.
        reduction: how gradients are added up over ranks, where there are several.
        whole: the draft of the whole batch, where this is a microbatch's.
        profiler: observes calls, while moves are made.
    """

    request: Request
    costs: StepCosts
    loss_fn: LossFunction
    batch: Any
    offered: Machine | None = None
    num_repeats: int = 1
    gradients: Consumption = Consumption.TOGETHER
    group_bytes: int = 0
    traced: Traced | None = None
    module: fx.GraphModule | None = None
    machine: Machine | None = None
    streaming: Streaming = field(default_factory=Streaming)
    reduction: Reduction | None = None
    whole: Draft | None = None
    profiler: CallProfiler | None = None
    _known: dict[Any, Any] = field(default_factory=dict)

    @property
    def loss(self) -> CapturedLoss:
        """The traced loss."""
        assert self.traced is not None, "moves of Stage.LOSS come before tracing"
        return self.traced.loss

    @property
    def groups_updates(self) -> bool:
        """Whether small parameters are updated several at once."""
        is_alone = not self.streaming and self.reduction is None
        return self.group_bytes > 0 and self.gradients is Consumption.UPDATE and is_alone

    @property
    def graph_module(self) -> fx.GraphModule:
        """The joint graph as rewritten so far."""
        assert self.module is not None, "moves of Stage.LOSS come before tracing"
        return self.module

    def with_trace(self, traced: Traced) -> Draft:
        """Return the draft of a traced size."""
        return self.changed(traced=traced, module=traced.loss.joint)

    def changed(self, **fields: Any) -> Draft:
        """Return a changed copy."""
        return replace(self, **fields, _known={})

    def asked(self, question: Callable[[Draft], Made]) -> Made:
        """Return what the whole batch's draft answers, asked once.

        Where a model's ranks talk to one another, a question that runs it is answered by all of
        them at once.

        Args:
            question: a function of a module, by whose name the others find it.
        """
        whole, together = self.whole or self, self.costs.ask_together
        return whole.once(
            question, lambda: question(whole) if together is None else together(question)
        )

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Return what `make` returns, made once for this draft: `space` and `apply` share it."""
        if key not in self._known:
            self._known[key] = make()
        found: Made = self._known[key]
        return found
