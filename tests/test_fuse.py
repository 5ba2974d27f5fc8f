"""Steps in fused kernels compute what eager PyTorch does, in fewer operations, within plans."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.capture.dropout import use_eager_dropout
from packlight.capture.read_joint import Read, read_joint_graph
from packlight.cli import options
from packlight.costs.measure import FUSED_NAMESPACE
from packlight.costs.profiler import CallProfiler
from packlight.errors import WayError
from packlight.kernels import kernel as kernels
from packlight.moves.fuse import groups as fuse_groups
from packlight.moves.fuse import move as fuse_move
from packlight.moves.fuse.groups import Groups
from packlight.moves.fuse.reread import REREAD_KEY
from packlight.step import Action, Phase
from tests.oracles.joint import Joint, joint_graph

ROWS, WIDTH = 64, 96


@pytest.fixture(autouse=True)
def every_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a kernel takes says nothing here."""
    monkeypatch.setattr(fuse_groups, "MOST_SECONDS", float("inf"))


def grouped(joint: Joint, *, is_exact: bool) -> Groups:
    with CallProfiler(progress=False) as profiler:
        return Groups(joint.module, reading(joint, profiler), is_exact=is_exact)


def reading(joint: Joint, profiler: CallProfiler) -> Read:
    count = joint.num_forward_outputs
    return partial(read_joint_graph, num_forward_outputs=count, measure=profiler.measure)


def joint_of(loss_fn: Callable[..., torch.Tensor], *shape: int) -> Joint:
    torch.manual_seed(0)
    values = torch.randn(shape, requires_grad=True)
    return joint_graph(loss_fn, values, torch.randn(shape, requires_grad=True))


def residual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pointwise calls, one of them transposed, and a value that two calls read."""
    z = x * 0.5 + y.transpose(0, 1)
    return (F.relu(z) * z + x).transpose(0, 1).contiguous().square().sum()


def normed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A norm, a softmax and a loss, with what is read next to them."""
    hidden = F.layer_norm(x + y, x.shape[-1:]) * y
    return F.cross_entropy((F.softmax(hidden, -1) * 3 + x) @ y.t(), torch.arange(len(x)))


def test_pointwise_groups_keep_every_bit() -> None:
    joint = joint_of(residual, ROWS, ROWS)
    groups = grouped(joint, is_exact=True)
    assert not groups.not_worth_it()
    module = groups.module()
    fused = [n for n in module.graph.nodes if str(n.target).startswith(FUSED_NAMESPACE)]
    assert fused
    for plain, mine in zip(joint.run(), joint.run(module), strict=True):
        assert plain is mine is None or torch.equal(plain, mine)
        assert plain is None or plain.stride() == mine.stride()


def test_groups_with_sums_differ_by_rounding_and_make_less() -> None:
    joint = joint_of(normed, ROWS, WIDTH)
    groups = grouped(joint, is_exact=False)
    module = groups.module()
    for plain, mine in zip(joint.run(tangent=0.7), joint.run(module, 0.7), strict=True):
        if plain is not None:
            assert mine.stride() == plain.stride()
            atol = 2e-6 * plain.abs().max().item()
            torch.testing.assert_close(mine, plain, rtol=0, atol=atol)
    with CallProfiler(progress=False) as profiler:
        after = read_joint_graph(module, joint.num_forward_outputs, profiler.measure).graph
    before = groups.step.graph
    assert len(after.operations) < len(before.operations)
    made = [
        sum(graph.buffers[b].bytes for o in graph.operations for b in o.creates)
        for graph in (before, after)
    ]
    saved = sum(graph.group.saved_bytes for graph in groups.kernels)
    assert saved > 4 * ROWS * WIDTH * 4 and made[1] == made[0] - saved
    # A kernel that writes into what it reads is one whose result was seen to stay the same.
    assert any(o.overwrites for o in after.operations if o.name.startswith(FUSED_NAMESPACE))


def test_a_backward_makes_again_what_it_reads_of_the_forward() -> None:
    """Its kernel reads 16-bit scores; their log-softmax in float32 is not kept for it."""

    def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = x.bfloat16() @ y.bfloat16().t()
        return F.cross_entropy(scores.float(), torch.arange(len(x)))

    joint = joint_of(loss_fn, ROWS, WIDTH)
    groups = grouped(joint, is_exact=False)
    with CallProfiler(progress=False) as profiler:
        after = read_joint_graph(
            groups.module(), joint.num_forward_outputs, profiler.measure
        ).graph
    made = {b for o in after.operations[: after.num_forward] for b in o.creates}
    read = {b for o in after.operations[after.num_forward :] for b in o.reads}
    squares = [after.buffers[b].bytes for b in made & read]
    assert 2 * ROWS * ROWS in squares and 4 * ROWS * ROWS not in squares
    for plain, mine in zip(joint.run(), joint.run(groups.module()), strict=True):
        if plain is not None:
            torch.testing.assert_close(mine, plain, rtol=2e-2, atol=1e-4)
    # Where that kernel is left out, what it reads is made once, as ever.
    names = [graph.name for graph in groups.kernels if len(graph.members) > 3]
    with CallProfiler(progress=False) as profiler:
        without = Groups(
            joint.module, reading(joint, profiler), is_exact=False, left_out=names
        )
    assert not any(REREAD_KEY in node.meta for node in without.module().graph.nodes)


def test_dropout_draws_eagers_masks_and_its_product_is_fused() -> None:
    def dropped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (F.dropout(x, 0.3) + y).square().sum()

    joint = joint_of(dropped, ROWS, WIDTH)
    use_eager_dropout(joint.module)
    groups = grouped(joint, is_exact=True)
    fused = [str(n.target) for graph in groups.kernels for n in graph.members]
    assert fused.count("packlight.dropout_backward.default") == 2  # the forward's product, too
    for plain, mine in zip(joint.run(), joint.run(groups.module()), strict=True):
        assert plain is mine is None or torch.equal(plain, mine)


def test_groups_are_closed_and_have_one_large_result_in_the_forward() -> None:
    groups = grouped(joint_of(normed, ROWS, WIDTH), is_exact=False)
    graph = groups.step.graph
    for one in groups.kernels:
        inside = set(one.group.operations)
        phases = {graph.operations[o].phase for o in inside}
        assert len(phases) == 1
        large = [b for b in one.group.outputs if graph.buffers[b].bytes >= ROWS * WIDTH]
        assert len(large) <= 1 or phases == {Phase.BACKWARD}
        # No path leaves the group and comes back: what it reads needs nothing that it makes.
        made = {b for o in inside for b in graph.operations[o].creates}
        downstream = set(made)
        for operation in graph.operations:
            if operation.id not in inside and downstream & set(operation.reads):
                downstream |= set(operation.creates)
        for o in inside:
            assert not (downstream - made) & set(graph.operations[o].reads)


def test_no_more_kernels_are_compiled_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_groups, "MOST_KERNELS", 1)
    groups = grouped(joint_of(normed, ROWS, WIDTH), is_exact=False)
    assert len({graph.name for graph in groups.kernels}) == 1
    assert "no more than 1 kernels are compiled" in groups.failures


# -- in fit


class Net(nn.Module):
    """Blocks of a norm, a wide layer and an activation, each twice: equal layers share kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, wide in zip(self.norms, self.wide, strict=True):
            x = x + torch.sigmoid(wide(F.relu(norm(x) * 2 + 1)))
        return x


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def fitted(budget: Any = None, **options: Any) -> tuple[packlight.TrainStep, torch.Tensor]:
    torch.manual_seed(0)
    model, batch = Net(), torch.randn(ROWS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return packlight.fit(model, loss_fn, optimizer, batch, budget, progress=False, **options), batch


@pytest.fixture
def fusing_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes fused kernels wherever a plan with them fits."""
    for move in (fuse_move.Fuse, fuse_move.FuseExactly):
        monkeypatch.setattr(move, "penalty", property(lambda self: 1e-3))


def assert_trains_like_eager(
    step: packlight.TrainStep, batch: torch.Tensor, *, is_exact: bool
) -> None:
    eager = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    for _ in range(2):
        measured = step.measured(batch)
        loss = loss_fn(eager, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert measured.peak_bytes <= step.peak_bytes
        torch.testing.assert_close(measured.loss, loss.detach(), rtol=2e-6, atol=0)
        if is_exact:
            assert torch.equal(measured.loss, loss.detach())
    for mine, other in zip(step.model.parameters(), eager.parameters(), strict=True):
        atol = 0 if is_exact else 2e-6 * other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["fuse", pytest.param("fuse-exactly", marks=pytest.mark.slow)])
def test_a_fused_step_trains_like_eager_and_is_described_saved_and_loaded(
    fusing_wins: None, tmp_path: Path, name: str
) -> None:
    moves = (*packlight.MOVES, name)
    step, batch = fitted(moves=moves)
    assert [move.name for move in step.way.moves][-1] == name
    assert step.way.is_bit_exact is (name == "fuse-exactly")
    assert " calls fused to " in step.describe() and "compiled once in" in step.describe()
    assert_trains_like_eager(step, batch, is_exact=name == "fuse-exactly")
    step.save_way(tmp_path / "way.json")
    again, _ = fitted(moves=moves, way=tmp_path / "way.json")
    assert again.way.moves == step.way.moves
    assert again.plan.schedule == step.plan.schedule


@pytest.mark.slow
def test_recomputed_kernels_return_the_bits_of_their_first_run(fusing_wins: None) -> None:
    moves = ("update-in-backward", "fuse")
    plain, batch = fitted(moves=moves)
    losses = [float(plain(batch)) for _ in range(2)]
    step, _ = fitted(int(0.9 * plain.peak_bytes), moves=moves)
    assert any(name.startswith(FUSED_NAMESPACE) for name in rerun_names(step))
    for loss in losses:
        measured = step.measured(batch)
        assert 0 <= step.peak_bytes - measured.peak_bytes <= 64  # as without kernels
        assert float(measured.loss) == loss
    assert all(map(torch.equal, step.model.parameters(), plain.model.parameters()))


def rerun_names(step: packlight.TrainStep) -> list[str]:
    operations = step.profile.graph.operations
    runs = [i.target for i in step.plan.schedule.instructions if i.action is Action.RUN]
    return [operations[o].name for o in set(runs) if runs.count(o) > 1]


def test_nothing_is_fused_unless_it_is_asked_for() -> None:
    assert not {"fuse", "fuse-exactly"} & {*packlight.MOVES, *packlight.EXACT_MOVES}
    step, _ = fitted()
    assert "fuse" not in step.describe()


def test_the_command_line_names_it() -> None:
    for is_exact, name in ((False, "fuse"), (True, "fuse-exactly")):
        names = options.moves(argparse.Namespace(exact=is_exact, fuse=True))
        assert names == (*(packlight.EXACT_MOVES if is_exact else packlight.MOVES), name)


# -- what cannot be compiled


def test_without_a_compiler_the_step_runs_unfused_and_says_why(
    monkeypatch: pytest.MonkeyPatch, fusing_wins: None, tmp_path: Path
) -> None:
    step, batch = fitted(moves=("fuse",))
    step.save_way(tmp_path / "way.json")
    monkeypatch.setattr(fuse_move, "compiler_problem", lambda device: "no g++ was found")
    plain, batch = fitted(moves=("fuse",))
    assert "without fuse: nothing can be compiled here: no g++ was found" in plain.describe()
    assert_trains_like_eager(plain, batch, is_exact=True)
    with pytest.raises(WayError, match="no g\\+\\+ was found"):
        fitted(moves=("fuse",), way=tmp_path / "way.json")


@pytest.fixture
def no_kernels_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels that the process has are forgotten, and none are on disk."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_kernels", {})
    yield


def test_groups_that_do_not_compile_run_call_by_call_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch, no_kernels_yet: None, fusing_wins: None
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise SyntaxError("unexpected kernel")

    monkeypatch.setattr(kernels, "compiled_source", fail)
    step, batch = fitted(moves=("fuse",))
    assert "do not compile: SyntaxError: unexpected kernel" in step.describe()
    assert_trains_like_eager(step, batch, is_exact=True)


def test_a_cache_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, no_kernels_yet: None, tmp_path: Path
) -> None:
    (tmp_path / "kernels").write_text("a file where a directory should be")
    monkeypatch.setattr(kernels, "compiled_source", lambda *_, **__: "def call(args): args.clear()")
    joint = joint_of(lambda x, y: (x + y).exp().sum(), ROWS, WIDTH)
    assert grouped(joint, is_exact=False).kernels
    assert os.path.isfile(tmp_path / "kernels")
