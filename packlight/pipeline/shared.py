"""Parameters of a pipeline: whose they are, and those that several ranks have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from packlight.cluster.instructions import PipelineSchedule
from packlight.pipeline.split import StageGraph
from packlight.ranks.group import Ranks


@dataclass(frozen=True)
class _Foreign:
    """A parameter that is not this rank's.

    Attributes:
        parameter: its object.
        absent: of its shape and layout, without memory: what a traced step expects to be passed.
        nothing: what it is between steps: no rows, so that whoever reads it sees that it is not
            here.
    """

    parameter: nn.Parameter
    absent: torch.Tensor
    nothing: torch.Tensor


class SharedParameters:
    """Which ranks have a parameter: those with a stage that reads it.

    Tied weights may be on several. Each adds up its own part of the gradient over microbatches; the
    parts are added up at the end, and every rank makes the same update of its own copy.

    Args:
        ranks: of the pipeline.
        schedule: which stage is where.
        graphs: of all stages.
        parameters: primal -> the parameter that it is.
    """

    def __init__(
        self,
        ranks: Ranks,
        schedule: PipelineSchedule,
        graphs: Sequence[StageGraph],
        parameters: Mapping[int, nn.Parameter],
    ) -> None:
        self.ranks = ranks
        self.owners: dict[int, tuple[int, ...]] = {
            primal: tuple(sorted({
                schedule.rank_of_stage[stage]
                for stage, graph in enumerate(graphs) if primal in graph.primals
            }))
            for primal in parameters
        }
        self._parameters = parameters
        self._foreign: list[_Foreign] = []
        several = sorted({own for own in self.owners.values() if len(own) > 1})
        members = dist.get_process_group_ranks(ranks.group)
        timeout = timedelta(seconds=ranks.timeout_seconds)
        # Their members make groups, in one order; others may be of another pipeline.
        self._groups = {
            own: dist.new_group(
                [members[r] for r in own], timeout,
                use_local_synchronization=len(own) < dist.get_world_size(),
            )
            for own in several if ranks.rank in own
        }
        self._primal_of = {id(parameter): primal for primal, parameter in parameters.items()}

    @property
    def foreign(self) -> list[nn.Parameter]:
        """Parameters that only other ranks' stages read."""
        rank = self.ranks.rank
        return [
            self._parameters[primal]
            for primal, own in self.owners.items() if own and rank not in own
        ]

    def is_known(self, parameter: nn.Parameter) -> bool:
        """Whether some stage reads a parameter."""
        return bool(self.owners.get(self._primal_of.get(id(parameter), -1)))

    def is_first_owner(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first that has a parameter."""
        return self.owners[self._primal_of[id(parameter)]][:1] == (self.ranks.rank,)

    def is_foreign(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter's values are on other ranks alone."""
        return any(each.parameter is tensor for each in self._foreign)

    def add_up(self) -> None:
        """Add up the gradients of parameters that several ranks have."""
        for primal, own in self.owners.items():
            if len(own) > 1 and self.ranks.rank in own:
                parameter = self._parameters[primal]
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                with self.ranks.naming_losses():
                    dist.all_reduce(parameter.grad, group=self._groups[own])

    def release(self) -> None:
        """Let go of the values of parameters that are not this rank's."""
        self._foreign = [
            _Foreign(p, p.data, p.data.new_empty((0, *p.shape[1:]))) for p in self.foreign
        ]
        for each in self._foreign:
            each.absent.untyped_storage().resize_(0)
            each.parameter.data = each.nothing

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Have all parameters in their shapes, those of other ranks without memory."""
        for each in self._foreign:
            each.parameter.data = each.absent
        try:
            yield
        finally:
            for each in self._foreign:
                each.parameter.data = each.nothing

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters in memory, on all ranks, with their owners' values."""
        for each in self._foreign:
            each.parameter.data = torch.empty_like(each.absent)
        for primal, own in self.owners.items():
            if own:
                values = self._parameters[primal].detach()
                self.ranks.wait(self.ranks.start_sharing(values, own[0]))
        try:
            yield
        finally:
            for each in self._foreign:
                each.parameter.data = each.nothing
