"""Loss heads in row chunks compute what the whole head computes, with a part of its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from packlight.capture.joint import JointStep
from packlight.capture.read_joint import read_joint_graph
from packlight.costs.profiler import CallProfiler
from packlight.moves.chunk.rewrite import LATE_KEY, Region, chunked, find_heads
from packlight.planner.plain import plain_schedule
from packlight.step import Phase, simulate
from tests.models import make
from tests.oracles.joint import Joint, joint_graph

VOCABULARY = 101
CHUNKS = (3, 7)


class Tied(nn.Module):
    """Embedding, one layer, and a head that shares the embedding's weight."""

    def __init__(self, *, is_tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=bias)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WEIGHTS = torch.linspace(0.5, 2.0, VOCABULARY)


def flat(logits: torch.Tensor, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), **options)


def per_token(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    losses = flat(logits, tokens, reduction="none")
    return (losses * torch.linspace(0, 1, losses.numel())).sum()


def z_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return flat(logits, tokens) + 0.01 * logits.logsumexp(-1).square().mean()


def shifted(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def picked(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    chosen = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -(chosen * torch.linspace(0, 1, tokens.shape[1])).mean()


def soft_labels(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    labels = 0.9 * F.one_hot(tokens.flatten(), VOCABULARY).float() + 0.1 / VOCABULARY
    return F.cross_entropy(logits.flatten(0, 1), labels)


LOSSES: dict[str, Loss] = {
    "mean": flat,
    "sum": lambda x, t: flat(x, t, reduction="sum"),
    "ignored labels": lambda x, t: flat(x, t, ignore_index=7),
    "label smoothing": lambda x, t: flat(x, t, label_smoothing=0.1),
    "class weights": lambda x, t: flat(x, t, weight=WEIGHTS, ignore_index=7),
    "weights, smoothed": lambda x, t: flat(x, t, weight=WEIGHTS, label_smoothing=0.1),
    "per token": per_token,
    "soft cap": lambda x, t: flat(3 * torch.tanh(x / 3), t),
    "scaled": lambda x, t: flat(x * 0.125, t),
    "z-loss": z_loss,
    "classes second": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "gathered": picked,
    "soft labels": soft_labels,
    "shifted by slices": shifted,
}


def tokens_of(batch_size: int = 4, length: int = 6) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (batch_size, length))
    tokens[0, :3] = 7
    return tokens


def one_head(joint: Joint) -> Region:
    (head,) = find_heads(joint.module, joint.num_forward_outputs)
    return head


def assert_close(mine: list[Any], expected: list[Any], tolerance: float = 2e-6) -> None:
    """Equal up to summation order: relative to the largest element, or to nothing at all."""
    for place, (a, b) in enumerate(zip(mine, expected, strict=True)):
        assert (a is None) == (b is None), place
        if isinstance(b, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride(), place
            atol = max(tolerance * b.abs().max().item(), 1e-9)
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same_step(
    joint: Joint, head: Region, tolerance: float = 2e-6, chunks: tuple[int, ...] = CHUNKS
) -> None:
    expected = joint.run(tangent=0.7)
    for num_chunks in chunks:
        assert_close(joint.run(chunked(joint.module, head, num_chunks), 0.7), expected, tolerance)


def assert_eager_gradients(joint: Joint, module: fx.GraphModule, loss: torch.Tensor) -> None:
    """Compare a rewritten step's gradients with those of autograd, found by storage."""
    loss.backward()
    results = joint.run(module)
    torch.testing.assert_close(results[0], loss.detach(), rtol=1e-5, atol=1e-6)
    gradients = results[joint.num_forward_outputs :]
    num_compared = 0
    for primal, gradient in zip(joint.primals, gradients, strict=True):
        for parameter in PARAMETERS_OF[id(joint)]:
            if isinstance(primal, torch.Tensor) and primal.data_ptr() == parameter.data_ptr():
                assert parameter.grad is not None
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
                num_compared += 1
    assert num_compared == len(PARAMETERS_OF[id(joint)])


PARAMETERS_OF: dict[int, list[nn.Parameter]] = {}


def read(joint: Joint, module: fx.GraphModule) -> JointStep:
    with CallProfiler(progress=False) as profiler:
        return read_joint_graph(module, joint.num_forward_outputs, profiler.measure)


def peak_bytes(step: JointStep) -> int:
    return simulate(step.graph, plain_schedule(step.graph)).peak_bytes


def step_of(model: nn.Module, loss_fn: Any, batch: Any) -> Joint:
    joint = joint_graph(loss_fn, model, batch)
    PARAMETERS_OF[id(joint)] = list(model.parameters())
    return joint


# -- losses


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_in_chunks_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(is_tied=False, bias=True), tokens_of()

    def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](model(tokens), tokens)

    joint = step_of(model, loss_fn, tokens)
    head = one_head(joint)
    assert head.name == "head"
    assert head.rows == (4 if name == "shifted by slices" else 24)
    assert_same_step(joint, head)
    assert_eager_gradients(joint, chunked(joint.module, head, 3), loss_fn(model, tokens))


def test_gradients_of_a_tied_head_are_added_to_the_embeddings() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), tokens_of()

    def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return flat(model(tokens), tokens)

    joint = step_of(model, loss_fn, tokens)
    head = one_head(joint)
    more_than_rows = 1000
    assert_same_step(joint, head, chunks=(1, 2, more_than_rows))
    assert_eager_gradients(joint, chunked(joint.module, head, 7), loss_fn(model, tokens))


def test_all_labels_ignored_gives_nan_as_eager_does() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.full((2, 5), 7)
    joint = step_of(model, lambda m, t: flat(m(t), t, ignore_index=7), tokens)
    loss = joint.run(chunked(joint.module, one_head(joint), 3))[0]
    assert math.isnan(loss) and math.isnan(joint.run()[0])


@pytest.mark.parametrize("is_loss_inside", [False, True])
def test_sums_of_a_bfloat16_head_are_kept_in_float32(is_loss_inside: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(is_tied=False, bias=True), tokens_of(8, 16)

    def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
            if is_loss_inside:
                return flat(logits, tokens)
        return flat(logits.float(), tokens)

    joint = step_of(model, loss_fn, tokens)
    head = one_head(joint)
    # As near to the exact gradients as the unchunked step, whose products round to bfloat16 once.
    assert_same_step(joint, head, tolerance=2**-7, chunks=(3,))
    exact = step_of(model, lambda m, t: flat(m(t), t), tokens).run()
    errors = []
    for results in (joint.run(), joint.run(chunked(joint.module, head, 16))):
        pairs = [(a, b) for a, b in zip(results, exact, strict=True) if isinstance(b, torch.Tensor)]
        errors.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    assert errors[1] < 1.5 * errors[0]


def test_an_autocast_around_the_rewriting_casts_nothing() -> None:
    joint = wide_gpt()
    head = one_head(joint)
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = chunked(joint.module, head, 2)
    values = [n.meta.get("val") for n in rewritten.graph.nodes]
    assert not any(v.dtype == torch.bfloat16 for v in values if isinstance(v, torch.Tensor))


# -- what must stay whole


def self_labels(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).flatten(0, 1)
    return F.cross_entropy(logits, logits.argmax(-1))


def with_logits(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(tokens)
    return flat(logits, tokens), logits


def normalized(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).flatten(0, 1)
    return F.cross_entropy(logits / logits.std(0), tokens.flatten())


def dropped(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return flat(F.dropout(model(tokens), 0.2), tokens)


@pytest.mark.parametrize("loss_fn", [self_labels, with_logits, normalized, dropped])
def test_rows_that_depend_on_each_other_or_are_needed_outside_stay_whole(loss_fn: Any) -> None:
    torch.manual_seed(0)
    joint = joint_graph(loss_fn, Tied(), tokens_of())
    assert find_heads(joint.module, joint.num_forward_outputs) == []


def test_wide_layers_within_a_network_are_no_heads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    joint = joint_graph(lambda m, x: m(x).square().mean(), model, torch.randn(32, 8))
    assert find_heads(joint.module, joint.num_forward_outputs) == []


# -- models


def classifier() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4000),
    )
    batch = torch.randn(32, 3, 8, 8), torch.randint(0, 4000, (32,))
    return model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1])


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5", "classifier"])
def test_heads_of_models(family: str) -> None:
    torch.manual_seed(0)
    model, batch, loss_fn = classifier() if family == "classifier" else make(family)
    if family == "bert":
        batch["labels"][:, ::3] = -100
    model.eval()  # dropout would draw other masks in eager
    joint = step_of(model, loss_fn, batch)
    head = one_head(joint)
    assert_same_step(joint, head, tolerance=1e-5, chunks=(7,))
    assert_eager_gradients(joint, chunked(joint.module, head, 3), loss_fn(model, batch))


# -- the rewritten graph


def wide_gpt() -> Joint:
    """A GPT whose logits (256 x 4000) are most of its memory, each size in it one of a kind."""
    return step_of(
        *(lambda model, batch, loss_fn: (model, loss_fn, batch))(
            *make(
                "reference_gpt",
                layers=1,
                width=32,
                heads=2,
                length=64,
                vocabulary=4000,
                batch_size=4,
            )
        )
    )


def test_no_tensor_of_a_chunked_step_has_the_size_of_the_logits() -> None:
    joint = wide_gpt()
    head, num_logits = one_head(joint), 256 * 4000
    assert head.bytes == 4 * num_logits
    text = str(joint.module.graph)
    rewritten = chunked(joint.module, head, 4)
    assert str(joint.module.graph) == text, "the original is left as it was"
    sizes = [
        value.numel()
        for node in rewritten.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
    ]
    assert max(sizes) <= num_logits // 4


def test_placeholders_and_output_of_a_chunked_step_are_those_of_the_whole() -> None:
    joint = wide_gpt()
    rewritten = chunked(joint.module, one_head(joint), 4)
    for op in ("placeholder", "output"):
        mine = [n for n in rewritten.graph.nodes if n.op == op]
        theirs = [n for n in joint.module.graph.nodes if n.op == op]
        assert [n.name for n in mine] == [n.name for n in theirs]
        assert [n.meta.get("desc") for n in mine] == [n.meta.get("desc") for n in theirs]
    layers = {o.layer for o in read(joint, rewritten).graph.operations if "mm" in o.name}
    assert "head" in layers


def test_each_chunk_ends_before_the_next_begins() -> None:
    joint = wide_gpt()
    rewritten = chunked(joint.module, one_head(joint), 3)
    names = [str(n.target) for n in rewritten.graph.nodes if n.meta.get(LATE_KEY)]
    steps = [n for n in names if n.startswith(("aten._log_softmax", "aten.cat"))]
    forward, backward = "aten._log_softmax.default", "aten._log_softmax_backward_data.default"
    assert steps == [forward, backward] * 3 + ["aten.cat.default"]


def test_the_peak_of_a_chunked_step_falls_with_the_number_of_chunks() -> None:
    joint = wide_gpt()
    head = one_head(joint)
    whole = peak_bytes(read(joint, joint.module))
    peaks = [peak_bytes(read(joint, chunked(joint.module, head, n))) for n in (2, 4, 8)]
    # Two tensors of the logits' size are in memory at once: scores, and their gradient.
    for num_chunks, peak in zip((2, 4, 8), peaks, strict=True):
        saved = 2 * head.bytes * (1 - 1 / num_chunks)
        assert peak <= whole - 0.8 * saved, num_chunks


def test_weight_gradients_of_chunks_are_added_up_in_place() -> None:
    joint = wide_gpt()
    step = read(joint, chunked(joint.module, one_head(joint), 4))
    weight_bytes = 4000 * 32 * 4
    added = [
        operation
        for operation in step.graph.operations
        if operation.name == "aten.addmm.default"
        and step.graph.buffers[operation.creates[0]].bytes == weight_bytes
    ]
    assert len(added) == 3 and all(operation.overwrites for operation in added)


def test_the_loss_of_a_chunked_step_comes_with_the_backward() -> None:
    joint = wide_gpt()
    graph = read(joint, chunked(joint.module, one_head(joint), 2)).graph
    assert graph.forward_outputs == ()
    softmaxes = [o for o in graph.operations if o.name == "aten._log_softmax.default"]
    assert len(softmaxes) == 2 and all(o.phase is Phase.BACKWARD for o in softmaxes)
