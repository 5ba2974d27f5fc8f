"""How the code of an FX graph takes its arguments."""

from __future__ import annotations

import copy

from torch import fx

from packlight.torch_internals.aot import Compiled


def box_arguments(graph: fx.Graph) -> None:
    """Let a graph's code take its arguments in one list, and empty it before the first call."""
    graph.set_codegen(fx.graph._BoxedCodeGen())


def has_boxed_arguments(graph: fx.Graph) -> bool:
    """Whether a graph's code takes its arguments in one list."""
    return isinstance(graph._codegen, fx.graph._BoxedCodeGen)


def copy_calling_convention(old: fx.Graph, new: fx.Graph) -> None:
    """Let a graph's code take its arguments, and return its results, as another one does."""
    new.set_codegen(copy.copy(old._codegen))


def boxed(function: Compiled) -> Compiled:
    """Mark a compiled function as one that takes its arguments in a list and may empty it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function
