"""transformers' models split by heads and hidden units: the numbers of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import packlight
from packlight.run.distributed import load_distributed
from tests.rank_pool import RankPool

FAMILIES = ("gpt2", "llama", "bert", "t5", "vit")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 4


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("megatron"))
    yield pool
    pool.close()


def model_of(family: str) -> nn.Module:
    """Return a small model, dropout left out: its masks would be other ones in parts."""
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=16, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)
    if family == "llama":
        config = transformers.LlamaConfig(
            **SIZES, num_key_value_heads=2, intermediate_size=64, vocab_size=64,
        )
        return transformers.LlamaForCausalLM(config)
    if family == "bert":
        config = transformers.BertConfig(
            **SIZES, intermediate_size=64, vocab_size=64, max_position_embeddings=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForMaskedLM(config)
    if family == "t5":
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.ViTConfig(
        **SIZES, intermediate_size=64, image_size=16, patch_size=8, num_labels=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def batches(family: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        if family == "vit":
            labels = torch.randint(8, (4,), generator=generator)
            images = torch.randn(4, 3, 16, 16, generator=generator)
            made.append({"pixel_values": images, "labels": labels})
            continue
        tokens = torch.randint(1, 64, (4, 12), generator=generator)
        made.append({"input_ids": tokens, "labels": tokens.roll(1, 1)})
    return made


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))


def trained_eagerly(family: str, is_split: bool) -> tuple[list[float], nn.Module]:
    model = model_of(family)
    if is_split:
        packlight.megatron(model, mesh())
    optimizer = optimizer_of(model)
    losses = []
    for batch in batches(family):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def losses_of_parts(family: str) -> tuple[list[float], int]:
    losses, model = trained_eagerly(family, is_split=True)
    return losses, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_the_losses_of_one_process(pool: RankPool, family: str) -> None:
    losses, model = trained_eagerly(family, is_split=False)
    split = 0  # what lies in parts: all matrices of layers, and their outputs' biases
    for name, parameter in model.named_parameters():
        is_outside = not any(part in name for part in (".h.", "layer", ".block.")) or "norm" in name
        split += 0 if is_outside or parameter.ndim < 2 else parameter.numel()
    whole = sum(p.numel() for p in model.parameters())
    for found, num_elements in pool.run(losses_of_parts, family):
        assert found == pytest.approx(losses, rel=1e-5)
        assert num_elements <= whole - split // 2


def trained(family: str, directory: str, options: dict[str, Any]) -> tuple[Any, ...]:
    model = packlight.megatron(model_of(family), mesh())
    step = packlight.fit(
        model, loss_of, optimizer_of(model), batches(family)[0], mesh=mesh(),
        parallel=packlight.Parallel(tensor="tensor"), moves=(), **options,
    )
    losses = [float(step(batch)) for batch in batches(family)[:-1]]
    measured = step.measured(batches(family)[-1])
    step.save(directory)
    made = [o for o in step.profile.graph.operations if o.name.startswith("packlight.all_reduce")]
    return [*losses, float(measured.loss)], measured.peak_bytes, step.peak_bytes, len(made)


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])]
)
def test_parts_are_planned_and_saved_as_one_process_has_them(
    pool: RankPool, family: str, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    alone, whole = trained_eagerly(family, is_split=False)
    # Behind each attention and MLP, and in the backward before each; of T5's attention to the
    # encoder both inputs'.
    num_sums = 2 * 2 * 2 if family != "t5" else 2 * (2 + 2) + 2 * (3 + 4)
    for losses, peak, predicted, num_made in pool.run(trained, family, str(directory), {}):
        assert losses == pytest.approx(alone, rel=1e-5)
        assert peak <= predicted and num_made == num_sums
    other = model_of(family)
    step = packlight.fit(other, loss_of, optimizer_of(other), batches(family)[0], moves=())
    step.load(directory)
    for (name, value), expected in zip(
        other.named_parameters(), whole.parameters(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


def with_a_head_in_parts(directory: str) -> tuple[list[float], int, int, int]:
    model = packlight.megatron(model_of("llama"), mesh(), splits_head=True)
    batches_of = [{**batch, "labels": masked(batch["labels"])} for batch in batches("llama")]
    step = packlight.fit(
        model, loss_of, optimizer_of(model), batches_of[0], mesh=mesh(),
        parallel=packlight.Parallel(tensor="tensor"), moves=(),
    )
    losses = [float(step(batch)) for batch in batches_of[:-1]]
    measured = step.measured(batches_of[-1])
    step.save(directory)
    graph = step.profile.graph
    largest = max(graph.buffers[b].bytes for o in graph.operations for b in o.creates)
    return [*losses, float(measured.loss)], measured.peak_bytes, step.peak_bytes, largest


def masked(labels: torch.Tensor) -> torch.Tensor:
    """Return labels of which one in three does not count."""
    return labels.masked_fill(torch.arange(labels.shape[1]) % 3 == 0, -100)


def test_a_head_in_parts_has_the_loss_of_one_process(pool: RankPool, tmp_path: Path) -> None:
    whole = model_of("llama")
    optimizer, losses = optimizer_of(whole), []
    for batch in batches("llama"):
        optimizer.zero_grad()
        loss = loss_of(whole, {**batch, "labels": masked(batch["labels"])})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    directory = tmp_path / "checkpoint"
    for found, peak, predicted, largest in pool.run(with_a_head_in_parts, str(directory)):
        assert found == pytest.approx(losses, rel=1e-5)
        assert peak <= predicted
        assert largest < 4 * 12 * 64 * 4  # the bytes of all logits
    other = model_of("llama")
    load_distributed(directory, other, optimizer_of(other))
    for (name, value), expected in zip(other.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


class Other(nn.Module):
    """A layer of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)


def attempted(what: str) -> None:
    model = model_of("gpt2")
    if what == "unknown":
        model.transformer.h[1].mlp = Other()
    if what == "nothing":
        model = nn.Sequential(nn.Linear(8, 8))
    if what == "heads":
        model = model_of("llama")
        model.model.layers[0].self_attn.head_dim = 32
    packlight.megatron(model, mesh(), splits_head=what == "tied")


@pytest.mark.parametrize(
    "what, words",
    [
        ("unknown", "does not know how GPT2LMHeadModel is split: Other.mix"),
        ("nothing", "it has no layers that are known"),
        ("tied", "lm_head.weight is transformer.wte.weight, too"),
        ("heads", "model.layers.0.self_attn.q_proj has 1 heads, of which 2 ranks"),
    ],
)
def test_what_cannot_be_split_is_named_before_anything_is_changed(
    pool: RankPool, what: str, words: str
) -> None:
    pool.assert_refused(words, attempted, what, kind="UnsupportedModelError")
