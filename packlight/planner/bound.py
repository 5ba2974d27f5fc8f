"""Lower bounds on the seconds within a budget: what cannot be held must run again.

While an operation runs, its own inputs, results and workspace take a part of the budget. Whatever
was made before and is read afterwards either lies in the rest, or its maker runs again. The
cheapest choice of what lies there is a knapsack; its fractional relaxation, largest seconds per
byte first (Dantzig 1957), bounds it.
"""

from __future__ import annotations

from collections.abc import Iterable

from packlight.step import Operation, StepGraph

MAX_POSITIONS = 64


def lower_bound_seconds(graph: StepGraph, budget_bytes: int | None) -> float:
    """Return seconds that no schedule within a budget can beat, whatever its order.

    Around an operation only its ancestors are known to have run and only its descendants are known
    to come later, so buffers from the ones to the others are counted. Every position gives a bound,
    the best one counts. Gradients may be dropped and recomputed like everything else.

    Args:
        graph: the step.
        budget_bytes: for what a schedule allocates; None for no limit.

    Cost: linear in the graph for each of at most `MAX_POSITIONS` positions.
    """
    plain = graph.seconds
    if budget_bytes is None:
        return plain
    facts = _Facts(graph)
    positions = range(len(graph.operations))
    stride = max(1, len(positions) // MAX_POSITIONS)
    best = 0.0
    for position in positions[::stride]:
        before = _reach(position, facts.parents)
        after = _reach(position, facts.children)
        held = facts.crossing(before, after)
        best = max(best, facts.rerun_seconds(position, held, before, budget_bytes))
    return plain + best


def rerun_seconds_by_position(graph: StepGraph, budget_bytes: int) -> list[float]:
    """Return for each operation the least recomputation from it on, first runs in graph order."""
    facts = _Facts(graph)
    result, live = [], set[int]()
    for operation in graph.operations:
        later = {b for b in live if facts.last_read[b] > operation.id}
        result.append(facts.rerun_seconds(operation.id, later, None, budget_bytes))
        live = later | {b for b in operation.creates if facts.last_read[b] > operation.id}
    return result


class _Facts:
    """What both bounds look up."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        operations = graph.operations
        resident = graph.resident
        self.size = [0 if b.id in resident else b.bytes for b in graph.buffers]
        self.maker = [-1] * len(graph.buffers)
        self.last_read = [-1] * len(graph.buffers)
        self.parents: list[set[int]] = [set() for _ in operations]
        self.children: list[set[int]] = [set() for _ in operations]
        for operation in operations:
            for buffer in operation.reads:
                maker = self.maker[buffer]
                self.last_read[buffer] = operation.id
                if maker >= 0:
                    self.parents[operation.id].add(maker)
                    self.children[maker].add(operation.id)
            for buffer in operation.creates:
                self.maker[buffer] = operation.id
        for buffer in graph.outputs:
            self.last_read[buffer] = len(operations)
        self.outputs = set(graph.outputs)
        self.pinned = self.outputs & set(graph.forward_outputs)

    def crossing(self, before: set[int], after: set[int]) -> set[int]:
        """Return buffers made in `before` that `after` or the end of the step reads."""
        held = {b for i in after for b in self.graph.operations[i].reads if self.maker[b] in before}
        return held | {b for b in self.outputs if self.maker[b] in before}

    def rerun_seconds(
        self, position: int, held: Iterable[int], before: set[int] | None, budget_bytes: int
    ) -> float:
        """Return the least recomputation if `held` should be in memory while an operation runs.

        Args:
            position: the operation.
            held: buffers made before it and read after it.
            before: operations known to have run; None for all with smaller ids.
            budget_bytes: for all.
        """
        operation, size = self.graph.operations[position], self.size
        own = {*operation.reads, *operation.creates}
        room = budget_bytes - operation.workspace_bytes - sum(size[b] for b in own)
        room += _relief(operation, size)
        by_maker: dict[int, int] = {}
        for buffer in held:
            if buffer in own or size[buffer] == 0:
                continue
            if buffer in self.pinned:
                room -= size[buffer]
            else:
                maker = self.maker[buffer]
                by_maker[maker] = by_maker.get(maker, 0) + size[buffer]
        seconds = self.graph.operations
        items = sorted((seconds[k].seconds / total, total) for k, total in by_maker.items())
        excess = float(sum(by_maker.values()) - max(room, 0))
        lost = 0.0
        for rate, total in items:
            if excess <= 0:
                break
            lost += rate * min(total, excess)
            excess -= total
        return lost


def _relief(operation: Operation, size: list[int]) -> int:
    """Return the most bytes that an operation saves by working in place."""
    return max((size[c] for c, r in operation.overwrites if size[r] > 0), default=0)


def _reach(start: int, neighbours: list[set[int]]) -> set[int]:
    found: set[int] = set()
    stack = list(neighbours[start])
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack.extend(neighbours[index])
    return found
