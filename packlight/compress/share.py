"""Weights that share few values, which are trained: a codebook for each tensor.

Deep Compression's (Han, Mao, Dally 2016, arXiv 1510.00149, section 3): weights are clustered, and
the gradient of a cluster's value is the sum over its members. Where weights may change clusters
(`learn="both"`), each also keeps a number of its own behind its value, to which the gradient goes
as if there were no rounding (Bengio et al. 2013), and takes the value nearest to that number;
"nearest" may count bits, too (entropy-constrained quantization, Chou et al. 1989).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from packlight.compress.layers import Place, attach, detach, places_of
from packlight.compress.packages import kmeans1d
from packlight.errors import OptionError

STARTS = ("linear", "density", "random", "optimal")
LEARNT = ("codebook", "both")


class Sharing:
    """A model whose weights are values of codebooks while it is trained; made by `share`.

    The values are parameters of the model (so an optimizer has to be made after `share`), weights
    that are zero stay zero and have no value.
    """

    def __init__(self, places: list[Place], codebooks: list[_Codebook]) -> None:
        self._places, self._codebooks = places, codebooks

    def num_values(self) -> dict[str, int]:
        """Return how many values each parameter has, zero aside."""
        return {
            place.name: len(codebook.values)
            for place, codebook in zip(self._places, self._codebooks, strict=True)
        }

    def finish(self, *, half: bool = False) -> None:
        """Write the values into the weights; the model is plain again.

        Args:
            half: round the values to float16 first, which halves the tables in a file.
        """
        for place, codebook in zip(self._places, self._codebooks, strict=True):
            if half:
                with torch.no_grad():
                    codebook.values.copy_(codebook.values.half())
            requires_grad = place.stored.requires_grad or not codebook.moves
            detach(place)
            place.stored.requires_grad_(requires_grad)


def share(
    model: nn.Module,
    num_values: int | Mapping[str, int],
    *,
    start: str = "linear",
    learn: str = "codebook",
    bit_weight: float = 0.0,
    seed: int = 0,
) -> Sharing:
    """Give each parameter a codebook, and let the model compute with its values.

        sharing = share(model, 2**5)
        optimizer = ...                         # of model.parameters(), made now
        ...                                     # train
        sharing.finish()

    Args:
        model: changed: its weights are values of codebooks.
        num_values: other than zero, for each parameter of two dims and more; or by name, for those
            named and for no other (biases, say).
        start: of a codebook. "linear": from the smallest weight to the largest in equal steps,
            which keeps large weights, of which there are few; "density": at equal steps of the
            weights' distribution; "random": values of weights; "optimal": least squares
            (kmeans1d).
        learn: "codebook": which weights share a value never changes; "both": weights move on and
            may take another value.
        bit_weight: for learn="both": a weight w takes the value v with the smallest
            (w - v)^2 / s^2 + bit_weight * bits(v), s^2 the weights' mean square, bits by how often
            v was taken lately. 0 takes the nearest.
        seed: of a random start.

    Raises:
        OptionError: an unknown start or way to learn, or less than one value.
        CompressionError: no such parameter, or one that is not finite.
        MissingExtraError: kmeans1d is not installed, for "optimal".

    >>> model = nn.Linear(3, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, 1.2, 0.0], [3.0, 3.4, 0.8]]))
    >>> share(model, 2, start="optimal").finish()
    >>> [[round(weight, 3) for weight in row] for row in model.weight.tolist()]
    [[1.0, 1.0, 0.0], [3.2, 3.2, 1.0]]
    """
    for name, value, known in (("start", start, STARTS), ("learn", learn, LEARNT)):
        if value not in known:
            raise OptionError(f"{name}={value!r}\nhint: one of {', '.join(known)}")
    by_name = num_values if isinstance(num_values, Mapping) else {}
    places = places_of(model, by_name if isinstance(num_values, Mapping) else None)
    counts = [
        num_values if isinstance(num_values, int) else by_name[place.name] for place in places
    ]
    if min(counts) < 1:
        raise OptionError(f"num_values={num_values!r}; each parameter needs one at least")
    generator = torch.Generator().manual_seed(seed)
    codebooks = [
        _Codebook(
            place.stored.detach(), start_values(place.tensor.detach(), count, start, generator),
            learn == "both", bit_weight,
        )
        for place, count in zip(places, counts, strict=True)
    ]  # fmt: skip
    for place, codebook in zip(places, codebooks, strict=True):
        if learn == "codebook":
            place.stored.requires_grad_(False)
        attach(place, codebook)
    return Sharing(places, codebooks)


def start_values(
    weights: torch.Tensor, num: int, start: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return at most `num` ascending values for the weights that are not zero; see `share`."""
    own = weights[weights != 0].reshape(-1)
    if own.numel() == 0:
        return own
    distinct: torch.Tensor = torch.unique(own)
    if len(distinct) <= num:
        return distinct
    if start == "linear":
        return torch.linspace(float(own.min()), float(own.max()), num, dtype=own.dtype)
    if start == "density":
        places = (torch.arange(num) + 0.5) / num * (own.numel() - 1)
        distinct = torch.unique(own.sort().values[places.round().long()])
        return distinct
    if start == "random":
        drawn = torch.randperm(len(distinct), generator=generator)[:num]
        return distinct[drawn].sort().values
    centers = torch.tensor(kmeans1d().cluster(own.double().tolist(), num).centroids)
    distinct = torch.unique(centers.to(own.dtype))
    return distinct


class _Codebook(nn.Module):
    """A weight as values of a codebook.

    Attributes:
        values: trained.
    """

    positions: torch.Tensor
    codes: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, values: torch.Tensor, moves: bool, bit_weight: float
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())
        self.moves, self.bit_weight = moves, bit_weight
        positions = weight.reshape(-1).nonzero()[:, 0]
        self.register_buffer("positions", positions, persistent=False)
        own = weight.reshape(-1)[positions]
        self.register_buffer("codes", _nearest(own, values), persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.moves and torch.is_grad_enabled():
            self._move(weight.detach().reshape(-1)[self.positions])
        shared = _Shared.apply(weight, self.values, self.positions, self.codes)  # type: ignore
        return shared  # type: ignore[no-any-return]

    @torch.no_grad()
    def _move(self, own: torch.Tensor) -> None:
        values = self.values
        if not len(own):
            return
        if not self.bit_weight:
            self.codes.copy_(_nearest(own, values))
            return
        counts = torch.bincount(self.codes, minlength=len(values)).to(own.dtype)
        bits = -((counts + 0.5) / (len(own) + 0.5 * len(values))).log2()
        cost = (own[:, None] - values).square() / own.square().mean() + self.bit_weight * bits
        self.codes.copy_(cost.argmin(dim=1))


class _Shared(torch.autograd.Function):
    """Codes to weights; back, the sums over clusters' members, and what each weight would get."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(positions, codes.clone())
        ctx.num_values = len(values)
        shared = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if len(values):
            shared.view(-1)[positions] = values[codes]
        return shared

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        positions, codes = ctx.saved_tensors
        members = gradient.reshape(-1)[positions]
        for_weight = for_values = None
        if ctx.needs_input_grad[0]:
            for_weight = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
            for_weight.view(-1)[positions] = members
        if ctx.needs_input_grad[1]:
            sums = torch.zeros(ctx.num_values, dtype=gradient.dtype, device=gradient.device)
            for_values = sums.index_add_(0, codes, members)
        return for_weight, for_values, None, None


def _nearest(own: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if not len(values):
        return torch.zeros(len(own), dtype=torch.int64, device=own.device)
    # Training may have changed the order of values.
    ascending, order = values.sort()
    return order[torch.bucketize(own, (ascending[1:] + ascending[:-1]) / 2)]
