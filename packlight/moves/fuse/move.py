"""The moves: groups of calls in one kernel each, up to rounding or exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import Read, read_joint_graph
from packlight.costs.profiler import CallProfiler
from packlight.errors import OptionError, WayError
from packlight.moves.draft import Draft
from packlight.moves.fuse.groups import Groups
from packlight.moves.move import Effect, Move, Refusal, Room
from packlight.torch_internals.inductor import compiler_problem
from packlight.units import format_bytes, format_seconds

# Whoever recomputes more than this looks for what saves bytes at other costs.
ENOUGH_SLOWDOWN = 1.05


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
        """Yield the setting in which every kernel is used that is worth its time, or its bytes.

        A kernel that is slower than its calls, since those are in the cache, still makes less: such
        ones are used, too, where a step without them has to recompute, or does not fit.
        """
        problem = compiler_problem(draft.costs.device)
        if problem is not None:
            yield Refusal(f"nothing can be compiled here: {problem}")
            return
        assert draft.profiler is not None, "calls are observed while a draft is shaped"
        read, is_exact = cls._read(draft), cls.is_exact
        seen: set[frozenset[str]] = set()
        for may_be_slow in (False, True):
            num_found = len(room.found)
            groups = Groups.worth_it(
                draft.graph_module, read, is_exact=is_exact, may_be_slow=may_be_slow
            )
            if groups.left_out in seen:
                return
            seen.add(groups.left_out)
            draft.once((cls, groups.left_out), lambda found=groups: found)  # type: ignore[misc]
            if groups.kernels:
                groups.tell_expected(draft.profiler)
                yield cls(tuple(sorted(groups.left_out)))
            elif may_be_slow or room.left_bytes is None:
                yield Refusal(groups.why_none())
            fits = len(room.found) > num_found
            if room.left_bytes is None or fits and (room.least_slowdown or 1) <= ENOUGH_SLOWDOWN:
                return

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
    def fused_step(cls, step: JointStep, read: Read, profiler: CallProfiler) -> JointStep:
        """Return a step whose groups of calls are one kernel each, where that is worth it.

        Args:
            step: as it was read; stays as it is.
            read: reads its joint graph, and what is made of it.
            profiler: what was seen of its calls.

        Raises:
            OptionError: nothing can be compiled here.
        """
        problem = compiler_problem(step.device)
        if problem is not None:
            raise OptionError(
                f"{cls.name!r}: nothing can be compiled here: {problem}\nhint: leave it out"
            )
        groups = Groups.worth_it(step.module, read, is_exact=cls.is_exact)
        groups.tell_expected(profiler)
        return read(groups.module())

    @classmethod
    def _groups(cls, draft: Draft, left_out: frozenset[str]) -> Groups:
        def make() -> Groups:
            read, is_exact = cls._read(draft), cls.is_exact
            return Groups(draft.graph_module, read, is_exact=is_exact, left_out=left_out)

        return draft.once((cls, left_out), make)

    @staticmethod
    def _read(draft: Draft) -> Read:
        assert draft.profiler is not None, "calls are observed while a draft is shaped"
        return partial(
            read_joint_graph, num_forward_outputs=draft.loss.num_forward_outputs,
            measure=draft.profiler.measure,
        )


@dataclass(frozen=True)
class FuseExactly(Fuse):
    """Groups of pointwise calls are one kernel each, where that keeps every bit."""

    name: ClassVar[str] = "fuse-exactly"
    effect: ClassVar[Effect] = Effect.SAME_BITS
    is_exact: ClassVar[bool] = True
