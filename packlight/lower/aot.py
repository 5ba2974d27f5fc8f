"""A program of two sections as AOTAutograd wants it: a forward graph and a backward graph.

The forward takes the primals and returns the forward's outputs, then what is saved; the backward
takes what was saved, then the tangents, and returns the gradients. So do sections; what is left to
do here is to say it in AOTAutograd's terms. Where buffers are transferred, a token of the run is
saved, too, and the tier is found by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from packlight.capture.joint import JointStep
from packlight.lower.program import Program, Section
from packlight.memory.pool import TierPool
from packlight.torch_internals.aot import descriptions, saved_descriptions

# In the backward module's metadata: which of its arguments it overwrites.
OVERWRITTEN_KEY = "packlight_overwritten"


def partitioned(
    program: Program, step: JointStep, tiers: TierPool | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return what AOTAutograd asks of a partition; the program's modules are changed into it.

    Args:
        program: of two sections, cut where the forward ends.
        step: the captured step behind it.
        tiers: with the program's slots, if it has any.
    """
    forward, backward = program.sections
    assert forward.leaves == backward.takes, "what one leaves, the other takes"
    if program.slots:
        assert tiers is not None, "the schedule transfers buffers"
        _find_tiers(program, step, tiers)
    for node in backward.module.graph.nodes:
        if node.op in ("call_function", "call_method", "get_attr"):
            node.meta["autograd_backward"] = True
    saved = _outputs(forward)[forward.num_results :]
    _hide_saved_values(saved)
    _describe_outputs(step, program, len(saved))
    backward.module.meta[OVERWRITTEN_KEY] = [
        place for place, buffer in enumerate(backward.takes) if buffer in backward.overwrites
    ]
    return forward.module, backward.module


def _find_tiers(program: Program, step: JointStep, tiers: TierPool) -> None:
    """Have the forward begin a run and save its token, and the backward find the tier by it."""
    for section in program.sections:
        module, graph = section.module, section.module.graph
        module.tiers = tiers  # type: ignore[assignment]
        (given,) = graph.find_nodes(op="placeholder", target="tier")
        with graph.inserting_before(given):
            pool = graph.create_node("get_attr", "tiers")
        if section is program.sections[0]:
            with graph.inserting_before(given):
                token = graph.call_method("open", (pool,))
            output = graph.output_node()
            output.args = ((*_outputs(section), token),)
        else:
            with graph.inserting_before(list(graph.nodes)[len(section.takes)]):
                token = graph.placeholder("run_token")
            token.meta["val"] = _fake_token(step)
        with graph.inserting_before(given):
            tier = graph.call_method("tier_of", (pool, token))
        given.replace_all_uses_with(tier)
        graph.erase_node(given)
        module.recompile()


def _outputs(section: Section) -> tuple[Any, ...]:
    outputs: Any = section.module.graph.output_node().args[0]
    return tuple(outputs)


def _fake_token(step: JointStep) -> torch.Tensor:
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in step.primals)
    with next(mode for mode in modes if mode is not None):
        return torch.empty(1, dtype=torch.int64)


def _hide_saved_values(sources: Iterable[fx.Node]) -> None:
    """Keep AOTAutograd from refusing `retain_graph=True`.

    It refuses where it sees that saved tensors are the graph's own, since a compiler may then reuse
    their storage. Here the backward copies what it would overwrite when the graph is retained.
    """
    for source in sources:
        if source.op != "placeholder":
            source.meta = {k: v for k, v in source.meta.items() if k != "val"}


def _describe_outputs(step: JointStep, program: Program, num_saved: int) -> None:
    """Copy AOTAutograd's descriptions of the joint graph's outputs to the two graphs' outputs."""
    described = descriptions(step.module.graph.output_node())
    if described is None:
        return
    forward, backward = program.sections
    saved = saved_descriptions(num_saved)
    num_results = forward.num_results
    forward.module.graph.output_node().meta["desc"] = [*described[:num_results], *saved]
    backward.module.graph.output_node().meta["desc"] = list(described[num_results:])
