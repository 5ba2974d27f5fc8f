"""A traced loss in which ranks tell one another something: each exchange becomes one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from packlight.errors import UnsupportedModelError
from packlight.ranks.collectives import ALL_GATHER, ALL_REDUCE, COLLECTIVES, REDUCE_SCATTER
from packlight.torch_internals import collectives as functional

_ONE_CALL: dict[Any, Any] = {
    functional.ALL_REDUCE: ALL_REDUCE,
    functional.ALL_GATHER: ALL_GATHER,
    functional.REDUCE_SCATTER: REDUCE_SCATTER,
}


def merge_waits(module: fx.GraphModule) -> None:
    """Make each collective and the wait behind it one call.

    Raises:
        UnsupportedModelError: one of a kind that is not known, or nobody waits for one.
    """
    found = [node for node in module.graph.nodes if node.target in _ONE_CALL]
    for node in found:
        _merge(module, node)
    strange = [node for node in module.graph.nodes if functional.is_exchange(node.target)]
    if strange:
        raise UnsupportedModelError(
            f"{strange[0].target} between ranks cannot be planned\nhint: sums, gathers and "
            "scattered sums can; other placements of inputs and outputs may need no others"
        )
    if found:
        module.recompile()


def refuse_unheard(module: fx.GraphModule, is_heard: Callable[[str], bool]) -> None:
    """Raise where a graph's ranks tell something to those of a group that a step knows nothing of.

    Args:
        module: with exchanges in one call each.
        is_heard: whether a step's ranks are those of a group, by its name.

    Raises:
        UnsupportedModelError: they do.
    """
    groups = {str(n.args[-1]) for n in module.graph.nodes if n.target in COLLECTIVES}
    if not all(map(is_heard, groups)):
        raise UnsupportedModelError(
            "the loss talks to other ranks, of which nothing is known here\nhint: pass the mesh "
            "that the model was split with, and parallel=packlight.Parallel(tensor=...), or "
            "space=... for samples in rows"
        )


def _merge(module: fx.GraphModule, node: fx.Node) -> None:
    if [user.target for user in node.users] != [functional.WAIT]:
        raise UnsupportedModelError(f"{node.name} is an exchange between ranks without one wait")
    (wait,) = node.users
    with module.graph.inserting_before(node):
        call = module.graph.call_function(_ONE_CALL[node.target], node.args, node.kwargs)
    call.meta = {**node.meta, "val": wait.meta["val"]}
    wait.replace_all_uses_with(call)
    module.graph.erase_node(wait)
    module.graph.erase_node(node)
