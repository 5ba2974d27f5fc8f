"""From a model, a loss and an optimizer to a step in stages on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import read_joint_graph
from packlight.capture.step_capture import CapturedLoss, LossFunction, StepCapture, naming_failures
from packlight.cluster.instructions import PipelineSchedule, check
from packlight.cluster.schedules import schedule_of
from packlight.costs.cache import Cache
from packlight.costs.profiler import CallProfiler
from packlight.errors import (
    BatchError,
    InfeasibleBudgetError,
    OptionError,
    RankMismatchError,
    UnsupportedModelError,
)
from packlight.moves.microbatch.batch_statistics import batch_statistics
from packlight.moves.microbatch.independence import few_rows, settle
from packlight.moves.microbatch.loss_weight import find_denominator
from packlight.moves.microbatch.split import LossWeight, leaves_of_primals, num_rows, split
from packlight.pipeline.cuts import choose_cuts
from packlight.pipeline.memory import StageBytes, most_bytes
from packlight.pipeline.plans import plan_stages
from packlight.pipeline.shared import SharedParameters
from packlight.pipeline.split import split_step
from packlight.pipeline.stage import PlannedStage, read_stage
from packlight.pipeline.step import Layout, PipelineStep
from packlight.ranks.parallel import Parallel, RankGroups, ranks_of, refuse_wrapped
from packlight.step.digest import structure_digest
from packlight.units import parse_bytes
from packlight.updates.accounting import batch_bytes, tensors_bytes
from packlight.updates.gradients import Clipping
from packlight.updates.several import SeveralUpdates, updates_of
from packlight.updates.update import ParameterUpdates, UpdateCost

SCALAR_BYTES = 64
RUN = ("gpipe", "1f1b", "varuna", "zb-h1", "zb-h2")


def fit_pipeline(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    budget: str | int | None = None,
    *,
    mesh: DeviceMesh,
    num_microbatches: int,
    schedule: str = "1f1b",
    stages_per_rank: int = 1,
    data: str | None = None,
    loss_weight: LossWeight | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    progress: bool = True,
    timeout_seconds: float = 1800.0,
) -> PipelineStep:
    """Return a training step whose model lies in stages on the ranks of a mesh.

    All ranks call it with the same model (equal weights), loss, optimizer and batch. The step is
    captured as one graph, cut where that makes the slowest stage fastest, and each rank keeps the
    parameters of its stages alone; a microbatch's activations are planned for the rank's budget.
    Gradients have the bits of microbatches that are accumulated on one device, those of weights
    that several ranks have (tied ones) but for the order of sums.

    Args:
        model: any that `fit` captures as one graph, without layers that normalise over the batch.
        loss_fn: `loss_fn(model, batch)` returns a scalar tensor.
        optimizer: over parameters of the model.
        batch: an example; its rows are the microbatches'.
        budget: bytes of each rank, or a string such as "1GiB", as for `fit`. None for no limit.
        mesh: of one dimension, the ranks of the pipeline; or of two, one of them `data`.
        num_microbatches: into which each batch is cut, of equal sizes.
        schedule: "1f1b" (PipeDream-flush, Narayanan et al. 2021), "gpipe" (Huang et al. 2019), or
            with backwards in halves "zb-h1" and "zb-h2" (Qi et al. 2024): less of a bubble, the
            latter for up to twice the microbatches in flight; "varuna" (Athlur et al. 2022) is
            1F1B that recomputes before the gradient arrives.
        stages_per_rank: with "1f1b", interleaved (Narayanan et al. 2021, 2.2): a smaller bubble.
        data: name of the mesh's dimension along which ranks have the same stages, and other parts
            of the batch, of the same size; their gradients are added up once a step.
        loss_weight: as for `fit`: what the loss divides by, where its graph does not say.
        clip_grad_norm: clip the norm of all ranks' gradients together.
        clip_grad_value: clip each element of gradients.
        scaler: scales the loss; a gradient that overflows on one rank skips the update on all.
        progress: show what profiling does.
        timeout_seconds: how long a rank waits for another one.

    Raises:
        InfeasibleBudgetError: on all ranks, with the smallest budget of the rank that needs most.
        OptionError: a schedule that does not run here, more stages than places to cut, a mesh that
            does not fit.
        BatchError: rows that the microbatches do not divide.
        RankMismatchError: ranks have captured different steps.
        MicrobatchError: microbatches would not have the whole batch's gradients.
        GraphBreakError, UnsupportedModelError.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    groups = _groups(mesh, data, device, timeout_seconds)
    everybody, ranks = groups.all, groups.tensor or groups.all
    if schedule not in RUN:
        raise OptionError(
            f"schedule={schedule!r} is planned for clusters, and not run\nhint: {' or '.join(RUN)}"
        )
    order = schedule_of(schedule, ranks.size, num_microbatches, stages_per_rank)
    check(order)
    rows = num_rows(batch)
    if rows % num_microbatches:
        raise BatchError(
            "batch", None, f"of {rows} rows cannot be cut into {num_microbatches} equal parts",
            f"{rows - rows % num_microbatches or num_microbatches} rows can",
        )
    budget_bytes = None if budget is None else parse_bytes(budget)
    fitting = _Fitting(model, loss_fn, optimizer, batch, order, groups)
    with CallProfiler(progress) as profiler:
        everybody.gather(lambda: fitting.capture(profiler))
        fitting.agree()
        everybody.gather(lambda: fitting.cut(profiler, loss_weight))
    fitting.share()
    fitting.plan_together(budget_bytes)
    return fitting.step(budget_bytes, Clipping(clip_grad_norm, clip_grad_value), scaler)


def _groups(
    mesh: DeviceMesh, data: str | None, device: torch.device, timeout_seconds: float
) -> RankGroups:
    """Return all ranks, those with the same stages, and (as `tensor`) those of one pipeline."""
    stages = None
    if data is not None and isinstance(mesh, DeviceMesh):
        others = [name for name in mesh.mesh_dim_names or () if name != data]
        if mesh.ndim != 2 or len(others) != 1:
            raise OptionError(
                f"data={data!r} is no dimension of two of the mesh ({mesh.mesh_dim_names})\nhint: "
                "a mesh with mesh_dim_names=('data', 'stage') and data='data'; pipelines beside "
                "tensor parallel ranks are not there yet"
            )
        (stages,) = others
    parallel = Parallel(data=data, tensor=stages, timeout_seconds=timeout_seconds)
    groups = ranks_of(mesh, parallel, device)
    assert groups is not None, "a mesh has ranks"
    return groups


class _Fitting:
    """What becomes of the arguments, in the order of the calls."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        batch: Any,
        schedule: PipelineSchedule,
        groups: RankGroups,
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.batch, self.schedule, self.groups = batch, schedule, groups
        self.all, self.ranks = groups.all, groups.tensor or groups.all
        self.parts = split(batch, schedule.num_microbatches)
        self.updates: ParameterUpdates | SeveralUpdates | None = None
        self.traced = StepCapture(loss_fn, model)

    def capture(self, profiler: CallProfiler) -> None:
        """Trace one microbatch, and observe its calls."""
        refuse_wrapped(self.model)
        with naming_failures():
            self.loss: CapturedLoss = self.traced.capture(self.parts[0])
        if len(self.loss.returned) != 1 or self.loss.assigned:
            raise UnsupportedModelError(
                "a pipeline's loss_fn returns the loss alone, and its forward assigns no tensors "
                "to attributes\nhint: compute what is beside it in an evaluation"
            )
        rows = num_rows(self.parts[0])
        if statistics := batch_statistics(self.loss.joint, rows):
            raise UnsupportedModelError(
                f"{statistics[0]!r} and {len(statistics) - 1} others normalise over the rows of a "
                "microbatch\nhint: GroupNorm or LayerNorm, or eval mode for those layers"
            )
        self.whole: JointStep = read_joint_graph(
            self.loss.joint, self.loss.num_forward_outputs, profiler.measure
        )

    def agree(self) -> None:
        """Have all ranks cut the first rank's way, if they have captured the same step."""
        mine = structure_digest(self.whole.graph)
        digests = self.all.gather(lambda: mine)
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise RankMismatchError(
                    "the captured step", rank, digests[0][:12], digest[:12],
                    "the same model, batch shapes and versions everywhere",
                )
        self.cuts = self.all.gather(
            lambda: self._cuts(digests[0]) if self.all.rank == 0 else []
        )[0]

    def _cuts(self, digest: str) -> list[int]:
        """Return where the step is cut: where it was before, whatever operations take by now.

        So a budget that was named is enough when it is asked for.
        """
        cache = Cache("cuts", self.whole.device)
        question = f"{digest} {self.schedule.num_stages}"
        if question not in cache:
            cache[question] = choose_cuts(self.whole.graph, self.schedule.num_stages)
            cache.save()
        return [int(cut) for cut in cache[question]]

    def cut(self, profiler: CallProfiler, loss_weight: LossWeight | None) -> None:
        """Make the stages' graphs, find out how losses are weighed and what updates cost."""
        loss = self.loss
        weight = loss_weight
        if weight is None:
            part = self.parts[0]
            weight = find_denominator(
                loss.joint, loss.num_forward_outputs, num_rows(part),
                leaves_of_primals(loss.arguments, part), loss.arguments, loss.loss_index,
            )
        few = few_rows(self.batch, weight)
        self.weight = settle(self.model, self.loss_fn, few, weight)
        self.graphs = split_step(loss, self.whole, self.cuts)
        known = {id(p): p for p in self.model.parameters()}
        self.parameters: dict[int, nn.Parameter] = {
            i: known[id(a)] for i, a in enumerate(loss.arguments) if id(a) in known
        }
        updates = updates_of(self.optimizer)
        self.updates = updates if updates.refusal is None else None
        self.own = {
            index: read_stage(graph, profiler.measure, index in self.schedule.split_stages)
            for index, graph in enumerate(self.graphs)
            if self.schedule.rank_of_stage[index] == self.ranks.rank
        }

    def share(self) -> None:
        """Find out whose the parameters are (all ranks at once: groups are made)."""
        self.draws = any(o.is_random for o in self.whole.graph.computations)
        self.shared = SharedParameters(self.ranks, self.schedule, self.graphs, self.parameters)

    def plan_together(self, budget_bytes: int | None) -> None:
        """Plan all ranks' stages; where one does not fit, the rank that needs most says so on all.

        Raises:
            InfeasibleBudgetError: with a budget that is enough for every rank.
        """
        def plan() -> tuple[int, str, list[tuple[str, int]], str] | None:
            try:
                self.plan(budget_bytes)
            except InfeasibleBudgetError as error:
                return error.smallest_bytes, error.peak_operation, error.peak_buffers, error.hint
            return None

        needs = [(*told, rank) for rank, told in enumerate(self.all.gather(plan)) if told]
        if needs:
            smallest, where, buffers, hint, rank = max(needs, key=lambda told: told[0])
            assert budget_bytes is not None, "no limit is never too small"
            raise InfeasibleBudgetError(
                budget_bytes, smallest, f"{where}, {rank}", buffers, hint
            )

    def plan(self, budget_bytes: int | None) -> None:
        """Plan this rank's stages."""
        foreign = {id(p) for p in self.shared.foreign}
        mine = [p for p in self.model.parameters() if id(p) not in foreign]
        taken = {id(self.parameters[p]) for p in self._own_primals if p in self.parameters}
        trained = [p for p in mine if p.requires_grad and id(p) in taken]
        costs = [self._update_cost(p) for p in trained]
        self.update_seconds = sum(cost.seconds for cost in costs)
        resting = tensors_bytes([*mine, *self.model.buffers()])
        static = [
            ("parameters and buffers", resting),
            ("gradients", sum(p.nbytes for p in trained)),
            ("optimizer state", sum(cost.state_bytes for cost in costs)),
            ("batch", batch_bytes(self.batch) + SCALAR_BYTES * self.schedule.num_microbatches),
        ]
        # An update's workspace comes when no microbatch is under way; a gradient that has another
        # layout than its parameter is copied beside what runs.
        update = max((cost.workspace_bytes for cost in costs), default=0)
        copied = max((p.nbytes for p in trained), default=0)
        static_bytes = sum(size for _, size in static)

        def most(stages: Mapping[int, StageBytes]) -> int:
            peak, _ = most_bytes(self.schedule, self.ranks.rank, stages, static_bytes + copied)
            return max(peak, static_bytes + update)

        self.planned: dict[int, PlannedStage] = plan_stages(
            self.own, budget_bytes, most, static, self.schedule.ahead_stages
        )
        self.peak_bytes = most({k: stage.bytes for k, stage in self.planned.items()})

    @property
    def _own_primals(self) -> set[int]:
        return {p for graph, _ in self.own.values() for p in graph.primals}

    def _update_cost(self, parameter: nn.Parameter) -> UpdateCost:
        if self.updates is None:
            raise UnsupportedModelError(
                f"{type(self.optimizer).__name__} cannot update parameters one at a time: "
                f"{updates_of(self.optimizer).refusal}\nhint: most optimizers of torch.optim can"
            )
        return self.updates.cost(parameter)

    def step(
        self, budget_bytes: int | None, clipping: Clipping, scaler: torch.amp.GradScaler | None
    ) -> PipelineStep:
        """Let go of other ranks' parameters and return what trains."""
        layout = Layout(
            self.groups, self.schedule, self.planned, self.parameters, self.draws
        )
        self.loss.arguments.clear()
        self.shared.release()
        return PipelineStep(
            layout, self.traced, self.optimizer, self.updates, self.weight, self.shared,
            self.batch, budget_bytes, self.peak_bytes, clipping, scaler, self.update_seconds,
        )
