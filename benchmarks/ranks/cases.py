"""Small models of six families, the ways to share them over ranks, and the numbers they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import packlight
from packlight.convolution import Channels, Filters, parallelize_convolutions
from packlight.optim import SGD8bit
from tests.models import WideResNet, classify

WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY, LENGTH, CLASSES, ROWS = 64, 256, 4, 2, 128, 16, 16, 8
ROWS_OF_MLP = 128  # as many as others have tokens: as much to keep for the backward
_SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}
LossFn = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A small model.

    Attributes:
        make: of random weights, without dropout: its masks would be others on each rank.
        batch: a whole batch, from a generator.
        loss_fn: mean over rows or tokens.
        split: splits the weights over ranks of a mesh of one dimension.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss_fn: LossFn
    split: Callable[[nn.Module, DeviceMesh], Any]


def _mlp() -> nn.Module:
    sizes = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)] * 2
    layers: list[nn.Module] = []
    for wide_in, wide_out in sizes:
        layers += [nn.Linear(wide_in, wide_out), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def _split_mlp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {str(i): (ColwiseParallel() if i % 4 == 0 else RowwiseParallel()) for i in (0, 2, 4, 6)}
    return packlight.localize(parallelize_module(model, mesh, plan))


def _wide_resnet() -> nn.Module:
    """Return one with group norms: batch norms see their rank's part, which is no oracle's."""
    model = WideResNet(depth=10, widen=2, dropout=0.0)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return model


def _split_wide_resnet(model: nn.Module, mesh: DeviceMesh) -> Any:
    plan = {"blocks.*.conv1": Filters(), "blocks.*.conv2": Channels()}
    return parallelize_convolutions(model, mesh, plan, torch.empty(2, 3, 16, 16))


def _gpt() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=LENGTH,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ))


def _llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, vocab_size=VOCABULARY)
    )


def _t5() -> nn.Module:
    import transformers

    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=HIDDEN, num_layers=LAYERS, num_heads=HEADS,
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0,
    ))


def _vit() -> nn.Module:
    import transformers

    return transformers.ViTForImageClassification(transformers.ViTConfig(
        **_SIZES, image_size=16, patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))


def _rows(generator: torch.Generator) -> Any:
    labels = torch.randint(CLASSES, (ROWS_OF_MLP,), generator=generator)
    return torch.randn(ROWS_OF_MLP, WIDTH, generator=generator), labels


def _images(generator: torch.Generator) -> Any:
    labels = torch.randint(10, (ROWS,), generator=generator)
    return torch.randn(ROWS, 3, 16, 16, generator=generator), labels


def _pixels(generator: torch.Generator) -> Any:
    images, labels = _images(generator)
    return {"pixel_values": images, "labels": labels}


def _tokens(generator: torch.Generator) -> Any:
    tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": tokens.roll(1, 1)}


def _own_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


MODELS = {
    "MLP": Model(_mlp, _rows, classify, _split_mlp),
    "WRN": Model(_wide_resnet, _images, classify, _split_wide_resnet),
    "GPT": Model(_gpt, _tokens, _own_loss, packlight.megatron),
    "Llama": Model(_llama, _tokens, _own_loss, packlight.megatron),
    "T5": Model(_t5, _tokens, _own_loss, packlight.megatron),
    "ViT": Model(_vit, _pixels, _own_loss, packlight.megatron),
}


@dataclass(frozen=True)
class Strategy:
    """How ranks share a model.

    Attributes:
        mesh: sizes of the mesh's dimensions, by name.
        parallel: what they are for; None for stages of a pipeline.
    """

    mesh: Mapping[str, int]
    parallel: packlight.Parallel | None

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    @property
    def splits_weights(self) -> bool:
        """Whether each rank has a part of the weights in the model itself."""
        return self.parallel is not None and self.parallel.tensor is not None

    @property
    def splits_batch(self) -> bool:
        """Whether each rank has its part of the batch."""
        return "data" in self.mesh


def _sharded(pieces: str) -> Strategy:
    return Strategy({"data": 2}, packlight.Parallel(shard="data", pieces=pieces))


_BOTH = {"data": 2, "tensor": 2}
STRATEGIES = {
    "data": Strategy({"data": 2}, packlight.Parallel(data="data")),
    "zero1": _sharded("state"),
    "zero2": _sharded("gradient"),
    "zero3": _sharded("parameter"),
    "tensor": Strategy({"tensor": 2}, packlight.Parallel(tensor="tensor")),
    "tensor x data": Strategy(_BOTH, packlight.Parallel(data="data", tensor="tensor")),
    "zero3 x tensor": Strategy(_BOTH, packlight.Parallel(shard="data", tensor="tensor")),
    "model": Strategy({"stage": 2}, None),
}


@dataclass(frozen=True)
class Config:
    """In which numbers, and in how many bytes.

    Attributes:
        tolerance: of the largest error that is not a fault: rounding's, measured on one device
            whose batch runs in halves, is less than a third of it.
        options: of `fit`.
        share: of what a step takes above what always is in memory, as its budget (where that is
            too little, the smallest one); None for none.
    """

    tolerance: float
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None


def _sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return SGD, which shows every factor that a gradient gets; its first momentum is that."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _sgd_8bit(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return SGD8bit(parameters, lr=0.1, momentum=0.9)


# Recomputation, and updates in the backward: nothing else is looked for.
_FEW: dict[str, Any] = {"moves": ("update-in-backward",)}
CONFIGS = {
    "fp32": Config(1e-3, _sgd, _FEW),
    "bf16": Config(1e-1, _sgd, {**_FEW, "allow": "bf16"}),
    "8-bit state": Config(1e-1, _sgd_8bit, _FEW),
    "recomputation": Config(1e-3, _sgd, _FEW, share=0.5),
}
