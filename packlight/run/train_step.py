"""A planned training step, called batch by batch; planned anew where shapes change."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from packlight.capture.batch import fresh
from packlight.capture.step_capture import CapturedAgainError, StepCapture
from packlight.capture.undisturbed import generators_kept
from packlight.costs.cache import device_name
from packlight.errors import (
    GraphBreakError,
    InfeasibleBudgetError,
    OptionError,
    UnsupportedModelError,
)
from packlight.garbage import old_objects_kept
from packlight.moves.request import Request
from packlight.moves.stream.streamed import StreamedTensors
from packlight.ranks.parallel import refuse_wrapped
from packlight.ranks.sharded import Lying, ShardedParameters, lying_of
from packlight.run.evaluated import evaluated
from packlight.run.measured import MeasuredStep, measured_step
from packlight.run.parameters import check_parameters, name_parameters_left
from packlight.run.piece_step import PieceStepRunner
from packlight.run.ranks import agreed_place, agreed_signature
from packlight.run.signature import Family, Signature, family_of, num_traced, signature_of
from packlight.run.step import StepRunner
from packlight.search.prepare import Preparer
from packlight.search.ready import Ready
from packlight.search.saved import write_way
from packlight.search.way import Way
from packlight.step import Plan, StepProfile
from packlight.torch_internals.autograd import has_gradient_hooks

MANY_PLANS = 6  # after so many it is time to tell
# Of so many shapes of batches the programs are kept, those that ran last.
MOST_SHAPES = 64


class TrainStep:
    """One training step (forward, backward, optimizer step) that keeps to a budget.

    Made by `fit`. Calling it with a batch trains one step and returns the detached loss (or what
    `loss_fn` returns that begins with it). A batch of another shape is captured and planned anew,
    for the same budget. With `fit(..., accumulate=True)` that is `backward` and `update` in one.

    Attributes:
        budget_bytes: whole-step budget or None.
        way: how the latest captured shape runs: moves, schedules, memory.
        scaler: of the loss, None if it is not scaled; its state belongs into a checkpoint.
    """

    def __init__(self, request: Request, way: Way | None = None) -> None:
        self.request, self._given_way = request, way
        self.model, self.optimizer = request.model, request.optimizer
        self.budget_bytes, self.scaler = request.budget_bytes, request.scaler
        self._trained: Any = None
        # What is on the disk stays there whatever the parameters and batches are.
        self._streamed = StreamedTensors(request.offload_directory)
        ranks = request.shard_ranks
        self._sharded = None if ranks is None else ShardedParameters(ranks)
        # Per batch signature: traced calls, and what runs for each of them, the latest first.
        self._captures: dict[Any, dict[int | None, StepCapture]] = {}
        self._families: dict[Any, Family] = {}
        self._runners: dict[Any, list[StepRunner | PieceStepRunner]] = {}
        self._key: Any = None
        self._signature: Any = None
        self._num_steps = self._num_plans = 0
        if request.ranks is not None:  # what is refused on one rank is refused on all
            request.ranks.gather(self._look_at_parameters)
        else:
            self._look_at_parameters()

    def _look_at_parameters(self) -> bool:
        """Start over if parameters were frozen, freed or added; return whether they were."""
        groups: list[Any] = [{"params": self.model.parameters()}]
        if self.optimizer is not None:
            groups += self.optimizer.param_groups
        trained = [
            [(id(p), p.requires_grad, has_gradient_hooks(p)) for p in group["params"]]
            for group in groups
        ]
        if trained == self._trained:
            return False
        refuse_wrapped(self.model)
        check_parameters(self.model, self.optimizer)
        self._preparer = Preparer(self.request, self._given_way)
        self._given_way = None
        self._trained, self._has_named_left = trained, False
        return True

    # -- training

    def __call__(self, batch: Any) -> Any:
        """Train one step on a batch and return the detached scalar loss.

        Gradients that are there are an error, but with `accumulate=True`: then they are added to.

        Where `loss_fn` returns a tuple that begins with the loss, so does this: what comes after is
        detached, too. The budget has room for it twice, since a loop holds what the step before
        returned until it gets the next.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; parameters and optimizer are untouched.
            LossScaleError: gradients keep overflowing; parameters and optimizer are untouched.
            InfeasibleBudgetError: the batch has a new shape that does not fit in the budget.
        """
        if not self.request.accumulates:
            return self._run(batch, lambda runner, own: runner.run(own, self._num_steps))
        returned = self.backward(batch)
        self.update()
        return returned

    def backward(self, batch: Any, weight: float = 1.0) -> Any:
        """Add a batch's gradients to those that its parameters have, as `loss.backward()` does.

        Only with `fit(..., accumulate=True)`. What is there is another batch's, another loss's (of
        a step with the same optimizer), or whatever a loop has put there: `parameter.grad` may be
        looked at and changed before the update.

        Args:
            batch: as for a call.
            weight: what the loss is multiplied with: 1/4 for each of four batches, say.

        Returns:
            What a call does; the loss without its weight.

        Raises:
            OptionError: there is no room for gradients between steps.
            Exception: as a call. Nothing was updated; gradients that were there are dropped, unless
                it is the budget, in which a new shape of batch does not fit.
        """
        self._check_accumulates("backward")
        return self._run(batch, lambda runner, own: runner.backward(own, self._num_steps, weight))

    def update(self) -> None:
        """Clip the gradients that are there, step the optimizer, and drop them.

        That holds no more than the budget, where `optimizer.step()` may. Only with `fit(...,
        accumulate=True)`. With a scaler it unscales, and skips what is not finite.

        Raises:
            OptionError: there is no room for gradients between steps.
            LossScaleError: gradients keep overflowing; parameters and optimizer are untouched.
        """
        self._check_accumulates("update")
        self._runner.update(self._num_steps)

    def _check_accumulates(self, name: str) -> None:
        if not self.request.accumulates:
            raise OptionError(
                f"{name}() is for steps whose gradients stay until the next one\n"
                "hint: fit(..., accumulate=True), or step(batch) for forward, backward and update"
            )

    def _run(self, batch: Any, run: Callable[[StepRunner | PieceStepRunner, Any], Any]) -> Any:
        """Have a batch's runner run it, another one if what the trace depends on has changed."""
        assert self.optimizer is not None, "a TrainStep made for planning has no optimizer"
        assert self.request.modelled is None, "ranks that are not there cannot train"
        self.prepare(batch)
        try:
            returned = run(self._runner, fresh(batch))
        except CapturedAgainError as other:  # nothing has run
            self._change_runner(batch, other.program)
            try:
                returned = run(self._runner, fresh(batch))
            except CapturedAgainError:
                raise UnsupportedModelError(
                    "the loss depends on something that is another each time it is looked at"
                ) from None
        self._num_steps += 1
        return returned

    def arrange(self) -> None:
        """Have on the disk what the latest batch's shape streams, and all else in memory."""
        self._runner.arrange()

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Have parameters that lie in pieces with all ranks (`Parallel(shard=...)`) whole.

        Between steps such a parameter is this rank's piece. All ranks enter and leave this at once,
        with the memory of the whole model. What is written then, the same on all ranks, stays.
        """
        return nullcontext() if self._sharded is None else self._sharded.whole()

    def save(self, directory: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint by torch.distributed.checkpoint, of all ranks together.

        It can be loaded on any number of ranks, or by one process. It appears whole or not at all.

        Args:
            directory: of this checkpoint; one that is there is replaced.
            extra: anything that JSON can hold, returned by `load`.
        """
        from packlight.run.distributed import save_distributed

        assert self.optimizer is not None, "a TrainStep made for planning has no optimizer"
        save_distributed(
            Path(directory), self.model, self.optimizer, self.request.ranks, self._lying, extra
        )

    def load(self, directory: str | os.PathLike[str]) -> Any:
        """Go on from a checkpoint that `save` wrote, all ranks together; return its `extra`.

        On as many ranks that goes on to the last bit.

        Raises:
            FormatError: there is no such checkpoint, or it is of another model.
        """
        from packlight.run.distributed import load_distributed

        assert self.optimizer is not None, "a TrainStep made for planning has no optimizer"
        return load_distributed(
            Path(directory), self.model, self.optimizer, self.request.ranks, self._lying
        )

    @property
    def _lying(self) -> Lying:
        """Where values and states are, for checkpoints."""
        return lying_of(self.model, self._sharded, self.request.shard_ranks)

    def is_on_disk(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor (a parameter, optimizer state) lies in the offload directory's file.

        It can be read and written like any other, and takes no memory.
        """
        return self._streamed.is_on_disk(tensor)

    def measured(self, batch: Any) -> MeasuredStep:
        """Train one step like a call, and measure the whole step's peak (6 to 8% slower on CPU)."""
        assert self.optimizer is not None
        self.prepare(batch)
        runner, memory = self._runner, self._runner.memory
        runner.arrange()
        if self._sharded is not None:  # what is predicted is the rank that has most
            more = self._sharded.own_bytes - self.ready.sharding.parameter_bytes
            memory = replace(memory, parameter_bytes=memory.parameter_bytes + more)
        return measured_step(
            lambda: self(batch), memory, batch, self.optimizer, self.is_on_disk,
            self._preparer.device,
        )

    def evaluate(self, batch: Any) -> Any:
        """Return what `loss_fn` does for a batch in eval mode, without gradients.

        Where parameters lie in pieces, all ranks do this at once, with the whole model in memory.
        Modes are restored. It is computed in the precision of the training step, by eager PyTorch.
        """
        with self.whole_parameters():
            return evaluated(self._preparer.loss_fn, self.model, batch)

    # -- planning

    def prepare(self, batch: Any) -> None:
        """Capture and plan the step for a batch's shapes, if that is not done; train nothing.

        A loss that breaks into pieces is captured while it trains.
        """

        def look() -> tuple[Signature, bool]:
            has_changed = self._look_at_parameters()
            return signature_of(batch, self.model.training), has_changed

        key, signature, has_changed = agreed_signature(self.request.ranks, look)
        if has_changed:
            self._runners.clear()
            self._captures.clear()
            self._families.clear()
        if not self._runners.get(key):
            self._plan(batch, key, signature)
        self._runners[key] = self._runners.pop(key)  # the latest comes last
        self._key, self._signature = key, signature
        if not self._has_named_left:
            self._has_named_left = True
            name_parameters_left(self.model, self.optimizer, self.request.beside)

    def _plan(
        self, batch: Any, key: Any, signature: Signature, was_traced: bool = False
    ) -> None:
        """Plan a batch's step; it may have been traced already, where an old program was asked."""
        family = self._families.setdefault(family_of(signature), Family())
        # Ranks trace numbers: which sizes change may be another question on each of them.
        changing = family.changing(signature) if self.request.ranks is None else ()
        traced = (family_of(signature), changing) if changing else key
        captures = self._captures.setdefault(traced, {})
        if any(capture.is_full for capture in captures.values()):
            captures.clear()
            self._runners.pop(key, None)
        traced_before = num_traced(captures)
        runner: StepRunner | PieceStepRunner
        try:
            with old_objects_kept(), generators_kept():
                if self._sharded is not None:  # what is traced and measured, are whole parameters
                    self._sharded.gather_all()
                ready = self._preparer.prepare(batch, captures, family.bucket, dict(changing))
                runner = StepRunner(self._preparer.costs, self._streamed, self._sharded, ready)
        except InfeasibleBudgetError:
            raise
        except Exception as error:
            if changing:
                family.is_static = True  # with numbers it may do, else that says what is wrong
                self._plan(batch, key, signature, was_traced)
                return
            if not isinstance(error, GraphBreakError) or not error.can_be_cut:
                raise
            if self.request.ranks is not None:  # they agree on plans of one graph only
                raise
            preparer = self._preparer
            runner = PieceStepRunner(preparer.costs, preparer.loss_fn, batch, error)
        self._note_plan(was_traced or num_traced(captures) > traced_before)
        self._runners.setdefault(key, []).insert(0, runner)
        while len(self._runners) > MOST_SHAPES:
            forgotten = next(iter(self._runners))
            self._captures.pop(forgotten, None)
            for old in self._runners.pop(forgotten):
                old.forget()

    def _change_runner(self, batch: Any, program: Any) -> None:
        """Put the runner of another traced call first; plan it if it is new."""
        runners = self._runners[self._key]
        known = next((i for i, runner in enumerate(runners) if runner.runs(program)), None)
        if self.request.ranks is not None:  # each has its own plain values: all run one plan
            known = agreed_place(self.request.ranks, known)
        if known is None:
            self._plan(batch, self._key, self._signature, was_traced=True)
        else:
            runners.insert(0, runners.pop(known))

    @property
    def _runner(self) -> StepRunner | PieceStepRunner:
        """What runs for the latest batch's shape."""
        return self._runners[self._key][0]

    def _note_plan(self, was_traced: bool) -> None:
        """Warn, once, where planning does not pay because hardly a step is like one before."""
        self._num_plans += was_traced
        if self._num_plans == MANY_PLANS and self._num_plans > self._num_steps / 2:
            warnings.warn(
                f"{self._num_plans} of {self._num_steps + 1} steps were planned anew: shapes or "
                "plain values in the batch, or numbers that the model counts, change\nhint: pad "
                "batches to few shapes, and pass numbers that change as tensors",
                stacklevel=4,
            )

    @property
    def way(self) -> Way:
        """How the latest batch's shape runs, as data."""
        return self.ready.way

    @property
    def ready(self) -> Ready:
        """... with the captured graphs and the tensors that it runs on."""
        runner = self._runner
        if isinstance(runner, PieceStepRunner):
            raise runner.no_graph("it has no way to be saved, and no graph of all of it")
        return runner.ready

    def save_way(self, path: str | os.PathLike[str]) -> None:
        """Write how the latest batch's shape runs to a file, for `fit(..., way=path)`."""
        write_way(self.way, path)

    @property
    def plan(self) -> Plan:
        """The schedule that runs for the latest captured shape (per microbatch, the largest)."""
        return self._runner.plan

    @property
    def profile(self) -> StepProfile:
        """The captured step and its memory outside of the schedule."""
        graph = self.ready.parts[0].step.joint.graph
        return StepProfile(
            graph, self.way.memory, device_name(self._preparer.device), torch.__version__,
            self.way.machine,
        )

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the whole step, everything resident included."""
        return self._runner.peak_bytes

    def describe(self) -> str:
        """Return a few lines: what is in memory at the peak, the moves made, and the price."""
        return self._runner.describe()

    def how_it_runs(self) -> list[tuple[str, str]]:
        """Return (name, text): the precision, the moves made, and why others were not."""
        return self._runner.how_it_runs()
