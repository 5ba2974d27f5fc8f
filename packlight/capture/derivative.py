"""Whether the backward of a traced graph can be anything but the derivative of its forward."""

from __future__ import annotations

from torch import fx

# In names of functions and methods: what cuts gradients off, switches them off or asks for them.
_ABOUT_GRADIENTS = ("detach", "grad", "inference")


def is_derivative(module: fx.GraphModule) -> bool:
    """Return whether gradients are derivatives of what a graph computes, as far as is sure.

    Meant for graphs whose functions are all torch's own (those that `kept.key_of` knows): there,
    nothing but gradients that are cut off, or divided by how often an index occurs, makes them
    something else. What is then independent in the forward is so in the backward.

    Args:
        module: traced by dynamo.
    """
    return not any(_is_about_gradients(node) for node in module.graph.nodes)


def _is_about_gradients(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if any(part in name for part in _ABOUT_GRADIENTS) or "data" in node.args:
        return True
    # One of an embedding's settings divides gradients.
    return "embedding" in name and any(
        value is True for value in (*node.args, *node.kwargs.values())
    )
