"""The moves: groups of calls in one kernel each, up to rounding or exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from packlight.errors import WayError
from packlight.moves.draft import Draft
from packlight.moves.fuse.groups import Groups
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.torch_internals.inductor import compiler_problem
from packlight.units import format_bytes, format_seconds


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
        left_out: frozenset[str] = frozenset()
        while not_worth_it := cls._groups(draft, left_out).not_worth_it():
            left_out |= not_worth_it  # without them, groups may be others
        groups = cls._groups(draft, left_out)
        if groups.kernels:
            yield cls(tuple(sorted(left_out)))
        elif left_out:
            reason = "faster in one kernel" + (" with the same bits" if cls.is_exact else "")
            yield Refusal(f"no group of calls is {reason}")
        else:
            yield Refusal(groups.why_none())

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with its graph rewritten.

        Raises:
            WayError: nothing can be compiled here.
        """
        problem = compiler_problem(draft.costs.device)
        if problem is not None:
            raise WayError(
                "machine", "it has fused kernels", f"one that compiles them: {problem}",
                "leave way= out, and a way without them is looked for",
            )
        groups = self._groups(draft, frozenset(self.left_out))
        return draft.changed(module=groups.module())

    def describe(self, draft: Draft) -> str:
        """Return what is fused, what that saves and what it cost."""
        groups = self._groups(draft, frozenset(self.left_out))
        used = groups.kernels
        kernels = {graph.name: kernel for graph, kernel in used.items()}
        num_calls = sum(len(graph.members) for graph in used)
        seconds = sum(kernel.compile_seconds for kernel in kernels.values())
        saved_bytes = sum(graph.group.saved_bytes for graph in used)
        words = [
            f"{num_calls} calls fused to {len(used)} ({len(kernels)} kernels, compiled once in "
            f"{format_seconds(seconds)}; {format_bytes(saved_bytes)} of results never in memory)"
        ]
        words += [
            f"{count} groups run call by call: {reason}"
            for reason, count in groups.failures.items()
        ]
        return ", ".join(words)

    @classmethod
    def _groups(cls, draft: Draft, left_out: frozenset[str]) -> Groups:
        def make() -> Groups:
            assert draft.profiler is not None, "calls are observed while a draft is shaped"
            return Groups(
                draft.graph_module, draft.loss.num_forward_outputs, draft.profiler.measure,
                is_exact=cls.is_exact, left_out=left_out,
            )

        return draft.once((cls, left_out), make)


@dataclass(frozen=True)
class FuseExactly(Fuse):
    """Groups of pointwise calls are one kernel each, where that keeps every bit."""

    name: ClassVar[str] = "fuse-exactly"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    is_exact: ClassVar[bool] = True
