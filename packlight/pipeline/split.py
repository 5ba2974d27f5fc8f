"""A captured step cut into stages: each a joint graph of its own, with what crosses between them.

The forward is cut at positions; a gradient's operation runs in the stage whose values it reads, and
never behind one whose result it needs. What a stage needs of another one crosses every boundary in
between: with the forward where it is needed later, with the backward where it is needed earlier.
Views do not cross: they are made again from what they look at. So any graph can be cut anywhere,
and what that costs is the bytes of `crossing`.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from packlight.capture.joint import JointStep
from packlight.capture.step_capture import CapturedLoss
from packlight.errors import UnsupportedModelError
from packlight.step import OperationKind
from packlight.torch_internals.aot import is_tangent

FORWARD_ARRIVAL, BACKWARD_ARRIVAL = "arriving", "tangents_arriving"


@dataclass(frozen=True)
class Value:
    """A tensor that crosses a boundary: all of its storage.

    Attributes:
        name: of the node that makes it, for reports.
        shape, stride, dtype: of the tensor that owns the storage.
        num_bytes: of the storage.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int

    @classmethod
    def of(cls, node: fx.Node) -> Value:
        """Return the value of a node."""
        fake = node.meta["val"]
        size = fake.untyped_storage().nbytes()
        return cls(node.name, tuple(fake.shape), tuple(fake.stride()), fake.dtype, int(size))


@dataclass(frozen=True)
class StageGraph:
    """One stage's part of a step.

    Attributes:
        module: a joint graph: placeholders are primals, values that arrive with the forward,
            tangents (values that arrive with the backward; the loss's own); outputs are the
            forward's results, then the backward's.
        primals: which of the whole step's primals it takes, in order.
        arriving, leaving: values that cross with the forward, from the stage before and to the next
            one. Those that leave come first among the forward's results.
        written: primals (of the whole step) whose new values are the next of them.
        has_loss: whether the loss comes last among them.
        returning, handing: values that cross with the backward, from the next stage and to the one
            before. What is handed on comes first among the backward's results.
        gradients: primals (of the whole step) whose gradients, or its part of them, are the others.
        num_early: how many of them are complete with what is handed on, where the backward is in
            halves (`halves.py`).
    """

    module: fx.GraphModule
    primals: tuple[int, ...]
    arriving: tuple[Value, ...]
    leaving: tuple[Value, ...]
    written: tuple[int, ...]
    has_loss: bool
    returning: tuple[Value, ...]
    handing: tuple[Value, ...]
    gradients: tuple[int, ...]
    num_early: int = 0

    @property
    def num_forward_results(self) -> int:
        """How many of the module's outputs belong to the forward."""
        return len(self.leaving) + len(self.written) + self.has_loss


def split_step(loss: CapturedLoss, step: JointStep, cuts: Sequence[int]) -> list[StageGraph]:
    """Return the stages of a step.

    Args:
        loss: the captured call.
        step: read from its joint graph.
        cuts: operations of the forward before which it is cut, ascending.

    Raises:
        UnsupportedModelError: the model writes a buffer that several stages read.
    """
    return _Splitter(loss, step, cuts).stages()


class _Splitter:
    def __init__(self, loss: CapturedLoss, step: JointStep, cuts: Sequence[int]) -> None:
        self.loss, self.step, self.num_stages = loss, step, len(cuts) + 1
        self.nodes = list(step.module.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.primals = {node: index for index, node in enumerate(step.primals)}
        self.stage: dict[fx.Node, int] = {}
        self.is_forward: dict[fx.Node, bool] = {}
        # For each stage the nodes that its operations and results read, by phase.
        self.ahead: list[set[fx.Node]] = [set() for _ in range(self.num_stages)]
        self.back: list[set[fx.Node]] = [set() for _ in range(self.num_stages)]
        self._label(list(cuts))
        self.users = self._users_of_primals()

    # -- which stage an operation runs in

    def _label(self, cuts: list[int]) -> None:
        graph = self.step.graph
        for operation in graph.computations:
            node = self.step.node_of_operation[operation.id]
            if operation.kind is OperationKind.TANGENT or node.op == "placeholder":
                continue
            self.is_forward[node] = operation.id < graph.num_forward
            if self.is_forward[node]:
                self.stage[node] = bisect_right(cuts, operation.id)
        users, last_use = self._users_of_primals(), self._last_uses()
        for node in self.nodes:
            if self.is_forward.get(node, True):
                continue
            reads = list(self._reads(node))
            makers = [(root, maker) for root in reads if (maker := self._maker(root)) is not None]
            stage = min(
                (self.stage[m] for _, m in makers if not self.is_forward[m]),
                default=self.num_stages - 1,
            )
            # What the forward made is at hand from its maker's stage to its last reader's.
            seen = [(self.stage[m], last_use[root]) for root, m in makers if self.is_forward[m]]
            if seen:
                stage = min(stage, max(max(s for s, _ in seen), min(s for _, s in seen)))
            for root in reads:
                stage = max((s for s in users.get(root, ()) if s <= stage), default=stage)
            self.stage[node] = stage

    def _last_uses(self) -> dict[fx.Node, int]:
        """Return the last stage in whose forward each value is made or read."""
        last: dict[fx.Node, int] = {}
        for node, stage in self.stage.items():
            for root in self._reads(node):
                last[root] = max(last.get(root, 0), stage)
        for node in self.step.buffer_of_node:
            maker = self._maker(node)
            if maker is not None and maker in self.stage and self._root(node) is node:
                last[node] = max(last.get(node, 0), self.stage[maker])
        return last

    def _users_of_primals(self) -> dict[fx.Node, set[int]]:
        """Return the stages in whose forward each primal is read."""
        users: dict[fx.Node, set[int]] = {primal: set() for primal in self.primals}
        for node, stage in self.stage.items():
            for root in self._reads(node) if self.is_forward[node] else ():
                if root in users:
                    users[root].add(stage)
        return users

    def _reads(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield what owns the storages that a node reads."""
        for source in node.all_input_nodes:
            yield self._root(source)

    def _root(self, node: fx.Node) -> fx.Node:
        buffer = self.step.buffer_of_node.get(node)
        root = None if buffer is None else self.step.root_of_buffer[buffer]
        return node if root is None else root

    def _maker(self, root: fx.Node) -> fx.Node | None:
        """Return the operation that makes a value; None for what is there from the start."""
        while root.target is operator.getitem:
            source = root.args[0]
            assert isinstance(source, fx.Node)
            root = source
        return root if root in self.is_forward else None

    # -- what crosses

    def stages(self) -> list[StageGraph]:
        """Cut."""
        gradients = self._gradients()
        written = self._written()
        self.crossing: list[tuple[dict[fx.Node, None], dict[fx.Node, None]]] = [
            ({}, {}) for _ in range(self.num_stages - 1)
        ]
        for node, stage in self.stage.items():
            for root in self._reads(node):
                self._cross(root, stage, self.is_forward[node])
        for stage, of_stage in enumerate(gradients):
            for _, node in of_stage:
                self._cross(self._root(node), stage, False)
        return [
            self._stage(stage, gradients[stage], written[stage])
            for stage in range(self.num_stages)
        ]

    def _cross(self, root: fx.Node, stage: int, is_forward: bool) -> None:
        maker = self._maker(root)
        if maker is None:
            if is_tangent(root) and stage != self.num_stages - 1:
                for boundary in range(stage, self.num_stages - 1):
                    self.crossing[boundary][1][root] = None
            return
        source = self.stage[maker]
        assert source <= stage or not is_forward, "cuts are along the forward"
        assert source >= stage or self.is_forward[maker], "gradients go back"
        for boundary in range(source, stage):
            self.crossing[boundary][0][root] = None
        for boundary in range(stage, source):
            self.crossing[boundary][1][root] = None

    def _gradients(self) -> list[list[tuple[int, fx.Node]]]:
        """Return for each stage (primal, node) of the gradients that it has.

        What several stages add to the gradient of one primal stays apart: their ranks add it up
        once for all microbatches.
        """
        found: list[list[tuple[int, fx.Node]]] = [[] for _ in range(self.num_stages)]
        for primal, node in enumerate(self.step.backward_results):
            users = self.users[self.step.primals[primal]] if isinstance(node, fx.Node) else set()
            for stage, part in self._parts(node) if isinstance(node, fx.Node) else ():
                owner = max((s for s in users if s <= stage), default=stage)
                assert owner in users or not users, "a gradient comes back to where its weight is"
                found[owner].append((primal, part))
        return found

    def _parts(self, node: fx.Node) -> list[tuple[int, fx.Node]]:
        """Return (stage, node) of the terms of a gradient, whose sums nobody makes any more."""
        parts, sums = self._terms(node)
        for each in sums:
            del self.stage[each]
        return parts

    def _terms(self, node: fx.Node) -> tuple[list[tuple[int, fx.Node]], list[fx.Node]]:
        """Return the terms of a gradient, one for each stage, and the sums that they replace."""
        maker = self._maker(self._root(node))
        stage = self.num_stages - 1 if maker is None else self.stage[maker]
        terms = [a for a in node.args if isinstance(a, fx.Node)]
        is_sum = node.target is torch.ops.aten.add.Tensor and len(terms) == 2 and not node.kwargs
        if is_sum and all(t.meta["val"].shape == node.meta["val"].shape for t in terms):
            found = [self._terms(term) for term in terms]
            parts = [part for of_term, _ in found for part in of_term]
            is_read = any(user.op != "output" and user in self.stage for user in node.users)
            is_read = is_read and not self._is_only_added(node)
            if len({stage for stage, _ in parts}) == len(parts) and not is_read:
                return parts, [node, *(each for _, sums in found for each in sums)]
        return [(stage, node)], []

    @staticmethod
    def _is_only_added(node: fx.Node) -> bool:
        """Whether a sum goes into one other sum and nowhere else."""
        return len(node.users) == 1 and next(iter(node.users)).target is torch.ops.aten.add.Tensor

    def _written(self) -> list[list[tuple[int, fx.Node]]]:
        """Return for each stage (primal, node) of the buffers that it writes."""
        found: list[list[tuple[int, fx.Node]]] = [[] for _ in range(self.num_stages)]
        for result, primal in self.loss.written_back.items():
            node = self.step.forward_results[result]
            maker = self._maker(self._root(node))
            if maker is None:
                continue
            stage, placeholder = self.stage[maker], self.step.primals[primal]
            if self.users[placeholder] - {stage}:
                raise UnsupportedModelError(
                    f"the forward writes {placeholder.name!r} in stage {stage}, and other stages "
                    f"read it ({sorted(self.users[placeholder])})\nhint: give each layer a buffer "
                    "of its own, or cut elsewhere"
                )
            found[stage].append((primal, node))
        return found

    # -- a stage's graph

    def _stage(
        self,
        stage: int,
        gradients: list[tuple[int, fx.Node]],
        written: list[tuple[int, fx.Node]],
    ) -> StageGraph:
        none: dict[fx.Node, None] = {}
        last = self.num_stages - 1
        arriving, handing = self.crossing[stage - 1] if stage else (none, none)
        leaving, returning = self.crossing[stage] if stage < last else (none, none)
        results = [*leaving, *(node for _, node in written)]
        has_loss = stage == last
        if has_loss:
            results.append(self.step.forward_results[self.loss.loss_index])
        finals = [*handing, *(node for _, node in gradients)]
        own = [node for node in self.nodes if self.stage.get(node) == stage]
        writer = _Writer(self.step, self.primals)
        read = {self._root(s) for node in own for s in node.all_input_nodes}
        read |= {self._root(node) for node in (*results, *finals)}
        read |= {self.step.primals[primal] for primal, _ in written}
        taken = [primal for primal in self.step.primals if primal in read]
        for node in taken:
            writer.copy(node)
        for index, node in enumerate(arriving):
            writer.placeholder(f"{FORWARD_ARRIVAL}_{index}", node)
        for tangent in self.step.tangents if has_loss else ():
            writer.copy(tangent)
        for index, node in enumerate(returning):
            writer.placeholder(f"{BACKWARD_ARRIVAL}_{index}", node)
        for is_forward in (True, False):
            for node in own:
                if self.is_forward[node] is is_forward:
                    writer.copy(node)
        module = writer.module([*results, *finals])
        return StageGraph(
            module, tuple(self.primals[node] for node in taken),
            tuple(map(Value.of, arriving)), tuple(map(Value.of, leaving)),
            tuple(primal for primal, _ in written), has_loss,
            tuple(map(Value.of, returning)), tuple(map(Value.of, handing)),
            tuple(primal for primal, _ in gradients),
        )


class _Writer:
    """Copies nodes into a graph, with the views and items that they read."""

    def __init__(self, step: JointStep, primals: dict[fx.Node, int]) -> None:
        self.step, self.primals = step, primals
        self.graph = fx.Graph()
        self.known: dict[fx.Node, fx.Node] = {}

    def placeholder(self, name: str, node: fx.Node) -> None:
        """Take a value that another stage makes."""
        argument = self.graph.placeholder(name)
        argument.meta = {"val": node.meta["val"]}
        self.known[node] = argument

    def copy(self, node: fx.Node) -> fx.Node:
        """Return a node's copy."""
        if node not in self.known:
            for source in node.all_input_nodes:
                self.copy(source)
            self.known[node] = self.graph.node_copy(node, self.known.__getitem__)
        return self.known[node]

    def module(self, results: Sequence[Any]) -> fx.GraphModule:
        """Return the graph with its results."""
        self.graph.output(tuple([self.copy(node) for node in results]))
        return fx.GraphModule(self.step.module, self.graph, "PacklightStage")
