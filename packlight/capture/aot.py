"""What AOTAutograd says about a joint graph beside the graph itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packlight.torch_internals.aot import (
    descriptions,
    is_tangent,
    mutated_input,
    place_returned,
    starts_at_mutation,
)


class GraphData(fx.GraphModule):
    """A graph that is read and rarely run: its Python is written when it is first called."""

    def recompile(self) -> Any:
        """Do nothing yet."""

    def forward(self, *arguments: Any) -> Any:
        """Run the graph."""
        super().recompile()  # puts another `forward` in place of this one
        return self.forward(*arguments)


def mutations(joint: fx.GraphModule, num_forward_outputs: int) -> dict[int, Any]:
    """Return, for forward outputs that are new values of inputs, which input each belongs to."""
    output = next(n for n in reversed(joint.graph.nodes) if n.op == "output")
    mutated = map(mutated_input, (descriptions(output) or ())[:num_forward_outputs])
    return {index: described for index, described in enumerate(mutated) if described is not None}


def written_back(joint: fx.GraphModule, num_forward_outputs: int) -> dict[int, int]:
    """Return, for forward outputs that are new values of inputs, the placeholders' positions."""
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    by_description = {descriptions(n): i for i, n in enumerate(placeholders)}
    mutated = mutations(joint, num_forward_outputs)
    return {i: by_description[d] for i, d in mutated.items() if d in by_description}


def user_results(joint: fx.GraphModule, num_forward_outputs: int) -> tuple[int, ...]:
    """Return, in the order of the traced function's own results, which forward outputs they are."""
    output = next(n for n in reversed(joint.graph.nodes) if n.op == "output")
    places = enumerate(map(place_returned, (descriptions(output) or ())[:num_forward_outputs]))
    index_of = {place: index for index, place in places if place is not None}
    return tuple(index_of[place] for place in sorted(index_of))


def num_tangents(joint: fx.GraphModule) -> int:
    """Return how many of the forward's outputs the backward starts from."""
    return sum(map(is_tangent, joint.graph.nodes))


def drop_other_tangents(joint: fx.GraphModule) -> None:
    """Take out gradients of the new values of parameters that the forward changes in place.

    After the step nothing goes back through such a value, so its gradient is zero. Where it is only
    added to the parameter's own, the sum is that one.
    """
    add = torch.ops.aten.add.Tensor
    dropped = False
    for tangent in [n for n in joint.graph.nodes if is_tangent(n)]:
        if not starts_at_mutation(descriptions(tangent)):
            continue
        sums = list(tangent.users)
        if any(n.target is not add or n.args[0] is n.args[1] or n.kwargs for n in sums):
            continue
        for node in sums:
            others = [a for a in node.args if a is not tangent]
            node.replace_all_uses_with(others[0])
            joint.graph.erase_node(node)
        joint.graph.erase_node(tangent)
        dropped = True
    if dropped:
        joint.recompile()
