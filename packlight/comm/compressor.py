"""What a compressed all-reduce is: `init`, `compress`, `combine`, in optax's shape.

    state = compressor.init(parameter)
    message, state = compressor.compress(gradient, state)     # on each rank
    gradient = compressor.combine(messages)                   # of all ranks: their average

Some methods need more than one round, and some states take in what came back. So there is a
coroutine beside the three, `reduce`, which yields messages and is sent everybody's; by default it
is those three lines. Whoever drives it decides what carries messages: a network (`Transport`), or
one process that plays all ranks (`reduce_here`), which is the oracle of the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

# Tensors, numbers, and states of what is inside: what a checkpoint holds. A state is used up by
# the call that it is given to, whose result may live in the same tensors.
State = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """What one rank tells the others of one gradient.

    Attributes:
        payload: what is sent. uint8 [bytes], packed; or float32 [elements] if it is linear. Without
            elements it stands for zeros.
        shape: of the gradient; not sent, all ranks know it.
        is_linear: whether the average of payloads is the payload of the average, so that they may
            be summed on the way.
        context: what else all ranks know; not sent.
    """

    payload: torch.Tensor
    shape: torch.Size
    is_linear: bool = False
    context: Any = None

    @property
    def num_bytes(self) -> int:
        """Size of what is sent."""
        return self.payload.numel() * self.payload.element_size()


def on_the_way(messages: Sequence[Message]) -> Sequence[Message]:
    """Return what arrives of messages: themselves, or the average of linear ones, in rank order."""
    first = messages[0]
    if not first.is_linear or len(messages) == 1:
        return messages
    total = first.payload.clone()
    for message in messages[1:]:
        total += message.payload
    return [replace(first, payload=total.div_(len(messages)))]


def silence(shape: torch.Size) -> Message:
    """Return the message of a rank that has nothing to say; it stands for zeros."""
    return Message(torch.empty(0, dtype=torch.uint8), shape)


class Reduced:
    """What an all-reduce has led to on one rank.

    Attributes:
        gradient: the average over ranks, float32.
        state: of the compressor, for the next one.
    """

    def __init__(
        self, gradient: torch.Tensor, state: State, compressor: Compressor, message: Message
    ) -> None:
        self.gradient, self.state = gradient, state
        self._compressor, self._message = compressor, message

    @cached_property
    def sent(self) -> torch.Tensor:
        """What of this rank's gradient has got into the average, times the number of ranks."""
        return self._compressor.combine([self._message])


Reduction = Generator[Message, Sequence[Message], Reduced]


class Compressor(ABC):
    """A method of compression; its subclasses are frozen dataclasses whose fields are settings.

    Attributes:
        is_contraction: whether what is lost is never more than what was given, in squares: what
            error feedback needs in order to send everything in the end.
        is_unbiased: whether it is right on average.
        needs_shape: whether it makes use of a matrix's rows and columns.
    """

    is_contraction = False
    is_unbiased = False
    needs_shape = False

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return the state of a parameter of which nothing has been sent.

        Args:
            parameter: of any shape.
            number: tells it from other parameters where random numbers are drawn.
            rank: tells ranks from one another, there.
        """
        return {}

    @abstractmethod
    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return what this rank sends of a gradient, and the next state.

        Args:
            gradient: float32 on the CPU, contiguous; it is not changed.
            state: of this parameter; it is used up.
        """

    def combine(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the average of what messages stand for, float32, in the gradient's shape."""
        total = torch.zeros(messages[0].shape)
        flat = total.view(-1)
        for message in messages:
            if message.payload.numel():
                self._add(message, flat)
        return total.div_(len(messages)) if len(messages) > 1 else total

    @abstractmethod
    def _add(self, message: Message, total: torch.Tensor) -> None:
        """Add what a message stands for to a flat float32 tensor."""

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks: yields this rank's messages and is sent everybody's."""
        message, state = self.compress(gradient, state)
        messages = yield message
        return Reduced(self.combine(messages), state, self, message)


class Composition(Compressor):
    """A compressor around another one: what it does before and after.

    Attributes:
        inner: the other one. Its state lies in this one's, as "inner".
    """

    inner: Compressor

    @property
    def needs_shape(self) -> bool:  # type: ignore[override]
        """Whether the inner compressor does."""
        return self.inner.needs_shape

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return its own state with that of the inner compressor."""
        return {**self._own(parameter), "inner": self.inner.init(parameter, number, rank)}

    def _own(self, parameter: torch.Tensor) -> State:
        return {}

    def _before(self, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor | None, State]:
        """Return what to send, None for nothing this time; and the next state."""
        return gradient, state

    def _after(self, given: torch.Tensor, reduced: Reduced, state: State) -> State:
        """Return the next state, after `given` was sent."""
        return state

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return a message, and the state as if this rank were the only one."""
        reduction = self.reduce(gradient, state)
        message = next(reduction)
        try:
            while True:
                message = reduction.send([message])
        except StopIteration as end:
            return message, end.value.state

    def combine(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the average of what messages stand for."""
        return self.inner.combine(messages)

    def _add(self, message: Message, total: torch.Tensor) -> None:
        self.inner._add(message, total)

    def reduce(self, gradient: torch.Tensor, state: State) -> Reduction:
        """Average a gradient over ranks."""
        given, state = self._before(gradient, state)
        if given is None:
            message = silence(gradient.shape)
            yield message
            return Reduced(torch.zeros(gradient.shape), state, self, message)
        reduced = yield from self.inner.reduce(given, state["inner"])
        reduced.state = self._after(given, reduced, {**state, "inner": reduced.state})
        return reduced


def reduce_here(
    compressor: Compressor, gradients: Sequence[torch.Tensor], states: Sequence[State]
) -> tuple[torch.Tensor, list[State]]:
    """Return the average of ranks' gradients and their next states, all of it in this process.

    Args:
        compressor: of all ranks.
        gradients: of each rank.
        states: of each rank.

    >>> from packlight.comm import ErrorFeedback, TopK
    >>> compressor = ErrorFeedback(TopK(density=0.5))
    >>> gradients = [torch.tensor([4.0, 1.0]), torch.tensor([0.0, 3.0])]
    >>> states = [compressor.init(g, rank=rank) for rank, g in enumerate(gradients)]
    >>> average, states = reduce_here(compressor, gradients, states)
    >>> average, states[0]["residual"]
    (tensor([2.0000, 1.5000]), tensor([0., 1.]))
    """
    reductions = [
        compressor.reduce(as_input(gradient), state)
        for gradient, state in zip(gradients, states, strict=True)
    ]
    messages = [next(reduction) for reduction in reductions]
    while True:
        results: list[Reduced] = []
        following: list[Message] = []
        for reduction in reductions:
            try:
                following.append(reduction.send(on_the_way(messages)))
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results[0].gradient, [result.state for result in results]
        messages = following


def as_input(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient as compressors take it: float32, contiguous, on the CPU, detached."""
    return gradient.detach().to("cpu", torch.float32).contiguous()
