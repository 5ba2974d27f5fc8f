"""Calls taken apart before they are fused; fused steps in both doors; what they may take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import packlight
from packlight.backend import PacklightBackend, backend_from_options
from packlight.capture.dynamo import plain_errors
from packlight.costs.measure import FUSED_NAMESPACE
from packlight.costs.profiler import CallProfiler
from packlight.errors import OptionError
from packlight.moves.fuse import groups as fuse_groups
from packlight.moves.fuse import move as fuse_move
from packlight.moves.fuse.groups import Groups
from packlight.moves.fuse.partition import SPLIT_KEY
from packlight.search import forms
from packlight.step import Phase
from tests.oracles.joint import Joint, joint_graph
from tests.test_fuse import reading

ROWS, CLASSES = 64, 96


@pytest.fixture(autouse=True)
def every_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a kernel takes says nothing here."""
    monkeypatch.setattr(fuse_groups, "MOST_SECONDS", float("inf"))


def grouped(joint: Joint, **options: Any) -> Groups:
    with CallProfiler(progress=False) as profiler:
        return Groups(joint.module, reading(joint, profiler), is_exact=False, **options)


def assert_close(mine: Any, eager: Any) -> None:
    """Differ by rounding: by 2e-6 of the norm."""
    for a, b in zip(mine, eager, strict=True):
        if b is not None:
            assert a.shape == b.shape
            assert (a - b).double().norm() <= 2e-6 * b.double().norm()


def assert_as_near(mine: Any, eager: Any, exact: Any) -> None:
    """Differ from what has twice the digits by 2e-6 of its norm, or as much as eager's, thrice."""
    for a, b, c in zip(mine, eager, exact, strict=True):
        if c is not None:
            limit = max(2e-6 * c.double().norm(), 3 * (b - c).double().norm())
            assert a.dtype == b.dtype and (a - c).double().norm() <= limit


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
def test_cross_entropy_keeps_two_numbers_a_row_and_ignores_what_eager_ignores(
    reduction: str,
) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, CLASSES, (ROWS,))
    targets[::3] = -100
    values = torch.randn(ROWS, 32), torch.randn(CLASSES, 32)
    x, w = (v.requires_grad_() for v in values)
    joint = joint_graph(
        lambda x, w: F.cross_entropy(x @ w.t() * 20, targets, reduction=reduction), x, w
    )
    groups = grouped(joint)
    assert_close(joint.run(groups.module(), 0.7), joint.run(tangent=0.7))
    with CallProfiler(progress=False) as profiler:
        after = reading(joint, profiler)(groups.module()).graph
    square = 4 * ROWS * CLASSES
    made = [[after.buffers[b].bytes for b in o.creates if after.buffers[b].bytes >= square]
            for o in after.operations if o.name.startswith(FUSED_NAMESPACE)]
    assert [square] in made and [] in made  # a gradient, and no log-softmax
    # Its gradient is written where the scores were.
    fused = [o for o in after.operations if o.name.startswith(FUSED_NAMESPACE)]
    assert any(o.overwrites for o in fused if o.phase is Phase.BACKWARD)


class Images(nn.Module):
    """Convolutions, batch norms, a residual."""

    def __init__(self) -> None:
        super().__init__()
        # (A bias before a batch norm has a gradient of rounding errors alone.)
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        x = F.relu(x + self.norms[1](self.second(x)))
        return self.head(x.mean((2, 3)))


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch), torch.arange(len(batch)) % 4)


def fitted(model: nn.Module, batch: torch.Tensor, budget: Any, moves: Any) -> packlight.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return packlight.fit(model, loss_fn, optimizer, batch, budget, moves=moves, progress=False)


def test_a_batch_norm_is_statistics_and_a_pointwise_rest_that_takes_in_what_follows() -> None:
    torch.manual_seed(0)
    model, batch = Images(), torch.randn(4, 3, 16, 16)
    joint = joint_graph(lambda x: loss_fn(model, x), batch)
    groups = grouped(joint)
    in_double = copy.deepcopy(model).double()
    exact = joint_graph(lambda x: loss_fn(in_double, x), batch.double()).run(tangent=0.7)
    assert_as_near(joint.run(groups.module(), 0.7), joint.run(tangent=0.7), exact)
    graph = groups.step.graph
    forward = [
        one for one in groups.kernels
        if graph.operations[one.group.operations[0]].phase is Phase.FORWARD
    ]
    names = [[str(n.target).split(".")[1] for n in one.members] for one in forward]
    statistics = [one for one in names if "var_mean" in one]
    assert len(statistics) == 2 and not any("relu" in one for one in statistics)
    assert sum("relu" in one for one in names) == 2
    # Where such a kernel is left out, the batch norm is whole.
    left_out = {one.name for one, n in zip(forward, names, strict=True) if "var_mean" in n}
    whole = grouped(joint, left_out=left_out)
    assert not any(SPLIT_KEY in n.meta for n in whole.step.module.graph.nodes)


@pytest.mark.slow
def test_a_fused_convolutional_step_fits_to_the_byte_and_repeats_its_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuse_move.Fuse, "penalty", property(lambda self: 1e-3))
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 16, 16)
    moves = ("update-in-backward", "channels-last", "fuse")
    models = [Images()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    plain = fitted(models[0], batch, None, moves)
    tight = fitted(models[1], batch, int(0.9 * plain.peak_bytes), moves)
    assert [move.name for move in tight.way.moves][-1] == "fuse"
    assert tight.plan.num_reruns
    optimizer = torch.optim.SGD(models[2].parameters(), lr=0.1)
    for _ in range(2):
        losses = []
        for step in (plain, tight):
            measured = step.measured(batch)
            assert 0 <= step.peak_bytes - measured.peak_bytes <= 64  # as without kernels
            losses.append(measured.loss)
        assert torch.equal(*losses)
        eager = loss_fn(models[2], batch)
        optimizer.zero_grad()
        eager.backward()
        optimizer.step()
        torch.testing.assert_close(losses[0], eager.detach(), rtol=2e-6, atol=0)
    states = [list(model.state_dict().values()) for model in models]
    assert all(map(torch.equal, states[0], states[1]))  # gradients, and batch norms' statistics
    assert_close(states[0], states[2])


# -- in the backend


class Blocks(nn.Module):
    """Pointwise chains between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.relu(layer(x) * 2 + 1) * 0.5
        return x


def test_the_backend_fuses_what_it_is_asked_to_and_recomputes_with_equal_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms, "ROUNDING_MARGIN", 1e-3)  # fused steps win
    torch.manual_seed(0)
    net, batch = Blocks(), torch.randn(64, 96)
    peaks, gradients = [], []
    for choose in (None, lambda graph: int(0.9 * peaks[0])):
        torch._dynamo.reset()
        backend = PacklightBackend(moves=("fuse",), choose_budget=choose, progress=False)
        step = torch.compile(net, backend=backend, fullgraph=True)
        net.zero_grad()
        step(batch).square().mean().backward()
        (compilation,) = backend.compilations
        assert any(o.name.startswith(FUSED_NAMESPACE) for o in compilation.graph.operations)
        peaks.append(compilation.plan.peak_bytes)
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert peaks[1] < peaks[0]
    assert all(map(torch.equal, *gradients))
    net.zero_grad()
    net(batch).square().mean().backward()
    assert_close(gradients[0], [p.grad for p in net.parameters()])


def test_moves_that_the_backend_does_not_make_on_request_are_named() -> None:
    with pytest.raises(OptionError, match="'microbatch' is no move.*\n.*'fuse-exactly'"):
        backend_from_options({"moves": ["microbatch"]})


def test_the_backend_says_that_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_move, "compiler_problem", lambda device: "no g++ was found")
    torch._dynamo.reset()
    backend = PacklightBackend(moves=("fuse",), progress=False)
    with pytest.raises(OptionError, match="'fuse': nothing can be.*no g"), plain_errors():
        torch.compile(Blocks(), backend=backend, fullgraph=True)(torch.randn(64, 96))


# -- what is expected of kernels


def test_a_kernels_time_in_a_step_is_expected_to_be_its_share_of_its_calls_times() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, ROWS), torch.randn(ROWS, ROWS, requires_grad=True)
    joint = joint_graph(lambda x, y: (F.relu(x @ y + 1) * 2).sum(), x, y)
    with CallProfiler(progress=False) as profiler:
        read = reading(joint, profiler)
        plain = read(joint.module)
        for index, facts in enumerate(plain.facts):
            if facts is not None:
                profiler.note_in_step(*plain.call(index), 1.0)
        groups = Groups(joint.module, read, is_exact=False)
        groups._shares = lambda family: [0.25] * len(family)  # type: ignore[method-assign]
        groups.tell_expected(profiler)
        for family in groups._families():
            for graph in family:
                expected = profiler.estimated_in_step(groups.kernels[graph].overload, 100.0)
                assert expected == pytest.approx(0.25 * len(groups._calls(family)))
    assert groups.kernels


def test_what_a_kernel_makes_again_is_no_call_that_it_saves() -> None:
    """The forward runs the activation, too: beside the kernel stand only its other calls."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, ROWS, requires_grad=True), torch.randn(ROWS, ROWS)

    def squashed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.tanh((x @ y).bfloat16().float()) @ y).square().sum()

    joint = joint_graph(squashed, x, y)
    groups = grouped(joint)
    plain = groups._plain
    for family in groups._families():
        beside = {plain.node_of_operation[o].name for o in groups._calls(family)}
        assert beside.isdisjoint(groups._running())
    everything = pytree.tree_leaves([groups._calls(f) for f in groups._families()])
    assert len(everything) == len(set(everything))  # no call stands beside two families
