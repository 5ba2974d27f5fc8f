"""A schedule as generated functions, one for each section between its cuts.

Generated FX code drops each value after its last use, so writing the calls in the schedule's order,
each reading the latest version of its inputs, makes every buffer die where the schedule frees it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.joint import CPU_GENERATOR_BYTES, JointStep
from packlight.capture.whole_step import WholeStep
from packlight.costs.measure import in_place_call
from packlight.kernels.kernel import direct_call
from packlight.lower.crossing import Bounds, Crossing, crossings
from packlight.lower.facts import Facts
from packlight.lower.program import OPERATION_KEY, Program, Section
from packlight.lower.reductions import ReductionWriter
from packlight.lower.rng import generator_state, replay
from packlight.lower.transfers import TransferWriter
from packlight.lower.values import Values, plain_meta
from packlight.step import Action, Instruction, OperationKind, Schedule
from packlight.torch_internals.calling import box_arguments

GENERATOR_STATE_BYTES = {"cpu": CPU_GENERATOR_BYTES, "cuda": 16}


def emit(
    step: JointStep | WholeStep,
    schedule: Schedule,
    cuts: Sequence[int] = (),
    num_handed_on: int = 0,
) -> Program:
    """Return a program that runs a schedule.

    A whole step's results are returned by the last section; primals that are results are returned
    as they are. Of any other step, the section in which the forward ends returns the forward's
    results, the last one the gradients.

    Args:
        step: the captured step.
        schedule: a schedule of its graph that `simulate` accepts.
        cuts: where sections end, as positions among the instructions; none for a single section.
        num_handed_on: how many of the backward's results the last section but one returns.
    """
    whole = step if isinstance(step, WholeStep) else WholeStep(step, {}, {}, {})
    facts = Facts(whole, schedule)
    bounds = _bounds(step, schedule, cuts, num_handed_on)
    return _Emitter(facts).program(bounds)


def _bounds(
    step: JointStep | WholeStep, schedule: Schedule, cuts: Sequence[int], num_handed_on: int
) -> list[Bounds]:
    places = [0, *cuts, len(schedule.instructions)]
    assert places == sorted(places), f"cuts {cuts} among {places[-1]} instructions"
    ends = places[1:]
    last = len(ends) - 1
    forward = next(k for k, end in enumerate(ends) if end >= schedule.num_forward)
    joint = step.joint if isinstance(step, WholeStep) else step
    arrival = next(
        (
            position for position, i in enumerate(schedule.instructions)
            if i.action is Action.RUN
            and joint.graph.operations[i.target].kind is OperationKind.TANGENT
        ),
        schedule.num_forward,
    )
    backward = next((k for k, end in enumerate(ends) if end > arrival), last)
    results: list[list[Any]] = [[] for _ in ends]
    if isinstance(step, WholeStep):
        results[last] += joint.forward_results
    else:
        results[forward] += joint.forward_results
        results[last - 1 if num_handed_on else last] += joint.backward_results[:num_handed_on]
        results[last] += joint.backward_results[num_handed_on:]
    return [
        Bounds(places[k], end, k == 0, k == backward, tuple(results[k]))
        for k, end in enumerate(ends)
    ]


class _Emitter:
    """Writes section after section."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.whole, self.step = facts, facts.step, facts.step.joint
        self.ran: set[int] = set()
        self.transfers = TransferWriter(facts)
        self.reductions = ReductionWriter(facts)
        # The node behind what a section has left, in that section's graph.
        self.left: dict[int, fx.Node] = {}

    def program(self, sections: Sequence[Bounds]) -> Program:
        """Write everything."""
        exchanged = crossings(self.facts, sections)
        transferred = {operation.moved for operation in self.facts.transfers}
        crossing_copies = {b for crossing in exchanged for b in crossing.leaves}
        self.wanted_copies = crossing_copies | transferred
        is_whole = bool(self.whole.kept_by or self.whole.consumed_by)
        helpers = [
            *(("events",) if is_whole else ()),
            *(("tier",) if self.facts.offloaded else ()),
            *(("streamed",) if self.facts.streamed else ()),
            *(("reducer",) if self.whole.buckets else ()),
        ]
        written = [self._section(b, x, helpers) for b, x in zip(sections, exchanged, strict=True)]
        return Program(tuple(written), tuple(helpers), tuple(self.transfers.slots))

    def _section(self, bounds: Bounds, crossing: Crossing, helpers: list[str]) -> Section:
        graph = self.graph = fx.Graph()
        values = self.values = Values(self.facts, graph)
        self.overwritten: set[int] = set()
        for primal in self.step.primals if bounds.takes_primals else ():
            argument = graph.node_copy(primal)
            # Of what is streamed, only what was fetched is in memory.
            if self.step.buffer_of_node.get(primal) not in self.facts.streamed:
                values.place(primal, argument)
        self.taken = {b: self._taken(b) for b in crossing.takes}
        for tangent in self.step.tangents if bounds.takes_tangents else ():
            values.place(tangent, graph.node_copy(tangent))
        self.helpers = {name: graph.placeholder(name) for name in helpers}
        nodes = self.step.module.graph.find_nodes(op="get_attr")
        constants = {node: graph.node_copy(node) for node in nodes}
        for node, constant in constants.items():
            values.place(node, constant)
        self.transfers.begin(values, self.helpers)
        self.reductions.begin(values, self.helpers)
        for instruction in self.facts.schedule.instructions[bounds.start : bounds.end]:
            self._write(instruction)
        results = [self._result(node) for node in bounds.results]
        left = [values.whole(buffer) for buffer in crossing.leaves]
        self.left.update(zip(crossing.leaves, left, strict=True))
        graph.output((*results, *left))
        for constant in constants.values():
            if not constant.users:
                graph.erase_node(constant)
        box_arguments(graph)
        return Section(
            fx.GraphModule(self.step.module, graph, "PacklightSection"),
            crossing.takes,
            bounds.takes_tangents,
            len(results),
            crossing.leaves,
            crossing.passes,
            frozenset(self.overwritten),
        )

    def _taken(self, buffer: int) -> fx.Node:
        source = self.left[buffer]
        # Else AOTAutograd would take it for an input of the joint graph.
        is_argument = source.name.startswith("tangents")
        placeholder = self.graph.placeholder(f"saved_{source.name}" if is_argument else source.name)
        placeholder.target = placeholder.name  # two sections may have left values of one name
        placeholder.meta = plain_meta(source.meta)
        self.values.place_whole(buffer, placeholder)
        return placeholder

    def _result(self, node: Any) -> Any:
        """Return what a section returns; whoever gets it must find all transfers of it over."""
        buffer = self.facts.buffer_of(node)
        if buffer is not None:
            self.transfers.wait_written(buffer)
            self.transfers.wait_fetched(buffer)
        if isinstance(node, fx.Node) and node in self.facts.kept_of:
            return self.values.whole(self.facts.kept_of[node])
        return self.values.of(node)

    # -- instructions

    def _write(self, instruction: Instruction) -> None:
        target = instruction.target
        if instruction.action is Action.FREE:
            self.transfers.free(target)
            self.values.forget(target)
            return
        operation = self.step.graph.operations[target]
        for buffer in operation.touches:
            self.transfers.wait_fetched(buffer)
        if instruction.overwrite is not None:
            self.transfers.wait_written(instruction.overwrite[1])
        self.handlers[operation.kind](self, instruction)
        self.ran.add(target)

    def _compute(self, instruction: Instruction) -> None:
        """Write one call."""
        index = instruction.target
        node = self.step.node_of_operation[index]
        for buffer in self.step.graph.operations[index].creates:
            self.values.forget(buffer)
        args, kwargs = self.values.arguments(node)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if instruction.overwrite is not None:
            target, kwargs = self._in_place(index, node, instruction.overwrite[1], args, kwargs)
        state = self.step.rng_state_of.get(index)
        if state is not None and index in self.ran:
            replayed: Any = (self.values.whole(state), _device(node), target, *args)
            new = self.graph.call_function(replay, replayed, kwargs)
        else:
            new = self.graph.call_function(direct_call(target), args, kwargs)
        new.meta = {**plain_meta(node.meta), OPERATION_KEY: index}
        if instruction.overwrite is not None:
            self.values.forget(instruction.overwrite[1])
        self.values.place(node, new)
        self._place_items(node, new)

    def _place_items(self, node: fx.Node, new: fx.Node) -> None:
        """Take a tuple's items apart at once: the tuple itself would keep all of them alive."""
        if node in self.step.buffer_of_node:
            return
        for user in node.users:
            if user in self.step.folded and user.target is operator.getitem:
                if user.args[0] is node:
                    item = self.graph.call_function(operator.getitem, (new, user.args[1]))
                    item.meta = plain_meta(user.meta)
                    self.values.place(user, item)
        self.values.forget_node(node)

    def _in_place(
        self, index: int, node: fx.Node, read: int, args: Any, kwargs: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        if read in self.taken and self.values.whole(read) is self.taken[read]:
            self.overwritten.add(read)
        argument = self.step.overwritten_argument[index, read]
        found = in_place_call(node.target, argument, len(node.args))  # type: ignore[arg-type]
        assert found is not None
        overload, keyword = found
        if keyword is None:
            return overload, kwargs
        tensors = [
            leaf
            for leaf in pytree.tree_leaves((node.args, dict(node.kwargs)))
            if isinstance(leaf, fx.Node) and leaf in self.step.buffer_of_node
        ]
        return overload, {**kwargs, keyword: self.values.of(tensors[argument])}

    # -- what is no call of the joint graph

    def _take_tangent(self, instruction: Instruction) -> None:
        """It has come in as an argument."""

    def _hand_on(self, instruction: Instruction) -> None:
        """The section ends here."""

    def _take_generator_state(self, instruction: Instruction) -> None:
        (buffer,) = self.step.graph.operations[instruction.target].creates
        if buffer in self.facts.unused_states:
            return
        node = self.step.node_of_operation[instruction.target]
        state = self.graph.call_function(generator_state, (_device(node),))
        with _fake_mode(node):
            state.meta["val"] = torch.empty(
                GENERATOR_STATE_BYTES[_device(node).type], dtype=torch.uint8, device="cpu"
            )
        self.values.place_alone(buffer, state)

    def _take_snapshot(self, instruction: Instruction) -> None:
        """Copy what the caller overwrites; until the forward returns the original is the same."""
        (copy,) = self.step.graph.operations[instruction.target].creates
        if copy in self.wanted_copies:
            node = self.step.node_of_operation[instruction.target]
            new = self.graph.call_function(torch.ops.aten.clone.default, (self.values.of(node),))
            new.meta = plain_meta(node.meta)
            self.values.place_alone(copy, new)

    def _keep(self, instruction: Instruction) -> None:
        (kept,) = self.step.graph.operations[instruction.target].creates
        results = self.whole.kept_by[instruction.target]  # which are all the same
        node = self.step.forward_results[results[0]]
        value = self.values.of(node)
        if instruction.overwrite is None:  # somebody may overwrite it later
            value = self.graph.call_function(torch.ops.aten.clone.default, (value,))
            value.meta = plain_meta(node.meta)
        else:
            self.values.forget(instruction.overwrite[1])
        self.values.place_alone(kept, value)
        for result in results:
            self.graph.call_method("result", (self.helpers["events"], result, value))

    def _update(self, instruction: Instruction) -> None:
        index = instruction.target
        for buffer in self.step.graph.operations[index].mutates:
            self.transfers.updating(buffer)
        primals = self.whole.consumed_by[index]
        if self.whole.buckets:
            for primal in primals:
                value = self.reductions.gradient(primal)
                arguments: tuple[Any, ...] = (self.helpers["events"], primal, value)
                self.graph.call_method("reduced_gradient", arguments)
            return
        nodes = [self.step.backward_results[primal] for primal in primals]
        buffers = [self.step.buffer_of_node[node] for node in nodes]
        given: list[tuple[Any, ...]] = []
        for place, (primal, node) in enumerate(zip(primals, nodes, strict=True)):
            self.transfers.wait_written(buffers[place])
            is_last_read = (index, buffers[place]) in self.facts.last_reads
            is_last_use = is_last_read and buffers[place] not in buffers[place + 1 :]
            given.append((primal, self.values.of(node), is_last_use))
        if index in self.whole.grouped:
            self.graph.call_method("gradients", (self.helpers["events"], given))
            return
        for arguments in given:
            self.graph.call_method("gradient", (self.helpers["events"], *arguments))

    def _bucket(self, instruction: Instruction) -> None:
        self.reductions.pack(instruction)

    def _reduce(self, instruction: Instruction) -> None:
        self.reductions.reduce(instruction)

    def _own(self, instruction: Instruction) -> None:
        self.reductions.own(instruction)

    def _share(self, instruction: Instruction) -> None:
        primal = self.whole.shared_by[instruction.target]
        self.graph.call_method("share", (self.helpers["events"], primal))

    def _read(self, instruction: Instruction) -> None:
        self.transfers.fetch(self.step.graph.operations[instruction.target].moved)

    def _write_away(self, instruction: Instruction) -> None:
        self.transfers.offload(self.step.graph.operations[instruction.target].moved)

    handlers: ClassVar[dict[OperationKind, Callable[[_Emitter, Instruction], None]]] = {
        OperationKind.COMPUTE: _compute,
        OperationKind.TANGENT: _take_tangent,
        OperationKind.GENERATOR: _take_generator_state,
        OperationKind.SNAPSHOT: _take_snapshot,
        OperationKind.KEEP: _keep,
        OperationKind.UPDATE: _update,
        OperationKind.READ: _read,
        OperationKind.WRITE: _write_away,
        OperationKind.BUCKET: _bucket,
        OperationKind.REDUCE: _reduce,
        OperationKind.OWN: _own,
        OperationKind.SHARE: _share,
        OperationKind.HAND_ON: _hand_on,
    }


def _device(node: fx.Node) -> torch.device:
    values = pytree.tree_leaves(node.meta["val"])
    return next(v.device for v in values if isinstance(v, torch.Tensor))


def _fake_mode(node: fx.Node) -> Any:
    values = pytree.tree_leaves(node.meta["val"])
    return next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
