"""Fake results that are made again look like those that PyTorch's fake kernels make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from packlight.capture import fakes
from packlight.capture.fakes import fake_result

_aten = torch.ops.aten


def layouts(value: Any, inputs: list[torch.Tensor]) -> list[Any]:
    """Return everything to be seen of the tensors in a value, and whose storage they look at."""
    storages = [t.untyped_storage()._cdata for t in inputs]
    found = []
    for leaf in pytree.tree_leaves(value):
        cdata = leaf.untyped_storage()._cdata
        found.append((
            leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device,
            leaf.untyped_storage().nbytes(), leaf.requires_grad,
            storages.index(cdata) if cdata in storages else None,
        ))
        storages.append(cdata)
    return found


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (_aten.mm.default, ((6, 8), (8, 4))),
    (_aten.t.default, ((6, 8),)),
    (_aten.slice.Tensor, ((6, 8), 0, 2, 5)),
    (_aten.split.Tensor, ((6, 8), 2)),
    (_aten.native_layer_norm.default, ((6, 8), [8], None, None, 1e-5)),
    (_aten.view.default, ((6, 8), [3, 16])),
    (_aten.add.Tensor, ((6, 8), (8,))),
    (_aten._to_copy.default, ((6, 8),)),
    (_aten.unbind.int, ((6, 8),)),
]


@pytest.mark.parametrize(("target", "arguments"), CALLS, ids=[str(t) for t, _ in CALLS])
def test_a_result_made_again_looks_like_the_first(
    target: Any, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = FakeTensorMode()
    with mode:
        base = torch.empty(100)

    def inputs_at(offset: int) -> tuple[list[torch.Tensor], list[Any]]:
        made, given = [], []
        for argument in arguments:
            if isinstance(argument, tuple):
                with mode:
                    argument = base[offset:].as_strided(
                        argument, [*argument[1:], 1] if len(argument) > 1 else [1]
                    )
                made.append(argument)
            given.append(argument)
        return made, given

    tensors, args = inputs_at(3)
    fake_result(mode, target, args, {})
    # Views of another place in their storage: relative places count.
    tensors, args = inputs_at(5)
    with mode, torch.no_grad():
        expected = layouts(target(*args), tensors)
    monkeypatch.setattr(fakes, "_described", None)  # nothing is asked for any more
    assert layouts(fake_result(mode, target, args, {}), tensors) == expected


def test_results_of_two_calls_share_no_storage() -> None:
    mode = FakeTensorMode()
    with mode:
        value = torch.empty(4, 4)
    one, other = (fake_result(mode, _aten.exp.default, (value,), {}) for _ in range(2))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert one.fake_mode is other.fake_mode is mode


def test_what_is_asked_of_other_tensors_is_asked_anew() -> None:
    mode = FakeTensorMode()
    with mode:
        values = [torch.empty(4, 4), torch.empty(4, 5), torch.empty(4, 4, dtype=torch.float64)]
    for value in values:
        result = fake_result(mode, _aten.exp.default, (value,), {})
        assert (result.shape, result.dtype) == (value.shape, value.dtype)
