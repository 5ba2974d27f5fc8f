"""What Packlight asks of TorchDynamo: trace through common models, and say plainly where it cannot.

What it is asked with is in torch_internals/; the wording of its messages is read here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from packlight.errors import GraphBreakError, UnsupportedModelError
from packlight.torch_internals.dispatch import undecomposed
from packlight.torch_internals.dynamo import dynamo_errors, keep_eagers_meaning, trace_through
from packlight.torch_internals.translator import graph_break, returned_names

VALUES_HINT = "decide it before the forward, from plain numbers, or compute both with torch.where"
# nn.Transformer compares a mask's values with a causal one's, unless it is told.
CAUSAL_HINT = "tell torch's attention whether its mask is causal: tgt_is_causal= or is_causal="
BACKWARD_HINT = (
    "return the sum of the losses; torch.autograd.grad(..., create_graph=True) gives gradients "
    "inside a loss"
)
GENERATOR_HINT = (
    "draw from torch's own generator (torch.manual_seed), or draw before the step and put it into "
    "the batch"
)
NOISE_HINT = "draw them from torch, or pass them with the batch"
GRAPH_BREAK_HINT = "move what cannot be traced out of the forward, or wrap it in a custom operator"


def prepare_dynamo() -> None:
    """Let dynamo trace through what models of today do and a user should not have to know about.

    A logger's call inside a forward would break the graph: while traced, it is skipped. Recurrent
    layers are traced into the operations of their time steps.
    """
    # transformers adds warning_once and warning_advice to all loggers.
    names = ("debug", "info", "warning", "error", "log", "warning_once", "warning_advice")
    methods = (getattr(logging.Logger, name, None) for name in names)
    trace_through(m for m in methods if m is not None)
    keep_eagers_meaning()


def made_traceable(model: nn.Module, error: GraphBreakError) -> bool:
    """Have a model do what its first call does and no trace can; return whether there is such.

    Models of transformers that return hidden states or routers' logits hook their layers at their
    first call, under a lock. In eager PyTorch that happens unseen.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or error.file != capturing.__file__:
        return False
    for module in model.modules():
        if hasattr(module, "_can_record_outputs"):
            capturing.maybe_install_capturing_hooks(module)
    return True


# Parts of names of operators that are traced as they are.
NATIVE = ("upsample", "multi_margin_loss", "multilabel_margin_loss_forward")


@contextmanager
def native_calls() -> Iterator[None]:
    """Trace upsampling and margin losses of several classes as the calls that eager PyTorch makes.

    Where tracing goes through Python's dispatcher, torch decomposes upsampling into indexing and
    arithmetic: for code generators, who fuse it. Run call by call that rounds otherwise and holds
    several times what the kernel does. So does `multi_margin_loss`; and what
    `multilabel_margin_loss` is decomposed to takes the places behind a row's -1, which are to be
    left out, for class 0.
    """
    overloads = [
        getattr(packet, overload)
        for name in dir(torch.ops.aten)
        if any(part in name for part in NATIVE)
        for packet in [getattr(torch.ops.aten, name)]
        for overload in packet.overloads()
    ]
    with undecomposed(overloads):
        yield


def specialize(example_inputs: Sequence[Any]) -> None:
    """Make symbolic sizes constants: a plan is for one shape (another one is planned anew)."""
    for value in example_inputs:
        if isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *value.stride()):
                int(size)


def refuse_graph_break() -> None:
    """Raise if the graph being compiled is one of several pieces of the model.

    Raises:
        GraphBreakError: with file, line and cause.
    """
    found = graph_break()
    if found is not None:
        raise _graph_break(*found)


@dataclass(frozen=True)
class Returned:
    """Which of a traced graph's results the function returns; the others go to attributes.

    Attributes:
        loss: the place of the one tensor, or of the first in a tuple; None where there is no such.
        extras: the places of all other tensors in what is returned.
    """

    loss: int | None = None
    extras: tuple[int, ...] = ()


def returned_places(module: fx.GraphModule) -> Returned:
    """Return the places, among the results of the graph being compiled, of what is returned."""
    loss, extras = returned_names()
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    names = [getattr(node, "name", None) for node in output.args[0]]
    return Returned(
        names.index(loss) if loss in names else None,
        tuple(place for place, name in enumerate(names) if name in extras),
    )


def detach_all_but(module: fx.GraphModule, loss: int) -> None:
    """Let no gradient go back through results of a traced graph but the loss.

    Nothing can go back through the others after the step: its graph is gone then, as eager's is.

    Args:
        module: traced by dynamo; changed.
        loss: its place among the results.
    """
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    results = list(output.args[0])
    for place, node in enumerate(results):
        value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if place != loss and isinstance(value, torch.Tensor) and value.requires_grad:
            with module.graph.inserting_before(output):
                results[place] = module.graph.call_method("detach", (node,))
            results[place].meta["example_value"] = value.detach()
    output.args = (tuple(results),)
    module.recompile()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise our own errors out of dynamo's wrappers, and graph breaks as `GraphBreakError`."""
    around_backend, untraceable = dynamo_errors()
    try:
        yield
    except around_backend as error:
        inner = error.inner_exception  # type: ignore[attr-defined]
        raise inner.with_traceback(None) from None
    except untraceable as error:
        stack = getattr(error, "real_stack", None)
        failure = re.search(r"(?:got|raised exception) (\w+\(.*\))$", str(error), re.MULTILINE)
        if failure is not None:
            raise _failed_trace(failure[1], stack) from error
        raise _graph_break(str(error), stack) from error


def _innermost(stack: Any) -> tuple[str, int]:
    """Return file and line of the last call that is not torch's own."""
    frames = list(stack or ())
    torch_directory = os.path.dirname(torch.__file__) + os.sep
    outside = [frame for frame in frames if not frame.filename.startswith(torch_directory)]
    for frame in (*outside[-1:], *frames[-1:]):
        return frame.filename, frame.lineno or 0
    return "<unknown>", 0


def _failed_trace(failure: str, stack: Any) -> UnsupportedModelError:
    file, line = _innermost(stack)
    return UnsupportedModelError(
        f"the model fails when it is traced, at {file}:{line}\n  {failure}\n"
        "hint: if it runs in eager PyTorch, it takes another branch when it is traced "
        "(torch.compiler.is_compiling()); passing what it makes up there, such as an attention "
        "mask, often helps"
    )


def refuse_values(module: fx.GraphModule) -> None:
    """Raise if sizes or numbers of a traced graph depend on the values of tensors.

    Where a function must be one graph, dynamo makes symbols of what `nonzero` or `item()` return:
    no schedule is known to fit for all their values.

    Raises:
        GraphBreakError: with file, line and operation.
    """
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if value is None or not free_unbacked_symbols(value):
            continue
        places = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
        file, line = places[-1] if places else ("<unknown>", "0")
        name = getattr(node.target, "__name__", node.target)
        cause = f"what {name} returns has a size or is a number that depends on a tensor's values"
        raise GraphBreakError(file, int(line), cause, VALUES_HINT)


def described_break(message: str, stack: Any) -> tuple[str, str]:
    """Return in a line why a graph breaks, and where: "file:line"."""
    error = _graph_break(message, stack)
    return error.cause, f"{error.file}:{error.line}"


def _graph_break(message: str, stack: Any) -> GraphBreakError:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Consider ")]
    cause = telling[0] if telling else "unknown cause"
    explanation = next((x for x in lines if x.startswith("Explanation:")), "")
    if explanation:
        cause += f" ({explanation.removeprefix('Explanation:').strip()})"
    hints = [x.removeprefix("Hint:").strip() for x in lines if x.startswith("Hint:")]
    useful = [h for h in hints if not re.search(r"report|torch\._dynamo|fundamental", h)]
    hint = useful[0] if useful else GRAPH_BREAK_HINT
    branch = re.search(r"data-dependent expression.*Caused by: (.*?)\s+#", message, re.DOTALL)
    if branch is not None:
        cause = f"`{branch[1]}` depends on the values of a tensor"
        is_attention = "multi_head_attention_forward" in branch[1]
        hint = CAUSAL_HINT if is_attention else VALUES_HINT
    can_be_cut = "Tensor.backward()" not in message  # gradients would count twice
    if not can_be_cut:
        cause, hint = "backward() is called, which is the step's to do", BACKWARD_HINT
    if "(Generator)" in message:
        cause, hint = "a generator is passed by hand, which no trace can hold", GENERATOR_HINT
    if "use_numpy_random_stream" in message:
        cause, hint = "it draws random numbers from numpy", NOISE_HINT
    file, line = _innermost(stack)
    return GraphBreakError(file, line, cause, hint, can_be_cut=can_be_cut)
