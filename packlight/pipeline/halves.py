"""A stage's backward in halves: what the stage before waits for, and the rest.

The first half makes what is handed on, and nothing that is not needed for that; the second makes
the gradients of the stage's own parameters (Qi et al. 2024, arXiv 2401.10241). Each operation is in
one of them, so nothing runs twice but what the plan recomputes. To the planner the border is an
operation like any other: it reads what is handed on, and whatever belongs behind it reads a token
that it makes. So recomputation is planned for either half, and a schedule says where to cut it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from packlight.capture.joint import JointStep
from packlight.pipeline.split import StageGraph
from packlight.step import (
    Action,
    Buffer,
    BufferKind,
    Operation,
    OperationKind,
    Phase,
    Schedule,
    StepGraph,
)


def in_halves(graph: StageGraph, step: JointStep) -> tuple[StageGraph, JointStep]:
    """Return a stage whose backward is in halves, with an operation HAND_ON between the two.

    Gradients that are complete with the first half come before the others among its results.

    Args:
        graph: of the stage.
        step: read from it.
    """
    own, num_handing = step.graph, len(graph.handing)
    handing, finals = step.backward_results[:num_handing], step.backward_results[num_handing:]
    handed = {step.buffer_of_node[node] for node in handing}
    first = _needed(own, handed)
    early = _early(step, finals, first, handed)
    order = sorted(range(len(finals)), key=lambda i: step.buffer_of_node[finals[i]] not in early)
    in_halves = replace(
        graph,
        gradients=tuple(graph.gradients[i] for i in order),
        num_early=sum(step.buffer_of_node[node] in early for node in finals),
    )
    results = [*handing, *(finals[i] for i in order)]
    num_late = len(finals) - in_halves.num_early
    return in_halves, _with_border(step, results, num_late, first, handed | early)


def hand_on_position(step: JointStep, schedule: Schedule) -> int | None:
    """Return where a schedule's first half of the backward ends; None where it is not halved."""
    for position, instruction in enumerate(schedule.instructions):
        if instruction.action is Action.RUN:
            if step.graph.operations[instruction.target].kind is OperationKind.HAND_ON:
                return position + 1
    return None


def _needed(graph: StepGraph, handed: Collection[int]) -> set[int]:
    """Return the operations of the backward that belong to the first half.

    Beside what is needed, that is whatever draws random numbers, in the order in which it does, and
    the arrival of gradients.
    """
    wanted, needed = set(handed), set()
    for operation in reversed(graph.computations[graph.num_forward :]):
        is_drawn = operation.is_random or operation.kind is OperationKind.GENERATOR
        is_wanted = is_drawn or not wanted.isdisjoint(operation.creates)
        if is_wanted or operation.kind is OperationKind.TANGENT:
            needed.add(operation.id)
            wanted.update(operation.reads)
    return needed


def _early(
    step: JointStep, gradients: Iterable[Any], first: Collection[int], handed: Collection[int]
) -> set[int]:
    """Return the buffers of gradients that are complete, and read no more, with the first half.

    A parameter has them from there on, and others are added to them.
    """
    backward = step.graph.computations[step.graph.num_forward :]
    made = {b for o in backward if o.id in first for b in o.creates}
    read = {b for o in backward if o.id not in first for b in o.reads}
    tangents = {b for o in backward if o.kind is OperationKind.TANGENT for b in o.creates}
    buffers = {step.buffer_of_node[node] for node in gradients}
    return (buffers & made) - read - tangents - set(handed)


def _with_border(
    step: JointStep,
    results: list[fx.Node],
    num_late: int,
    first: Collection[int],
    given: Collection[int],
) -> JointStep:
    """Return a step whose backward is sorted by halves, with what lies between them.

    Args:
        step: of a stage.
        results: of the backward, in the order in which they are returned.
        num_late: how many of them the second half returns.
        first: operations of the first half.
        given: buffers that belong to others from the border on.
    """
    graph = step.graph
    num_forward = graph.num_forward
    forward, backward = graph.computations[:num_forward], graph.computations[num_forward:]
    halves = [o for o in backward if o.id in first], [o for o in backward if o.id not in first]
    token = Buffer(len(graph.buffers), 0, BufferKind.GRADIENT, "handed on")
    border = Operation(
        0, f"packlight.{OperationKind.HAND_ON}", tuple(sorted(given)), (token.id,), 0.0,
        phase=Phase.BACKWARD, can_recompute=False, kind=OperationKind.HAND_ON,
    )
    late = (replace(o, reads=(*o.reads, token.id)) for o in halves[1])
    old_ids = [o.id for o in (*forward, *halves[0])]
    num_before = len(old_ids)
    new_of = {old: new for new, old in enumerate(old_ids)}
    new_of.update({o.id: num_before + 1 + i for i, o in enumerate(halves[1])})
    operations = tuple(
        replace(_without_claims(o, given, o.id in first), id=new)
        for new, o in enumerate((*forward, *halves[0], border, *late))
    )
    returned = {step.buffer_of_node[node] for node in results[-num_late:]} if num_late else set()
    outputs = tuple(b for b in graph.outputs if b not in given or b in returned)

    def in_order(things: list[Any], of_border: Any) -> list[Any]:
        return [*(things[i] for i in old_ids), of_border, *(things[o.id] for o in halves[1])]

    return replace(
        step,
        graph=StepGraph(
            operations, (*graph.buffers, token), graph.num_forward, graph.forward_outputs, outputs
        ),
        node_of_operation=in_order(step.node_of_operation, step.node_of_operation[0]),
        facts=in_order(step.facts, None),
        root_of_buffer=[*step.root_of_buffer, None],
        overwritten_argument={
            (new_of[o], b): place for (o, b), place in step.overwritten_argument.items()
        },
        rng_state_of={new_of[o]: state for o, state in step.rng_state_of.items()},
        backward_results=results,
    )


def _without_claims(operation: Operation, given: Collection[int], is_first: bool) -> Operation:
    """Return an operation that leaves alone what belongs to others from the border on."""
    overwrites = tuple(pair for pair in operation.overwrites if pair[1] not in given)
    reads_given = is_first and not set(given).isdisjoint(operation.reads)
    return replace(
        operation, overwrites=overwrites, can_recompute=operation.can_recompute and not reads_given
    )
