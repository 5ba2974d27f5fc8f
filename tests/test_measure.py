"""Calls are observed on made-up tensors that are like the real ones in all that costs bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from packlight.costs.measure import call_signature, observe_call
from packlight.costs.peak import measure_peak

aten = torch.ops.aten


def spectrum(length: int = 65) -> torch.Tensor:
    return torch.zeros(8, 16, length, dtype=torch.cfloat)


CALLS = {
    "a part of a storage is copied with all of it": (
        aten.copy.default,
        lambda: (torch.zeros(8, 16, 128, dtype=torch.cfloat)[..., :65], spectrum()),
    ),
    "a conjugate that the kernel takes a copy of": (
        aten.bmm.default,
        lambda: (spectrum(16).transpose(1, 2).conj(), torch.zeros(8, 16, 4, dtype=torch.cfloat)),
    ),
    "the imaginary part of a conjugate is negated lazily": (
        aten.mm.default, lambda: (spectrum(16)[0].conj().imag, torch.zeros(16, 4)),
    ),
}


@pytest.mark.parametrize(("target", "make"), CALLS.values(), ids=CALLS)
def test_what_is_observed_is_what_the_call_really_holds(
    target: torch._ops.OpOverload, make: Callable[[], tuple[torch.Tensor, ...]]
) -> None:
    real = make()
    peak = measure_peak(lambda: target(*real))
    with FakeTensorMode() as mode:
        facts = observe_call(target, [mode.from_tensor(t) for t in real], {})
    (output,) = facts.outputs
    assert output.storage_bytes == peak.result.untyped_storage().nbytes()
    assert output.storage_bytes + facts.workspace_bytes == peak.peak_bytes


def test_calls_on_a_part_of_a_storage_are_told_from_those_on_a_whole_one() -> None:
    whole, part = torch.zeros(4), torch.zeros(8)[:4]
    values = spectrum()
    signatures = {
        call_signature(aten.clone.default, (t,), {})
        for t in (whole, part, values, values.conj(), values.conj().imag, values.imag)
    }
    assert len(signatures) == 6
    equal = (call_signature(aten.clone.default, (torch.zeros(8)[a : a + 4],), {}) for a in (0, 4))
    assert len(set(equal)) == 1  # where in the storage costs nothing
