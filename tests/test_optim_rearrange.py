"""State of `LowBit` follows elements that change places, whatever it is stored in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from packlight.optim import LowBit, adam
from tests.test_optim import decoded

pytest.importorskip("numba", reason="the CPU's step needs the extra 'optim'")

NUM = 8192 + 300


def stepped(states: str, weights: str = "fp32") -> tuple[nn.Parameter, LowBit]:
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    parameter = nn.Parameter(torch.zeros(NUM, dtype=dtype))
    optimizer = LowBit([parameter], adam(lr=0.01), states, weights)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        parameter.grad = torch.randn(NUM, generator=generator).exp().to(dtype)
        parameter.grad[::3] *= -1
        optimizer.step()
    return parameter, optimizer


def moments(
    optimizer: LowBit, parameter: nn.Parameter, states: str, count: int
) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter]
    return {
        name: decoded(state[name], state[f"{name}_scale"], states, name == "exp_avg")[:count]
        if f"{name}_scale" in state else state[name].double()
        for name in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit", "4bit"])
def test_elements_that_stay_where_they_are_keep_their_codes(states: str) -> None:
    parameter, optimizer = stepped(states, "bf16-kahan")
    before = copy.deepcopy(optimizer.state[parameter])
    optimizer.rearrange_state(parameter, torch.arange(NUM))
    after = optimizer.state[parameter]
    assert before.keys() == after.keys()
    assert before.pop("step") == after["step"]
    for name, value in before.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("count", [NUM, NUM - 500, 3000])
def test_moments_move_with_their_elements_and_new_ones_start_at_zero(
    states: str, count: int
) -> None:
    parameter, optimizer = stepped(states)
    before = moments(optimizer, parameter, states, NUM)
    generator = torch.Generator().manual_seed(1)
    source = torch.randperm(NUM, generator=generator)[:count]
    source[::10] = -1
    optimizer.rearrange_state(parameter, source)
    after = moments(optimizer, parameter, states, count)
    for name, old in before.items():
        expected = old[source.clamp(min=0)].masked_fill(source < 0, 0)
        found = after[name]
        block = {"8bit": 256, "4bit": 128}.get(states, 1)
        size = torch.nn.functional.pad(expected.abs(), (0, -count % block)).view(-1, block).amax(1)
        size = size.repeat_interleave(block)[:count]
        # Half a gap of the coarsest part of each map, over the largest of a block; 4-bit second
        # moments have no zero, but 1/16.
        is_small = count < 4096
        gap = 0.0 if is_small else {"8bit": 0.008, "4bit": 0.13}.get(states, 0.0)
        assert ((found - expected).abs() <= gap * size + 1e-6 * expected.abs()).all(), name
        if states != "4bit":
            assert (found[source < 0] == 0).all()
    parameter.data = torch.zeros(count)
    parameter.grad = torch.ones(count)
    optimizer.step()  # what is stored fits the parameter
