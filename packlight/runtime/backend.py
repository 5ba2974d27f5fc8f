"""The torch.compile backend: capture, profile, plan, run.

    model = torch.compile(model, backend="packlight", options={"budget": "300MiB"})

The budget covers every byte allocated from the start of the forward to the end of the backward above
what was there before: saved activations, outputs, gradients, workspace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from packlight.capture.joint import JointStep, read_joint_graph
from packlight.capture.profiler import CallProfiler
from packlight.errors import GraphBreakError, OptionError
from packlight.runtime.emit import emit
from packlight.step import Plan, StepGraph
from packlight.units import parse_bytes

KNOWN_OPTIONS = ("budget", "allow", "progress")


@dataclass
class Compilation:
    """What was captured and planned for one graph; kept for inspection.

    Attributes:
        step: the captured step, None for a graph without a backward.
        plan: what runs.
    """

    graph: StepGraph
    plan: Plan


@dataclass
class PacklightBackend:
    """A torch.compile backend with its options.

    Attributes:
        budget_bytes: peak of a step above what was there before it; None for no limit.
        compilations: one per captured graph, newest last.
        choose_plan: (graph, budget) -> Plan; the planner.
    """

    budget_bytes: int | None = None
    allow: tuple[str, ...] = ()
    progress: bool = True
    choose_budget: Callable[[StepGraph], int | None] | None = None
    compilations: list[Compilation] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        _refuse_graph_break()
        _specialize(example_inputs)
        compiler = aot_autograd(
            fw_compiler=_boxed,
            bw_compiler=_boxed_backward,
            inference_compiler=self._compile_inference,
            partition_fn=self._partition,
        )
        compiled: Callable[..., Any] = compiler(module, example_inputs)
        return compiled

    def _partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        from packlight.planner import plan_schedule

        with CallProfiler(self.progress) as profiler:
            step = capture(joint, num_fwd_outputs, profiler)
        budget = self.budget_bytes
        if self.choose_budget is not None:
            budget = self.choose_budget(step.graph)
        plan = plan_schedule(step.graph, budget)
        self.compilations.append(Compilation(step.graph, plan))
        emitted = emit(step, plan.schedule)
        return emitted.forward, emitted.backward

    def _compile_inference(self, module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return _boxed(module, example_inputs)


def packlight_backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile a graph (the entry point of `torch.compile(..., backend="packlight")`).

    Args:
        module, example_inputs: from dynamo.
        options: `budget` (bytes or a string such as "300MiB"; absent for no limit), `allow` (names of
            approximate techniques), `progress` (show what profiling does; True).

    Raises:
        OptionError, BudgetFormatError, InfeasibleBudgetError, GraphBreakError, UnsupportedModelError.
    """
    return backend_from_options({**(options or {}), **unknown})(module, example_inputs)


def backend_from_options(options: dict[str, Any]) -> PacklightBackend:
    """Return a backend for an options dictionary, checked."""
    strange = sorted(set(options) - set(KNOWN_OPTIONS))
    if strange:
        raise OptionError(
            f"unknown option{'s' if len(strange) > 1 else ''} {', '.join(map(repr, strange))} for the "
            f"packlight backend\nhint: known options are {', '.join(map(repr, KNOWN_OPTIONS))}"
        )
    allow = check_allowed(options.get("allow", ()))
    budget = options.get("budget")
    return PacklightBackend(
        budget_bytes=None if budget is None else parse_bytes(budget),
        allow=allow,
        progress=bool(options.get("progress", True)),
    )


def check_allowed(allow: Any) -> tuple[str, ...]:
    """Return the names of approximate techniques that were allowed; none exists yet."""
    names = (allow,) if isinstance(allow, str) else tuple(allow)
    if names:
        raise OptionError(
            f"unknown technique {names[0]!r} in allow\n"
            "hint: no approximate technique is available in this version; leave allow empty"
        )
    return names


def capture(joint: fx.GraphModule, num_forward_outputs: int, profiler: CallProfiler) -> JointStep:
    """Return the step behind AOTAutograd's joint graph."""
    output = next(n for n in reversed(joint.graph.nodes) if n.op == "output")
    mutated_inputs = {
        index: described.mutated_input
        for index, described in enumerate(output.meta.get("desc") or ())
        if index < num_forward_outputs and type(described).__name__ == "InputMutationAOTOutput"
    }
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    by_description = {n.meta.get("desc"): i for i, n in enumerate(placeholders)}
    mutated = frozenset(by_description[d] for d in mutated_inputs.values() if d in by_description)
    return read_joint_graph(
        joint,
        num_forward_outputs,
        profiler.measure,
        mutated_primals=mutated,
        pinned_outputs=lambda index: index not in mutated_inputs,
    )


def _boxed(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """Compile a graph to a function that takes its arguments in a list and empties the list."""
    module.graph.set_codegen(torch.fx.graph._BoxedCodeGen())
    module.recompile()
    forward = module.forward

    def run(arguments: list[Any]) -> Any:
        return forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _boxed_backward(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    return _boxed(module, example_inputs)


def _specialize(example_inputs: Sequence[Any]) -> None:
    """Make symbolic sizes constants: a plan is made for one shape (another shape is planned anew)."""
    for value in example_inputs:
        if isinstance(value, torch.SymInt):
            int(value)
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *value.stride()):
                int(size)


def _refuse_graph_break() -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return  # not called by dynamo
    reason = translator.output.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return
    frame = reason.user_stack[-1] if reason.user_stack else None
    cause = reason.reason.strip().splitlines()[0] if reason.reason else "unknown cause"
    raise GraphBreakError(
        frame.filename if frame else "<unknown>",
        (frame.lineno or 0) if frame else 0,
        cause,
        "move what dynamo cannot trace out of the forward, or wrap it in a custom operator",
    )


def prepare_dynamo() -> None:
    """Let dynamo trace through what models of today do and a user should not have to know about.

    Logging inside a forward would break the graph; while traced, it is skipped. Recurrent layers
    are traced into one operation.
    """
    from torch._dynamo import config

    methods = ("debug", "info", "warning", "error", "log")
    config.ignore_logging_functions.update(getattr(logging.Logger, name) for name in methods)
    # transformers adds these to its loggers, which is where a warning inside a forward comes from.
    extra = (getattr(logging.Logger, name, None) for name in ("warning_once", "warning_advice"))
    config.ignore_logging_functions.update(method for method in extra if method is not None)
    config.allow_rnn = True
