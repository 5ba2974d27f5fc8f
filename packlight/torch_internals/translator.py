"""What dynamo knows of the call that it is compiling while it calls a backend."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from torch import fx


class TracedCall(NamedTuple):
    """What dynamo knows of the call being compiled.

    Attributes:
        arguments: of the outermost function, by name.
        codes: all code that was traced.
        random_functions: of Python's that the compiled code calls before the graph.
    """

    arguments: dict[str, Any]
    codes: set[CodeType]
    random_functions: list[Callable[..., Any]]


def traced_call() -> TracedCall | None:
    """Return the call that a backend is being called for, None if dynamo does not call it.

    Relied upon: the translator is at work (an AttributeError where there is none); its output knows
    the outermost frame, its locals, the code that was inlined, and calls of `random`.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return None
    random_functions = [function for function, _, _ in output.random_calls]
    return TracedCall(output.root_tx.f_locals, set(output.traced_code), random_functions)


def graph_break() -> tuple[str, Any] | None:
    """Return why the graph being compiled ends before the function does, and the user's stack.

    Relied upon: a backend is called with the translator at work (an AttributeError where there is
    none), whose output has `compile_subgraph_reason` with `graph_break`, `reason`, `user_stack`.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return None  # not called by dynamo
    reason = translator.output.compile_subgraph_reason
    is_break = reason is not None and reason.graph_break
    return (reason.reason or "", reason.user_stack) if is_break else None


def returned_names() -> tuple[str | None, set[str]]:
    """Return the name of the node that the traced function returns, and of those beside it.

    The first is None where neither one tensor is returned nor a tuple or list that begins with one.

    Relied upon: when a backend is called, what the function returns is all that is left on the
    translator's stack; a tensor there has its node as `proxy.node`, a tuple or list its `items`,
    and `VariableTracker.visit` comes by everything within.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import VariableTracker

    def name_of(variable: Any) -> str | None:
        proxy = getattr(variable, "proxy", None)
        return str(proxy.node.name) if isinstance(proxy, fx.Proxy) else None

    stack = InstructionTranslator.current_tx().stack
    if len(stack) != 1:
        return None, set()
    items = getattr(stack[0], "items", None)
    is_sequence = isinstance(items, (list, tuple)) and len(items) > 0
    found: set[str | None] = set()
    VariableTracker.visit(lambda variable: found.add(name_of(variable)), list(stack))
    first = name_of(items[0] if is_sequence and items is not None else stack[0])
    return first, {name for name in found if name is not None} - {str(first)}


def compiled_for() -> Any:
    """Return the backend that dynamo is compiling for, as it was passed; None outside.

    Relied upon: the translator at work, whose output has `compiler_fn`.
    """
    from torch._dynamo.eval_frame import innermost_backend
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return None
    compiler_fn: Any = translator.output.compiler_fn
    return innermost_backend(compiler_fn)


def options_of(given: Any) -> dict[str, Any]:
    """Return the options that `torch.compile` was given for a named backend.

    Relied upon: its wrapper of the backend has them in `kwargs`.
    """
    kwargs: dict[str, Any] = dict(getattr(given, "kwargs", {}))
    return {**(kwargs.pop("options", None) or {}), **kwargs}


def is_resumed() -> bool:
    """Whether the function being compiled goes on after a break.

    Relied upon: its name says so.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return False
    return translator.f_code.co_name.startswith("torch_dynamo_resume_in")
