"""The moves: groups of calls in one kernel each, exactly or up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import read_joint_graph
from packlight.errors import WayError
from packlight.kernels.kernel import CompileError, Kernel, kernel_of
from packlight.moves.draft import Draft
from packlight.moves.fuse.bits import equal_results, keeping_bits
from packlight.moves.fuse.fusable import Kind, domain, kind_of, literals
from packlight.moves.fuse.partition import MIN_ELEMENTS, groups_of
from packlight.moves.fuse.rewrite import GroupGraph, fused
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.torch_internals.inductor import compiler_problem
from packlight.units import format_bytes, format_seconds

# A kernel that takes more than so many times as long as its calls, each alone, is not used. Alone
# they find what they read in the cache, and a kernel's advantage is that it reads less.
MOST_SECONDS = 1.1


@dataclass(frozen=True)
class Fuse(Move):
    """Groups of pointwise calls, norms, softmaxes, losses and sums are one kernel each.

    Attributes:
        left_out: names of kernels whose calls run one by one: they would be slower.
    """

    name: ClassVar[str] = "fuse"
    effect: ClassVar[Effect] = Effect.REORDERS_SUMS
    is_on_request: ClassVar[bool] = True
    may_save_time: ClassVar[bool] = True
    is_exact: ClassVar[bool] = False

    left_out: tuple[str, ...] = ()

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Self | Refusal]:
        """Yield the setting in which every kernel is used that is worth it."""
        problem = compiler_problem(draft.costs.device)
        if problem is not None:
            yield Refusal(f"nothing can be compiled here: {problem}")
            return
        groups = draft.once(cls, lambda: _Groups(draft, cls.is_exact))
        if not groups.kernels:
            yield Refusal(groups.why_none())
            return
        left_out = groups.not_worth_it()
        if len(left_out) == groups.num_kernels:
            yield Refusal("no group of calls is faster in one kernel, or keeps its bits there")
        else:
            yield cls(tuple(sorted(left_out)))

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten.

        Raises:
            WayError: nothing can be compiled here.
        """
        problem = compiler_problem(draft.costs.device)
        if problem is not None:
            raise WayError(
                "machine", "calls in fused kernels", f"one without a compiler: {problem}",
                "install the compiler, or leave way= out: a way without is then looked for",
            )
        groups = self._groups(draft)
        return draft.changed(module=fused(groups.step, groups.used(self.left_out)))

    def describe(self, draft: Draft) -> str:
        """Return what is fused, what that saves and what it cost."""
        groups = self._groups(draft)
        used = groups.used(self.left_out)
        kernels = {kernel.overload: kernel for kernel in used.values()}
        num_calls = sum(len(group.members) for group in used)
        seconds = sum(kernel.compile_seconds for kernel in kernels.values())
        saved_bytes = sum(group.group.saved_bytes for group in used)
        words = (
            f"{num_calls} calls fused to {len(used)} of {len(kernels)} kernels, which took "
            f"{format_seconds(seconds)} to compile once; {format_bytes(saved_bytes)} of results "
            "are never in memory"
        )
        for reason, count in groups.failures.items():
            words += f"; {count} groups run call by call: {reason}"
        return words

    def _groups(self, draft: Draft) -> _Groups:
        return draft.once(type(self), lambda: _Groups(draft, self.is_exact))


@dataclass(frozen=True)
class FuseExactly(Fuse):
    """Groups of pointwise calls are one kernel each, where that keeps every bit."""

    name: ClassVar[str] = "fuse-exactly"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    is_exact: ClassVar[bool] = True


class _Groups:
    """The groups of a draft's calls, compiled.

    Attributes:
        step: the draft's graph, as it was read.
        kernels: of those that could be compiled.
        failures: why others could not -> how many.
    """

    def __init__(self, draft: Draft, is_exact: bool) -> None:
        assert draft.profiler is not None, "calls are observed while a draft is shaped"
        self._measure, self.is_exact = draft.profiler.measure, is_exact
        self.step = read_joint_graph(
            draft.graph_module, draft.loss.num_forward_outputs, self._measure
        )
        self.kernels: dict[GroupGraph, Kernel] = {}
        self.failures: dict[str, int] = {}
        may_join = self._may_join()
        for group in groups_of(self.step, may_join):
            graph = GroupGraph(self.step, group, rounds_as_eager=is_exact)
            try:
                self.kernels[graph] = kernel_of(graph.region)
            except CompileError as error:
                self.failures[str(error)] = self.failures.get(str(error), 0) + 1

    def _may_join(self) -> Any:
        if not self.is_exact:
            return lambda node, kind: True
        pointwise = [
            node for node in self.step.node_of_operation
            if node.op == "call_function" and kind_of(node) is Kind.POINTWISE
            and domain(node) >= MIN_ELEMENTS
        ]
        kept = keeping_bits(self.step, pointwise)
        return lambda node, kind: kind is Kind.POINTWISE and literals(node) in kept

    @property
    def num_kernels(self) -> int:
        """How many different ones there are."""
        return len({kernel.overload for kernel in self.kernels.values()})

    def why_none(self) -> str:
        """Return why there are no kernels."""
        if self.failures:
            reason, count = next(iter(self.failures.items()))
            return f"{count} groups of calls do not compile: {reason}"
        return "no calls that a kernel could contain read one another's results"

    def used(self, left_out: tuple[str, ...]) -> dict[GroupGraph, Kernel]:
        """Return the kernels but some."""
        return {g: k for g, k in self.kernels.items() if g.region.name not in left_out}

    def not_worth_it(self) -> set[str]:
        """Return the names of kernels that are slower than their calls, or change bits."""
        found: dict[str, bool] = {}
        for graph, kernel in self.kernels.items():
            name = graph.region.name
            if name not in found:
                found[name] = not self._is_worth_it(graph, kernel)
        return {name for name, is_left_out in found.items() if is_left_out}

    def _is_worth_it(self, graph: GroupGraph, kernel: Kernel) -> bool:
        if self.is_exact and not all(equal_results(kernel, graph.region)):
            return False
        facts = self._measure(kernel.overload, graph.region.inputs, {})
        calls = [self.step.facts[o] for o in graph.group.operations]
        return facts.seconds <= MOST_SECONDS * sum(c.seconds for c in calls if c is not None)
