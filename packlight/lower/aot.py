"""A program of two sections as AOTAutograd wants it: a forward graph and a backward graph.

The forward takes the primals and returns the forward's outputs, then what is saved; the backward
takes what was saved, then the tangents, and returns the gradients. So do sections; what is left to
do here is to say it in AOTAutograd's terms.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from packlight.capture.joint import JointStep
from packlight.lower.program import Program
from packlight.torch_internals import descriptions, saved_descriptions

# In the backward module's metadata: which of its arguments it overwrites.
OVERWRITTEN_KEY = "packlight_overwritten"


def partitioned(program: Program, step: JointStep) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return what AOTAutograd asks of a partition.

    Args:
        program: of two sections, cut where the forward ends.
        step: the captured step behind it.
    """
    forward, backward = program.sections
    assert forward.leaves == backward.takes, "what one leaves, the other takes"
    for node in backward.module.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            node.meta["autograd_backward"] = True
    saved = forward.module.graph.output_node().args[0][forward.num_results :]  # type: ignore[index]
    _hide_saved_values(saved)  # type: ignore[arg-type]
    _describe_outputs(step, program)
    backward.module.meta[OVERWRITTEN_KEY] = [
        place for place, buffer in enumerate(backward.takes) if buffer in backward.overwrites
    ]
    return forward.module, backward.module


def _hide_saved_values(sources: Iterable[fx.Node]) -> None:
    """Keep AOTAutograd from refusing `retain_graph=True`.

    It refuses where it sees that saved tensors are the graph's own, since a compiler may then reuse
    their storage. Here the backward copies what it would overwrite when the graph is retained.
    """
    for source in sources:
        if source.op != "placeholder":
            source.meta = {k: v for k, v in source.meta.items() if k != "val"}


def _describe_outputs(step: JointStep, program: Program) -> None:
    """Copy AOTAutograd's descriptions of the joint graph's outputs to the two graphs' outputs."""
    described = descriptions(step.module.graph.output_node())
    if described is None:
        return
    forward, backward = program.sections
    saved = saved_descriptions(len(forward.leaves))
    num_results = forward.num_results
    forward.module.graph.output_node().meta["desc"] = [*described[:num_results], *saved]
    backward.module.graph.output_node().meta["desc"] = list(described[num_results:])
