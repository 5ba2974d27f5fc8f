"""Models in plain PyTorch that do what users' models do and transformers' do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.models import Case, call_pair, classify

Pair = tuple[torch.Tensor, torch.Tensor]


def _labels(batch_size: int) -> torch.Tensor:
    return torch.randint(0, 10, (batch_size,))


def blocks(width: int, depth: int, dropout: float, activation: type[nn.Module]) -> list[nn.Module]:
    """Return linear layers with activations and dropout between."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation(), nn.Dropout(dropout)]
    return layers


class Auxiliary(nn.Module):
    """Three stages with a classifier after each: the loss is a sum of a list of losses."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*blocks(96, 2, dropout, nn.GELU)) for _ in "123")
        self.heads = nn.ModuleList(nn.Linear(96, 10) for _ in "123")

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        losses = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = x + stage(x)
            losses.append(F.cross_entropy(head(x), targets))
        return losses


def auxiliary_losses(dropout: float) -> Case:
    """A list of losses, summed by the loss function."""

    def loss_fn(model: nn.Module, batch: Pair) -> torch.Tensor:
        return torch.stack(model(*batch)).sum()

    return Auxiliary(dropout), (torch.randn(128, 96), _labels(128)), loss_fn


class TiedLanguageModel(nn.Module):
    """The embedding is the output layer, too, and is used once more as features."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.body = nn.Sequential(*blocks(64, 3, dropout, nn.SiLU))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(tokens))
        return F.linear(x + self.embed.weight.mean(0), self.embed.weight).transpose(1, 2)


def tied_embeddings(dropout: float) -> Case:
    """One parameter used three times."""
    tokens = torch.randint(0, 300, (8, 32))
    return TiedLanguageModel(dropout), (tokens, tokens.roll(-1, 1)), classify


class InPlace(nn.Module):
    """Activations, additions and masks that overwrite what they read."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(5))
        self.head, self.dropout = nn.Linear(96, 10), nn.Dropout(dropout, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            y = self.dropout(layer(x))
            y.mul_(0.5).add_(x)
            y[:, :8].zero_()
            x = F.leaky_relu_(y, 0.1) if i % 2 else F.elu_(y)
        return self.head(x)


def in_place(dropout: float) -> Case:
    """In-place operations everywhere."""
    return InPlace(dropout), (torch.randn(128, 96), _labels(128)), classify


class RunningState(nn.Module):
    """A running mean, a counter and a centre that the forward reads and overwrites."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*blocks(96, 3, dropout, nn.Tanh)), nn.Linear(96, 10)
        self.register_buffer("mean", torch.zeros(96))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_steps += 1
        x = self.body(x - self.mean)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.head(x * (1 + self.mean) / self.num_steps.sqrt())


def running_state(dropout: float) -> Case:
    """Buffers that the forward mutates."""
    return RunningState(dropout), (torch.randn(128, 96), _labels(128)), classify


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank correction (LoRA, Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer.requires_grad_(False), nn.Dropout(dropout)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.dropout(x) @ self.down.T @ self.up.T


def lora(dropout: float) -> Case:
    """A frozen transformer whose attention projections have low-rank corrections."""
    model = models.ReferenceGPT(3, 64, 4, 64, 512, dropout).requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.proj = Adapted(block.qkv, 4, dropout), Adapted(block.proj, 4, dropout)
    tokens = torch.randint(0, 512, (4, 64))
    return model, (tokens, tokens.roll(-1, 1)), call_pair


def frozen_backbone(dropout: float) -> Case:
    """A frozen convolutional backbone, in training mode, with a trained head."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        models.InvertedResidual(16, 16, 1), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    ).requires_grad_(False)
    head = nn.Sequential(nn.Linear(256, 256), *blocks(256, 2, dropout, nn.ReLU), nn.Linear(256, 10))
    batch = torch.randn(8, 3, 32, 32), _labels(8)
    return nn.Sequential(backbone, head), batch, classify


def siamese(dropout: float) -> Case:
    """One encoder called twice, and a triplet-like loss of the two results."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(dropout),
        nn.Conv2d(16, 32, 3, 2, 1), nn.PReLU(32), nn.Flatten(), nn.Linear(32 * 7 * 7, 32),
    )

    def loss_fn(model: nn.Module, batch: Pair) -> torch.Tensor:
        left, right = F.normalize(model(batch[0])), F.normalize(model(batch[1]))
        return F.cross_entropy(left @ right.T / 0.1, torch.arange(len(left)))

    return encoder, (torch.randn(16, 1, 28, 28), torch.randn(16, 1, 28, 28)), loss_fn


class Unrolled(nn.Module):
    """An LSTM cell in a Python loop; hidden states are kept in a list."""

    def __init__(self, dropout: float, cell: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head, self.dropout = nn.Embedding(100, 32), nn.Linear(64, 100), dropout
        self.cell = cell(32, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state, hidden = None, []
        for x in self.embed(tokens).unbind(1):
            state = self.cell(x, state)
            h = state[0] if isinstance(state, tuple) else state
            hidden.append(F.dropout(h, self.dropout, self.training))
        return self.head(torch.stack(hidden, 1)).transpose(1, 2)


def unrolled(cell: type[nn.Module]) -> Callable[[float], Case]:
    """Return a maker of a recurrent cell unrolled by hand."""

    def make(dropout: float) -> Case:
        tokens = torch.randint(0, 100, (8, 12))
        return Unrolled(dropout, cell), (tokens, tokens.roll(-1, 1)), classify

    return make


class Recurrent(nn.Module):
    """Embedding, a bidirectional recurrent layer of torch, classifier."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(100, 32), layer, nn.Linear(64, 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens))[0]).transpose(1, 2)


def recurrent(layer: type[nn.RNNBase], **settings: bool) -> Callable[[float], Case]:
    """Return a maker of a tagger with two recurrent layers."""

    def make(dropout: float) -> Case:
        width = 32 if settings.get("bidirectional") else 64
        layers = layer(32, width, num_layers=2, batch_first=True, dropout=dropout, **settings)
        tokens = torch.randint(0, 100, (8, 8))
        return Recurrent(layers), (tokens, tokens.roll(-1, 1)), classify

    return make


class LongSkips(nn.Module):
    """A U of linear layers: what goes down is read again, in reverse, on the way up."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(*blocks(64, 1, dropout, nn.GELU)) for _ in range(6)
        )
        self.up = nn.ModuleList(nn.Linear(128, 64) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for layer in self.up:
            x = F.gelu(layer(torch.cat([x, skips.pop()], 1)))
        return x


def regress(model: nn.Module, batch: Pair) -> torch.Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def long_skips(dropout: float) -> Case:
    """Six skips, the first over everything."""
    return LongSkips(dropout), (torch.randn(256, 64), torch.randn(256, 64)), regress


class Straight(torch.autograd.Function):
    """Rounds in the forward, and passes gradients where the input is small."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 2)


class Quantized(nn.Module):
    """Linear layers with rounded activations (a straight-through estimator)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(4))
        self.head, self.dropout = nn.Linear(96, 10), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(Straight.apply(layer(x)))
        return self.head(x)


def custom_function(dropout: float) -> Case:
    """A backward written by hand."""
    return Quantized(dropout), (torch.randn(128, 96), _labels(128)), classify


@dataclass
class Output:
    """What a model returns: its loss, and what else a user wants to see."""

    loss: torch.Tensor
    hidden: list[torch.Tensor]


class ReturnsDataclass(nn.Module):
    """Returns a dataclass with the loss and all activations in a list."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*blocks(96, 1, dropout, nn.ReLU)) for _ in range(4)
        )
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> Output:
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        penalty = sum(h.square().mean() for h in hidden[1:])
        return Output(F.cross_entropy(self.head(hidden[-1]), targets) + 0.01 * penalty, hidden)


def returns_dataclass(dropout: float) -> Case:
    """A dataclass as the model's output; activations kept in a list."""

    def loss_fn(model: nn.Module, batch: Pair) -> torch.Tensor:
        return model(*batch).loss

    return ReturnsDataclass(dropout), (torch.randn(128, 96), _labels(128)), loss_fn


class Checkpointed(nn.Module):
    """Blocks under torch's own activation checkpointing."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*blocks(96, 2, dropout, nn.GELU)) for _ in range(4)
        )
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def checkpointed(dropout: float) -> Case:
    """Gradient checkpointing is on in the model already."""
    return Checkpointed(dropout), (torch.randn(128, 96), _labels(128)), classify


OWN: dict[str, Callable[[float], Case]] = {
    "auxiliary_losses": auxiliary_losses,
    "tied_embeddings": tied_embeddings,
    "in_place": in_place,
    "running_state": running_state,
    "frozen_backbone": frozen_backbone,
    "lora": lora,
    "siamese": siamese,
    "long_skips": long_skips,
    "custom_function": custom_function,
    "returns_dataclass": returns_dataclass,
    "checkpointed": checkpointed,
}
RECURRENT: dict[str, Callable[[float], Case]] = {
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU, bidirectional=True),
    "rnn": recurrent(nn.RNN),
    "lstm_cell": unrolled(nn.LSTMCell),
    "gru_cell": unrolled(nn.GRUCell),
}
