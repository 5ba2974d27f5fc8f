"""Single compressors beside their papers; what messages hold; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from packlight.comm import (
    QSGD,
    Clip,
    Compressor,
    CountSketch,
    Delayed,
    Dense,
    ErrorFeedback,
    GradZip,
    MomentumCorrection,
    PowerSGD,
    Quantize,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    compressor_of,
    dgc,
    reduce_here,
)
from packlight.comm.packing import (
    VALUE_FORMATS,
    Reader,
    integer,
    read_indices,
    read_symbols,
    read_values,
    write_indices,
    write_symbols,
    write_values,
)
from packlight.comm.sparse import largest
from packlight.errors import FormatError, OptionError
from tests.test_comm import gradient, states_of

# -- bytes


@pytest.mark.parametrize(
    ("text", "bits"),
    [("q8+noef", 8.125), ("q4+noef", 4.125), ("q2+noef", 2.125), ("q1+noef", 1.125),
     ("ternary", 1.63), ("sign", 1.0), ("topk:0.01+noef", 0.01 * (8.12 + 32)),
     ("topk:0.01+q2+noef", 0.01 * 10.2), ("topk:0.001+q1+noef", 0.001 * 12.5),
     ("randk:0.01+q2+noef", 0.0201), ("powersgd:1+noef", 32 * 512 / 65536)],
)  # fmt: skip
def test_messages_are_as_small_as_their_information(text: str, bits: float) -> None:
    compressor = compressor_of(text)
    shape = (256, 256)
    message, _ = compressor.compress(gradient(shape, 0), compressor.init(torch.zeros(shape)))
    if text.startswith("powersgd"):
        assert message.num_bytes * 8 / 65536 == bits
    else:
        assert message.num_bytes <= 65536 * bits / 8 * 1.02 + 6


def test_entropy_coding_comes_near_the_entropy_where_most_codes_are_zero() -> None:
    compressor = QSGD(2, block=65536, entropy=True)
    g = gradient((256, 256), 0)
    message, _ = compressor.compress(g, compressor.init(g))
    codes = np.bincount((compressor.combine([message]).sign() + 1).long().view(-1), minlength=3)
    shares = codes[codes > 0] / codes.sum()
    entropy_bytes = -(shares * np.log2(shares)).sum() * g.numel() / 8
    assert message.num_bytes <= entropy_bytes + 24
    assert message.num_bytes < Ternary().compress(g, Ternary().init(g))[0].num_bytes / 5


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.2, 0.9, 1.0])
def test_indices_come_back_and_take_what_they_hold(density: float) -> None:
    generator = np.random.default_rng(0)
    indices = np.flatnonzero(generator.random(200_000) < density)
    packed = write_indices(indices, 200_000)
    assert np.array_equal(read_indices(Reader(packed), 200_000), indices)
    if 0.001 < density < 0.5:
        entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density))
        assert len(packed) * 8 / 200_000 <= 1.06 * entropy


@pytest.mark.parametrize("form", VALUE_FORMATS)
@pytest.mark.parametrize("count", [0, 1, 2, 9, 300])
def test_values_come_back_as_near_as_their_form_allows(form: str, count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    back = read_values(Reader(write_values(values, form)), count, form)
    largest_magnitude = float(np.abs(values).max(initial=0))
    error = {"fp32": 0, "bf16": 2**-8, "q8": 0.5 / 127, "q4": 0.5 / 7, "q2": 1, "q1": 1}[form]
    assert np.abs(back - values).max(initial=0) <= error * largest_magnitude * (1 + 1e-5)
    assert np.square(back - values).sum() <= np.square(values).sum() + 1e-6


@pytest.mark.parametrize("symbols", [[0] * 9, [], [2, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
def test_symbols_come_back(symbols: list[int]) -> None:
    array = np.array(symbols, np.uint8)
    assert np.array_equal(read_symbols(Reader(write_symbols(array, 3)), 3), array)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**40])
def test_integers_come_back(value: int) -> None:
    assert Reader(integer(value)).integer() == value


def test_a_message_that_is_cut_off_or_changed_is_an_error() -> None:
    packed = write_indices(np.array([3, 70, 1000]), 2000)
    with pytest.raises(FormatError):
        read_indices(Reader(packed[:-1]), 2000)
    with pytest.raises(FormatError):
        read_indices(Reader(packed), 100)
    with pytest.raises(FormatError, match="in the middle"):
        Reader(packed).take(99)


# -- the largest


@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "one block", "sorted", "NaN"])
@pytest.mark.parametrize("count", [1, 50, 4000])
def test_the_largest_are_those_of_a_sort(kind: str, count: int) -> None:
    n = 100_000
    flat = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    if kind == "equal":
        flat = np.sign(flat)
    elif kind == "zeros":
        flat[:] = 0
    elif kind == "one block":  # where the sample does not look
        flat[:] *= 1e-3
        flat[900:1000] = 5
    elif kind == "sorted":
        flat.sort()
    elif kind == "NaN":
        flat[77] = np.nan
    found = largest(flat, count)
    keys = np.abs(flat)
    keys[np.isnan(keys)] = np.inf
    expected = np.sort(np.argsort(-keys, kind="stable")[:count])
    assert np.array_equal(found, expected)


# -- single methods


def test_dgc_is_the_papers_algorithm() -> None:
    """Oracle: algorithm 4 of the paper's appendix, written out in torch."""
    momentum, density = 0.9, 0.1
    compressor = dgc(density, momentum)
    states = states_of(compressor, (100,), 2)
    u, v = torch.zeros(2, 100), torch.zeros(2, 100)
    for step in range(20):
        g = torch.stack([gradient((100,), 10 * step + rank) for rank in range(2)])
        average, states = reduce_here(compressor, list(g), states)
        u = momentum * u + g
        v = v + u
        top = v.abs() >= v.abs().topk(10, dim=1).values[:, -1:]
        expected = torch.where(top, v, 0.0).mean(0)
        u, v = torch.where(top, 0.0, u), torch.where(top, 0.0, v)
        torch.testing.assert_close(average, expected)


def test_dgc_without_compression_is_sgd_with_momentum() -> None:
    compressor = MomentumCorrection(ErrorFeedback(Dense()), 0.9, nesterov=True, masking=False)
    states = states_of(compressor, (50,), 2)
    weight = torch.nn.Parameter(torch.ones(50))
    plain = torch.ones(50)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
    for step in range(6):
        gradients = [gradient((50,), 10 * step + rank) for rank in range(2)]
        average, states = reduce_here(compressor, gradients, states)
        plain = plain - 0.1 * average
        weight.grad = torch.stack(gradients).mean(0)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), plain)


def test_the_density_falls_in_the_warm_up() -> None:
    compressor = TopK(0.001, warmup_steps=4)
    state = compressor.init(torch.zeros(10_000))
    counts = []
    for step in range(6):
        message, state = compressor.compress(gradient((10_000,), step), state)
        counts.append(int(compressor.combine([message]).count_nonzero()))
    assert counts == [2500, 629, 159, 40, 10, 10]


def test_strom_sends_the_threshold_and_keeps_the_rest() -> None:
    compressor = ErrorFeedback(Threshold(1.0))
    states = states_of(compressor, (3,), 1)
    average, states = reduce_here(compressor, [torch.tensor([2.5, -1.0, 0.9])], states)
    assert average.tolist() == [1.0, -1.0, 0.0]
    torch.testing.assert_close(states[0]["residual"], torch.tensor([1.5, 0.0, 0.9]))


def test_a_majority_decides_and_a_tie_is_zero() -> None:
    gradients = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, -1.0, -0.1])]
    assert reduce_here(Sign(), gradients, [{}, {}])[0].tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("compressor", [PowerSGD(3), GradZip(3)], ids=["powersgd", "gradzip"])
def test_low_rank_finds_a_gradient_of_that_rank(compressor: Compressor) -> None:
    left, right = gradient((30, 3), 1), gradient((3, 20), 2)
    gradients = [left @ right, 2 * left @ right]
    states = states_of(compressor, (30, 20), 2)
    for _ in range(3):
        average, states = reduce_here(compressor, gradients, states)
    torch.testing.assert_close(average, 1.5 * left @ right, atol=1e-4, rtol=1e-4)


def test_powersgd_is_one_step_of_the_power_method_on_the_average() -> None:
    compressor = PowerSGD(2)
    gradients = [gradient((30, 20), rank) for rank in range(3)]
    states = states_of(compressor, (30, 20), 3)
    guess = states[0]["right"].double()
    average, _ = reduce_here(compressor, gradients, states)
    matrix = torch.stack(gradients).double().mean(0)
    left = torch.linalg.qr(matrix @ guess).Q
    torch.testing.assert_close(average.double(), left @ left.T @ matrix, atol=1e-5, rtol=1e-4)


def test_a_sketch_finds_the_largest_of_the_average_that_no_rank_has() -> None:
    compressor = CountSketch(0.002, rows=5, cells=0.02)
    gradients = [0.02 * gradient((5000,), rank) for rank in range(3)]
    for rank, g in enumerate(gradients):  # each rank sees something else; the sum is at 7
        g[7] += 4
        g[100 + rank] += 5 * (-1) ** rank
        g[100 + (rank + 1) % 3] -= 5 * (-1) ** rank
    average, _ = reduce_here(compressor, gradients, states_of(compressor, (5000,), 3))
    assert average.count_nonzero() <= 10
    mean = torch.stack(gradients).mean(0)
    torch.testing.assert_close(average[7], mean[7])


def test_delayed_sends_the_sum_of_what_came_meanwhile() -> None:
    compressor = Delayed(Dense(), 3)
    states = states_of(compressor, (4,), 2)
    averages = []
    for step in range(6):
        gradients = [torch.full((4,), float(step + rank)) for rank in range(2)]
        average, states = reduce_here(compressor, gradients, states)
        averages.append(average[0].item())
    assert averages == [0, 0, 0 + 1 + 2 + 1.5, 0, 0, 3 + 4 + 5 + 1.5]


def test_clip_shortens_and_keeps_the_direction() -> None:
    g = torch.tensor([3.0, 4.0])
    average, _ = reduce_here(Clip(Dense(), 1.0), [g], states_of(Clip(Dense(), 1.0), (2,), 1))
    torch.testing.assert_close(average, g / 5)


def test_random_elements_are_the_same_on_all_ranks_and_others_in_the_next_step() -> None:
    compressor = RandomK(0.1)
    states = states_of(compressor, (1000,), 2)
    chosen = []
    for _ in range(2):
        average, states = reduce_here(compressor, [torch.ones(1000)] * 2, states)
        assert average.count_nonzero() == 100
        chosen.append(average)
    assert not torch.equal(*chosen)


def test_random_rounding_differs_between_ranks_parameters_and_steps() -> None:
    compressor = Quantize(2, stochastic=True)
    g = gradient((1000,), 0)
    seen = []
    for number, rank in ((0, 0), (0, 1), (1, 0)):
        state = compressor.init(g, number, rank)
        for _ in range(2):
            message, state = compressor.compress(g, state)
            seen.append(message.payload)
    assert all(not torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))


# -- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopK(0), "density=0; it must be above 0"),
        (lambda: TopK(1.5), "at most 1"),
        (lambda: RandomK(-1), "density"),
        (lambda: TopK(0.1, "q3"), "unknown values='q3'; known: fp32"),
        (lambda: Threshold(0), "threshold=0"),
        (lambda: Quantize(3), "bits=3; known: 8, 4, 2, 1"),
        (lambda: Quantize(8, block=100), "multiple of 256"),
        (lambda: Quantize(1, stochastic=True), "hint: Ternary"),
        (lambda: QSGD(1), "bits=1"),
        (lambda: PowerSGD(0), "rank=0"),
        (lambda: CountSketch(0.1, rows=0), "rows=0"),
        (lambda: Dense("fp8"), "known: fp32, bf16, fp16"),
        (lambda: MomentumCorrection(Dense(), 1.0), "momentum=1.0"),
        (lambda: Delayed(Dense(), 0), "every=0"),
        (lambda: Clip(Dense(), 0), "max_norm=0"),
        (lambda: ErrorFeedback(Sign()), r"hint: Quantize\(bits=1\)"),
        (lambda: ErrorFeedback(QSGD()), "no contraction"),
        (lambda: ErrorFeedback(Quantize(4, stochastic=True)), "stochastic=False"),
        (lambda: ErrorFeedback(RandomK(0.1, rescaled=True)), "rescaled=False"),
        (lambda: compressor_of("topq:0.1"), "did you mean 'topk'"),
        (lambda: compressor_of("topk"), "needs a density: topk:..."),
        (lambda: compressor_of("q8:3"), "takes no number"),
        (lambda: compressor_of("topk:x"), "'x' is no density"),
        (lambda: compressor_of("topk:0.1+zip"), "'zip' is no word"),
        (lambda: compressor_of("q4+q2"), "'q2' is no word that goes with q4"),
        (lambda: compressor_of("sign+ans"), "entropy do not go with sign"),
        (lambda: compressor_of("topk:0.1+every:x"), "needs a number"),
        (lambda: compressor_of(3), "no compressor"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_reason(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()


def test_words_make_the_compositions_that_they_say() -> None:
    assert compressor_of("fp32") == Dense()
    assert compressor_of("topk:0.01+q2+noef") == TopK(0.01, "q2")
    assert compressor_of("q4+ans") == ErrorFeedback(Quantize(4, entropy=True))
    assert compressor_of("q4+stochastic") == Quantize(4, stochastic=True)
    assert compressor_of("dgc:0.001+warmup:50") == dgc(0.001, warmup_steps=50)
    wanted = "threshold:0.1+momentum:0.5+every:4"
    inner = MomentumCorrection(ErrorFeedback(Threshold(0.1)), 0.5)
    assert compressor_of(wanted) == Delayed(inner, 4)
