"""`packlight.optim` against plain formulas: each rule with each way to store states and weights."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from packlight.optim import STATE_FORMATS, WEIGHT_FORMATS, LowBit, Rule, adam, adamw, lion, sgd
from tests.oracles import optimizers as plain

# Neither whole blocks nor whole tiles; large enough to be quantized.
SHAPE = (71, 73)

RULES: dict[str, tuple[Rule, plain.Update]] = {
    "sgd": (sgd(0.02), plain.sgd(0.02)),
    "momentum": (sgd(0.005, 0.9, weight_decay=0.1), plain.sgd(0.005, 0.9, l2=0.1)),
    "nesterov": (sgd(0.005, 0.9, nesterov=True), plain.sgd(0.005, 0.9, nesterov=True)),
    "adam": (adam(0.02, weight_decay=0.1), plain.adam(0.02, 0.9, 0.999, 1e-8, l2=0.1)),
    "adamw": (
        adamw(0.02, weight_decay=0.1), plain.adam(0.02, 0.9, 0.999, 1e-8, decoupled=0.1)
    ),
    "lion": (lion(0.01, weight_decay=0.1), plain.lion(0.01, 0.9, 0.99, 0.1)),
}

# How far 40 steps may end from the formulas, over how far these went.
STATE_BOUNDS = {"fp32": 5e-6, "bf16": 0.01, "8bit": 0.03, "4bit": 0.35}
WEIGHT_BOUNDS = {
    "fp32": 0.0,
    "bf16-nearest": 0.25,
    "bf16-stochastic": 0.06,
    "fp16-stochastic": 0.008,
    "bf16-kahan": 0.008,  # most of it the last rounding: the residual is not looked at here
    "bf16+8bit": 0.008,
}


def gradients(num_steps: int, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    """Return gradients that are partly the same in all steps, of sizes from 0.3 to 1."""
    generator = torch.Generator().manual_seed(1)
    size = 10 ** -(0.5 * torch.rand(shape, generator=generator))
    steady = torch.randn(shape, generator=generator)
    return [
        size * (steady + torch.randn(shape, generator=generator)) for _ in range(num_steps)
    ]


def started(weights: str = "fp32", shape: tuple[int, ...] = SHAPE) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(values.bfloat16().to(WEIGHT_FORMATS[weights].dtype))


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: Any) -> None:
    for gradient in grads:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize("states", STATE_FORMATS)
@pytest.mark.parametrize("name", RULES)
def test_every_combination_stays_near_the_formulas(name: str, states: str, weights: str) -> None:
    rule, update = RULES[name]
    parameter = started(weights)
    expected = start = parameter.detach().double()
    optimizer = LowBit([parameter], rule, states, weights)
    memory: dict[str, Any] = {}
    for t, gradient in enumerate(gradients(40), 1):
        run(optimizer, parameter, [gradient])
        expected = update(expected, gradient.to(parameter.dtype).double(), memory, t)
    off = (parameter.detach().double() - expected).norm() / (expected - start).norm()
    assert off <= math.hypot(STATE_BOUNDS[states], WEIGHT_BOUNDS[weights])
    if weights == "fp32" and states != "fp32" and name != "sgd":
        assert off >= STATE_BOUNDS[states] / 30, "so the state is stored in few bits indeed"


def to_fp32(optimizer: LowBit, parameter: nn.Parameter) -> torch.Tensor:
    """Return a bfloat16 weight with its residual added."""
    values, residual = parameter.detach(), optimizer.state[parameter]["residual"]
    if residual.dtype == torch.bfloat16:
        return values.float() + residual.float()
    half_place = torch.exp2(values.float().abs().log2().floor() - 8)
    return values.float() + residual.float() / 127 * half_place


@pytest.mark.parametrize("weights", ["bf16-kahan", "bf16+8bit"])
def test_a_residual_keeps_what_the_rounding_of_a_weight_cuts_off(weights: str) -> None:
    rule, update = RULES["adamw"]
    parameter = started(weights)
    expected = start = parameter.detach().double()
    optimizer = LowBit([parameter], rule, "fp32", weights)
    memory: dict[str, Any] = {}
    for t, gradient in enumerate(gradients(40), 1):
        run(optimizer, parameter, [gradient])
        expected = update(expected, gradient.bfloat16().double(), memory, t)
    kept = to_fp32(optimizer, parameter)
    assert (kept - expected).norm() <= 2e-4 * (expected - start).norm()
    assert (kept.bfloat16() == parameter).float().mean() > 0.99  # a residual may round to a tie


TORCH_RULES = {
    "sgd": (sgd(0.1, weight_decay=0.01), torch.optim.SGD, dict(lr=0.1, weight_decay=0.01)),
    "momentum": (sgd(0.1, 0.9), torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "nesterov": (
        sgd(0.1, 0.9, nesterov=True), torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)
    ),
    "adam": (adam(0.01, weight_decay=0.1), torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    "adamw": (adamw(0.01), torch.optim.AdamW, dict(lr=0.01)),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", TORCH_RULES)
def test_in_fp32_the_rules_are_torchs_to_a_few_last_places(name: str, maximize: bool) -> None:
    rule, theirs, arguments = TORCH_RULES[name]
    mine, other = started(), started()
    run(LowBit([mine], rule, "fp32", maximize=maximize), mine, gradients(10))
    run(theirs([other], **arguments, maximize=maximize), other, gradients(10))
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=3e-7)


# -- how moments are stored


def quantized(gradient: torch.Tensor, states: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a step keeps of a gradient and of its square, decoded by the papers' levels."""
    parameter = nn.Parameter(torch.zeros_like(gradient))
    optimizer = LowBit([parameter], adam(betas=(0.0, 0.0)), states)
    run(optimizer, parameter, [gradient])
    state = optimizer.state[parameter]
    return tuple(
        decoded(state[name], state[f"{name}_scale"], states, name == "exp_avg")[: gradient.numel()]
        for name in ("exp_avg", "exp_avg_sq")
    )


def decoded(
    codes: torch.Tensor, scale: torch.Tensor, states: str, is_signed: bool
) -> torch.Tensor:
    codes = codes.flatten()
    block = 256
    if states == "4bit":
        block = 128
        codes = torch.stack([codes.view(-1, 64) & 15, codes.view(-1, 64) >> 4], 1).flatten()
    values = torch.from_numpy(levels_of(states, is_signed))[codes.long()]
    return values * scale.double().repeat_interleave(block)[: values.numel()]


def levels_of(states: str, is_signed: bool) -> np.ndarray:
    if states == "4bit" and not is_signed:
        return plain.linear_levels()
    return plain.dynamic_levels(8 if states == "8bit" else 4, is_signed)


@pytest.mark.parametrize("states", ["8bit", "4bit"])
@pytest.mark.parametrize("num_elements", [4096, 4096 + 1, 5000, 8192 + 129])
def test_no_moment_is_off_by_more_than_half_the_gap_around_it(
    states: str, num_elements: int
) -> None:
    generator = torch.Generator().manual_seed(num_elements)
    gradient = torch.randn(num_elements, generator=generator).exp()
    gradient *= torch.randn(num_elements, generator=generator).sign()
    gradient[256:512] = 0.0
    block = 256 if states == "8bit" else 128
    for value, kept, is_signed in zip(
        (gradient.double(), gradient.double().square()), quantized(gradient, states), (True, False),
        strict=True,
    ):
        padded = torch.nn.functional.pad(value.abs(), (0, -num_elements % block)).view(-1, block)
        largest = padded.amax(1).repeat_interleave(block)[:num_elements]
        levels = torch.from_numpy(levels_of(states, is_signed))
        assert torch.equal(kept[largest == 0], value[largest == 0])
        some = largest > 0
        relative = (value / largest)[some]
        # A level's cell is as wide as the widest of the gaps near it.
        gaps = nn.functional.max_pool1d(levels.diff()[None], 3, stride=1, padding=1)[0]
        above = torch.searchsorted(levels, relative).clamp(1, len(levels) - 1)
        bound = gaps[above - 1] / 2
        # Below the lowest level there is nothing: -1 of a signed map, 0 of a linear one.
        bound = torch.where(relative < levels[0], levels[0] - relative, bound)
        error = ((kept - value).abs() / largest)[some]
        assert (error <= bound + 1e-6).all()
        assert error.max() > 1e-3, "it is quantized"
        # Each block's largest value keeps its bits, unless it is negative: -1 is no level.
        is_largest = (value == largest) & (value > 0)
        assert is_largest.any() and torch.equal(kept[is_largest].float(), value[is_largest].float())


def test_a_second_moment_never_becomes_zero() -> None:
    """Zero would make the next update explode: its square root is divided by."""
    gradient = torch.full((4096,), 1e-6)
    gradient[::256] = 1.0
    for states in ("8bit", "4bit"):
        assert (quantized(gradient, states)[1] > 0).all()


def test_nan_and_infinity_spoil_their_own_weight_and_then_their_block_only() -> None:
    for poison in (math.nan, math.inf):
        parameter, gradient = started(shape=(20, 256)), gradients(2, (20, 256))
        gradient[0][3, 7] = poison
        optimizer = LowBit([parameter], adamw())
        run(optimizer, parameter, gradient[:1])
        assert parameter.isnan().sum() == 1 and parameter[3, 7].isnan()
        run(optimizer, parameter, gradient[1:])
        assert parameter[3].isnan().all() and parameter.isnan().sum() == 256


# -- random bits


def test_random_bits_are_philox_of_element_step_tensor_seed_and_parameter() -> None:
    assert plain.philox((0, 0, 0, 0), (0, 0)) == (
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    )  # fmt: skip  # from Random123's known answers
    from packlight.optim.cpu_kernel import TILE, _draw

    drawn = torch.zeros(TILE, dtype=torch.uint32)
    _draw(3, 17, 1, 42, 5, drawn.numpy())
    for element in (0, 1, 31, 32, 200, 255):
        lane, part = element % 32, element // 32
        words = plain.philox((3 * 32 + lane, 0, 17, 1), (42, 5))
        assert int(drawn[element]) == words[part // 2] >> 16 * (part % 2) & 0xFFFF


@pytest.mark.parametrize("weights", ["bf16-stochastic", "fp16-stochastic"])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e-6, 1.9921875])
def test_stochastic_rounding_is_unbiased(weights: str, value: float) -> None:
    form = WEIGHT_FORMATS[weights]
    parameter = nn.Parameter(torch.full((2**18,), value).to(form.dtype))
    start = float(parameter.detach()[0])
    spacing = float(torch.nextafter(parameter.detach()[:1].abs(), torch.ones(1).to(form.dtype) * 9))
    spacing -= abs(start)
    share = 0.3125
    optimizer = LowBit([parameter], sgd(share * spacing), weights=weights)
    run(optimizer, parameter, [torch.full((2**18,), -math.copysign(1.0, value))])
    moved = (parameter.detach().double().abs() - abs(start)) / spacing
    assert moved.unique().tolist() == [0, 1]
    assert abs(moved.mean() - share) < 4 * math.sqrt(share * (1 - share) / 2**18)


def test_rounding_to_nearest_stalls_where_stochastic_rounding_and_residuals_do_not() -> None:
    ends = {}
    for weights in ("bf16-nearest", "bf16-stochastic", "bf16-kahan", "bf16+8bit"):
        parameter = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = LowBit([parameter], sgd(1e-4), weights=weights)
        run(optimizer, parameter, [torch.ones(8192)] * 500)
        ends[weights] = parameter.detach().float().mean()
    assert ends.pop("bf16-nearest") == 1
    for end in ends.values():
        assert end == pytest.approx(0.95, abs=5e-3)


def test_bits_depend_neither_on_threads_nor_on_the_order_of_parameters() -> None:
    previous = torch.get_num_threads()
    ends = []
    shapes = ((400, 500), (71, 73), (9,))
    try:
        for num_threads, order in ((1, (0, 1, 2)), (2, (0, 1, 2)), (1, (2, 0, 1))):
            torch.set_num_threads(num_threads)
            parameters = [started("bf16-stochastic", shape) for shape in shapes]
            optimizer = LowBit(parameters, adamw(0.01), "bf16", "bf16-stochastic", seed=7)
            for step in range(2):
                for index in order:
                    gradient = gradients(2, shapes[index])[step]
                    run(optimizer, parameters[index], [gradient])
                    parameters[index].grad = None
            ends.append(parameters)
    finally:
        torch.set_num_threads(previous)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_parameters_and_seeds_draw_different_bits() -> None:
    twins = [started("bf16-stochastic"), started("bf16-stochastic")]
    optimizer = LowBit(twins, adamw(0.01), weights="bf16-stochastic")
    other = started("bf16-stochastic")
    for parameter in twins:
        parameter.grad = gradients(1)[0].bfloat16()
    optimizer.step()
    run(LowBit([other], adamw(0.01), weights="bf16-stochastic", seed=1), other, gradients(1))
    assert not torch.equal(twins[0], twins[1])
    assert not torch.equal(twins[0], other)


def test_a_moment_in_bfloat16_keeps_growing_where_rounding_to_nearest_would_stop() -> None:
    parameter = nn.Parameter(torch.zeros(8192))
    optimizer = LowBit([parameter], adamw(), "bf16")
    run(optimizer, parameter, [torch.ones(8192)] * 1500)
    second = optimizer.state[parameter]["exp_avg_sq"].float().mean()
    assert second == pytest.approx(1 - 0.999**1500, rel=0.01)


# -- layouts


@pytest.mark.parametrize("states", STATE_FORMATS)
def test_dense_parameters_of_any_layout_and_gradients_of_another(states: str) -> None:
    straight = started(shape=(60, 70, 2, 2))
    channels_last = nn.Parameter(
        straight.detach().clone().contiguous(memory_format=torch.channels_last)
    )
    for gradient in gradients(3, (60, 70, 2, 2)):
        straight.grad = gradient.clone()
        channels_last.grad = gradient.clone()  # row-major
    optimizer = LowBit([straight, channels_last], adamw(0.01, betas=(0.0, 0.0)), states)
    optimizer.step()
    # Blocks hold other elements, so only signs and sizes agree with few bits.
    bound = {"fp32": 0.0, "bf16": 0.02, "8bit": 0.02, "4bit": 0.02}[states]
    assert (straight - channels_last).abs().max() <= bound
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_copies_of_an_optimizer_go_on_with_the_same_bits() -> None:
    parameter = started("bf16-stochastic")
    optimizer = LowBit([parameter], adamw(0.01), weights="bf16-stochastic")
    run(optimizer, parameter, gradients(2))
    twin = copy.deepcopy(optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    others = [o.param_groups[0]["params"][0] for o in (twin, read)]
    for one, p in ((optimizer, parameter), (twin, others[0]), (read, others[1])):
        run(one, p, gradients(3)[2:])
    assert torch.equal(others[0], parameter) and torch.equal(others[1], parameter)
