"""Weights that become zero while a model is trained: masks, and by which score they are drawn.

- magnitude: Han et al. 2015, arXiv 1506.02626; gradually: Zhu, Gupta 2017, arXiv 1710.01878.
- lamp: magnitudes made comparable between layers, Lee et al. 2021, arXiv 2010.07611.
- movement: weights that training moves towards zero, Sanh et al. 2020, arXiv 2005.07683.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from packlight.compress.layers import attach, detach, places_of
from packlight.errors import OptionError

SCORES = ("magnitude", "lamp", "movement")
SCOPES = ("layer", "global")


class _Mask(nn.Module):
    """A weight where the mask is 1, zero where it is 0.

    Attributes:
        mask: of the weight's shape and dtype.
        passes: whether pruned weights get the gradient that they would have, and may come back.
    """

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor, passes: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)
        self.passes = passes

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        masked = weight * self.mask
        return weight + (masked - weight).detach() if self.passes else masked


class Pruner:
    """Keeps a share of a model's weights; the others are zero while the model is trained.

        pruner = Pruner(model)
        optimizer = ...                          # over model.parameters(), as ever
        for step, batch in enumerate(loader):
            if step % 100 == 0:
                pruner.prune_to(gradual(step / num_steps, final_density=0.05))
            ...                                  # the usual step
        pruner.finish()                          # a plain model, with zeros

    Weights go through a mask, as a parametrization: the model's parameters stay the same objects,
    so an optimizer made before goes on; `state_dict()` has other names until `finish()`.

    Args:
        model: changed: its weights go through masks.
        score: "magnitude"; "lamp": squared magnitude over the sum of those of the layer that are
            not smaller; "movement": minus the sum of weight times gradient over the steps so far.
        scope: "layer": the same share of each tensor is kept; "global": the best of all tensors.
        names: of the parameters; None is all of two dims and more.
        regrow: pruned weights are trained on behind their mask and come back when their score is
            high again (dynamic network surgery, arXiv 1608.04493). Always so for "movement".

    Raises:
        OptionError: an unknown score or scope.
        CompressionError: no such parameter, or one that is not finite.

    >>> model = nn.Linear(4, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, -5.0, 2.0, 0.5], [3.0, 0.1, -4.0, 0.2]]))
    >>> pruner = Pruner(model)
    >>> pruner.prune_to(0.5)
    >>> pruner.finish()
    >>> model.weight.tolist()
    [[0.0, -5.0, 2.0, 0.0], [3.0, 0.0, -4.0, 0.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        score: str = "magnitude",
        scope: str = "global",
        names: Iterable[str] | None = None,
        regrow: bool = False,
    ) -> None:
        _one_of("score", score, SCORES)
        _one_of("scope", scope, SCOPES)
        self._scope, self._score = scope, score
        self._places = places_of(model, names)
        self._masks = [_Mask(place.tensor.detach(), regrow or score == "movement")
                       for place in self._places]  # fmt: skip
        self._moved: list[torch.Tensor] = []
        self._hooks = []
        for place, mask in zip(self._places, self._masks, strict=True):
            mask.mask.copy_(place.tensor.detach() != 0)
            attach(place, mask)
            if score == "movement":
                moved = torch.zeros_like(place.stored, requires_grad=False)
                self._moved.append(moved)
                self._hooks.append(
                    place.stored.register_post_accumulate_grad_hook(  # type: ignore
                        _movement_into(moved)
                    )
                )

    @property
    def density(self) -> float:
        """The share of weights that are kept now."""
        kept = sum(int(mask.mask.sum()) for mask in self._masks)
        return kept / sum(mask.mask.numel() for mask in self._masks)

    def densities(self) -> dict[str, float]:
        """Return the share of weights kept, by parameter."""
        return {
            place.name: float(mask.mask.mean(dtype=torch.float64))
            for place, mask in zip(self._places, self._masks, strict=True)
        }

    @torch.no_grad()
    def prune_to(self, density: float | Mapping[str, float]) -> None:
        """Keep so many of the weights, those with the highest scores.

        Unless they may regrow, weights that are zero stay so, and a density above the present one
        changes nothing.

        Args:
            density: the share to keep, above 0 and at most 1; for each parameter its own, if a
                mapping from names is given (others stay as they are).

        Raises:
            OptionError: it is out of range, or for a parameter that is not pruned.
        """
        if isinstance(density, Mapping):
            unknown = set(density) - {place.name for place in self._places}
            if unknown:
                raise OptionError(f"density for {sorted(unknown)}, which this pruner has not")
            for index, place in enumerate(self._places):
                if place.name in density:
                    self._keep([index], _checked(density[place.name]))
        elif self._scope == "layer":
            for index in range(len(self._places)):
                self._keep([index], _checked(density))
        else:
            self._keep(list(range(len(self._places))), _checked(density))

    def finish(self) -> None:
        """Write the zeros into the weights and take the masks away; the model is plain again."""
        for hook in self._hooks:
            hook.remove()
        for place in self._places:
            detach(place)

    def _keep(self, indices: list[int], density: float) -> None:
        scores = [self._scores(index) for index in indices]
        flat = torch.cat([score.reshape(-1) for score in scores])
        num_kept = max(1, round(density * flat.numel()))
        if num_kept >= flat.numel():
            kept = flat > -torch.inf
        else:
            kept = torch.zeros_like(flat, dtype=torch.bool)
            kept[flat.topk(num_kept, sorted=False).indices] = True
            kept &= flat > -torch.inf
        parts = torch.split(kept, [score.numel() for score in scores])
        for index, part in zip(indices, parts, strict=True):
            mask = self._masks[index].mask
            mask.copy_(part.view_as(mask))

    def _scores(self, index: int) -> torch.Tensor:
        place, mask = self._places[index], self._masks[index]
        if self._score == "movement":
            return self._moved[index]
        magnitude = place.stored.detach().abs()
        if self._score == "lamp":
            magnitude = _lamp(magnitude if mask.passes else magnitude * mask.mask)
        return magnitude if mask.passes else magnitude.masked_fill(mask.mask == 0, -torch.inf)


def gradual(
    share_done: float, final_density: float, *, begin: float = 0.0, end: float = 0.75
) -> float:
    """Return the density at a share of the training: 1 at `begin`, then falling, slower and slower.

    `d + (1 - d) (1 - t)^3` with t from 0 at `begin` to 1 at `end` (Zhu, Gupta 2017, equation 1).

    >>> [round(gradual(share_done, 0.1), 4) for share_done in (0.0, 0.375, 0.9)]
    [1.0, 0.2125, 0.1]
    """
    t = min(1.0, max(0.0, (share_done - begin) / (end - begin)))
    return final_density + (1 - final_density) * (1 - t) ** 3


def iterative(round_index: int, num_rounds: int, final_density: float) -> float:
    """Return the density after a round of prune and retrain: each keeps the same share.

    >>> [round(iterative(i, 3, 0.125), 3) for i in range(3)]
    [0.5, 0.25, 0.125]
    """
    return float(final_density ** ((round_index + 1) / num_rounds))


def _lamp(magnitude: torch.Tensor) -> torch.Tensor:
    squares = magnitude.double().square().reshape(-1)
    ascending, order = squares.sort()
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = ascending / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view_as(magnitude)


def _movement_into(moved: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            moved.addcmul_(parameter, parameter.grad, value=-1)  # type: ignore[arg-type]

    return add


def _checked(density: float) -> float:
    if not 0 < density <= 1:
        raise OptionError(f"density={density!r}; it must be above 0 and at most 1")
    return density


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name}={value!r}\nhint: one of {', '.join(known)}")
