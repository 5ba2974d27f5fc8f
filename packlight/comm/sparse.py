"""Some elements of a gradient: the largest, those that reach a threshold, or random ones.

Sent are gaps between indices, in Rice's code, and values in fp32 or fewer bits. Random elements
are drawn from what all ranks know, so that only values are sent.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from packlight.comm.compressor import Compressor, Message, State
from packlight.comm.packing import (
    VALUE_FORMATS,
    Floats,
    Indices,
    Reader,
    kernels,
    read_indices,
    read_values,
    write_indices,
    write_values,
)
from packlight.errors import OptionError

# Where the search for the k-th largest begins: 16 elements of each 1024.
SAMPLE_OF, SAMPLE = 1024, 16
SMALL = 16 * SAMPLE_OF
SPARE_CANDIDATES = 1024


def check_density(density: float) -> None:
    """Refuse a share of elements that is none.

    Raises:
        OptionError: it is not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise OptionError(
            f"density={density!r}; it must be above 0 and at most 1\n"
            "hint: it is the share of elements that is sent, 0.001 for one of a thousand"
        )


def check_values(form: str) -> None:
    """Refuse a form of values that is not known.

    Raises:
        OptionError: it names what there is.
    """
    if form not in VALUE_FORMATS:
        raise OptionError(f"unknown values={form!r}; known: {', '.join(VALUE_FORMATS)}")


def warm_density(density: float, step: int, warmup_steps: int, first_density: float) -> float:
    """Return the density of a step: from the first one down to the last, exponentially, in stages.

    Deep Gradient Compression, section 3.3: 25%, 6.25%, 1.6%, 0.4%, 0.1% in four epochs.
    """
    if step >= warmup_steps or density >= first_density:
        return density
    return float(first_density * (density / first_density) ** (step / warmup_steps))


class _Sparse(Compressor):
    """Elements by their indices."""

    values: str

    @abstractmethod
    def _chosen(self, flat: Floats, state: State) -> Indices:
        """Return which elements are sent, ascending."""

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return the chosen elements."""
        flat = gradient.reshape(-1).numpy()
        indices = self._chosen(flat, state)
        payload = np.concatenate(
            [write_indices(indices, len(flat)), write_values(flat[indices], self.values)]
        )
        message = Message(torch.from_numpy(payload), gradient.shape)
        return message, {**state, "step": state["step"] + 1}

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return a count of steps."""
        return {"step": 0}

    def _add(self, message: Message, total: torch.Tensor) -> None:
        reader = Reader(message.payload.numpy())
        indices = read_indices(reader, total.numel())
        total.numpy()[indices] += read_values(reader, len(indices), self.values)


@dataclass(frozen=True)
class TopK(_Sparse):
    """The elements of the largest magnitude: `ceil(density n)` of n, to the last one.

    Attributes:
        density: share of elements.
        values: their form: "fp32", "bf16", "q8", "q4", "q2", "q1".
        warmup_steps: in so many steps the density falls exponentially to `density`.
        first_density: in the first of them.

    Raises:
        OptionError: a density that is none, or an unknown form.
    """

    density: float
    values: str = "fp32"
    warmup_steps: int = 0
    first_density: float = 0.25
    is_contraction = True

    def __post_init__(self) -> None:
        check_density(self.density)
        check_density(self.first_density)
        check_values(self.values)

    def _chosen(self, flat: Floats, state: State) -> Indices:
        density = warm_density(self.density, state["step"], self.warmup_steps, self.first_density)
        return largest(flat, int(np.ceil(density * len(flat))))


@dataclass(frozen=True)
class Threshold(_Sparse):
    """The elements whose magnitude reaches a threshold.

    With values="threshold" each is sent as the threshold with its sign, one bit, as in Strom 2015,
    "Scalable Distributed DNN Training Using Commodity GPU Cloud Computing": with error feedback,
    what is above stays for the next step.

    Attributes:
        threshold: in the gradient's units.
        values: see `TopK`, or "threshold".

    Raises:
        OptionError: a threshold that is not above 0, or an unknown form.
    """

    threshold: float
    values: str = "threshold"
    is_contraction = True

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise OptionError(f"threshold={self.threshold!r}; it must be above 0")
        if self.values != "threshold":
            check_values(self.values)

    def _chosen(self, flat: Floats, state: State) -> Indices:
        threshold = np.float32(self.threshold)
        indices = np.empty(len(flat) // 8 + 1, np.int64)
        count = kernels().reaching(flat, threshold, indices)
        if count > len(indices):
            indices = np.empty(count, np.int64)
            kernels().reaching(flat, threshold, indices)
        return indices[:count]

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return the elements that reach the threshold."""
        if self.values != "threshold":
            return super().compress(gradient, state)
        flat = gradient.reshape(-1).numpy()
        indices = self._chosen(flat, state)
        payload = [write_indices(indices, len(flat)), np.packbits(flat[indices] < 0)]
        message = Message(torch.from_numpy(np.concatenate(payload)), gradient.shape)
        return message, {**state, "step": state["step"] + 1}

    def _add(self, message: Message, total: torch.Tensor) -> None:
        if self.values != "threshold":
            super()._add(message, total)
            return
        reader = Reader(message.payload.numpy())
        indices = read_indices(reader, total.numel())
        is_negative = np.unpackbits(reader.rest(), count=len(indices)).astype(bool)
        total.numpy()[indices] += np.where(is_negative, -self.threshold, self.threshold)


@dataclass(frozen=True)
class RandomK(Compressor):
    """Elements that are drawn anew in each step, the same on all ranks; no index is sent.

    In fp32 their values are summed on the way.

    Attributes:
        density: share of elements.
        values: see `TopK`.
        rescaled: multiply by 1/density, which is unbiased (and no contraction); without, error
            feedback sends the rest later.
        seed: of what is drawn.

    Raises:
        OptionError: a density that is none, or an unknown form.
    """

    density: float
    values: str = "fp32"
    rescaled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values)

    @property
    def is_contraction(self) -> bool:  # type: ignore[override]
        """Whether nothing is rescaled."""
        return not self.rescaled

    @property
    def is_unbiased(self) -> bool:  # type: ignore[override]
        """Whether what is sent counts for what is not."""
        return self.rescaled and self.values == "fp32"

    def init(self, parameter: torch.Tensor, number: int = 0, rank: int = 0) -> State:
        """Return a count of steps, and whose they are."""
        return {"step": 0, "number": number}

    def compress(self, gradient: torch.Tensor, state: State) -> tuple[Message, State]:
        """Return this step's elements."""
        flat = gradient.reshape(-1).numpy()
        count = int(np.ceil(self.density * len(flat)))
        key = (self.seed % 2**64, state["number"] << 32 | state["step"])
        generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        indices = np.sort(generator.choice(len(flat), count, replace=False, shuffle=False))
        chosen = flat[indices] * np.float32(len(flat) / max(count, 1) if self.rescaled else 1)
        is_linear = self.values == "fp32"
        payload = chosen if is_linear else write_values(chosen, self.values)
        message = Message(torch.from_numpy(payload), gradient.shape, is_linear, indices)
        return message, {**state, "step": state["step"] + 1}

    def _add(self, message: Message, total: torch.Tensor) -> None:
        indices = message.context
        payload = message.payload.numpy()
        if not message.is_linear:
            payload = read_values(Reader(payload), len(indices), self.values)
        total.numpy()[indices] += payload


def largest(flat: Floats, count: int) -> Indices:
    """Return the indices, ascending, of the `count` largest magnitudes; NaN is the largest.

    Of equal ones the first. A sample says from which magnitude on it is worth looking; if it was
    misleading, the search goes on by bisection, so the result is exact whatever the sample.
    """
    if count >= len(flat):
        return np.arange(len(flat))
    if len(flat) <= SMALL:
        candidates = np.arange(len(flat))
    else:
        candidates = _candidates(flat, count)
    magnitudes = flat[candidates].view(np.uint32) & np.uint32(0x7FFFFFFF)
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    above = magnitudes > least
    num_equal = count - int(above.sum())
    above[np.flatnonzero(magnitudes == least)[:num_equal]] = True
    chosen: Indices = candidates[above]
    return chosen


def _candidates(flat: Floats, count: int) -> Indices:
    """Return the indices of the elements above some magnitude, at least `count`, seldom many."""
    room = np.empty(4 * count + SPARE_CANDIDATES, np.int64)
    low, high = 0, 2**31 - 1  # as bits: at least `count` reach `low`, fewer than that `high`
    looked_at = _sampled_magnitude(flat, count)
    while True:
        threshold = np.array([looked_at], np.uint32).view(np.float32)[0]
        found = int(kernels().reaching(flat, threshold, room))
        if count <= found <= len(room):
            return room[:found]
        if found < count:
            high = looked_at
        else:
            low = looked_at
        if high - low <= 1:  # as many are equal
            if looked_at == low:
                room = np.empty(found, np.int64)
            looked_at = low
        else:
            looked_at = (low + high) // 2


def _sampled_magnitude(flat: Floats, count: int) -> int:
    """Return a magnitude, as bits, that somewhat more than `count` elements reach in a sample."""
    whole = len(flat) // SAMPLE_OF * SAMPLE_OF
    sample = flat[:whole].reshape(-1, SAMPLE_OF)[:, :SAMPLE].ravel().view(np.uint32)
    magnitudes = sample & np.uint32(0x7FFFFFFF)
    expected = count * len(sample) / len(flat)
    rank = min(int(expected + 3 * np.sqrt(expected) + 4), len(sample))
    return int(np.partition(magnitudes, len(sample) - rank)[len(sample) - rank])
