"""Every compressor by the same claims: shapes, bias, contraction, error feedback, resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from packlight.comm import (
    QSGD,
    Compressor,
    CountSketch,
    Delayed,
    Dense,
    ErrorFeedback,
    GradZip,
    OneBitMomentum,
    PowerSGD,
    Quantize,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    dgc,
    reduce_here,
)

KINDS: dict[str, Compressor] = {
    "fp32": Dense(),
    "bf16": Dense("bf16"),
    "fp16": Dense("fp16"),
    "topk": TopK(0.05),
    "topk+bf16": TopK(0.05, "bf16"),
    "topk+q8": TopK(0.05, "q8"),
    "topk+q4": TopK(0.05, "q4"),
    "topk+q2": TopK(0.05, "q2"),
    "topk+q1": TopK(0.05, "q1"),
    "topk+warmup": TopK(0.01, warmup_steps=6),
    "threshold": Threshold(1.5),
    "threshold+fp32": Threshold(1.5, "fp32"),
    "randk": RandomK(0.1),
    "randk+q2": RandomK(0.1, "q2"),
    "randk+rescaled": RandomK(0.1, rescaled=True),
    "q8": Quantize(8),
    "q4": Quantize(4),
    "q2": Quantize(2),
    "q1": Quantize(1),
    "q8+stochastic": Quantize(8, stochastic=True),
    "q4+stochastic": Quantize(4, stochastic=True),
    "q2+stochastic": Quantize(2, stochastic=True),
    "q2+ans": Quantize(2, entropy=True),
    "qsgd:4": QSGD(4),
    "qsgd:2+ans": QSGD(2, entropy=True),
    "ternary": Ternary(),
    "powersgd": PowerSGD(2),
    "gradzip": GradZip(2),
    "sketch": CountSketch(0.05, cells=0.05),
    "sign": Sign(),
}
COMPOSED: dict[str, Compressor] = {
    **{f"ef({n})": ErrorFeedback(k) for n, k in KINDS.items() if k.is_contraction},
    "dgc": dgc(0.05, warmup_steps=4),
    "dgc, clipped": dgc(0.05, max_norm=3.0, nesterov=True),
    "delayed": Delayed(ErrorFeedback(TopK(0.1)), 3),
    "1-bit Adam": OneBitMomentum(2),
}
EVERY = {**KINDS, **COMPOSED}
SHAPES: list[tuple[int, ...]] = [(40, 33), (7,), (), (0,), (3, 0), (6, 5, 4), (1,)]


def gradient(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states_of(compressor: Compressor, shape: tuple[int, ...], num_ranks: int) -> list[Any]:
    return [compressor.init(torch.zeros(shape), number=3, rank=r) for r in range(num_ranks)]


def given(compressor: Compressor, state: Any) -> dict[str, torch.Tensor]:
    """Return every tensor that a state holds, by its path."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            found |= {f"{name}.{n}": t for n, t in given(compressor, value).items()}
    return found


# -- claims about all


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_any_shape_goes_and_comes_back(name: str, shape: tuple[int, ...]) -> None:
    states = states_of(EVERY[name], shape, 2)
    for step in range(4):
        gradients = [gradient(shape, 10 * step + rank) for rank in range(2)]
        before = [g.clone() for g in gradients]
        average, states = reduce_here(EVERY[name], gradients, states)
        assert average.shape == shape and average.dtype == torch.float32
        assert bool(average.isfinite().all())
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_what_is_combined_is_what_each_message_stands_for(name: str) -> None:
    """Oracle: messages decoded one by one, averaged by hand."""
    compressor = EVERY[name]
    messages, parts = [], []
    for rank, state in enumerate(states_of(compressor, (40, 33), 3)):
        for step in range(3):
            message, state = compressor.compress(gradient((40, 33), 5 * rank + step), state)
        messages.append(message)
        parts.append(compressor.combine([message]))
    if name in ("gradzip", "ef(gradzip)", "1-bit Adam"):
        pytest.skip("its message has a meaning only beside what all ranks agreed on before")
    average = torch.stack(parts).mean(0)
    if name == "sign":
        average = average.sign()
    torch.testing.assert_close(compressor.combine(messages), average)


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.is_contraction])
def test_contractions_lose_no_more_than_they_were_given(name: str) -> None:
    for seed in range(4):
        g = gradient((40, 33), seed) * torch.logspace(-6, 0, 33)
        (state,) = states_of(KINDS[name], (40, 33), 1)
        sent, _ = reduce_here(KINDS[name], [g], [state])
        lost, had = float((g - sent).square().sum()), float(g.square().sum())
        assert lost <= had * (1 + 1e-5), seed


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.is_unbiased])
def test_unbiased_ones_are_right_on_average(name: str) -> None:
    """Seen along the gradient itself, single elements, and random directions: a t-test for each."""
    g = gradient((40, 33), 0)
    directions = torch.cat([g.view(1, -1), torch.eye(1320)[:200:20], gradient((20, 1320), 1)])
    (state,) = states_of(KINDS[name], (40, 33), 1)
    seen = []
    for _ in range(400):
        message, state = KINDS[name].compress(g, state)
        seen.append(directions.double() @ KINDS[name].combine([message]).double().view(-1))
    seen_at = torch.stack(seen)
    off = (seen_at.mean(0) - directions.double() @ g.double().view(-1)).abs()
    last_bits = 1.0 if name in ("fp16", "bf16") else 1e-3
    assert bool((off <= 5 * seen_at.std(0) / 20 + last_bits).all())


@pytest.mark.parametrize("name", [n for n in COMPOSED if n.startswith("ef(")])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_error_feedback_sums_to_the_true_gradient(name: str, num_ranks: int) -> None:
    compressor, shape = COMPOSED[name], (40, 33)
    states = states_of(compressor, shape, num_ranks)
    true, received = torch.zeros(shape).double(), torch.zeros(shape).double()
    for step in range(12):
        gradients = [gradient(shape, 100 * step + rank) for rank in range(num_ranks)]
        average, states = reduce_here(compressor, gradients, states)
        true += torch.stack(gradients).double().mean(0)
        received += average.double()
    waiting = torch.stack([state["residual"] for state in states]).double().mean(0)
    torch.testing.assert_close(received + waiting, true, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_copied_state_goes_on_to_the_last_bit(name: str) -> None:
    compressor, shape = EVERY[name], (40, 33)
    states = states_of(compressor, shape, 2)
    saved: list[Any] = []
    ends = []
    for attempt in range(2):
        if attempt:
            states = saved
        for step in range(8):
            if step == 5 and not attempt:
                saved = copy.deepcopy(states)
            if attempt and step < 5:
                continue
            gradients = [gradient(shape, 10 * step + rank) for rank in range(2)]
            average, states = reduce_here(compressor, gradients, states)
        ends.append((average, [given(compressor, state) for state in states]))
    assert torch.equal(ends[0][0], ends[1][0])
    for first, second in zip(ends[0][1], ends[1][1], strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize("name", EVERY)
def test_all_that_a_message_says_is_in_its_bytes(name: str) -> None:
    """Oracle: a message rebuilt from a copy of its bytes."""
    compressor = EVERY[name]
    (state,) = states_of(compressor, (40, 33), 1)
    message, _ = compressor.compress(gradient((40, 33), 1).bfloat16().float(), state)
    assert message.payload.dtype == (torch.float32 if message.is_linear else torch.uint8)
    again = copy.copy(message)
    object.__setattr__(again, "payload", message.payload.clone())
    assert torch.equal(compressor.combine([again]), compressor.combine([message]))
