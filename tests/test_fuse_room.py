"""Fused kernels take less room than their calls: they write over what they read, in registers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from packlight.capture.dropout import use_eager_dropout
from packlight.costs.measure import FUSED_NAMESPACE, observe_call
from packlight.costs.profiler import CallProfiler
from packlight.kernels.kernel import direct_call
from packlight.moves.fuse import groups as fuse_groups
from packlight.moves.fuse import move as fuse_move
from packlight.moves.fuse.groups import Groups
from packlight.planner.smallest import smallest_schedules
from packlight.step import Phase, StepGraph, simulate
from tests.oracles.joint import Joint, joint_graph
from tests.test_fuse import assert_trains_like_eager, fitted, reading

SAMPLES, TOKENS, WIDTH, WIDE = 4, 16, 32, 96


@pytest.fixture(autouse=True)
def every_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a kernel takes says nothing here."""
    monkeypatch.setattr(fuse_groups, "MOST_SECONDS", float("inf"))


def both_graphs(joint: Joint) -> tuple[Groups, StepGraph, StepGraph]:
    """Return a step's groups, and the step call by call and in kernels."""
    with CallProfiler(progress=False) as profiler:
        read = reading(joint, profiler)
        groups = Groups(joint.module, read, is_exact=False)
        return groups, read(joint.module).graph, read(groups.module()).graph


def smallest_bytes(graph: StepGraph) -> int:
    return simulate(graph, smallest_schedules(graph)[0]).peak_bytes


def test_a_kernel_writes_over_what_it_reads_in_another_shape() -> None:
    """A linear layer's gradient comes as a matrix, its activation's has samples and tokens."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, requires_grad=True)
    first, second = (torch.randn(s, requires_grad=True) for s in ((WIDE, WIDTH), (WIDTH, WIDE)))
    bias = torch.randn(WIDE, requires_grad=True)
    joint = joint_graph(
        lambda x, a, b, c: F.linear(F.gelu(F.linear(x, a, b)), c).square().sum(),
        x, first, bias, second,
    )
    groups, _, graph = both_graphs(joint)
    backward = next(
        one for one in groups.kernels if any("gelu_backward" in n.name for n in one.members)
    )
    shapes = [tuple(value.shape) for value in backward.region.inputs]
    assert (SAMPLES * TOKENS, WIDE) in shapes
    assert tuple(backward.region.outputs[0].shape) == (SAMPLES, TOKENS, WIDE)
    (operation,) = [o for o in graph.operations if backward.name in o.name]
    assert operation.overwrites
    # Called so, it makes what it makes elsewhere, there.
    overload = groups.kernels[backward].overload
    inputs = [torch.randn(tuple(value.shape)) for value in backward.region.inputs]
    index = observe_call(overload, tuple(backward.region.inputs), {}).in_place
    assert index is not None
    expected, victim = overload(*inputs), inputs[index]
    found = direct_call(overload)(*inputs, out=victim)
    assert found[0].data_ptr() == victim.data_ptr()
    assert all(map(torch.equal, found, expected))
    for plain, mine in zip(joint.run(), joint.run(groups.module()), strict=True):
        if plain is not None:
            atol = 2e-6 * plain.abs().max().item()
            torch.testing.assert_close(mine, plain, rtol=0, atol=atol)


def test_attention_with_dropout_holds_its_scores_twice_and_not_thrice() -> None:
    torch.manual_seed(0)
    values = [torch.randn(SAMPLES, 2, 64, 8, requires_grad=True) for _ in range(3)]
    joint = joint_graph(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2).square().sum(),
        *values,
    )
    use_eager_dropout(joint.module)
    groups, plain, fused = both_graphs(joint)
    names = [[n.name for n in one.members] for one in groups.kernels]
    assert any("softmax" in one[0] and len(one) == 1 for one in names)  # needs no workspace now
    scores_bytes = 4 * SAMPLES * 2 * 64 * 64
    assert smallest_bytes(plain) > 3 * scores_bytes
    assert smallest_bytes(fused) < 2.75 * scores_bytes
    for eager, mine in zip(joint.run(), joint.run(groups.module()), strict=True):
        if eager is not None:
            atol = 2e-6 * eager.abs().max().item()
            torch.testing.assert_close(mine, eager, rtol=0, atol=atol)


def test_kernels_that_are_slower_than_their_calls_are_used_for_the_bytes_they_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves = ("update-in-backward", "fuse")
    monkeypatch.setattr(fuse_move.Fuse, "penalty", property(lambda self: 1e-3))
    plain, _ = fitted(moves=moves[:1])
    monkeypatch.setattr(fuse_groups, "MOST_SECONDS", 0.0)
    roomy, _ = fitted(moves=moves)
    assert "without fuse: no group of calls is faster in one kernel" in roomy.describe()
    tight, batch = fitted(int(0.9 * plain.peak_bytes), moves=moves)
    assert tight.way.moves[-1] == fuse_move.Fuse(left_out=())
    operations = tight.profile.graph.operations
    assert any(o.name.startswith(FUSED_NAMESPACE) for o in operations)
    assert {o.phase for o in operations} >= {Phase.FORWARD, Phase.BACKWARD}
    assert_trains_like_eager(tight, batch, is_exact=False)
