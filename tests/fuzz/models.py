"""Models, losses and batches put together from parts by name."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES = 16, 5


class Residual(nn.Module):
    """A layer around which its input goes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


class Attention(nn.Module):
    """Every position looks at all others."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Remembering(nn.Module):
    """Keeps what it saw, counts, and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        self.last = x
        return x - self.mean


class Checkpointed(nn.Module):
    """Recomputed in the backward, by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Clamped(nn.Module):
    """A gain that is kept within bounds, and the places of nearest codes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.codes = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.gain.clamp_(0, 1)
        nearest = F.one_hot((x @ self.codes.T).argmax(-1), 6).to(x.dtype)
        return x * self.gain + nearest @ self.codes


class Convolved(nn.Module):
    """Neighbours along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Measuring(nn.Module):
    """Python looks at a number and goes on with it: the graph breaks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.detach().abs().amax().item()
        return x / max(largest, 2.0)


class Branching(nn.Module):
    """Python chooses by a number which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Tanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) if x.detach().sum() > 0 else self.layers[1](x)


def _weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


def _spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.2),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "mlp": lambda: Residual(
        nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
    ),
    "attention": lambda: Residual(Attention()),
    "remembering": Remembering, "checkpointed": Checkpointed, "clamped": Clamped,
    "convolved": Convolved, "weight norm": _weight_norm, "spectral norm": _spectral_norm,
    "measuring": Measuring, "branching": Branching,
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
}


BREAKING = {"measuring", "branching"}


class Net(nn.Module):
    """Tokens or vectors through layers to numbers for each position."""

    def __init__(self, layers: Sequence[str], max_norm: bool, is_tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, WIDTH, max_norm=1.0 if max_norm else None)
        self.body = nn.Sequential(*(LAYERS[name]() for name in layers))
        self.head = nn.Linear(WIDTH, CLASSES, bias=not is_tied)
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x + self.words(tokens)))


Named = namedtuple("Named", "x tokens y note")


def batch_of(container: str, seed: int, rows: int, length: int) -> Any:
    """Return a batch in some container; equal seeds and sizes give equal numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, WIDTH, generator=generator)
    tokens = torch.randint(0, CLASSES, (rows, length), generator=generator)
    y = torch.randint(0, CLASSES, (rows, length), generator=generator)
    y[0, 0] = -100
    if container == "tuple":
        return x, tokens, y
    if container == "named tuple":
        return Named(x, tokens, y, f"note {seed}")
    batch = {"x": x, "tokens": tokens, "y": y}
    if container == "nested":
        return {"in": batch, "files": [f"{seed}-{row}" for row in range(rows)], "epoch": seed}
    return {**batch, "id": f"{seed}"} if container == "popped" else batch


def read(container: str, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors of a batch, as a loss function gets at them."""
    if container in ("tuple", "named tuple"):
        return batch[0], batch[1], batch[2]
    if container == "popped":
        batch.pop("id")
        return batch.pop("x"), batch.pop("tokens"), batch.pop("y")
    inner = batch["in"] if container == "nested" else batch
    return inner["x"], inner["tokens"], inner["y"]


def _entropy(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    return F.cross_entropy(model(x, tokens).flatten(0, 1), y.flatten())


def _square(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    return F.mse_loss(model(x, tokens), F.one_hot(tokens, CLASSES).to(x.dtype))


def _smooth(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    return F.smooth_l1_loss(model(x, tokens).sum(-1), x.sum(-1))


def _summed(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    return model(x, tokens).square().sum() * 1e-2


def _with_extras(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    out = model(x, tokens)
    loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
    return loss, {"out": out, "guess": out.argmax(-1)}


def _with_metric(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    out = model(x, tokens)
    accuracy = (out.argmax(-1) == y).float().mean()
    return F.cross_entropy(out.flatten(0, 1), y.flatten()), accuracy, out.shape[0]


def _penalty(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    x = x.clone().requires_grad_()
    out = model(x, tokens)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + gradient.square().mean()


def _asserted(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    out = model(x, tokens)
    torch._assert_async(torch.isfinite(x).all(), "an input is not finite")
    return out.logsumexp(-1).mean()


def _regularised(model: Any, x: Any, tokens: Any, y: Any) -> Any:
    penalty = sum(p.square().sum() for p in model.parameters())
    return _entropy(model, x, tokens, y) + 1e-3 * penalty


LOSSES: dict[str, Callable[..., Any]] = {
    "cross entropy": _entropy, "mean square": _square, "smooth": _smooth, "sum": _summed,
    "extras": _with_extras, "metric": _with_metric, "penalty": _penalty, "asserted": _asserted,
    "regularised": _regularised,
}
