"""Lower bounds on the seconds within a budget: what cannot be held must run again.

While an operation runs, its own inputs, results and workspace take a part of the budget. Whatever
was made before and is read afterwards either lies in the rest, or its maker runs again. The
cheapest choice of what lies there is a knapsack; its fractional relaxation, largest seconds per
byte first (Dantzig 1957), bounds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from packlight.planner.facts import Facts, mask_of
from packlight.planner.routes import Route, routes_of
from packlight.step import Operation, StepGraph

MAX_POSITIONS = 64


def lower_bound_seconds(graph: StepGraph, budget_bytes: int | None) -> float:
    """Return seconds that no schedule within a budget can beat, whatever its order.

    Around an operation only its ancestors are known to have run and only its descendants are known
    to come later, so buffers from the ones to the others are counted. Every position gives a bound,
    the best one counts. Gradients may be dropped and recomputed like everything else.

    With transfers, what is not held may also have been written before and be read later. With E
    bytes too many at a position, of which x are transferred, the compute lane is busy for the plain
    step and the least recomputation of E - x bytes, the other lanes for what must be streamed in
    any case and x bytes there and back, shared out as well as can be. The step takes at least the
    longest of all, at the best x.

    Args:
        graph: the step.
        budget_bytes: for what a schedule allocates; None for no limit.

    Cost: linear in the graph for each of at most `MAX_POSITIONS` positions.
    """
    plain = graph.seconds
    lanes = _Lanes.of(graph)
    if budget_bytes is None:
        return max(plain, lanes.least_seconds)
    facts = _Facts(graph)
    stride = max(1, graph.num_computations // MAX_POSITIONS)
    best = 0.0
    for position, held in facts.crossing(range(0, graph.num_computations, stride)).items():
        if not graph.transfers:
            best = max(best, facts.rerun_seconds(position, held, budget_bytes))
        else:
            excess, items = facts.excess(position, held, budget_bytes)
            best = max(best, _least_seconds(excess, items, plain, lanes) - plain)
    return plain + best


@dataclass(frozen=True)
class _Lanes:
    """What the lanes beside computation have to do, and how fast they do it together.

    A step takes no less than any weighted mean of its lanes' work. The weights are such that equal
    bytes there and back, on whatever lane, weigh about the same.

    Attributes:
        least_seconds: what one of them has to do in any case.
        streaming_seconds: the weighted mean of what they have to do in any case.
        seconds_per_byte: what another byte there and back adds to it at least; infinite where
            nothing can leave but what rests elsewhere.
    """

    least_seconds: float
    streaming_seconds: float
    seconds_per_byte: float

    @classmethod
    def of(cls, graph: StepGraph) -> _Lanes:
        """Return the lanes of a graph's transfers."""
        routes = routes_of(graph)
        lanes = {lane for found in routes.values() for route in found for lane in route.lanes}
        moved = [
            (graph.buffers[b].bytes, route)
            for b, found in routes.items() if b not in graph.resting for route in found
        ]
        per_byte = dict.fromkeys(sorted(lanes), math.inf)
        for num_bytes, route in moved:
            for lane in route.lanes:
                per_byte[lane] = min(per_byte[lane], route.seconds_on(lane) / num_bytes)
        rates = {lane: 1 / seconds for lane, seconds in per_byte.items()}
        total = sum(rates.values())
        weights = {lane: rate / total if total else 1 / len(rates) for lane, rate in rates.items()}
        streaming = 0.0
        alone = dict.fromkeys(weights, 0.0)
        for transfers in _needed_transfers(graph, routes):
            streaming += min(weights[o.lane] * o.seconds for o in transfers)
            if len({o.lane for o in transfers}) == 1:
                alone[transfers[0].lane] += min(o.seconds for o in transfers)
        least = max(alone.values(), default=0.0)
        cheapest = min(
            (sum(weights[lane] * route.seconds_on(lane) for lane in {*route.lanes}) / num_bytes
             for num_bytes, route in moved),
            default=math.inf,
        )
        return cls(least, streaming, cheapest)


def _needed_transfers(
    graph: StepGraph, routes: dict[int, tuple[Route, ...]]
) -> Iterator[list[Operation]]:
    """Yield the transfers of which one is needed: each that is used is read, if updated written."""
    updated = {b for o in graph.computations for b in o.mutates}
    for buffer in sorted({b for o in graph.computations for b in o.touches}.intersection(routes)):
        if buffer in graph.resting:
            yield [route.read for route in routes[buffer]]
            if buffer in updated:
                yield [route.write for route in routes[buffer] if route.write is not None]


def _least_seconds(
    excess: float, items: list[tuple[float, int]], plain: float, lanes: _Lanes
) -> float:
    """Return the least duration if bytes too many are recomputed or transferred.

    Args:
        excess: bytes too many.
        items: (seconds per byte, bytes) of what can be recomputed, in order.
        plain: seconds of the operations without recomputation.
        lanes: what else they do, and how fast.
    """
    per_byte, excess = lanes.seconds_per_byte, max(excess, 0.0)
    # Transferring everything, lanes are busy longest. Recompute the cheapest until they are not.
    compute, moving = plain, lanes.streaming_seconds + (excess * per_byte if excess else 0.0)
    for rate, total in items:
        if moving <= compute or excess <= 0:
            break
        amount = min(float(total), excess)
        if math.isfinite(per_byte):
            amount = min(amount, (moving - compute) / (rate + per_byte))
        compute += rate * amount
        excess -= amount
        moving = moving - per_byte * amount if math.isfinite(per_byte) else moving
    if not math.isfinite(per_byte):  # all of it is recomputed
        moving = lanes.streaming_seconds
    return max(compute, moving, lanes.least_seconds)


def rerun_seconds_by_position(graph: StepGraph, budget_bytes: int) -> list[float]:
    """Return for each operation the least recomputation from it on, first runs in graph order."""
    facts = _Facts(graph)
    result, live = [], set[int]()
    for operation in graph.computations:
        later = {b for b in live if facts.last_read[b] > operation.id}
        result.append(facts.rerun_seconds(operation.id, later, budget_bytes))
        live = later | {b for b in operation.creates if facts.last_read[b] > operation.id}
    return result


class _Facts:
    """What both bounds look up."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        operations = graph.computations
        self.facts = Facts(graph)
        self.size, self.maker = self.facts.size, self.facts.maker
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
        for buffer in graph.outputs:
            self.last_read[buffer] = len(operations)
        self.outputs = set(graph.outputs)
        self.pinned = self.outputs & set(graph.forward_outputs)

    def crossing(self, positions: range) -> dict[int, list[int]]:
        """Return what ancestors of operations made that descendants or the step's end read."""
        facts = self.facts
        reads = [mask_of(o.reads, facts.bit) for o in self.graph.computations]
        forth = range(len(reads))
        made = _reached(forth, self.parents, self.children, facts.creates_masks, positions)
        read = _reached(forth[::-1], self.children, self.parents, reads, positions)
        outputs = mask_of(self.outputs, facts.bit)
        return {p: facts.buffers_of(made[p] & (read[p] | outputs)) for p in positions}

    def rerun_seconds(
        self, position: int, held: Iterable[int], budget_bytes: int
    ) -> float:
        """Return the least recomputation if `held` should be in memory while an operation runs.

        Args:
            position: the operation.
            held: buffers made before it and read after it.
            budget_bytes: for all.
        """
        excess, items = self.excess(position, held, budget_bytes)
        lost = 0.0
        for rate, total in items:
            if excess <= 0:
                break
            lost += rate * min(total, excess)
            excess -= total
        return lost

    def excess(
        self, position: int, held: Iterable[int], budget_bytes: int
    ) -> tuple[float, list[tuple[float, int]]]:
        """Return the bytes too many if `held` should be in memory while an operation runs.

        Returns:
            (bytes too many, what could be recomputed instead: seconds per byte and bytes, cheapest
            first).
        """
        operation, size = self.graph.operations[position], self.size
        own = {*operation.touches, *operation.creates}
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
        return float(sum(by_maker.values()) - max(room, 0)), items


def _relief(operation: Operation, size: list[int]) -> int:
    """Return the most bytes that an operation saves by working in place."""
    return max((size[c] for c, r in operation.overwrites if size[r] > 0), default=0)


def _reached(
    order: range, before: list[set[int]], after: list[set[int]], masks: list[int], wanted: range
) -> dict[int, int]:
    """Return the union of what all that lies before some operations, however far, has as masks.

    Args:
        order: in which each comes after what is before it.
        before: the direct neighbours of each operation on that side.
        after: those on the other.
        masks: of each operation.
        wanted: for which to return it.
    """
    found: dict[int, int] = {}
    so_far: dict[int, int] = {}  # of each with the operation's own, as long as somebody asks
    waiting = [len(neighbours) for neighbours in after]
    for index in order:
        mask = 0
        for other in before[index]:
            mask |= so_far[other]
            waiting[other] -= 1
            if not waiting[other]:
                del so_far[other]
        if index in wanted:
            found[index] = mask
        if waiting[index]:
            so_far[index] = mask | masks[index]
    return found
