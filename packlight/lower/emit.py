"""A schedule written as two FX graphs, forward and backward.

Generated FX code drops each value after its last use, so emitting the calls in the schedule's
order, each reading the latest version of its inputs, makes every buffer die where the schedule
frees it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.joint import (
    CPU_GENERATOR_BYTES,
    RNG_STATE,
    SNAPSHOT,
    TANGENT,
    JointStep,
)
from packlight.costs.measure import in_place_call
from packlight.lower.rng import generator_state, replay
from packlight.step import Action, Instruction, Phase, Schedule
from packlight.torch_internals import descriptions, saved_descriptions

# In a node's metadata: the operation that it runs. In the backward module's metadata: which of its
# arguments it overwrites.
OPERATION_KEY = "packlight_operation"
OVERWRITTEN_KEY = "packlight_overwritten"
GENERATOR_STATE_BYTES = {"cpu": CPU_GENERATOR_BYTES, "cuda": 16}


@dataclass(frozen=True)
class EmittedStep:
    """What AOTAutograd asks of a partition, and which buffers cross from forward to backward.

    Attributes:
        forward: placeholders are the primals; returns the forward's outputs, then what is saved.
        backward: placeholders are what was saved, then the tangents; returns the gradients.
        saved_buffers: buffers that the backward takes from the forward.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved_buffers: tuple[int, ...]


def emit(step: JointStep, schedule: Schedule) -> EmittedStep:
    """Return forward and backward graphs that run a schedule.

    Args:
        step: the captured step.
        schedule: a schedule of `step.graph` that `simulate` accepts.
    """
    forward_part = schedule.instructions[: schedule.num_forward]
    backward_part = schedule.instructions[schedule.num_forward :]
    recomputed = frozenset(op for op, count in schedule.compute_counts().items() if count > 1)
    entering = _buffers_entering(step, backward_part)
    forward = Emitter(step, recomputed, is_backward=False)
    forward.wanted_copies = frozenset(entering)
    for node in step.module.graph.nodes:
        if node.op == "get_attr":
            forward.place(node, forward.new.node_copy(node))
    for primal in step.primals:
        forward.place(primal, forward.new.node_copy(primal))
    forward.run(forward_part)
    outputs = [forward.value(r) for r in step.forward_results]

    backward = Emitter(step, recomputed, is_backward=True)
    saved: list[tuple[fx.Node, fx.Node]] = []  # (joint node, node in the forward graph)
    saved_buffers: list[int] = []
    states = set(step.rng_state_of.values())
    for buffer in entering:
        root = step.root_of_buffer[buffer]
        assert root is not None
        if root.op == "get_attr":
            backward.place(root, backward.new.node_copy(root))
            continue
        name = forward.special.get(buffer)
        saved.append((root, name if name is not None else forward.value(root)))
        saved_buffers.append(buffer)
    for (root, source), buffer in zip(saved, saved_buffers, strict=True):
        placeholder = backward.new.placeholder(_clean(source.name))
        placeholder.meta = _plain_meta(source.meta)
        if buffer in states:
            backward.special[buffer] = placeholder
        else:
            backward.place(root, placeholder)
    for tangent in step.tangents:
        backward.place(tangent, backward.new.node_copy(tangent))
    backward.run(backward_part)
    gradients = [backward.value(r) for r in step.backward_results]
    for node in backward.new.nodes:
        if node.op in ("call_function", "get_attr"):
            node.meta["autograd_backward"] = True
    _hide_saved_values(source for _, source in saved)
    forward.new.output((*outputs, *(source for _, source in saved)))
    backward.new.output(tuple(gradients))
    old_output = next(n for n in step.module.graph.nodes if n.op == "output")
    _describe_outputs(old_output, forward.new, backward.new, len(outputs), len(saved))
    backward_module = fx.GraphModule(step.module, backward.new, "PacklightBackward")
    overwritten = {i.overwrite[1] for i in backward_part if i.overwrite is not None}
    backward_module.meta[OVERWRITTEN_KEY] = [
        place for place, buffer in enumerate(saved_buffers) if buffer in overwritten
    ]
    return EmittedStep(
        fx.GraphModule(step.module, forward.new, "PacklightForward"),
        backward_module,
        tuple(saved_buffers),
    )


def _buffers_entering(step: JointStep, instructions: tuple[Instruction, ...]) -> list[int]:
    """Return the buffers that the backward uses before it creates them."""
    created: set[int] = set()
    entering: dict[int, None] = {}
    for instruction in instructions:
        if instruction.action is Action.COMPUTE:
            operation = step.graph.operations[instruction.target]
            if operation.name == TANGENT:
                created.update(operation.creates)
                continue
            for buffer in operation.reads:
                if buffer not in created:
                    entering.setdefault(buffer)
            created.update(operation.creates)
    for node in pytree.tree_leaves(step.backward_results):
        if isinstance(node, fx.Node) and node in step.buffer_of_node:
            buffer = step.buffer_of_node[node]
            if buffer not in created:
                entering.setdefault(buffer)
    # Generator states are read only by recomputations.
    needed_states = {
        step.rng_state_of[i.target]
        for i in instructions
        if i.action is Action.COMPUTE and i.target in step.rng_state_of
    }
    states = set(step.rng_state_of.values())
    return [b for b in entering if b not in states or b in needed_states]


@dataclass
class Emitter:
    """Writes one graph; knows the latest value of every joint node that is in memory."""

    step: JointStep
    recomputed: frozenset[int]
    is_backward: bool
    ran: set[int] = field(default_factory=set)
    new: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wanted_copies: frozenset[int] = frozenset()
    # Values of buffers that no joint node stands for: generator states and snapshots.
    special: dict[int, fx.Node] = field(default_factory=dict)
    of_buffer: dict[int, list[fx.Node]] = field(default_factory=dict)

    def place(self, node: fx.Node, value: fx.Node) -> None:
        """Note the value of a joint node."""
        self.env[node] = value
        buffer = self.step.buffer_of_node.get(node)
        if buffer is not None:
            self.of_buffer.setdefault(buffer, []).append(node)

    def forget(self, buffer: int) -> None:
        """Note that a buffer is not in memory any more."""
        for node in self.of_buffer.pop(buffer, ()):
            self.env.pop(node, None)
        self.special.pop(buffer, None)

    def run(self, instructions: tuple[Instruction, ...]) -> None:
        """Write instructions in order."""
        for instruction in instructions:
            if instruction.action is Action.COMPUTE:
                self.compute(instruction)
            elif instruction.action is Action.FREE:
                self.free(instruction.target)
            else:
                self.transfer(instruction)

    def free(self, buffer: int) -> None:
        """Write the end of a buffer's life: generated code drops what is not read any more."""
        self.forget(buffer)

    def transfer(self, instruction: Instruction) -> None:
        """Write a transfer between memories."""
        raise AssertionError(f"{instruction.action} needs a whole step (lower/program.py)")

    def value(self, node: Any) -> Any:
        """Return the value of a joint node, making views and items again where needed."""
        if not isinstance(node, fx.Node):
            return node
        if node in self.env:
            return self.env[node]
        constant = node.meta.get("val")
        if isinstance(constant, (int, float, bool)):
            return constant
        if isinstance(constant, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return (
                constant.node.int_() if isinstance(constant, torch.SymInt) else constant.node.expr
            )
        assert node in self.step.folded, f"{node} is not in memory"
        args, kwargs = pytree.tree_map_only(fx.Node, self.value, (node.args, dict(node.kwargs)))
        target: Any = node.target
        new = self.new.call_function(target, args, kwargs)
        new.meta = _plain_meta(node.meta)
        self.place(node, new)
        return new

    def compute(self, instruction: Instruction) -> None:
        """Write one call."""
        index = instruction.target
        operation = self.step.graph.operations[index]
        node = self.step.node_of_operation[index]
        if operation.name == TANGENT:
            return
        if operation.name == RNG_STATE:
            self._take_generator_state(index, node, operation.creates[0])
            return
        if operation.name == SNAPSHOT:
            # Until the forward returns the original still holds the value.
            if operation.creates[0] in self.wanted_copies:
                copy = self.new.call_function(torch.ops.aten.clone.default, (self.value(node),))
                copy.meta = _plain_meta(node.meta)
                self.special[operation.creates[0]] = copy
            return
        for buffer in operation.creates:
            self.forget(buffer)
        args, kwargs = pytree.tree_map_only(fx.Node, self.value, (node.args, dict(node.kwargs)))
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if instruction.overwrite is not None:
            target, kwargs = self._in_place(index, node, instruction.overwrite[1], args, kwargs)
        state = self.step.rng_state_of.get(index)
        if state is not None and self.special.get(state) is not None and self._is_replay(index):
            replayed: Any = (self.special[state], _device(node), target, *args)
            new = self.new.call_function(replay, replayed, kwargs)
        else:
            new = self.new.call_function(target, args, kwargs)
        self.ran.add(index)
        new.meta = {**_plain_meta(node.meta), OPERATION_KEY: index}
        if instruction.overwrite is not None:
            self.forget(instruction.overwrite[1])
        self.place(node, new)
        self._place_items(node)

    def _place_items(self, node: fx.Node) -> None:
        """Take a tuple's items apart at once: the tuple itself would keep all of them alive."""
        for user in node.users:
            if user in self.step.folded and user.args and user.args[0] is node:
                if user.target is operator.getitem and node not in self.step.buffer_of_node:
                    item = self.new.call_function(operator.getitem, (self.env[node], user.args[1]))
                    item.meta = _plain_meta(user.meta)
                    self.place(user, item)
        if node not in self.step.buffer_of_node:
            self.env.pop(node, None)

    def _in_place(
        self, index: int, node: fx.Node, read: int, args: Any, kwargs: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
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
        return overload, {**kwargs, keyword: self.value(tensors[argument])}

    # -- random operations

    def _take_generator_state(self, index: int, node: fx.Node, buffer: int) -> None:
        random_operation = next(o for o, b in self.step.rng_state_of.items() if b == buffer)
        if random_operation not in self.recomputed:
            return
        state = self.new.call_function(generator_state, (_device(node),))
        with _fake_mode(node):
            state.meta["val"] = torch.empty(
                GENERATOR_STATE_BYTES[_device(node).type], dtype=torch.uint8, device="cpu"
            )
        self.special[buffer] = state

    def _is_replay(self, index: int) -> bool:
        is_forward_operation = self.step.graph.operations[index].phase is Phase.FORWARD
        return index in self.ran or (self.is_backward and is_forward_operation)


def _device(node: fx.Node) -> torch.device:
    values = pytree.tree_leaves(node.meta["val"])
    return next(v.device for v in values if isinstance(v, torch.Tensor))


def _fake_mode(node: fx.Node) -> Any:
    values = pytree.tree_leaves(node.meta["val"])
    return next(v.fake_mode for v in values if hasattr(v, "fake_mode"))


def _hide_saved_values(sources: Iterable[fx.Node]) -> None:
    """Keep AOTAutograd from refusing `retain_graph=True`.

    It refuses where it sees that saved tensors are the graph's own, since a compiler may then reuse
    their storage. Here the backward copies what it would overwrite when the graph is retained.
    """
    for source in sources:
        if source.op != "placeholder":
            source.meta = {k: v for k, v in source.meta.items() if k != "val"}


def _plain_meta(meta: dict[str, Any]) -> dict[str, Any]:
    left_out = ("saved_tensor_with_no_vc_check", OPERATION_KEY)
    return {k: v for k, v in meta.items() if k not in left_out}


def _clean(name: str) -> str:
    """Name a saved value so that AOTAutograd does not take it for an input of the joint graph."""
    return name if not name.startswith("tangents") else f"saved_{name}"


def _describe_outputs(
    old: fx.Node, forward: fx.Graph, backward: fx.Graph, num_outputs: int, num_saved: int
) -> None:
    """Copy AOTAutograd's descriptions of the joint graph's outputs to the two graphs' outputs."""
    described = descriptions(old)
    if described is None:
        return
    next(n for n in forward.nodes if n.op == "output").meta["desc"] = [
        *described[:num_outputs],
        *saved_descriptions(num_saved),
    ]
    next(n for n in backward.nodes if n.op == "output").meta["desc"] = list(described[num_outputs:])
