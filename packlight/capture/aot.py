"""What AOTAutograd says about a joint graph beside the graph itself."""

from __future__ import annotations

from typing import Any

from torch import fx


class GraphData(fx.GraphModule):
    """A graph that is read and never run: no Python is written for it, which takes long."""

    def recompile(self) -> Any:
        """Do nothing."""


def mutations(joint: fx.GraphModule, num_forward_outputs: int) -> dict[int, Any]:
    """Return, for forward outputs that are new values of inputs, which input each belongs to."""
    output = next(n for n in reversed(joint.graph.nodes) if n.op == "output")
    return {
        index: described.mutated_input
        for index, described in enumerate(output.meta.get("desc") or ())
        if index < num_forward_outputs and type(described).__name__ == "InputMutationAOTOutput"
    }


def written_back(joint: fx.GraphModule, num_forward_outputs: int) -> dict[int, int]:
    """Return, for forward outputs that are new values of inputs, the placeholders' positions."""
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    by_description = {n.meta.get("desc"): i for i, n in enumerate(placeholders)}
    mutated = mutations(joint, num_forward_outputs)
    return {i: by_description[d] for i, d in mutated.items() if d in by_description}


def user_results(joint: fx.GraphModule, num_forward_outputs: int) -> tuple[int, ...]:
    """Return, in the order of the traced function's own results, which forward outputs they are."""
    output = next(n for n in reversed(joint.graph.nodes) if n.op == "output")
    places = {
        described.idx: index
        for index, described in enumerate(output.meta.get("desc") or ())
        if index < num_forward_outputs and type(described).__name__ == "PlainAOTOutput"
    }
    return tuple(places[place] for place in sorted(places))


def num_tangents(joint: fx.GraphModule) -> int:
    """Return how many of the forward's outputs the backward starts from."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    return sum("tangents" in str(n.target) for n in placeholders)
