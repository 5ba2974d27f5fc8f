"""The fastest schedule of a small step, proven: A* over what is in memory.

A state is (t, S): operations 0..t-1 have run once, the buffers of the set S are in memory. A move
runs operation t, or runs an earlier one again; memory is made for it by dropping buffers, and only
when there is too little of it, so that no other drops need to be looked at. The way to a state
costs the seconds of the recomputations on it. What lies ahead costs at least

    h(t, S)  the seconds of every operation that has run, whose result is not in S, and that some
             operation t.. needs, directly or through others of this kind: each runs once more;
    k(t)     the knapsack bound of `bound.py` at the best of the positions t..

so the first schedule that comes off the queue is the fastest one whose first runs follow the order
of the graph (A*, Hart, Nilsson and Raphael 1968). Sets are bit masks. The number of nodes is
bounded: when it is used up, the least value in the queue is still a lower bound.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from packlight.planner.bound import rerun_seconds_by_position
from packlight.step import StepGraph

TICKS = 10**12


class _Node(NamedTuple):
    """A state, or (`runs` is not -1) what becomes one when there is memory for an operation.

    Attributes:
        position, live: t and S.
        ticks: recomputation on the way here.
        parent: index of the state before.
        runs: the operation for which memory is being made; `position` is already the one after it.
        victim: the buffer that it overwrites. Of a state: the operation that led to it.
        protected: buffers that were decided not to be dropped for it.
        ends_forward: whether it is the forward's last first run.
    """

    position: int
    live: int
    ticks: int
    parent: int
    runs: int = -1
    victim: int = 0
    protected: int = 0
    ends_forward: bool = False


@dataclass(frozen=True)
class Answer:
    """What the search found out about one budget.

    Attributes:
        order: operations in the order of the best schedule, None if none was found.
        extra_seconds: its recomputation.
        bound_seconds: no schedule within the budget recomputes less; infinite if there is none.
        is_proven: whether nothing was left to look at.
    """

    order: list[int] | None
    extra_seconds: float
    bound_seconds: float
    is_proven: bool


class ExactSearch:
    """Searches one graph, for any number of budgets."""

    def __init__(self, graph: StepGraph, keep_outputs: bool = False) -> None:
        """Prepare the search.

        Args:
            graph: the step.
            keep_outputs: never drop an output of the step once it is made (far fewer states; what
                is then found is a schedule, but no proof).
        """
        self.graph = graph
        operations, buffers = graph.operations, graph.buffers
        # Bits in the order of creation, so that the highest bit of a set has the latest maker.
        bit: dict[int, int] = {}
        self.size: list[int] = []
        self.maker: list[int] = []
        for operation in operations:
            for buffer in operation.creates:
                bit[buffer] = 1 << len(self.size)
                self.size.append(buffers[buffer].bytes)
                self.maker.append(operation.id)

        def mask(ids: tuple[int, ...]) -> int:
            result = 0
            for buffer in ids:
                result |= bit.get(buffer, 0)
            return result

        self.reads = [mask(o.reads) for o in operations]
        self.creates = [mask(o.creates) for o in operations]
        by_size = sorted(range(len(self.size)), key=lambda rank: -self.size[rank])
        self.largest_first = [1 << rank for rank in by_size if self.size[rank]]
        self.takes_over = [
            [(bit[c], bit[r]) for c, r in o.overwrites if r in bit] for o in operations
        ]
        scale = TICKS / graph.seconds if graph.seconds > 0 else 1.0
        self.scale = scale
        self.ticks = [round(o.seconds * scale) for o in operations]
        self.forward_outputs = mask(graph.forward_outputs)
        self.pinned = self.forward_outputs & mask(graph.outputs)
        if keep_outputs:
            self.pinned |= mask(graph.outputs)
        self.keep_outputs = keep_outputs
        self.can_rerun = [
            o.can_recompute and self.creates[o.id] != 0 and not self.creates[o.id] & self.pinned
            for o in operations
        ]
        self.last_chance = graph.last_chances()
        self.grows = [
            self._bytes_of(c) + operations[i].workspace_bytes for i, c in enumerate(self.creates)
        ]
        self._find_needs(mask(graph.outputs))
        self._bytes: dict[int, int] = {}
        self._ahead: dict[tuple[int, int], int] = {}

    def _find_needs(self, outputs: int) -> None:
        """Set what first runs from each position on read, and what serves to recompute that."""
        num = len(self.graph.operations)
        self.needed, self.useful = [0] * (num + 1), [0] * (num + 1)
        made = [0]
        for creates in self.creates:
            made.append(made[-1] | creates)
        wanted = outputs
        for t in range(num, -1, -1):
            if t < num:
                wanted |= self.reads[t]
            if t < self.graph.num_forward:
                wanted |= self.forward_outputs
            self.needed[t] = wanted & made[t]
            useful = todo = self.needed[t]
            while todo:
                maker = self.maker[todo.bit_length() - 1]
                todo &= ~self.creates[maker]
                if self.can_rerun[maker]:
                    new = self.reads[maker] & ~useful
                    useful |= new
                    todo |= new
            self.useful[t] = useful | (self.pinned & made[t])

    def _bytes_of(self, live: int) -> int:
        total = 0
        while live:
            low = live & -live
            total += self.size[low.bit_length() - 1]
            live ^= low
        return total

    def bytes_of(self, live: int) -> int:
        """Return the size of a set of buffers."""
        known = self._bytes.get(live)
        if known is None:
            known = self._bytes[live] = self._bytes_of(live)
        return known

    def ahead(self, t: int, live: int) -> int:
        """Return h(t, S) in ticks, or -1 if something that cannot be recomputed is lost."""
        key = (t, live)
        known = self._ahead.get(key)
        if known is not None:
            return known
        total, missing = 0, self.needed[t] & ~live
        while missing:
            maker = self.maker[missing.bit_length() - 1]
            if not self.can_rerun[maker] or self.last_chance[maker] < t:
                total = -1
                break
            total += self.ticks[maker]
            missing = (missing & ~self.creates[maker]) | (self.reads[maker] & ~live)
        self._ahead[key] = total
        return total

    def fastest(
        self, budget_bytes: int, max_nodes: int, upper_seconds: float = 1e300, width: int = 0
    ) -> Answer:
        """Return the schedule with the least recomputation within a budget.

        Args:
            budget_bytes: for what the schedule allocates.
            max_nodes: how many nodes may be made.
            upper_seconds: recomputation of a schedule at hand; slower ones are of no interest.
            width: go on from so many states of each position only (0: from all; else no proof).
        """
        self._forget()
        num = len(self.ticks)
        upper = int(min(upper_seconds * self.scale, 1e30)) + 100 * num
        least_after = [0] * (num + 1)
        bounds = rerun_seconds_by_position(self.graph, budget_bytes)
        for t in range(num - 1, -1, -1):
            least_after[t] = max(least_after[t + 1], int(bounds[t] * self.scale) - num)
        nodes = [_Node(0, 0, 0, -1)]
        queue: list[tuple[int, int, int, int]] = [(least_after[0], 0, 0, 0)]
        reached: dict[tuple[int, int], int] = {(0, 0): 0}
        visits = [0] * (num + 1)
        can_prove = not width and not self.keep_outputs
        while queue:
            least, _, _, index = heapq.heappop(queue)
            node = nodes[index]
            if node.runs < 0:
                if reached[node.position, node.live] < node.ticks:
                    continue
                if node.position == num and not self.needed[num] & ~node.live:
                    seconds = node.ticks / self.scale
                    bound = seconds if can_prove else 0.0
                    return Answer(self._order(nodes, index), seconds, bound, can_prove)
                visits[node.position] += 1
                if width and visits[node.position] > width:
                    continue
            for child, ahead in self._children(node, index, budget_bytes):
                value = max(least, child.ticks + max(ahead, least_after[child.position]))
                if value > upper:
                    continue
                if child.runs < 0:
                    key = (child.position, child.live)
                    known = reached.get(key)
                    if known is not None and known <= child.ticks:
                        continue
                    reached[key] = child.ticks
                nodes.append(child)
                heapq.heappush(queue, (value, -child.position, ahead, len(nodes) - 1))
            if len(nodes) > max_nodes:
                least = queue[0][0] if queue else least
                bound = max(0, least - 100 * num) / self.scale if can_prove else 0.0
                return Answer(None, math.inf, bound, False)
        # Everything that could be as fast as what is at hand was looked at.
        return Answer(None, math.inf, upper_seconds if can_prove else 0.0, can_prove)

    def any_within(self, budget_bytes: int, max_nodes: int, prefer_short: bool = False) -> Answer:
        """Return some schedule within a budget, however slow: depth first, largest sets only.

        Args:
            budget_bytes: for what the schedule allocates.
            max_nodes: how many nodes may be made.
            prefer_short: of equally advanced states, take the one on the shorter way first.
        """
        self._forget()
        num = len(self.ticks)
        nodes = [_Node(0, 0, 0, -1)]
        queue: list[tuple[int, int, int]] = [(0, 0, 0)]
        largest = [_Largest(len(self.size)) for _ in range(num + 1)]
        while queue:
            index = heapq.heappop(queue)[2]
            node = nodes[index]
            if node.runs < 0 and node.position == num and not self.needed[num] & ~node.live:
                seconds = node.ticks / self.scale
                return Answer(self._order(nodes, index), seconds, 0.0, False)
            for child, ahead in self._children(node, index, budget_bytes):
                if child.runs < 0 and not largest[child.position].add(child.live):
                    continue
                rank = ahead + child.ticks if prefer_short else ahead
                nodes.append(child)
                heapq.heappush(queue, (-child.position, rank, len(nodes) - 1))
            if len(nodes) > max_nodes:
                return Answer(None, math.inf, 0.0, False)
        can_prove = not self.keep_outputs
        return Answer(None, math.inf, math.inf if can_prove else 0.0, can_prove)

    def _forget(self) -> None:
        self._bytes.clear()
        self._ahead.clear()

    def _children(self, node: _Node, index: int, budget_bytes: int) -> list[tuple[_Node, int]]:
        """Return what follows a node, each with h in ticks; operations that fit have run."""
        if node.runs < 0:
            children = self._moves(node, index)
        else:
            children = self._drops(node, budget_bytes)
        found = []
        for child in children:
            live = (child.live & ~child.victim) | self.creates[child.runs]
            ahead = self.ahead(child.position, live)
            if child.ends_forward and self.forward_outputs & ~live:
                continue
            if ahead >= 0 and self._during(child) <= budget_bytes:
                child = self._run(child)
                ahead = self.ahead(child.position, child.live)
            if ahead >= 0:
                found.append((child, ahead))
        return found

    def _moves(self, node: _Node, index: int) -> list[_Node]:
        """Return the operations that can run now, memory aside."""
        t, live = node.position, node.live
        runs = [t] if t < len(self.ticks) and not self.reads[t] & ~live else []
        missing = self.useful[t] & ~live
        while missing:
            maker = self.maker[missing.bit_length() - 1]
            missing &= ~self.creates[maker]
            if (
                self.can_rerun[maker]
                and not self.reads[maker] & ~live
                and self.last_chance[maker] >= t
            ):
                runs.append(maker)
        found: list[_Node] = []
        for k in runs:
            after = t + 1 if k == t else t
            ticks = node.ticks if k == t else node.ticks + self.ticks[k]
            start = live & ~self.creates[k]
            ends = k == t and after == self.graph.num_forward
            found.append(_Node(after, start, ticks, index, k, ends_forward=ends))
            for created, victim in self.takes_over[k]:
                if not victim & self.pinned and created & self.useful[after]:
                    found.append(_Node(after, start, ticks, index, k, victim, 0, ends))
        return found

    def _during(self, node: _Node) -> int:
        return self.bytes_of(node.live) + self.grows[node.runs] - self.bytes_of(node.victim)

    def _drops(self, node: _Node, budget_bytes: int) -> list[_Node]:
        """Return the two ways to go on making memory: drop the largest buffer left, or never."""
        candidates = node.live & ~(self.reads[node.runs] | self.pinned | node.protected)
        excess = self._during(node) - budget_bytes
        total = self.bytes_of(candidates)
        if total < excess:
            return []
        choice = 0
        for choice in self.largest_first:
            if choice & candidates:
                break
        protected, victim, ends_forward = node.protected, node.victim, node.ends_forward
        t, live, ticks, parent, runs = node[:5]
        found = [
            _Node(t, live & ~choice, ticks, parent, runs, victim, protected, ends_forward)
        ]
        if total - self.bytes_of(choice) >= excess:
            protected |= choice
            found.append(_Node(t, live, ticks, parent, runs, victim, protected, ends_forward))
        return found

    def _run(self, node: _Node) -> _Node:
        """Return the state after the operation for which there is now memory."""
        live = ((node.live & ~node.victim) | self.creates[node.runs]) & self.useful[node.position]
        return _Node(node.position, live, node.ticks, node.parent, -1, node.runs)

    def _order(self, nodes: list[_Node], index: int) -> list[int]:
        order = []
        while index > 0:
            order.append(nodes[index].victim)  # of a state: the operation that led to it
            index = nodes[index].parent
        return order[::-1]



class _Largest:
    """Sets of which none is in one that came before it."""

    def __init__(self, num_bits: int) -> None:
        """Prepare for sets of so many bits; there are none so far."""
        self._num_bytes = 8 * -(-max(1, num_bits) // 64)
        # What is in none of them, a word of 64 bits a row.
        self._lacks: npt.NDArray[np.uint64] = np.empty((self._num_bytes // 8, 64), dtype=np.uint64)
        self._num, self._latest = 0, 0

    def add(self, new: int) -> bool:
        """Return whether a set is in none of them, and keep it if so."""
        if not new & ~self._latest:  # what one set is in, the next ones often are, too
            return False
        words = np.frombuffer(new.to_bytes(self._num_bytes, "little"), dtype=np.uint64)
        num, lacks = self._num, self._lacks
        outside = lacks[0, :num] & words[0]
        for row in range(1, len(words)):
            outside |= lacks[row, :num] & words[row]
        if not outside.all():
            place = int(outside.argmin())
            inverted = ~np.ascontiguousarray(lacks[:, place])
            self._latest = int.from_bytes(inverted.tobytes(), "little")
            return False
        if num == lacks.shape[1]:
            self._lacks = lacks = np.concatenate([lacks, np.empty_like(lacks)], axis=1)
        lacks[:, num] = ~words
        self._num = num + 1
        return True
