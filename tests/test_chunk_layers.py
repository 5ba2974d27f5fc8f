"""MLPs and attention in row chunks compute what whole ones compute, with a part of their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError
from packlight.moves.chunk.move import Chunk
from packlight.moves.chunk.rewrite import Kind, chunked, find_heads, find_row_groups
from packlight.planner.plan import smallest_peak_bytes
from packlight.step import Phase
from tests.models import make
from tests.oracles.eager_loop import assert_close as assert_close_training
from tests.oracles.eager_loop import twins
from tests.oracles.joint import Joint, joint_graph
from tests.test_chunk import assert_close, peak_bytes, read

WIDTH, MLP_WIDTH = 8, 48


class Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, MLP_WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, MLP_WIDTH, bias=False)
        self.down = nn.Linear(MLP_WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Squared(nn.Module):
    """ReLU squared, and a norm of the hidden layer of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, MLP_WIDTH), nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up(x)).square()
        return self.down(hidden / (1 + hidden.sum(-1, keepdim=True)))


def plain(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, MLP_WIDTH), activation, nn.Linear(MLP_WIDTH, WIDTH))


class Residual(nn.Module):
    """Layers, each with a norm before it.

    A constant tells rows apart, and they meet in the end: else the last layer were a loss head.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return (x * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().square()


MLPS: dict[str, Any] = {
    "gelu": lambda: plain(nn.GELU()),
    "tanh gelu": lambda: plain(nn.GELU(approximate="tanh")),
    "relu": lambda: plain(nn.ReLU()),
    "silu": lambda: plain(nn.SiLU()),
    "gated": Gated,
    "squared": Squared,
}


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def float64_step(*layers: nn.Module, shape: tuple[int, ...] = (5, 4)) -> Joint:
    model = Residual(*layers).double()
    return joint_graph(loss_of, model, torch.randn(*shape, WIDTH, dtype=torch.float64))


def groups_of(joint: Joint) -> list[Any]:
    return find_row_groups(joint.module, joint.num_forward_outputs)


def assert_same_step(joint: Joint, chunks: tuple[int, ...], tolerance: float) -> None:
    expected = joint.run(tangent=0.7)
    for num_chunks in chunks:
        rewritten = chunked(joint.module, groups_of(joint), num_chunks)
        assert_close(joint.run(rewritten, 0.7), expected, tolerance)


# -- what is computed


@pytest.mark.parametrize("name", MLPS)
def test_mlps_in_chunks_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    joint = float64_step(MLPS[name](), MLPS[name]())
    groups = groups_of(joint)
    assert [(g.kind, g.rows, len(g.runs)) for g in groups] == [(Kind.MLP, 20, 2)] * 2
    more_than_rows = 100
    assert_same_step(joint, (2, 7, more_than_rows), 1e-14)


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model, x = Residual(Gated(), plain(nn.GELU())).double(), torch.randn(6, WIDTH).double()
    joint = joint_graph(loss_of, model, x)
    results = joint.run(chunked(joint.module, groups_of(joint), 3))
    loss_of(model, x).backward()
    gradients = zip(joint.primals, results[joint.num_forward_outputs :], strict=True)
    mine = {primal.data_ptr(): gradient for primal, gradient in gradients}
    for parameter in model.parameters():
        gradient = mine[parameter.data_ptr()]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-13)


def test_frozen_weights_have_a_forward_in_chunks_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    model = Residual(plain(nn.GELU()), plain(nn.GELU())).double()
    model.layers.requires_grad_(False)
    joint = joint_graph(loss_of, model, torch.randn(6, WIDTH).double())
    first = next(g for g in groups_of(joint) if g.name == "layers.0.0")
    assert len(first.runs) == 2, "the norm before it gets gradients through it"
    assert_same_step(joint, (3,), 1e-14)


def test_sums_of_bfloat16_layers_are_kept_in_float32() -> None:
    torch.manual_seed(0)
    model, x = Residual(Gated(), plain(nn.GELU())), torch.randn(16, 4, WIDTH)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    joint = joint_graph(loss_fn, model, x)
    assert len(groups_of(joint)) == 2
    assert_same_step(joint, (4,), 2**-7)
    rewritten = chunked(joint.module, groups_of(joint), 4)
    sums = [n for n in rewritten.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    weights = [n for n in sums if sorted(n.meta["val"].shape) == [WIDTH, MLP_WIDTH]]
    assert weights and all(n.meta["val"].dtype == torch.float32 for n in weights)


@pytest.mark.parametrize(
    "family, sizes, num_groups",
    [
        ("gpt2", {"layers": 2}, 2),
        ("t5", {"layers": 1}, 2),
        ("vit", {}, 3),
        ("convnext", {}, 8),
        ("llama", {}, 3),
    ],
)
def test_layers_of_models(family: str, sizes: dict[str, int], num_groups: int) -> None:
    model, batch, loss_fn = make(family, **sizes)
    model.eval()  # dropout within an MLP keeps it whole
    joint = joint_graph(loss_fn, model, batch)
    groups = groups_of(joint)
    assert [g.kind for g in groups] == [Kind.MLP] * num_groups
    assert_same_step(joint, (3,), 1e-5)


def eager_attention(batch_size: int) -> Joint:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, vocab_size=32, use_cache=False, attn_implementation="eager",
    )
    tokens = torch.randint(0, 32, (batch_size, 64))
    model = LlamaForCausalLM(config)
    return joint_graph(lambda m, t: m(input_ids=t, labels=t).loss, model, tokens)


@pytest.mark.parametrize("batch_size, rows", [(1, 4), (6, 6)])
def test_attention_whose_scores_are_computed_runs_by_heads_or_sequences(
    batch_size: int, rows: int
) -> None:
    joint = eager_attention(batch_size)
    attention = [g for g in groups_of(joint) if g.kind is Kind.ATTENTION]
    score_bytes = 4 * batch_size * 4 * 64 * 64
    assert [(g.rows, g.bytes) for g in attention] == [(rows, score_bytes)] * 2
    assert_same_step(joint, (3,), 1e-5)


def test_a_head_in_chunks_leaves_layers_to_run_in_chunks() -> None:
    model, batch, loss_fn = make("reference_gpt", layers=2, width=32, heads=2, vocabulary=400)
    joint = joint_graph(loss_fn, model, batch)
    (head,) = find_heads(joint.module, joint.num_forward_outputs)
    module = chunked(joint.module, head, 8)
    groups = find_row_groups(module, joint.num_forward_outputs)
    assert [g.name for g in groups] == ["blocks.0.fc1", "blocks.1.fc1"]
    assert_close(joint.run(chunked(module, groups, 4)), joint.run(), 1e-5)


# -- what must stay whole


class Mixed(nn.Module):
    """An MLP whose hidden layer is looked at by all rows together."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, MLP_WIDTH), nn.Linear(MLP_WIDTH, WIDTH)
        self.norm, self.mix = nn.BatchNorm1d(MLP_WIDTH), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mix(self, F.gelu(self.up(x))))


def attended(layer: Mixed, x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


MIXES: dict[str, Any] = {
    "batch norm": lambda layer, x: layer.norm(x),
    "attention": attended,
    "softmax over rows": lambda _, x: x.softmax(0),
    "scores of rows": lambda _, x: (x @ x.T) @ x,
    "cumulative": lambda _, x: x.cumsum(0),
    "centred": lambda _, x: x - x.mean(0),
    "shifted": lambda _, x: x.roll(1, 0),
    "dropout": lambda _, x: F.dropout(x, 0.2),
}


@pytest.mark.parametrize("name", MIXES)
def test_layers_whose_rows_see_one_another_or_that_draw_numbers_stay_whole(name: str) -> None:
    torch.manual_seed(0)
    model = Residual(Mixed(MIXES[name]))
    joint = joint_graph(loss_of, model, torch.randn(32, WIDTH))
    assert groups_of(joint) == []


def test_a_hidden_layer_that_is_returned_stays_whole() -> None:
    up, down = nn.Linear(WIDTH, MLP_WIDTH), nn.Linear(MLP_WIDTH, WIDTH)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.gelu(model[0](x))
        return model[1](hidden).norm(), hidden

    joint = joint_graph(loss_fn, nn.Sequential(up, down), torch.randn(32, WIDTH))
    assert groups_of(joint) == []


def test_rows_that_meet_after_a_layer_leave_the_layer_to_chunks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(plain(nn.GELU()), nn.BatchNorm1d(WIDTH), plain(nn.GELU())).double()
    x = torch.randn(32, WIDTH).double()
    joint = joint_graph(lambda m, x: m(x).square().sum(1).amax(0), model, x)
    assert [g.name for g in groups_of(joint)] == ["0.0", "2.0"]
    assert_same_step(joint, (4,), 1e-13)


# -- the rewritten graph


def gpt() -> Joint:
    """A GPT in which MLPs hold most of the memory."""
    model, batch, loss_fn = make(
        "reference_gpt", layers=3, width=32, heads=2, length=256, vocabulary=64, batch_size=4
    )
    return joint_graph(loss_fn, model, batch)


def test_chunks_go_backward_in_the_order_in_which_they_came_last() -> None:
    torch.manual_seed(0)
    joint = float64_step(plain(nn.GELU()))
    step = read(joint, chunked(joint.module, groups_of(joint), 3))
    gelus = [o for o in step.graph.operations if o.name == "aten.gelu.default"]
    backwards = [o for o in step.graph.operations if o.name == "aten.gelu_backward.default"]
    assert [o.phase for o in gelus] == [Phase.FORWARD] * 3
    assert [o.phase for o in backwards] == [Phase.BACKWARD] * 3
    hidden = [o.reads[0] for o in gelus]
    assert [next(b for b in o.reads if b in hidden) for o in backwards] == hidden[::-1]


def test_no_tensor_of_chunked_layers_has_the_size_of_a_hidden_layer() -> None:
    joint = gpt()
    text = str(joint.module.graph)
    rewritten = chunked(joint.module, groups_of(joint), 4)
    assert str(joint.module.graph) == text, "the original is left as it was"
    largest = max(
        value.numel()
        for node in rewritten.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
    )
    qkv = 1024 * 3 * 32
    assert largest == qkv < 1024 * 4 * 32


def test_weight_gradients_of_chunks_are_added_up_in_place() -> None:
    torch.manual_seed(0)
    joint = float64_step(plain(nn.GELU()), shape=(64, 4))
    step = read(joint, chunked(joint.module, groups_of(joint), 4))
    weight_bytes = 8 * WIDTH * MLP_WIDTH
    added = [
        o
        for o in step.graph.operations
        if o.name == "aten.addmm.default" and step.graph.buffers[o.creates[0]].bytes == weight_bytes
    ]
    assert len(added) == 2 * 3 and all(o.overwrites for o in added)


def test_smallest_peak_falls_with_layers_in_chunks() -> None:
    torch.manual_seed(0)
    joint = float64_step(*(plain(nn.GELU()) for _ in range(5)), shape=(64, 32))
    hidden_bytes = 64 * 32 * MLP_WIDTH * 8
    whole = read(joint, joint.module)
    parts = read(joint, chunked(joint.module, groups_of(joint), 4))
    # At the least, a hidden layer and its gradient; in chunks, a quarter of those.
    assert smallest_peak_bytes(whole.graph) > 2 * hidden_bytes
    assert smallest_peak_bytes(parts.graph) < 1.25 * hidden_bytes
    assert peak_bytes(parts) <= peak_bytes(whole)


# -- fit


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a budget leads to does not depend on times seen in another test."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def test_fit_runs_mlps_in_chunks_where_whole_ones_do_not_fit(own_cache: None) -> None:
    torch.manual_seed(0)
    model, x = Residual(Gated(), Gated(), Gated()), torch.randn(64, 64, WIDTH)
    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 1e-6 * model(x)

    mine, eager = twins(model, loss_fn, sgd)
    before = model.layers[0].up.weight.clone()

    def fit(budget_bytes: int, moves: tuple[str, ...]) -> packlight.TrainStep:
        return packlight.fit(
            mine.model, loss_fn, mine.optimizer, x, budget_bytes, moves=moves, progress=False
        )

    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(1, ("update-in-backward",))
    budget_bytes = int(0.7 * caught.value.smallest_bytes)
    step = fit(budget_bytes, ("update-in-backward", "chunk"))
    assert "3 MLPs in 4 chunks" in step.describe() and not step.way.is_bit_exact
    for _ in range(2):
        torch.testing.assert_close(step(x), eager.step(x), rtol=1e-5, atol=1e-4)
    measured = step.measured(x)
    eager.step(x)
    assert_close_training(mine, eager, 1e-5)
    assert (eager.model.layers[0].up.weight - before).abs().max() > 1e-3
    assert measured.peak_bytes <= budget_bytes
    assert abs(measured.peak_bytes - step.peak_bytes) <= 0.005 * measured.peak_bytes
    roomy = fit(20 * budget_bytes, ("update-in-backward", "chunk"))
    assert roomy.way.made(Chunk) is None and roomy.way.is_bit_exact
