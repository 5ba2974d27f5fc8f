"""Layers with sparse weights compute what dense layers with masked weights do, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from packlight.errors import SparsePatternError, SparseTensorError
from packlight.sparse import pattern
from packlight.sparse.layers import LAYERS
from packlight.sparse.sampling import is_in, sample_distinct, sample_free
from packlight.sparse.weight import SparseWeight

pytest.importorskip("numba", reason="sparse kernels need the extra 'sparse'")

CASES: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(37, 11), (5, 37)),
    (lambda: nn.Linear(600, 9, bias=False), (3, 4, 600)),
    (lambda: nn.Linear(1100, 40), (130, 1100)),  # several groups of blocks, several tiles
    (lambda: nn.Conv2d(6, 8, 3, padding=1), (5, 6, 9, 7)),
    (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (3, 6, 9, 8)),
    (lambda: nn.Conv2d(4, 6, 1, stride=2), (3, 4, 7, 7)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=(3, 2), padding=(0, 1), dilation=(2, 3)),
     (2, 4, 13, 12)),
    (lambda: nn.Conv2d(6, 9, 3, padding=2, groups=3), (2, 6, 6, 6)),
    (lambda: nn.Conv2d(4, 4, 4, padding="same"), (2, 4, 6, 5)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    (lambda: nn.Conv1d(5, 7, 4, stride=3, padding=2), (3, 5, 17)),
    (lambda: nn.Conv2d(2, 3, 3), (2, 2, 70, 60)),
]


def sparse_pair(dense: nn.Module, density: float = 0.3) -> tuple[nn.Module, nn.Module]:
    """Return a sparse layer, and the dense one in float64 with the other elements zeroed."""
    weight = dense.weight
    positions = sample_distinct(round(density * weight.numel()), weight.numel())
    layer = LAYERS[type(dense)].of_dense(dense, SparseWeight.of_dense(weight, positions))
    oracle = layer.to_dense().double()
    return layer, oracle


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
def test_layers_equal_masked_dense_layers_in_float64() -> None:
    for make, shape in CASES:
        torch.manual_seed(0)
        layer, oracle = sparse_pair(make())
        x = torch.randn(shape, requires_grad=True)
        wide = x.detach().double().requires_grad_()
        out, expected = layer(x), oracle(wide)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(out)
        out.backward(dy)
        expected.backward(dy.double())
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
        at_pattern = oracle.weight.grad.reshape(-1)[layer.weight.positions()]
        torch.testing.assert_close(
            layer.weight.values.grad.double(), at_pattern, rtol=1e-5, atol=1e-4
        )
        if layer.bias is not None:
            torch.testing.assert_close(
                layer.bias.grad.double(), oracle.bias.grad, rtol=1e-5, atol=1e-4
            )


@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings_equal_masked_dense_embeddings(padding: int | None) -> None:
    layer, oracle = sparse_pair(nn.Embedding(20, 300, padding_idx=padding))
    rows = torch.randint(20, (4, 6))
    rows[0, :2] = 3
    dy = torch.randn(4, 6, 300)
    assert torch.equal(layer(rows).double(), oracle(rows))
    layer(rows).backward(dy)
    oracle(rows).backward(dy.double())
    expected = oracle.weight.grad.reshape(-1)[layer.weight.positions()]
    torch.testing.assert_close(layer.weight.values.grad.double(), expected)


def test_the_number_of_threads_changes_no_bit() -> None:
    layer, _ = sparse_pair(nn.Conv2d(32, 48, 3, padding=1))
    x = torch.randn(8, 32, 16, 16, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = layer(x)
            results.append([out, *torch.autograd.grad(out.sum(), [x, layer.weight.values])])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_low_precision_is_summed_in_float32() -> None:
    layer, oracle = sparse_pair(nn.Conv2d(16, 8, 3, padding=1))
    layer.bfloat16()
    assert layer.weight.index.dtype == torch.uint8
    x = torch.randn(2, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    expected = layer.to_dense().float()(x.float())
    out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.bfloat16().float(), rtol=8e-3, atol=1e-3)
    out.float().square().sum().backward()
    assert layer.weight.values.grad.dtype == torch.bfloat16


# In torch 2.15 opcheck itself looks at gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_keep_the_rules_of_the_dispatcher() -> None:
    layer, _ = sparse_pair(nn.Conv2d(4, 6, 3, stride=2, padding=1))
    weight = layer.weight
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    arguments = (x, weight.values, weight.index, layer.bias, list(weight.shape), [2, 2], [1, 1])
    torch.library.opcheck(torch.ops.packlight_sparse.product.default, (*arguments, [1, 1], 1))
    rows = torch.randint(6, (3,))
    shape = [6, 36]
    arguments = (rows, weight.values, weight.index, shape, -1)
    torch.library.opcheck(torch.ops.packlight_sparse.look_up.default, arguments)


def test_no_buffer_is_as_large_as_the_dense_weight() -> None:
    import packlight

    layer = LAYERS[nn.Linear](2048, 2048, density=0.05)
    x = torch.randn(16, 2048, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    step()
    layer.weight.values.grad = x.grad = None
    peak = packlight.measure_peak(step).peak_bytes
    assert peak < 0.15 * 4 * 2048 * 2048


def test_indices_take_a_byte_for_each_nonzero_and_one_for_each_block() -> None:
    positions = sample_distinct(100_000, 1000 * 1000)
    index = pattern.encode(positions, (1000, 1000))
    assert len(index) == 100_000 + 1000 * 4
    assert torch.equal(pattern.decode(index, (1000, 1000)), positions)
    full = pattern.encode(torch.arange(2 * 510), (2, 510))
    assert torch.equal(pattern.decode(full, (2, 510)), torch.arange(1020))


def test_free_places_are_all_equally_likely() -> None:
    taken = torch.tensor([0, 3, 4, 9])
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(10)
    for _ in range(3000):
        drawn = sample_free(3, taken, 10, generator)
        assert len(drawn.unique()) == 3 and not is_in(drawn, taken).any()
        seen[drawn] += 1
    free = seen[[1, 2, 5, 6, 7, 8]]
    assert seen[taken].sum() == 0
    assert (free - 1500).abs().max() < 5 * (3000 * 0.25) ** 0.5


def test_patterns_that_do_not_fit_are_refused() -> None:
    weight = SparseWeight(torch.ones(4), torch.tensor([0, 5, 6, 11]), (3, 4))
    for index, problem in [
        (weight.index[:-1], "6 bytes"),
        (weight.index.int(), "int32"),
        (torch.tensor([1, 2, 2, 0, 1, 2, 3], dtype=torch.uint8), "count 5"),
        (torch.tensor([1, 2, 1, 0, 2, 1, 3], dtype=torch.uint8), "ascend"),
        (torch.tensor([1, 2, 1, 0, 1, 2, 4], dtype=torch.uint8), "behind the last of 4"),
    ]:
        state = {**weight.state_dict(), "index": index}
        with pytest.raises(SparsePatternError, match=problem):
            weight.load_state_dict(state)
    assert weight.positions().tolist() == [0, 5, 6, 11]


def test_tensors_that_kernels_do_not_take_are_refused() -> None:
    layer, _ = sparse_pair(nn.Linear(8, 8))
    with pytest.raises(SparseTensorError, match="float64"):
        layer(torch.randn(2, 8, dtype=torch.float64))
    with pytest.raises(SparseTensorError, match=r"takes 2 dimensions, of which the second has 8"):
        layer(torch.randn(2, 9))
    embedding, _ = sparse_pair(nn.Embedding(5, 8))
    with pytest.raises(SparseTensorError, match="rows from 1 to 5 of an embedding with 5"):
        embedding(torch.tensor([1, 5]))
