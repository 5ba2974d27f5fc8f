"""LARS, LARC and LAMB beside their equations in float64; batch scaling; the noise scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from packlight.errors import OptionError
from packlight.optim import (
    LowBit,
    NoiseScale,
    Rule,
    adam,
    adamw,
    gradual_warmup,
    lamb,
    larc,
    lars,
    lion,
    scaled_lr,
    sgd,
)

SHAPES = [(64, 80), (80,), (3, 5)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(optimizer_of: Any, num_steps: int = 5, sign: float = 1.0) -> list[torch.Tensor]:
    weights = [nn.Parameter(w) for w in tensors(0)]
    optimizer = optimizer_of(weights)
    for step in range(num_steps):
        for weight, g in zip(weights, tensors(step + 1), strict=True):
            weight.grad = sign * g
        optimizer.step()
    return [w.detach() for w in weights]


def by_hand(kind: str, num_steps: int = 5) -> list[torch.Tensor]:
    """The oracle: the equations of the docstrings, in float64."""
    lr, decay, trust = 0.1, 0.01, 0.02
    weights = [w.double() for w in tensors(0)]
    firsts = [torch.zeros_like(w) for w in weights]
    seconds = [torch.zeros_like(w) for w in weights]
    for step in range(1, num_steps + 1):
        for w, m, v, g32 in zip(weights, firsts, seconds, tensors(step), strict=True):
            g = g32.double()
            if kind == "lamb":
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g.square())
                r = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + decay * w
                w -= lr * w.norm() / r.norm() * r
                continue
            factor = trust * w.norm() / (g.norm() + decay * w.norm())
            if kind != "lars":
                factor = factor / lr
            if kind == "larc, clipped":
                factor = factor.clamp_max(1.0)
            m.mul_(0.9).add_(factor * (g + decay * w))
            w -= lr * m
    return weights


RULES: dict[str, Rule] = {
    "lars": lars(0.1, 0.9, weight_decay=0.01, trust=0.02),
    "larc, clipped": larc(sgd(0.1, 0.9, weight_decay=0.01), 0.02),
    "larc": larc(sgd(0.1, 0.9, weight_decay=0.01), 0.02, clip=False),
    "lamb": lamb(0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_those_of_the_equations(kind: str, maximize: bool) -> None:
    found = trained(
        lambda w: LowBit(w, RULES[kind], states="fp32", maximize=maximize),
        sign=-1.0 if maximize else 1.0,
    )
    for value, expected in zip(found, by_hand(kind), strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(("states", "tolerance"), [("8bit", 0.02), ("4bit", 0.25)])
def test_states_of_few_bits_stay_near(kind: str, states: str, tolerance: float) -> None:
    optimizers = []

    def make(weights: list[nn.Parameter]) -> LowBit:
        optimizers.append(LowBit(weights, RULES[kind], states=states))
        return optimizers[0]

    found = trained(make)
    assert "exp_avg_scale" in optimizers[0].state[optimizers[0].param_groups[0]["params"][0]] or (
        "momentum_buffer_scale" in optimizers[0].state[optimizers[0].param_groups[0]["params"][0]]
    )
    for value, expected, start in zip(found, by_hand(kind), tensors(0), strict=True):
        moved = (expected - start).norm()
        assert (value.double() - expected).norm() <= tolerance * moved


def test_larc_around_adam_is_adam_on_scaled_gradients() -> None:
    found = trained(lambda w: LowBit(w, larc(adam(0.1), 0.02), states="fp32"), 1)
    for value, start, g in zip(found, tensors(0), tensors(1), strict=True):
        weight = nn.Parameter(start.clone())
        weight.grad = g * min(float(0.02 * start.norm() / g.norm() / 0.1), 1.0)
        torch.optim.Adam([weight], lr=0.1).step()
        torch.testing.assert_close(value, weight.detach())


@pytest.mark.parametrize("kind", RULES)
def test_zero_weights_and_zero_gradients_are_stepped_without_a_trust(kind: str) -> None:
    weight, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    optimizer = LowBit([weight, other], RULES[kind], states="fp32")
    weight.grad, other.grad = torch.ones(4), torch.zeros(4)
    optimizer.step()
    assert bool(weight.isfinite().all()) and bool((weight < 0).all())
    assert bool(other.isfinite().all()) and bool((other >= 0.89).all())


def test_groups_differ_in_their_rules_and_resume_to_the_last_bit() -> None:
    def make(weights: list[nn.Parameter]) -> LowBit:
        groups = [{"params": weights[:1]}, {"params": weights[1:], "rule": adamw(0.1)}]
        return LowBit(groups, lamb(0.1), states="8bit")

    through = trained(make)
    adam_alone = trained(lambda w: LowBit(w, adamw(0.1), states="8bit"))
    assert torch.equal(through[1], adam_alone[1]) and not torch.equal(through[0], adam_alone[0])

    weights = [nn.Parameter(w) for w in tensors(0)]
    optimizer = make(weights)
    for step in range(5):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make(weights)
            optimizer.load_state_dict(saved)
        for weight, g in zip(weights, tensors(step + 1), strict=True):
            weight.grad = g
        optimizer.step()
    assert all(torch.equal(w.detach(), t) for w, t in zip(weights, through, strict=True))


def test_the_learning_rate_scales_with_the_batch_and_warms_up() -> None:
    assert scaled_lr(0.1, 1024, 256) == pytest.approx(0.4)
    assert scaled_lr(0.1, 1024, 256, "sqrt") == pytest.approx(0.2)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.4)
    scheduler = gradual_warmup(optimizer, 4, first=0.25)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.4])


def test_the_noise_scale_is_what_the_gradients_were_made_with() -> None:
    """Oracle: a true gradient and a covariance that are known: S / |G|^2 = 50 x 4 / 10 = 20."""
    generator = torch.Generator().manual_seed(0)
    true = torch.full((50,), (10 / 50) ** 0.5)
    noise = NoiseScale(part=8, num_parts=4, decay=0.995)
    for _ in range(1500):
        parts = [true + 2 * torch.randn(50, generator=generator) / 8**0.5 for _ in range(4)]
        noise.add([[part[:20], part[20:]] for part in parts])
    assert noise.value() == pytest.approx(20, rel=0.15)


def test_the_noise_scale_is_infinite_where_all_is_noise_and_zero_where_none_is() -> None:
    noise = NoiseScale(4, 2, decay=0.0)
    noise.add([torch.ones(3), -torch.ones(3)])
    assert noise.value() == float("inf")
    noise.add([torch.ones(3), torch.ones(3)])
    assert noise.value() == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowBit([nn.Parameter(torch.ones(1))], lars(0.1, trust=0)), "trust=0"),
        (lambda: lars(-1), "lr=-1"),
        (lambda: larc(adamw(0.1)), "hint: adam"),
        (lambda: larc(lion(0.1, weight_decay=0.1)), "decoupled"),
        (lambda: LowBit([nn.Parameter(torch.ones(1).bfloat16())], lamb(), weights="bf16-kahan"),
         "weights='fp32'"),
        (lambda: scaled_lr(0.1, 10, 0), "base_batch=0"),
        (lambda: scaled_lr(0.1, 10, 1, "cubic"), "known: linear, sqrt"),
        (lambda: NoiseScale(8, 1), "two or more"),
        (lambda: NoiseScale(8, 2, decay=1.0), "decay=1.0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_reason(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()
