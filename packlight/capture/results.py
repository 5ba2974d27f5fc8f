"""Whether a traced loss is one that can be trained: its results, and what it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from packlight.capture.aot import num_tangents
from packlight.errors import UnsupportedModelError
from packlight.torch_internals.storages import storage_identity


def loss_index_of(
    joint: fx.GraphModule,
    returned: tuple[int, ...],
    loss_place: int | None,
    mutated: dict[int, int],
) -> int:
    """Return which forward result is the loss.

    Args:
        joint: the joint graph.
        returned: the forward results that the traced function returns or assigns to attributes.
        loss_place: where among them the one tensor is that it returns, if it does.
        mutated: forward result -> primal whose new value it is.
    """
    results = joint.graph.find_nodes(op="output")[0].args[0]
    nodes = [results[i] for i in returned if isinstance(results[i], fx.Node)]
    shapes = [tuple(node.meta["val"].shape) for node in nodes]
    if loss_place is None or not isinstance(results[returned[loss_place]], fx.Node):
        raise UnsupportedModelError(
            "loss_fn must return one scalar tensor, or a tuple that begins with it; it returned "
            f"{len(shapes)} tensor{'' if len(shapes) == 1 else 's'} of shape "
            f"{', '.join(map(str, shapes))}\nhint: return (loss, everything else)"
        )
    loss_index = returned[loss_place]
    loss_shape = tuple(results[loss_index].meta["val"].shape)
    if loss_shape != ():
        raise UnsupportedModelError(
            f"loss_fn must return a scalar tensor first, it returned one of shape {loss_shape}\n"
            "hint: take the mean or the sum"
        )
    new_values = [results[i] for i in mutated if isinstance(results[i], fx.Node)]
    storages = {storage_identity(node.meta["val"]) for node in new_values}
    for node in nodes:
        value = node.meta["val"]
        if node not in new_values and storage_identity(value) in storages:
            raise UnsupportedModelError(
                f"the forward assigns a view of shape {tuple(value.shape)} of a buffer that it "
                "also changes to an attribute\nhint: clone it"
            )
    if num_tangents(joint) > 1:
        raise UnsupportedModelError(
            "the forward changes tensors in place that gradients go back through\n"
            "hint: detach() what is only looked at, or make a new tensor of it"
        )
    return loss_index


def check_arguments(primals: list[fx.Node], arguments: list[Any], num_placeholders: int) -> None:
    """The program is given dynamo's arguments: they must be the joint graph's primals."""
    same = num_placeholders == len(arguments) + 1
    for primal, argument in zip(primals, arguments, strict=False):
        fake = primal.meta.get("val")
        if isinstance(fake, torch.Tensor):
            same = same and isinstance(argument, torch.Tensor) and fake.shape == argument.shape
            same = same and fake.dtype == argument.dtype
    if not same:
        raise UnsupportedModelError(
            f"the traced step takes {num_placeholders - 1} inputs where {len(arguments)} are "
            "passed: inputs that share memory and are changed by the model cannot be planned as a "
            "whole step\nhint: torch.compile(model, backend='packlight') plans such models"
        )
