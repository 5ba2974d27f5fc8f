"""A joint forward+backward FX graph read into a `StepGraph`.

Every node that allocates becomes an `Operation`; nodes that only look at a storage (views, items of
tuples) are folded into the `Buffer` they look at and are made again wherever they are needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.ignored import drop_ignored_reads
from packlight.capture.joint import CPU_GENERATOR_BYTES, JointStep
from packlight.capture.layers import layers_of_nodes
from packlight.capture.layouts import (
    as_observed,
    copies_before_view,
    fake_arguments,
    retraced,
    same_strides,
)
from packlight.capture.marks import LATE_KEY
from packlight.capture.parts import Parts
from packlight.capture.phases import after_tangents, forward_calls
from packlight.costs.measure import CallFacts, allocated_bytes
from packlight.errors import PacklightError, UnsupportedModelError
from packlight.step import Buffer, BufferKind, OperationKind, Phase, StepGraph
from packlight.torch_internals.aot import is_tangent

Measure = Callable[[torch._ops.OpOverload, Any, Any], CallFacts]
Read = Callable[[fx.GraphModule], JointStep]


def read_joint_graph(
    module: fx.GraphModule,
    num_forward_outputs: int,
    measure: Measure,
    *,
    mutated_primals: frozenset[int] = frozenset(),
    pinned_outputs: Callable[[int], bool] = lambda index: True,
) -> JointStep:
    """Return the step behind a joint graph.

    Args:
        module: traced by AOTAutograd; placeholders are primals then tangents, outputs are the
            forward's `num_forward_outputs` then one gradient (or None) per primal.
        num_forward_outputs: how many of the outputs belong to the forward.
        measure: observes a call: (target, args with fake tensors, kwargs) -> CallFacts.
        mutated_primals: primals that the caller overwrites when the forward has returned.
        pinned_outputs: whether forward output i is held by the caller until the step's end.

    Raises:
        UnsupportedModelError: a node that is no ATen call on tensors.
    """
    return _Reader(module, num_forward_outputs, measure, mutated_primals, pinned_outputs).read()


class _Reader:
    def __init__(
        self,
        module: fx.GraphModule,
        num_forward_outputs: int,
        measure: Measure,
        mutated_primals: frozenset[int],
        pinned_outputs: Callable[[int], bool],
    ) -> None:
        self.module = module
        self.measure = measure
        self.mutated_primals = mutated_primals
        self.pinned_outputs = pinned_outputs
        self.nodes = list(module.graph.nodes)
        drop_ignored_reads(self.nodes)
        results: list[Any] = list(self.nodes[-1].args[0])
        self.forward_results = results[:num_forward_outputs]
        self.backward_results = results[num_forward_outputs:]
        self.buffer_of_node: dict[fx.Node, int] = {}
        self.items: dict[fx.Node, list[int | None]] = {}
        self.folded: set[fx.Node] = set()
        self.primals: list[fx.Node] = []
        self.tangents: list[fx.Node] = []
        self.overwrites: dict[tuple[int, int], int] = {}
        self.rng_state_of: dict[int, int] = {}
        self.tangent_buffers: list[int] = []
        self.layers = layers_of_nodes(self.nodes)
        self.parts = Parts(self.layers)
        # Nodes whose real strides are not the traced ones (see capture/layouts.py).
        self.restrided: set[fx.Node] = set()

    def read(self) -> JointStep:
        forward_nodes = self._forward_nodes()
        ordered = [n for n in self.nodes if n.op in ("placeholder", "get_attr")]
        calls = [n for n in self.nodes if n.op not in ("placeholder", "get_attr", "output")]
        primals = [n for n in ordered if not is_tangent(n)]
        tangents = [n for n in ordered if is_tangent(n)]
        for node in primals:
            self._read_placeholder(node)
        for node in calls:
            if node in forward_nodes:
                self._read_call(node, Phase.FORWARD)
        num_forward = len(self.parts.operations)
        for node in tangents:
            self._read_tangent(node)
        for node in calls:
            if node not in forward_nodes:
                self._read_call(node, Phase.BACKWARD)
        return self._finish(num_forward)

    # -- which part of the step a node belongs to

    def _forward_nodes(self) -> set[fx.Node]:
        """Return calls of the forward: what its outputs need, and all that was traced there.

        Calls marked late (see moves/chunk/rewrite.py) run with the backward, whatever they are.
        """
        needed: set[fx.Node] = set()
        stack = [n for n in pytree.tree_leaves(self.forward_results) if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node not in needed and not node.meta.get(LATE_KEY):
                needed.add(node)
                stack.extend(node.all_input_nodes)
        wrong = needed & after_tangents(self.nodes)
        if wrong:
            raise UnsupportedModelError(
                f"forward outputs depend on gradients: {sorted(map(str, wrong))}"
            )
        traced = forward_calls(self.nodes)
        return {n for n in self.nodes if n in needed or (n in traced and not n.meta.get(LATE_KEY))}

    # -- nodes

    def _read_placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self.primals.append(node)
        if not isinstance(value, torch.Tensor):
            if node.op == "get_attr" and isinstance(
                getattr(self.module, str(node.target), None), torch.Tensor
            ):
                value = getattr(self.module, str(node.target))
            else:
                return
        if node.op == "placeholder" and value.requires_grad:
            kind = BufferKind.PARAMETER  # or an input that needs a gradient: the same to a planner
        else:
            kind = BufferKind.INPUT if value.dtype in _INDEX_DTYPES else BufferKind.STATE
        buffer = self.parts.new_buffer(_storage_bytes(value), kind, node.name, node)
        self.buffer_of_node[node] = buffer
        if node.op == "placeholder" and len(self.primals) - 1 in self.mutated_primals:
            # The caller overwrites this input when the forward has returned: whatever runs in the
            # backward must read a copy.
            name = f"{node.name} before the step"
            copy = self.parts.new_buffer(_storage_bytes(value), BufferKind.ACTIVATION, name, node)
            self.parts.new_pseudo_operation(
                node, OperationKind.SNAPSHOT, (buffer,), copy, Phase.FORWARD
            )
            self.buffer_of_node[node] = copy

    def _read_tangent(self, node: fx.Node) -> None:
        """A tangent arrives with the backward; autograd holds it until the backward's end."""
        self.tangents.append(node)
        value = node.meta["val"]
        buffer = self.parts.new_buffer(_storage_bytes(value), BufferKind.GRADIENT, node.name, node)
        self.buffer_of_node[node] = buffer
        self.tangent_buffers.append(buffer)
        self.parts.new_pseudo_operation(node, OperationKind.TANGENT, (), buffer, Phase.BACKWARD)

    def _read_call(self, node: fx.Node, phase: Phase) -> None:
        if node.target is operator.getitem:
            self._read_item(node)
            return
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return  # a size: constant after specialisation
        if not isinstance(node.target, torch._ops.OpOverload):
            raise UnsupportedModelError(
                f"{node.target} in {self.layers.get(node, 'the model')} is no ATen operation"
            )
        reads = self._buffers_read(node)
        if value is None:
            self.parts.new_operation(node, str(node.target), reads, (), phase, can_recompute=False)
            return
        traced = value
        if not self.restrided.isdisjoint(node.all_input_nodes):
            for copy in copies_before_view(node):
                self.layers[copy] = self.layers.get(node, "")
                self._read_call(copy, phase)
            value = retraced(node)
        facts = self._observed(node)
        reads = self._buffers_read(node)
        value = node.meta["val"] = as_observed(value, facts)
        if not same_strides(value, traced):
            self.restrided.add(node)
        argument_nodes: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), argument_nodes.append)  # twice, if it is given twice
        argument_nodes = [n for n in argument_nodes if n in self.buffer_of_node]
        if facts.is_view:
            self._fold_view(node, facts, argument_nodes, value)
            return
        self._read_allocating_call(node, phase, reads, facts, argument_nodes, value)

    def _observed(self, node: fx.Node) -> CallFacts:
        try:
            return self.measure(node.target, *fake_arguments(node))  # type: ignore[arg-type]
        except (PacklightError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise UnsupportedModelError(
                f"{node.target} in {self.layers.get(node) or 'the loss'} cannot be run alone to "
                f"see what it needs: {first_line}\nhint: its arguments have to be special numbers; "
                "a custom operator around it (torch.library.custom_op) that takes any can be"
            ) from error

    def _read_allocating_call(
        self,
        node: fx.Node,
        phase: Phase,
        reads: tuple[int, ...],
        facts: CallFacts,
        argument_nodes: list[fx.Node],
        value: Any,
    ) -> None:
        kind = BufferKind.ACTIVATION if phase is Phase.FORWARD else BufferKind.GRADIENT
        owned: list[int] = []
        created: list[int] = []
        for index, output in enumerate(facts.outputs):
            if output.same_storage_as is not None:
                owned.append(owned[output.same_storage_as])
                continue
            # An output that shares an argument's storage, beside outputs that do not, is counted as
            # a storage of its own: too much, never too little.
            name = node.name if len(facts.outputs) == 1 else f"{node.name}[{index}]"
            buffer = self.parts.new_buffer(output.storage_bytes, kind, name, node)
            owned.append(buffer)
            created.append(buffer)
        if isinstance(value, torch.Tensor):
            self.buffer_of_node[node] = owned[0]
        else:
            self.items[node] = _spread(value, owned)
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
        rng_state = None
        if is_random:
            rng_state = self._new_rng_state(node, phase)
            reads = (*reads, rng_state)
        overwrites: tuple[tuple[int, int], ...] = ()
        if facts.in_place is not None and facts.in_place < len(argument_nodes):
            overwrites = self._overwrites(node, facts.in_place, argument_nodes, created[0])
        operation = self.parts.new_operation(
            node,
            str(node.target),
            reads,
            tuple(created),
            phase,
            facts=facts,
            is_random=is_random,
            overwrites=overwrites,
        )
        if rng_state is not None:
            self.rng_state_of[operation] = rng_state
        for _, read in overwrites:
            self.overwrites[operation, read] = facts.in_place  # type: ignore[assignment]

    def _overwrites(
        self, node: fx.Node, index: int, argument_nodes: list[fx.Node], created: int
    ) -> tuple[tuple[int, int], ...]:
        victim = self.buffer_of_node[argument_nodes[index]]
        others = [self.buffer_of_node[a] for i, a in enumerate(argument_nodes) if i != index]
        mine = self.parts.buffers[victim]
        if mine.kind.is_resident or victim in others or victim in self.tangent_buffers:
            return ()
        if mine.bytes != self.parts.buffers[created].bytes:
            return ()
        return ((created, victim),)

    def _read_item(self, node: fx.Node) -> None:
        parent, index = node.args
        assert isinstance(parent, fx.Node) and isinstance(index, int)
        self.folded.add(node)
        traced, node.meta["val"] = node.meta.get("val"), parent.meta["val"][index]
        if not same_strides(node.meta["val"], traced):
            self.restrided.add(node)
        if parent in self.items:
            buffer = self.items[parent][index]
            if buffer is None:
                return
            self.buffer_of_node[node] = buffer
            if self.parts.root_of_buffer[buffer] is parent:
                self.parts.root_of_buffer[buffer] = node
        elif parent in self.buffer_of_node:
            self.buffer_of_node[node] = self.buffer_of_node[parent]

    def _fold_view(
        self, node: fx.Node, facts: CallFacts, argument_nodes: list[fx.Node], value: Any
    ) -> None:
        self.folded.add(node)
        sources = [
            self.buffer_of_node[argument_nodes[o.alias_of]] if o.alias_of is not None else None
            for o in facts.outputs
        ]
        if isinstance(value, torch.Tensor):
            assert sources[0] is not None
            self.buffer_of_node[node] = sources[0]
        else:
            self.items[node] = _spread(value, sources)
            if sources and sources[0] is not None and len(set(sources)) == 1:
                self.buffer_of_node[node] = sources[0]

    def _buffers_read(self, node: fx.Node) -> tuple[int, ...]:
        reads: dict[int, None] = {}
        for argument in node.all_input_nodes:
            if argument in self.buffer_of_node:
                reads.setdefault(self.buffer_of_node[argument])
            for buffer in self.items.get(argument, []):
                if buffer is not None:
                    reads.setdefault(buffer)
        return tuple(reads)

    def _new_rng_state(self, node: fx.Node, phase: Phase) -> int:
        value = next(v for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, torch.Tensor))
        # An accelerator's generator state is a few bytes on the host, which its allocator ignores.
        size = CPU_GENERATOR_BYTES if value.device.type == "cpu" else 0
        kind = BufferKind.ACTIVATION if phase is Phase.FORWARD else BufferKind.GRADIENT
        name = f"generator state before {node.name}"
        buffer = self.parts.new_buffer(size, kind, name, node)
        self.parts.new_pseudo_operation(node, OperationKind.GENERATOR, (), buffer, phase)
        return buffer

    # -- the end

    def _finish(self, num_forward: int) -> JointStep:
        forward_outputs = self._result_buffers(
            [
                r
                for r in self.forward_results
                if not (isinstance(r, fx.Node) and r.meta.get(LATE_KEY))
            ]
        )
        pinned = self._result_buffers(
            [r for i, r in enumerate(self.forward_results) if self.pinned_outputs(i)]
        )
        outputs = (*pinned, *self.tangent_buffers, *self._result_buffers(self.backward_results))
        graph = StepGraph(
            tuple(self.parts.operations),
            tuple(self._with_kinds(forward_outputs)),
            num_forward,
            forward_outputs,
            tuple(dict.fromkeys(outputs)),
        )
        return JointStep(
            graph,
            self.module,
            self.parts.node_of_operation,
            self.parts.root_of_buffer,
            self.buffer_of_node,
            self.folded,
            self.overwrites,
            self.primals,
            self.tangents,
            self.forward_results,
            self.backward_results,
            self.rng_state_of,
            self.parts.facts,
        )

    def _result_buffers(self, results: list[Any]) -> tuple[int, ...]:
        found: dict[int, None] = {}
        for node in pytree.tree_leaves(results):
            if isinstance(node, fx.Node) and node in self.buffer_of_node:
                buffer = self.buffer_of_node[node]
                if not self.parts.buffers[buffer].kind.is_resident:
                    found.setdefault(buffer)
        return tuple(found)

    def _with_kinds(self, forward_outputs: tuple[int, ...]) -> list[Buffer]:
        results = set(forward_outputs)
        return [
            Buffer(b.id, b.bytes, BufferKind.OUTPUT, b.name) if b.id in results else b
            for b in self.parts.buffers
        ]


_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool)


def _storage_bytes(value: torch.Tensor) -> int:
    return allocated_bytes(int(value.untyped_storage().nbytes()), value.device)


def _spread(value: Any, buffers: list[Any]) -> list[Any]:
    """Place buffers, which are listed for tensors only, where the tensors stand in a tuple."""
    remaining = iter(buffers)
    return [next(remaining) if isinstance(v, torch.Tensor) else None for v in value]
