"""Fake tensors without asking PyTorch's fake kernels, which take half a millisecond each."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.costs.made_up import tensor_arguments
from packlight.costs.measure import call_signature
from packlight.torch_internals.dispatch import FakeTensorMode, fake_of, is_fake, without_autocast
from packlight.torch_internals.storages import storage_identity

# Per mode and call: what its results look like, for calls that will be asked about again.
_Known = dict[str, tuple[list[Any], Any]]
_known: weakref.WeakKeyDictionary[FakeTensorMode, _Known] = weakref.WeakKeyDictionary()


def fake_mode_of(module: fx.GraphModule) -> FakeTensorMode:
    """Return the mode that a graph's values belong to."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    mode: FakeTensorMode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
    return mode


def fake_tensor(
    mode: FakeTensorMode,
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    device: torch.device,
    shape: Any,
    stride: Any,
    offset: int,
) -> torch.Tensor:
    """Return a fake tensor that looks at a storage on the meta device.

    Args:
        mode: that it belongs to; no other mode may be active.
        storage: fake tensors that share it are views of one another.
        dtype: of the tensor.
        device: where it pretends to be.
        shape: plain numbers.
        stride: in elements, likewise.
        offset: of the first element in the storage, in elements.
    """
    meta = torch.empty(0, dtype=dtype, device="meta")
    return fake_of(mode, meta.set_(storage, offset, shape, stride), device)


def fake_result(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    """Return what a call returns for fake tensors; of equal calls only the first is really made.

    Args:
        mode: of the tensors.
        target: an operator.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    known = _known.setdefault(mode, {})
    signature, inputs = call_signature(target, args, kwargs), tensor_arguments(args, kwargs)
    if signature in known:
        leaves, structure = known[signature]
        return pytree.tree_unflatten(_made(mode, leaves, inputs), structure)
    # The graph says what is cast and what is not: an autocast around it is already in there.
    with mode, torch.no_grad(), without_autocast():
        value = target(*args, **kwargs)
    described = _described(value, inputs)
    if described is not None:
        known[signature] = described
    return value


def _described(value: Any, inputs: list[torch.Tensor]) -> tuple[list[Any], Any] | None:
    """Return each tensor's origin and layout, and the structure they are in; None if unsure.

    An origin is the position of an input and the offset from that, or the name and size of a new
    storage.
    """
    leaves, structure = pytree.tree_flatten(value)
    if not all(map(is_fake, inputs)):  # a constant of the graph
        return None
    of_storage = {storage_identity(t): i for i, t in enumerate(inputs)}
    described: list[Any] = []
    for leaf in leaves:
        if not is_fake(leaf) or leaf.is_conj() or leaf.is_neg():
            return None
        identity, num_bytes = storage_identity(leaf), 0
        source, offset = of_storage.get(identity), leaf.storage_offset()
        if source is not None:
            offset -= inputs[source].storage_offset()
        else:
            num_bytes = leaf.untyped_storage().nbytes()
        described.append((
            source, identity, num_bytes, leaf.dtype, leaf.device, tuple(leaf.shape),
            leaf.stride(), offset,
        ))
    return described, structure


def _made(mode: FakeTensorMode, leaves: list[Any], inputs: list[torch.Tensor]) -> list[Any]:
    storages: dict[int, torch.UntypedStorage] = {}
    made = []
    for source, name, num_bytes, dtype, device, shape, stride, offset in leaves:
        if source is not None:
            storage = inputs[source].untyped_storage()
            offset += inputs[source].storage_offset()
        elif name in storages:
            storage = storages[name]
        else:
            storage = storages[name] = torch.UntypedStorage(num_bytes, device="meta")
        made.append(fake_tensor(mode, storage, dtype, device, shape, stride, offset))
    return made
