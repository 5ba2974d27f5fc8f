"""How dynamo is set to trace, and what it raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch


def trace_through(functions: Iterable[Callable[..., Any]]) -> None:
    """Have dynamo skip calls of these functions, and trace recurrent layers step by step.

    Relied upon: `config.ignore_logging_functions` is a set of functions, `config.allow_rnn` is on
    when it is set.
    """
    from torch._dynamo import config

    config.ignore_logging_functions.update(functions)
    config.allow_rnn = True


def keep_eagers_meaning() -> None:
    """Have dynamo guard modules' hooks and which tensors are one, and leave numpy's noise alone.

    It skips those guards to save time, and draws numpy's random numbers from torch's generator.

    Relied upon: three settings; calls of numpy's generator then break the graph.
    """
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
    config.skip_no_tensor_aliasing_guards_on_parameters = False
    config.use_numpy_random_stream = True


def guard_on(make_check: Callable[[], Callable[[], bool]]) -> None:
    """Have dynamo ask a question at every call of the graph that a backend is being called with.

    Relied upon: guards may be installed while a backend is called; a guard's `create_fn` gets the
    builder, whose root manager takes a function of the frame's locals.

    Args:
        make_check: called when the guards are made; what it returns is asked at every call, and
            where that is false, the graph is traced anew.
    """
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard

    def create(builder: Any, guard: Any) -> None:
        check = make_check()
        words = ["what Packlight's trace depends on"]
        builder.guard_manager.root.add_lambda_guard(lambda _: check(), words, guard.user_stack)

    install_guard(Guard(GlobalStateSource(), create))


def with_own_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function that is compiled apart from the original.

    Relied upon: dynamo keeps what it compiled by the code object.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__)


@contextmanager
def marked_dynamic(tensors: Iterable[tuple[torch.Tensor, Iterable[int]]]) -> Iterator[None]:
    """Have dynamo trace these dimensions with symbols, as far as the traced code lets it.

    Relied upon: the marks are attributes of the tensors, read while a call is traced.
    """
    from torch._dynamo import maybe_mark_dynamic

    before = [(tensor, dict(tensor.__dict__), tuple(dims)) for tensor, dims in tensors]
    try:
        for tensor, _, dims in before:
            for dim in dims:
                maybe_mark_dynamic(tensor, dim)
        yield
    finally:
        for tensor, attributes, _ in before:
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)


@contextmanager
def gradients_inside() -> Iterator[None]:
    """Let dynamo trace `torch.autograd.grad`, also of a loss that goes through a leaf made inside.

    Dynamo refuses to return what depends on such a leaf, since whoever asked it for a gradient
    would not reach the leaf. Of a step's results only the loss is asked for gradients, those of
    parameters.

    Relied upon: `config.trace_autograd_ops`; methods that refuse where it is off (`backward()`,
    which is left to the step) and where such a leaf is returned from.
    """
    from torch._dynamo import config
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.tensor import TensorVariable

    backward: Any = TensorVariable.method_backward

    def refuse(*arguments: Any, **named: Any) -> Any:
        with config.patch(trace_autograd_ops=False):
            return backward(*arguments, **named)

    changes: list[tuple[Any, str, Any]] = [
        (TensorVariable, "method_backward", refuse),
        (OutputGraph, "_check_requires_grad_intermediate_outputs", lambda *_: None),
    ]
    methods: dict[str, Any] = getattr(TensorVariable, "tp_methods", {})  # torch 2.15 calls these
    if "backward" in methods:
        table = {**methods, "backward": type(methods["backward"])(refuse)}
        changes.append((TensorVariable, "tp_methods", table))
    with ExitStack() as stack:
        stack.enter_context(config.patch(trace_autograd_ops=True))
        for kind, name, replacement in changes:
            if hasattr(kind, name):
                stack.callback(setattr, kind, name, getattr(kind, name))
                setattr(kind, name, replacement)
        yield


def many_entries(count: int) -> AbstractContextManager[None]:
    """Let dynamo trace a function anew so often, where guards of all its earlier traces fail.

    Relied upon: `config.recompile_limit`, at which a full graph is an error.
    """
    from torch._dynamo import config

    limit: AbstractContextManager[None] = config.patch(recompile_limit=count + 1)
    return limit


@contextmanager
def quick_tracing() -> Iterator[None]:
    """Trace without looking up names of functions for every node, by parsing whole source files.

    Dynamo makes up a line of a debug log with them. Where that log is asked for, it gets them.

    Relied upon: the translator finds `get_funcname` among its module's names; where it does not,
    nothing is changed.
    """
    from torch._dynamo import symbolic_convert

    translator: Any = symbolic_convert
    names_functions = getattr(translator, "get_funcname", None)
    log = logging.getLogger("torch._dynamo.output_graph.__trace_call")
    if names_functions is None or log.isEnabledFor(logging.DEBUG):
        yield
        return
    translator.get_funcname = lambda *_: None
    try:
        yield
    finally:
        translator.get_funcname = names_functions


def with_numbers(symbols: Iterable[tuple[torch.SymInt, int]]) -> Callable[[Any], Any]:
    """Return a function from what a trace computed with symbols to the number that it is.

    Relied upon: a symbolic number's `node` has an expression of sympy's as `expr`.

    Args:
        symbols: as the graph's inputs have them, and the numbers that they stand for.
    """
    numbers = {symbol.node.expr: number for symbol, number in symbols}
    known: dict[Any, Any] = {}

    def number(value: Any) -> Any:
        node = getattr(value, "node", None)
        if node is None:
            return value
        if node.expr not in known:
            found = node.expr.xreplace(numbers)
            known[node.expr] = node.pytype(found)
        return known[node.expr]

    return number


def dynamo_errors() -> tuple[type[Exception], tuple[type[Exception], ...]]:
    """Return what dynamo raises: around a backend's error, and where it cannot trace.

    Relied upon: the first has `inner_exception`; the others have the user's stack as `real_stack`,
    and a message with lines "Explanation: ..." and "Hint: ..." or, where the traced code itself
    raised, the exception at a line's end after "got" or "raised exception".
    """
    from torch._dynamo import exc

    return exc.BackendCompilerFailed, (exc.Unsupported, exc.UserError, exc.TorchRuntimeError)
