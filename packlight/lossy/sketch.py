"""A weight's gradient from fewer rows: S^T X is kept of a linear layer's input X, and not X.

Bershatsky et al. 2022, "Memory-Efficient Backpropagation through Large Linear Layers":
dW = dY^T X is replaced by (dY^T S)(S^T X), where E[S S^T] = I. Kinds of S, of k columns:

- "gaussian": independent normal numbers of variance 1/k;
- "rademacher": signs over the root of k;
- "rows": k rows drawn uniformly, with replacement, times n/k;
- "winners": Liu et al. 2023, "Winner-Take-All Column Row Sampling": rows are drawn by their
  norm, and the largest are taken for sure. Of the paper's probabilities, |x_i| |y_i|, only the
  first factor is known in the forward.

S is made again in the backward: from a seed that is a hash of what is sketched, so that no
generator is asked (see `packing.py`), or from the places of rows, which are kept.
"""

from __future__ import annotations

import math

import torch

from packlight.errors import OptionError

KINDS = ("gaussian", "rademacher", "rows", "winners")
_MASK = 0xFFFFFFFF
# Elements that a seed is made of.
_SAMPLE = 1024
# Bytes of S that are in memory at once.
_BLOCK_BYTES = 1 << 20


def num_kept_rows(num_rows: int, fraction: float) -> int:
    """Return k for n rows.

    Raises:
        OptionError: the fraction is not between 0 and 1.
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise OptionError(
            f"fraction={fraction!r} of the rows cannot be kept\nhint: a number between 0 and 1"
        )
    return max(1, round(num_rows * fraction))


def kept_bytes(num_rows: int, row_bytes: int, fraction: float, kind: str) -> int:
    """Return how many bytes are kept of so many rows."""
    count = num_kept_rows(num_rows, fraction)
    return count * row_bytes + (12 * count if kind in ("rows", "winners") else 8)


@torch.library.custom_op("packlight::sketch_rows", mutates_args=())
def sketch_rows(
    x: torch.Tensor, count: int, kind: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return S^T x, and what S is made of.

    Args:
        x: of shape (rows, features), floating.
        count: columns of S.
        kind: one of `KINDS`.
        seed: S depends on it, and on x.

    Returns:
        (count, features) of x's dtype; int64: a seed, or places of rows; float32: their factors.
    """
    if kind not in KINDS:
        raise OptionError(f"a sketch of kind {kind!r}\nhint: known are {', '.join(KINDS)}")
    key = _key(x, seed)
    generator = torch.Generator(x.device).manual_seed(key)
    if kind in ("gaussian", "rademacher"):
        state = torch.tensor([key], device=x.device)
        return _times_random(x, count, kind, key), state, x.new_empty(0, dtype=torch.float32)
    if kind == "rows":
        places = torch.randint(len(x), (count,), generator=generator, device=x.device)
        factors = torch.full((count,), len(x) / count, device=x.device)
    else:
        places, factors = _winners(x, count, generator)
    return x[places], places, factors


@sketch_rows.register_fake
def _(
    x: torch.Tensor, count: int, kind: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num = count if kind in ("rows", "winners") else 0
    return (
        x.new_empty(count, x.shape[1]), x.new_empty(num or 1, dtype=torch.int64),
        x.new_empty(num, dtype=torch.float32),
    )


@torch.library.custom_op("packlight::sketch_again", mutates_args=())
def sketch_again(
    y: torch.Tensor, count: int, kind: str, state: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Return S^T y for the S of a sketch, weighed so that (S^T y)^T (S^T x) is y^T x on average."""
    if kind in ("gaussian", "rademacher"):
        return _times_random(y, count, kind, int(state))
    places = state.clamp(0, len(y) - 1)  # (made-up ones, where the call is timed alone)
    return (y[places].float() * factors[:, None]).to(y.dtype)


@sketch_again.register_fake
def _(
    y: torch.Tensor, count: int, kind: str, state: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    return y.new_empty(count, y.shape[1])


def _times_random(x: torch.Tensor, count: int, kind: str, key: int) -> torch.Tensor:
    """Return S^T x, S made a block of rows after the other."""
    generator = torch.Generator(x.device).manual_seed(key)
    result = torch.zeros(count, x.shape[1], device=x.device)
    for rows in torch.split(x, max(1, _BLOCK_BYTES // (4 * count))):
        block = torch.empty(len(rows), count, device=x.device)
        if kind == "gaussian":
            block.normal_(generator=generator)
        else:
            block.bernoulli_(generator=generator).mul_(2).sub_(1)
        result.addmm_(block.t(), rows.float(), alpha=1 / math.sqrt(count))
    return result.to(x.dtype)


def _winners(
    x: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and factors: the largest once each, the others drawn by their norm."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    shares = norms / norms.sum() if norms.sum() > 0 else torch.full_like(norms, 1 / len(norms))
    sorted_shares, order = shares.sort(descending=True)
    # What is left to the others after each number of winners: as few as make the variance least.
    left = (1 - sorted_shares.cumsum(0)).clamp(min=0)
    left = torch.cat([left.new_ones(1), left])[: min(count, len(x))]
    spread = left.square() / (count - torch.arange(len(left), device=x.device))
    num_sure = int(spread.argmin())
    others = sorted_shares[num_sure:].clone()
    if not float(others.sum()) > 0:
        others.fill_(1.0)
    drawn = torch.multinomial(others, count - num_sure, replacement=True, generator=generator)
    chance = others[drawn] / others.sum()
    factors = torch.cat([
        torch.ones(num_sure, device=x.device), 1 / (chance * (count - num_sure))
    ])
    return torch.cat([order[:num_sure], order[num_sure:][drawn]]), factors


def _key(x: torch.Tensor, seed: int) -> int:
    """Return a seed from another one and from some of the elements."""
    step = max(1, x.numel() // _SAMPLE)
    sample = x.reshape(-1)[::step][:_SAMPLE].to(torch.float32).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, len(sample) + 1, device=x.device) * 0x9E3779B1 & _MASK
    return (int((sample * weights).sum()) ^ (seed * 0x85EBCA77)) & 0x7FFFFFFFFFFFFFFF
