"""Loads the user's FILE, and feeds its batches so that they can be replayed.

The functions of a FILE are documented in `packlight --help`. Whatever goes wrong inside them is
reported with the place in the FILE, not with a traceback through Packlight.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packlight.capture.returned import loss_of
from packlight.errors import OptionError, PacklightError

NUM_VALIDATION_BATCHES = 20

_REQUIRED = {
    "model": "model() -> nn.Module",
    "loss": "loss(model, batch) -> scalar tensor",
    "optimizer": "optimizer(model) -> torch.optim.Optimizer",
    "batches": 'batches(split="train") -> iterator of batches',
}


_END = object()


class ExampleError(PacklightError, ValueError):
    """A function of the user's FILE failed, or returned what it must not."""


@dataclass(frozen=True)
class Example:
    """The functions of a FILE, each reporting its failures as an `ExampleError`."""

    path: Path
    model: Callable[..., torch.nn.Module]
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    batches: Callable[..., Iterator[Any]]
    tokens_per_batch: Callable[[Any], int] | None
    sample: Callable[[torch.nn.Module], str] | None
    error: Callable[[torch.nn.Module, Any], Any] | None = None
    space: Callable[[Any], dict[str, Any]] | None = None


def load_example(file: str) -> Example:
    """Return the functions of a FILE.

    Raises:
        OptionError: the file is missing, is no Python, or lacks a function.
        ExampleError: it fails while it is imported.
    """
    path = Path(file)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise OptionError(f"{file}: {what}")
    spec = importlib.util.spec_from_file_location(f"packlight_example_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{file}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # As for a script: the file may import its neighbours, and its classes know their module.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    with _failures_named(path, "it"):
        spec.loader.exec_module(module)
    missing = [text for name, text in _REQUIRED.items() if not callable(getattr(module, name, 0))]
    if missing:
        raise OptionError(f"{file} lacks {missing[0].split('(')[0]}()\nhint: define {missing[0]}")

    def named(name: str) -> Callable[..., Any]:
        function = getattr(module, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _failures_named(path, f"{name}()"):
                return function(*args, **kwargs)

        return call

    # The loss runs inside of the capture, whose own errors must come through: it is not wrapped.
    return Example(
        path=path,
        model=named("model"),
        loss=module.loss,
        optimizer=named("optimizer"),
        batches=named("batches"),
        tokens_per_batch=named("tokens_per_batch") if hasattr(module, "tokens_per_batch") else None,
        sample=named("sample") if hasattr(module, "sample") else None,
        error=named("error") if hasattr(module, "error") else None,
        space=named("space") if hasattr(module, "space") else None,
    )


@contextmanager
def _failures_named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except PacklightError:
        raise
    except SyntaxError as error:
        raise OptionError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == path.resolve()
        ]
        line = f":{own[-1].lineno}" if own else ""
        raise ExampleError(
            f"{path}{line}: {what} failed with {type(error).__name__}: {error}"
        ) from error


def build(example: Example, device: str, seed: int) -> tuple[torch.nn.Module, Any]:
    """Return the example's model on a device, in training mode, and its optimizer.

    On the meta device, the model is made there: it never has values.

    Raises:
        OptionError: the device does not exist.
        ExampleError: the functions fail or return something else.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device} cannot be used: {reason}") from None
    seed_everything(seed)
    with torch.device(device) if device == "meta" else nullcontext():
        model = example.model()
    if not isinstance(model, torch.nn.Module):
        raise ExampleError(f"{example.path}: model() returned {type(model).__name__}, not a Module")
    model.to(device).train()
    optimizer = example.optimizer(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ExampleError(
            f"{example.path}: optimizer() returned {type(optimizer).__name__}, not an Optimizer"
        )
    return model, optimizer


def error_of(
    model: torch.nn.Module,
    example: Example,
    device: str,
    seed: int,
    most_batches: int = NUM_VALIDATION_BATCHES,
) -> float:
    """Return the mean error, or else loss, over validation batches.

    Raises:
        OptionError: there are none.
        ExampleError: the functions fail.
    """
    was_training = model.training
    model.eval()
    total, num_batches = 0.0, 0
    with torch.no_grad():
        for batch in BatchStream(example, "validation", device, seed):
            if example.error is not None:
                total += float(example.error(model, batch))
            else:
                total += float(loss_of(example.loss(model, batch)))
            num_batches += 1
            if num_batches == most_batches:
                break
    model.train(was_training)
    if not num_batches:
        raise OptionError(f'{example.path}: batches("validation") yields nothing')
    return total / num_batches


def seed_everything(seed: int) -> None:
    """Seed torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class BatchStream:
    """The batches of an example, the same ones for the same seed whatever else draws numbers.

    The example's iterator sees generators (torch's on the CPU, Python's, numpy's) of its own, put
    in place around each batch; dropout and the like never disturb it, nor it them. So the stream
    at batch n is a function of seed and n alone, and a resumed run replays the first n batches.

    Attributes:
        num_drawn: how many batches have been drawn.
    """

    def __init__(
        self, example: Example, split: str, device: str, seed: int, num_skipped: int = 0
    ) -> None:
        self.num_drawn = 0
        self._split = split
        self._path = example.path
        self._device = torch.device(device)
        with self._own_generators():
            # Only the CPU's generator: torch.manual_seed would reseed CUDA's as well.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            with _failures_named(self._path, "batches()"):
                self._iterator = iter(example.batches(split))
        for _ in range(num_skipped):
            self._draw()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return to_device(self._draw(), self._device)

    def _draw(self) -> Any:
        with self._own_generators(), _failures_named(self._path, "batches()"):
            batch = next(self._iterator, _END)
        if batch is _END:
            if self._split != "train":
                raise StopIteration
            raise ExampleError(
                f"{self._path}: batches('train') ended after {self.num_drawn} batches\n"
                "hint: make it endless: start over when the data are used up"
            )
        self.num_drawn += 1
        return batch

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        outside = _generator_states()
        _set_generator_states(getattr(self, "_inside", outside))
        try:
            yield
        finally:
            self._inside = _generator_states()
            _set_generator_states(outside)


class PartStream:
    """A rank's part of each batch of a stream: as equal as possible, the first ones larger."""

    def __init__(self, stream: Iterator[Any], rank: int, size: int) -> None:
        self._stream, self._rank, self._size = stream, rank, size

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        from packlight.moves.microbatch.split import num_rows, split

        batch = next(self._stream)
        if num_rows(batch) < self._size:
            raise ExampleError(
                f"a batch of {num_rows(batch)} rows has no part for each of {self._size} ranks\n"
                "hint: batches() yields the batch of all ranks together: make it larger"
            )
        return split(batch, self._size)[self._rank]


def _generator_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_generator_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch (tensor, or tuple, list or dict of them) with its tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
