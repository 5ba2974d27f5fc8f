"""The microbatches under way in one step of a pipeline, on one rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from packlight.cluster.instructions import Instruction, Work
from packlight.lower.frame import Frame
from packlight.lower.rng import generator_state, set_generator_state
from packlight.pipeline.channel import as_sent
from packlight.updates.gradients import fills_storage
from packlight.updates.slices import like_eager

if TYPE_CHECKING:
    from packlight.pipeline.step import PipelineStep


class UnderWay:
    """Does what instructions say, and has what that leaves for later ones.

    Args:
        step: with the rank's programs and its channel.
        parts: the microbatches.
        weights: how much each counts.
        seed: of the first one's random numbers.
    """

    def __init__(
        self, step: PipelineStep, parts: Sequence[Any], weights: Sequence[float], seed: int
    ) -> None:
        self.step, self.parts, self.weights, self.seed = step, parts, weights, seed
        self.frames: dict[tuple[int, int], tuple[Frame, list[torch.Tensor]]] = {}
        # What a stage made for another one of the same rank.
        self.at_hand: dict[Instruction, list[torch.Tensor]] = {}
        self.losses: dict[int, torch.Tensor] = {}

    def do(self, instruction: Instruction) -> None:
        """Run one instruction."""
        work = instruction.work
        if work is Work.FORWARD:
            self._forward(instruction)
        elif work is Work.RECOMPUTE:
            frame, _ = self.frames[instruction.stage, instruction.microbatch]
            frame.run([])
        elif work is Work.WEIGHT:
            self._weight(instruction)
        else:
            self._backward(instruction)

    def _forward(self, instruction: Instruction) -> None:
        """Run a stage's forward on one microbatch."""
        step, stage, microbatch = self.step, instruction.stage, instruction.microbatch
        graph = step.layout.stages[stage].graph
        primals = step.primals(self.parts[microbatch])
        given = self._needed(instruction)
        if step.layout.draws:
            state = given.pop().cpu() if given else step.seeded(self.seed + microbatch)
            set_generator_state(state, step.device)
        frame = Frame(step.programs[stage], {})
        results = list(frame.run([*(primals[p] for p in graph.primals), *given]))
        # What arrived is counted until the backward is over.
        self.frames[stage, microbatch] = frame, given
        leaving, results = results[: len(graph.leaving)], results[len(graph.leaving):]
        for primal, value in zip(graph.written, results, strict=False):
            primals[primal].copy_(value)
        if graph.has_loss:
            self.losses[microbatch] = results[-1].detach()
        leaving = [as_sent(t, v) for t, v in zip(leaving, graph.leaving, strict=True)]
        if step.layout.draws:
            leaving.append(generator_state(step.device))
        self._hand_on(instruction, leaving)

    def _backward(self, instruction: Instruction) -> None:
        """Run a stage's backward on one microbatch, or the half that others wait for."""
        step, stage, microbatch = self.step, instruction.stage, instruction.microbatch
        planned = step.layout.stages[stage]
        graph, is_half = planned.graph, instruction.work is Work.INPUT
        tangents = self._needed(instruction)
        if graph.has_loss:
            tangents.insert(0, torch.full_like(self.losses[microbatch], self.weights[microbatch]))
        key = stage, microbatch
        frame, arrived = self.frames[key] if is_half else self.frames.pop(key)
        results = list(frame.run(tangents))
        del frame, arrived
        handing, gradients = results[: len(graph.handing)], results[len(graph.handing):]
        del results
        handing = [as_sent(t, v) for t, v in zip(handing, graph.handing, strict=True)]
        self._hand_on(instruction, handing)
        del handing
        primals = graph.gradients[: graph.num_early] if is_half else graph.gradients
        add_up(step.layout.parameters, primals, gradients, planned.aliased)

    def _weight(self, instruction: Instruction) -> None:
        """Run the half of a stage's backward that nobody waits for."""
        frame, arrived = self.frames.pop((instruction.stage, instruction.microbatch))
        planned = self.step.layout.stages[instruction.stage]
        gradients = list(frame.run([]))
        del frame, arrived
        primals = planned.graph.gradients[planned.graph.num_early :]
        add_up(self.step.layout.parameters, primals, gradients, planned.aliased)

    def _needed(self, instruction: Instruction) -> list[torch.Tensor]:
        layout = self.step.layout
        source = layout.schedule.needs(instruction)
        if source is None:
            return []
        if source in self.at_hand:
            return self.at_hand.pop(source)
        graph = layout.stages[instruction.stage].graph
        is_forward = instruction.work is Work.FORWARD
        values = [*(graph.arriving if is_forward else graph.returning)]
        if is_forward and layout.draws:
            values.append(self.step.state_value)
        place = layout.schedule.rank_of_stage[source.stage]
        return self.step.channel.receive(source, values, place)

    def _hand_on(self, instruction: Instruction, tensors: list[torch.Tensor]) -> None:
        layout, stage = self.step.layout, instruction.stage
        if instruction in self.step.sent:
            target = self.step.sent[instruction].target.stage
            self.step.channel.send(instruction, tensors, layout.schedule.rank_of_stage[target])
            return
        is_end = layout.schedule.is_last(stage) if instruction.work is Work.FORWARD else (
            layout.schedule.is_first(stage)
        )
        if not is_end:
            self.at_hand[instruction] = tensors


def add_up(
    parameters: Mapping[int, nn.Parameter],
    primals: Sequence[int],
    gradients: list[torch.Tensor],
    aliased: Collection[int] = (),
) -> None:
    """Add gradients to those of earlier microbatches.

    Args:
        parameters: by primal.
        primals: whose gradients they are.
        gradients: emptied.
        aliased: primals of gradients that lie where something else does, which must stay.
    """
    for primal in primals:
        parameter, gradient = parameters[primal], gradients.pop(0)
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            continue
        own = like_eager(gradient, parameter)
        is_own = own is not gradient or (primal not in aliased and fills_storage(gradient))
        parameter.grad = own if is_own else own.clone()
        del gradient, own
