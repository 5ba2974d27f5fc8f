"""Masks as bits and indices as small integers: the same bits in gradients, fewer bytes kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.capture.read_joint import read_joint_graph
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError
from packlight.moves.pack import Pack, pack_bits, unpack_bits, with_packed_buffers
from packlight.planner.plain import plain_schedule
from packlight.search.search import Search
from packlight.step import StepGraph, simulate
from tests.oracles.joint import Joint, joint_graph

SIDE = 32


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9, 3), (5, 64, 33)])
def test_bits_are_unpacked_into_what_was_packed(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_bits(mask)
    assert packed.nbytes == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape, mask.stride()), mask)


def test_bits_keep_another_order_of_dims() -> None:
    mask = (torch.rand(2, 5, 8, 9) < 0.5).to(memory_format=torch.channels_last)
    unpacked = unpack_bits(pack_bits(mask), mask.shape, mask.stride())
    assert unpacked.stride() == mask.stride() and torch.equal(unpacked, mask)


def convolutions(pool: Callable[..., torch.Tensor]) -> Joint:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return second(pool(F.relu(first(images)))).square().mean()

    return joint_graph(loss, torch.randn(4, 3, SIDE, SIDE))


def dropped(width: int = 64) -> Joint:
    torch.manual_seed(0)
    first, second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (F.dropout(second(F.dropout(first(rows), 0.3)), 0.1) + rows).square().mean()

    return joint_graph(loss, torch.randn(128, width))


def step_graph(joint: Joint, packed: bool) -> StepGraph:
    module = with_packed_buffers(joint.module) if packed else joint.module
    with CallProfiler(progress=False) as profiler:
        return read_joint_graph(module, joint.num_forward_outputs, profiler.measure).graph


def kept_bytes(graph: StepGraph) -> int:
    """Bytes that cross from the forward to the backward."""
    made = {b for o in graph.operations[: graph.num_forward] for b in o.creates}
    read = {b for o in graph.operations[graph.num_forward :] for b in o.reads}
    return sum(graph.buffers[b].bytes for b in made & read)


CASES = {
    "max pool": lambda: convolutions(lambda x: F.max_pool2d(x, 2)),
    "overlapping max pool": lambda: convolutions(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "adaptive max pool": lambda: convolutions(lambda x: F.adaptive_max_pool2d(x, 16)),
    "relu and a sum": lambda: convolutions(lambda x: x + x.mean()),
    "dropout": dropped,
}


@pytest.mark.parametrize("case", CASES)
def test_packed_steps_have_the_same_bits(case: str) -> None:
    joint = CASES[case]()
    packed = with_packed_buffers(joint.module)
    assert packed is not joint.module
    for plain, mine in zip(joint.run(), joint.run(packed), strict=True):
        assert plain is mine is None or torch.equal(plain, mine)


@pytest.mark.parametrize("case", CASES)
def test_packed_steps_keep_fewer_bytes_for_the_backward(case: str) -> None:
    joint = CASES[case]()
    plain, packed = step_graph(joint, packed=False), step_graph(joint, packed=True)
    assert kept_bytes(packed) < kept_bytes(plain)
    peaks = [simulate(g, plain_schedule(g)).peak_bytes for g in (plain, packed)]
    assert peaks[1] <= peaks[0]


def test_what_is_kept_is_counted_by_hand() -> None:
    """A pool over a rectified 30 x 30 plane: bits, 2-byte indices, the pooled plane and images."""
    joint = CASES["max pool"]()
    images, rectified, pooled = 4 * 3 * SIDE**2, 4 * 8 * 30**2, 4 * 8 * 15**2
    in_gradient = 4 * 8 * 13**2  # of square()
    packed = step_graph(joint, packed=True)
    assert kept_bytes(packed) == rectified // 8 + 2 * pooled + 4 * pooled + 4 * in_gradient
    assert images > 0


def test_a_rectified_value_that_a_convolution_reads_stays_whole() -> None:
    joint = convolutions(lambda x: x)
    assert with_packed_buffers(joint.module) is joint.module


def test_not_a_number_passes_a_packed_relu_as_it_passes_relu() -> None:
    joint = CASES["relu and a sum"]()
    with torch.no_grad():
        joint.primals[0].view(-1)[0] = float("nan")
    packed = with_packed_buffers(joint.module)
    for plain, mine in zip(joint.run(), joint.run(packed), strict=True):
        if plain is not None:
            torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)


def dropout_net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 64))
        for _ in range(6)
    ]
    return nn.Sequential(*layers), torch.randn(256, 64)


@pytest.mark.parametrize("share", [0.95, 0.6])
def test_a_packed_step_keeps_to_its_budget_and_to_every_bit(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether packing is faster than drawing masks again is the machine's business.
    look_at = Search._try
    monkeypatch.setattr(
        Search, "_try", lambda self, moves, found: Pack() in moves and look_at(self, moves, found)
    )
    model, batch = dropout_net()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    options = {"moves": packlight.EXACT_MOVES, "progress": False}
    plain = packlight.fit(model, loss_fn, optimizers[0], batch, budget="1GiB", **options)
    budget = int(share * plain.way.peak_bytes)
    step = packlight.fit(model, loss_fn, optimizers[0], batch, budget=budget, **options)
    resident_bytes = batch.nbytes + sum(p.nbytes for p in model.parameters())
    assert "masks and indices packed" in step.describe()
    for seed in range(2):
        torch.manual_seed(seed)
        measured = packlight.measure_peak(lambda: step(batch))
        assert measured.peak_bytes + resident_bytes <= budget
        torch.manual_seed(seed)
        optimizers[1].zero_grad()
        loss_fn(twin, batch).backward()
        optimizers[1].step()
    for mine, eager in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, eager)


def test_moves_say_whether_anything_may_be_packed() -> None:
    model, batch = dropout_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InfeasibleBudgetError, match="without pack: not among the moves"):
        packlight.fit(
            model, lambda m, b: m(b).square().mean(), optimizer, batch, budget=1,
            moves=("update-in-backward",), progress=False,
        )
