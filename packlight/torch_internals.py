"""What Packlight takes from torch beyond its documented interface, each thing under a name.

Any of it may move from one release of torch to the next, so it is reached from here alone, and what
is relied upon stands at each function. tests/test_torch_internals.py has a test for each, which
says what has moved, and one that reads the sources for private names of torch used elsewhere.

Dynamo and AOTAutograd are imported where they are used: planning without a model needs neither.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.optim import optimizer as torch_optimizer
from torch.utils import _python_dispatch

__all__ = ["FakeTensorMode"]  # from here, too

Compiled = Callable[..., Any]
Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]

# -- TorchDynamo


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


def hooks_of_all_modules() -> list[int]:
    """Return the numbers of the hooks that torch runs for every module, new ones for new hooks.

    Relied upon: torch keeps them in dictionaries of the module, by numbers that it counts on.
    """
    kept = nn.modules.module
    return [
        *kept._global_forward_pre_hooks, *kept._global_forward_hooks,
        *kept._global_backward_pre_hooks, *kept._global_backward_hooks,
    ]


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
def numbers_stay_numbers() -> Iterator[None]:
    """Let AOTAutograd leave numbers that follow from symbolic sizes what they are.

    It would make tensors of them, which is other calls than those with plain numbers.

    Relied upon: the pass that does it is called by its name in one module; where it is not, nothing
    is changed.
    """
    from torch._functorch._aot_autograd import graph_compile

    module: Any = graph_compile
    make_tensors = getattr(module, "tensorify_python_scalars", None)
    if make_tensors is None:
        yield
        return
    module.tensorify_python_scalars = lambda *_: None
    try:
        yield
    finally:
        module.tensorify_python_scalars = make_tensors


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


def dynamo_errors() -> tuple[type[Exception], tuple[type[Exception], ...]]:
    """Return what dynamo raises: around a backend's error, and where it cannot trace.

    Relied upon: the first has `inner_exception`; the others have the user's stack as `real_stack`,
    and a message with lines "Explanation: ..." and "Hint: ..." or, where the traced code itself
    raised, the exception at a line's end after "got" or "raised exception".
    """
    from torch._dynamo import exc

    return exc.BackendCompilerFailed, (exc.Unsupported, exc.UserError, exc.TorchRuntimeError)


# -- AOTAutograd


def aot_compiler(compile_one: Compiled, partition: Partition) -> Compiled:
    """Return a dynamo backend that asks for a joint graph's two parts and compiles each.

    Relied upon: `partition_fn(joint, inputs, *, num_fwd_outputs, ...)` is called once, with a graph
    whose placeholders are primals then tangents and whose outputs are the forward's then one
    gradient per primal; without a backward it is not called. An error that it raises comes out.

    Args:
        compile_one: (graph, inputs) -> function.
        partition: (joint graph, number of its outputs that belong to the forward) -> both parts.
    """
    from torch._dynamo.backends.common import aot_autograd

    def partition_fn(
        joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(joint, num_fwd_outputs)

    compiler: Compiled = aot_autograd(
        fw_compiler=compile_one, bw_compiler=compile_one, partition_fn=partition_fn
    )
    return compiler


def is_tangent(node: fx.Node) -> bool:
    """Whether a joint graph's node is a gradient that the backward starts from."""
    return node.op == "placeholder" and "tangents" in str(node.target)


TRACED_IN_BACKWARD = {"partitioner_tag": "is_backward"}


def is_traced_in_backward(node: fx.Node) -> bool:
    """Whether a joint graph's node was traced in the backward (it need not read a tangent)."""
    return all(node.meta.get(key) == mark for key, mark in TRACED_IN_BACKWARD.items())


def descriptions(node: fx.Node) -> Any:
    """Return what AOTAutograd says of a placeholder, or of each of the output's results.

    Relied upon: it stands in `meta["desc"]`. A joint graph that is not AOTAutograd's has none.
    """
    return node.meta.get("desc")


def mutated_input(description: Any) -> Any:
    """Return the description of the input whose new value a result is, None if it is none.

    Relied upon: the placeholder's description is equal to it.
    """
    is_mutation = type(description).__name__ == "InputMutationAOTOutput"
    return description.mutated_input if is_mutation else None


def starts_at_mutation(description: Any) -> bool:
    """Whether a tangent is the gradient of an input's new value.

    Relied upon: a tangent's description names the output that it belongs to.
    """
    return mutated_input(getattr(description, "output", None)) is not None


def place_returned(description: Any) -> int | None:
    """Return which of the traced function's own results this one is, None if it is none."""
    return description.idx if type(description).__name__ == "PlainAOTOutput" else None


def saved_descriptions(num_saved: int) -> list[Any]:
    """Return the descriptions of what a forward saves for its backward."""
    from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

    return [SavedForBackwardsAOTOutput(i) for i in range(num_saved)]


def description_class(name: str) -> Callable[..., Any]:
    """Return one of AOTAutograd's classes of descriptions, by its name.

    Relied upon: they are dataclasses in one module.
    """
    from torch._functorch._aot_autograd import descriptors

    found: Callable[..., Any] = getattr(descriptors, name)
    return found


def tracing_settings() -> list[Any]:
    """Return what beside torch's public settings decides how a graph is traced.

    Relied upon: functorch's configuration has a hash; modes of dispatch lie on a stack.
    """
    from torch._functorch import config

    return [config.get_hash().hex(), torch._C._len_torch_dispatch_stack()]


def modules_around(node: fx.Node) -> list[tuple[str, Any]]:
    """Return the modules that a call was traced in, outermost first, as (dynamo's path, class).

    Relied upon: `nn_module_stack` of forward nodes, `fwd_nn_module_stack` of their gradients.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return list(stack.values())


def sequence_number(node: fx.Node) -> int | None:
    """Return a number that a forward node and those of its gradient have in common."""
    return node.meta.get("seq_nr")


# -- FX


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


# -- tracing modes and dispatch


def is_fake(value: Any) -> bool:
    """Whether a tensor is one of a trace's, without memory."""
    return isinstance(value, FakeTensor)


def fake_of(mode: FakeTensorMode, meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the meta device as a trace's tensor that says it is on another one."""
    return FakeTensor(mode, meta, device)


@contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Leave every tracing mode: inside a compile call, tensors made here are real ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with ExitStack() as stack:
        stack.enter_context(_python_dispatch._disable_current_modes())
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch._C._DisableTorchDispatch())
        yield


def without_autocast() -> AbstractContextManager[None]:
    """Leave autocast, whichever devices it is on for."""
    manager: AbstractContextManager[None] = torch._C._DisableAutocast()
    return manager


@contextmanager
def undecomposed(overloads: Sequence[Any]) -> Iterator[None]:
    """Trace operators as they are where torch registers decompositions of them for tracing.

    Relied upon: such a decomposition is among the overload's `py_kernels`, under one of two keys;
    which kernel a call takes is remembered in `_dispatch_cache`.
    """
    keys = torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd
    hidden: list[tuple[Any, Any, Any]] = []
    for overload in overloads:
        for key in keys:
            if key in overload.py_kernels:
                hidden.append((overload, key, overload.py_kernels.pop(key)))
        overload._dispatch_cache.clear()
    try:
        yield
    finally:
        for overload, key, kernel in hidden:
            overload.py_kernels[key] = kernel
            overload._dispatch_cache.clear()


def is_graph_retained() -> bool:
    """Whether the backward that is running was asked to keep its graph (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# -- storages


def storage_identity(tensor: torch.Tensor) -> int:
    """Return what two tensors have in common if and only if they look at one storage."""
    return int(tensor.untyped_storage()._cdata)


def num_storage_references(tensor: torch.Tensor) -> int:
    """Return a number that grows with every further tensor on a tensor's storage."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def lazily_negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view that is negated when it is read."""
    return torch._neg_view(tensor)


# -- processes


def default_store() -> Any:
    """Return the store through which the processes of the default group found one another."""
    return dist.distributed_c10d._get_default_store()


# -- optimizers and modules

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def has_global_step_hooks() -> bool:
    """Whether hooks are registered that run in every optimizer's step."""
    return bool(
        torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    )


def plain_step(optimizer_class: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return a class's `step` without the wrapper in which torch runs hooks and profiles.

    Relied upon: the wrapper has `hooked` and `__wrapped__`.
    """
    step: Any = optimizer_class.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def is_replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an object's `step` is neither its class's nor that of torch's LR schedulers.

    Relied upon: theirs has `_wrapped_by_lr_sched`, and the class's as `__wrapped__`.
    """
    patched = optimizer.__dict__.get("step")
    is_of_scheduler = getattr(patched, "_wrapped_by_lr_sched", False)
    is_class_step = getattr(patched, "__wrapped__", None) is type(optimizer).step
    return patched is not None and not (is_of_scheduler and is_class_step)


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Note on an optimizer that it was stepped: LR schedulers warn if they step before it."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether autograd would call hooks with a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def through_hooks(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return what a parameter's hooks make of its gradient, as autograd calls them.

    Relied upon: they lie in `_backward_hooks`, in order; one that returns a tensor replaces it.
    """
    for hook in tuple((parameter._backward_hooks or {}).values()):
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    return gradient


def after_accumulation(parameter: torch.Tensor) -> None:
    """Call the hooks that autograd calls once a parameter's `grad` is there."""
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile(model)` returns; another model as it is."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


# -- the profiler


def memory_events(profiler: Any) -> list[int]:
    """Return every allocation (+bytes) and free (-bytes) on the CPU while a profiler ran, in order.

    Relied upon: events named "[memory]", those of kernels' own temporaries included.
    """
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    events.sort(key=lambda event: event[0])
    return [num_bytes for _, num_bytes in events]
