"""What was observed of an optimizer's steps, remembered on disk.

Only for optimizers whose code a version tells: torch's own and Packlight's. Anybody else's may
compute something else tomorrow under the same name, and is observed in every process.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packlight.costs.cache import Cache
from packlight.torch_internals.optimizers import plain_step
from packlight.updates.twin import kinds_of_settings


class RememberedSteps:
    """Observations of one optimizer with its present settings, by what was asked.

    Args:
        optimizer: not changed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._code = _version_of(type(optimizer))
        self._optimizer = optimizer
        self._cache: Cache | None = None

    def seen(self, question: tuple[Any, ...], observe: Callable[[], Any]) -> Any:
        """Return the answer to a question, from disk or by `observe()`.

        Args:
            question: equal for equal answers, in plain words and numbers; that the optimizer's
                class and the kinds of its settings are the same goes without saying.
            observe: returns a value that JSON knows.
        """
        if self._code is None:
            return observe()
        if self._cache is None:
            groups = self._optimizer.param_groups
            parameters = (p for group in groups for p in group["params"])
            self._cache = Cache("optimizers", next(parameters).device)
        settings = kinds_of_settings(self._optimizer)
        # How a kernel splits its work among threads may decide bits; their number can change.
        threads = torch.get_num_threads()
        key = f"{type(self._optimizer)} {self._code} {settings} {threads} threads {question}"
        if key not in self._cache:
            self._cache[key] = observe()
            self._cache.save()
        return self._cache[key]


def _version_of(optimizer_class: type[torch.optim.Optimizer]) -> str | None:
    """Return what tells an optimizer's code from that of another release, None if nothing does."""
    step = plain_step(optimizer_class)
    homes = {optimizer_class.__module__, getattr(step, "__module__", "")}
    if all(home.startswith("torch.optim.") for home in homes):
        return "torch"  # its version is in the file's name
    if all(home.startswith("packlight.optim.") for home in homes):
        return _digest_of_our_optimizers()
    return None


@functools.cache
def _digest_of_our_optimizers() -> str:
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).resolve().parent.parent / "optim").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
