"""What AOTAutograd says of a joint graph, in its nodes and beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from packlight.torch_internals.checks import linalg_checks_are_calls
from packlight.torch_internals.recurrent import whole_recurrent_layers

Compiled = Callable[..., Any]
Partition = Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]]


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

    def compiled(graph: fx.GraphModule, inputs: Any) -> Any:
        with contiguous_tangents(), as_eager_runs_it():
            return compiler(graph, inputs)

    return compiled


@contextmanager
def as_eager_runs_it() -> Iterator[None]:
    """Trace what torch would trace as something else than eager PyTorch runs."""
    with whole_recurrent_layers(), linalg_checks_are_calls():
        yield


@contextmanager
def contiguous_tangents() -> Iterator[None]:
    """Let AOTAutograd expect gradients of results to be dense, in the result's memory format.

    A backward is traced before anybody knows which strides will arrive, and what has others is
    copied. torch's guess is a result's own strides; but the gradient of a transposed view is most
    often made by a matrix product or a reshape, is contiguous, and the copy sends what follows to
    other kernels than eager PyTorch's: other bits, and more memory.

    Relied upon: functorch's configuration has that switch; where not, nothing is changed.
    """
    from torch._functorch import config

    name = "guess_tangent_strides_as_outputs"
    if not hasattr(config, name):
        yield
        return
    with config.patch({name: False}):
        yield


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


def modules_around(node: fx.Node) -> list[tuple[str, Any]]:
    """Return the modules that a call was traced in, outermost first, as (dynamo's path, class).

    Relied upon: `nn_module_stack` of forward nodes, `fwd_nn_module_stack` of their gradients.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return list(stack.values())


def sequence_number(node: fx.Node) -> int | None:
    """Return a number that a forward node and those of its gradient have in common."""
    return node.meta.get("seq_nr")
