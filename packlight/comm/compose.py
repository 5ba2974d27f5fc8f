"""What goes around a compressor: error feedback, momentum correction, clipping, delay, phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from packlight.comm.compressor import Composition, Compressor, Message, Reduced, Reduction, State
from packlight.comm.dense import Dense
from packlight.comm.quantize import Quantize
from packlight.comm.sparse import TopK
from packlight.errors import OptionError


@dataclass(frozen=True)
class ErrorFeedback(Composition):
    """What was not sent is added to the next gradient (Seide et al. 2014, Stich et al. 2018).

        given = gradient + decay residual;  residual <- given - sent

    So all messages of a rank and its residual sum to all its gradients, if nothing decays.

    Attributes:
        inner: a contraction, of which something is sent in the end.
        decay: at most 1; below, the residual is a momentum of what waits (SparseLoCo, Sarfi et al.
            2025, has 0.95 in place of an outer momentum).

    Raises:
        OptionError: `inner` is none, or a decay outside of its range.
    """

    inner: Compressor
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise OptionError(f"decay={self.decay!r}; it must be at least 0 and at most 1")
        if not self.inner.is_contraction:
            raise OptionError(
                f"error feedback around {self.inner}, which is no contraction: what it loses can "
                "be more than what it was given, so that residuals grow\n"
                f"hint: {_instead(self.inner)}"
            )

    is_contraction = True

    def _own(self, parameter: torch.Tensor) -> State:
        return {"residual": torch.zeros(parameter.shape)}

    def _before(self, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor | None, State]:
        return state["residual"].mul_(self.decay).add_(gradient), state

    def _after(self, given: torch.Tensor, reduced: Reduced, state: State) -> State:
        return {**state, "residual": given.sub_(reduced.sent)}


def _instead(inner: Compressor) -> str:
    if type(inner).__name__ == "Sign":
        return "Quantize(bits=1) sends the sign with the mean magnitude"
    if hasattr(inner, "stochastic"):
        return "stochastic=False rounds to nearest, which is one"
    if hasattr(inner, "rescaled"):
        return "rescaled=False, which is one"
    return "it is unbiased and needs none; Quantize(bits=2) or (bits=4) is one"


@dataclass(frozen=True)
class MomentumCorrection(Composition):
    """Momentum before compression, on each rank (Lin et al. 2018, Deep Gradient Compression).

        velocity <- momentum velocity + gradient;  given = velocity

    Around error feedback, so that what waits in the residual is velocity. The optimizer then has
    no momentum. With `masking`, the velocity of what was sent is forgotten (momentum factor
    masking): it would push on with what others have not sent yet.

    Attributes:
        inner: what sends the velocity.
        momentum: at least 0, below 1.
        nesterov: given = gradient + momentum velocity.
        masking: see above; only where something is not sent.

    Raises:
        OptionError: a momentum outside of its range.
    """

    inner: Compressor
    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum!r}; it must be at least 0 and below 1")

    def _own(self, parameter: torch.Tensor) -> State:
        return {"velocity": torch.zeros(parameter.shape)}

    def _before(self, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor | None, State]:
        velocity = state["velocity"].mul_(self.momentum).add_(gradient)
        if self.nesterov:
            return velocity.mul(self.momentum).add_(gradient), state
        return velocity, state

    def _after(self, given: torch.Tensor, reduced: Reduced, state: State) -> State:
        if self.masking:
            state["velocity"].masked_fill_(reduced.sent != 0, 0.0)
        return state


@dataclass(frozen=True)
class Clip(Composition):
    """Shortens a gradient to a norm, tensor by tensor, before anything is added to it.

    Deep Gradient Compression clips on each of N ranks to the threshold of one device times
    N^(-1/2), all parameters together; here each parameter has its own norm.

    Attributes:
        inner: what sends it.
        max_norm: Euclidean.

    Raises:
        OptionError: a norm that is not above 0.
    """

    inner: Compressor
    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise OptionError(f"max_norm={self.max_norm!r}; it must be above 0")

    def _before(self, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor | None, State]:
        norm = float(torch.linalg.vector_norm(gradient))
        return gradient * (self.max_norm / norm) if norm > self.max_norm else gradient, state


@dataclass(frozen=True)
class Delayed(Composition):
    """Sends once in so many steps what has come together since; zeros are the average meanwhile.

    Attributes:
        inner: what sends it.
        every: steps.

    Raises:
        OptionError: no whole number from 1 on.
    """

    inner: Compressor
    every: int

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise OptionError(f"every={self.every!r}; it must be a whole number, 1 or larger")

    def _own(self, parameter: torch.Tensor) -> State:
        return {"step": 0, "held": torch.zeros(parameter.shape)}

    def _before(self, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor | None, State]:
        held = state["held"].add_(gradient)
        step = state["step"] + 1
        if step % self.every:
            return None, {**state, "step": step}
        return held, {**state, "step": step, "held": torch.zeros(gradient.shape)}


@dataclass(frozen=True)
class OneBitMomentum(Composition):
    """The two phases of 1-bit Adam (Tang et al. 2021), for `OneBitAdam`, which steps with them.

    First `warmup_steps` gradients in fp32, while the optimizer learns its second moment. From then
    on, with the second moment frozen, the *momentum* is averaged, compressed:

        given = beta1 momentum + (1 - beta1) gradient;  momentum <- its average

    Attributes:
        warmup_steps: of the first phase.
        inner: sends the momentum; one bit with error feedback in the paper.
        beta1: of the momentum.
    """

    warmup_steps: int
    inner: Compressor = ErrorFeedback(Quantize(bits=1))
    beta1: float = 0.9

    def _own(self, parameter: torch.Tensor) -> State:
        return {"step": 0, "momentum": torch.zeros(parameter.shape)}

    def combine(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the average of what messages stand for."""
        return (Dense() if messages[0].context is _WARMUP else self.inner).combine(messages)

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks, or the momentum."""
        step, momentum = state["step"], state["momentum"]
        state = {**state, "step": step + 1}
        if step < self.warmup_steps:
            message = replace(Dense().compress(gradient, {})[0], context=_WARMUP)
            average = self.combine((yield message))
            momentum.mul_(self.beta1).add_(average, alpha=1 - self.beta1)
            return Reduced(average, state, self, message)
        given = momentum.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        reduced = yield from self.inner.reduce(given, state["inner"])
        reduced.state = {**state, "inner": reduced.state, "momentum": reduced.gradient.clone()}
        return reduced


_WARMUP = "warm-up"


def dgc(
    density: float = 0.001,
    momentum: float = 0.9,
    warmup_steps: int = 0,
    nesterov: bool = False,
    max_norm: float | None = None,
    values: str = "fp32",
) -> Compressor:
    """Return Deep Gradient Compression (Lin et al. 2018), all of it, for an SGD without momentum.

    Clipping, momentum correction, error feedback ("local gradient accumulation"), momentum factor
    masking, the largest elements, and a density that falls to its last value.

    Args:
        density: share of elements that is sent in the end.
        momentum: see `MomentumCorrection`.
        nesterov: see there.
        warmup_steps: see `TopK`.
        max_norm: see `Clip`.
        values: see `TopK`.

    Raises:
        OptionError: a number that it does not take.
    """
    top = TopK(density, values, warmup_steps)
    corrected = MomentumCorrection(ErrorFeedback(top), momentum, nesterov)
    return corrected if max_norm is None else Clip(corrected, max_norm)
