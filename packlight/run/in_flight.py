"""Runs of pieces between their forward and their backward, and what of a step is in memory.

Autograd keeps a token for each run, a small tensor; while its memory lives, the backward may come.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from packlight.run.piece_record import Run
from packlight.torch_internals.storages import StorageWatch, storage_identity


class RunsInFlight:
    """The runs whose backward may still come.

    Args:
        others: tensors that a step has made and somebody else holds by now: gradients.
    """

    def __init__(self, others: Callable[[], Iterable[torch.Tensor]] = tuple) -> None:
        self._others = others
        # Changes in finalizers, that is at any moment: by one operation at a time.
        self._runs: dict[int, Run] = {}
        self._numbers = itertools.count()
        self._watches: dict[int, StorageWatch] = {}

    def begin_step(self) -> None:
        """Forget what earlier steps have returned."""
        self._watches.clear()

    def token(self, run: Run) -> torch.Tensor:
        """Return what autograd is to keep while a run's backward may come."""
        number = next(self._numbers)
        self._runs[number] = run
        memory = np.array([number])
        weakref.finalize(memory, self._forget, number).atexit = False
        return torch.from_numpy(memory)

    def _forget(self, number: int) -> None:
        run = self._runs.pop(number, None)
        if run is not None:
            run.frame = None

    def of(self, token: torch.Tensor) -> Run | None:
        """Return the run with a token, if it is in flight."""
        return self._runs.get(int(token))

    def clear(self) -> None:
        """Forget all."""
        self._runs.clear()

    def alive(self) -> list[Run]:
        """Return the runs that keep something for a backward."""
        return [run for run in [*self._runs.values()] if run.frame is not None]

    def note_made(self, values: Iterable[Any]) -> list[StorageWatch]:
        """Watch what a section returns."""
        found = []
        for value in values:
            if isinstance(value, torch.Tensor):
                identity = storage_identity(value)
                watch = self._watches.get(identity)
                if watch is None or not watch.num_tensors:
                    watch = self._watches[identity] = StorageWatch(value)
                found.append(watch)
        return found

    def used_bytes(self, run: Run | None = None, arguments: Sequence[Any] = ()) -> int:
        """Return what is in memory of what the step has made.

        Args:
            run: what it keeps and what its forward has returned does not count.
            arguments: nor do these.
        """
        own = () if run is None else run.made
        sizes = {
            identity: watch.num_bytes for identity, watch in self._watches.items()
            if watch.num_tensors and watch not in own
        }
        tensors = [*self._others()]
        left_out = [value for value in arguments if isinstance(value, torch.Tensor)]
        for other in self.alive():
            (left_out if other is run else tensors).extend(other.kept())
        sizes.update((storage_identity(t), t.untyped_storage().nbytes()) for t in tensors)
        for tensor in left_out:
            sizes.pop(storage_identity(tensor), None)
        return sum(sizes.values())
