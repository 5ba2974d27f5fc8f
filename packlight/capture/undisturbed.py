"""Running a user's Python for a look, and leaving all that it changed as it was.

Tracing a call has no side effects: dynamo applies them when the traced call runs. Where a loss has
to run for real before anything is trained, attributes that it counts up, lists that it appends to,
generators that it draws from and tensors that it writes to are put back.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

# What is looked through for more: a container of more elements is put back, but not looked into.
MAX_ELEMENTS, MAX_OBJECTS = 10_000, 200_000
# Objects of these packages are not looked into; modules of layers are.
CLOSED_PACKAGES = {"torch", "numpy", "packlight", "logging", "threading", "builtins"}
PLAIN = (bool, int, float, complex, str, bytes, type(None))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the random numbers of Python, numpy and torch back to where they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def undisturbed(*roots: Any) -> Iterator[None]:
    """Put back what is changed meanwhile in everything that can be reached from some objects.

    That is attributes, containers, what functions close over and which globals they name, tensors
    other than parameters, and generators.

    Args:
        roots: models, functions, other objects.
    """
    kept = PythonState(*roots)
    with generators_kept():
        try:
            yield
        finally:
            kept.put_back()


class PythonState:
    """What can be reached from some objects, as it is now: see `undisturbed`."""

    def __init__(self, *roots: Any) -> None:
        self._put_back: list[Callable[[], None]] = []
        self._is_same: list[Callable[[], bool]] = []
        self._seen: dict[int, Any] = {}  # objects are held, so that no number comes up again
        for root in roots:
            self.look_at(root)

    def put_back(self) -> None:
        """Have everything as it was."""
        for put_back in self._put_back:
            put_back()

    @property
    def is_same(self) -> bool:
        """Whether all attributes, containers and variables hold what they held."""
        return all(is_same() for is_same in self._is_same)

    def look_at(self, root: Any) -> None:
        """Keep what can be reached from an object."""
        remaining = [root]
        while remaining and len(self._seen) < MAX_OBJECTS:
            found = remaining.pop()
            if id(found) not in self._seen and not isinstance(found, (type, ModuleType)):
                self._seen[id(found)] = found
                remaining.extend(self._inside(found))

    def _inside(self, found: Any) -> list[Any]:
        """Keep one object, and return what it holds."""
        if isinstance(found, (tuple, frozenset)):
            return list(found)
        if isinstance(found, (dict, list, set, deque)):
            return self._keep_container(found)
        if isinstance(found, torch.Tensor):
            self._keep_tensor(found)
        elif isinstance(found, FunctionType):
            return self._keep_function(found)
        elif isinstance(found, MethodType):
            return [found.__self__, found.__func__]
        elif isinstance(found, functools.partial):
            return [found.func, found.args, found.keywords]
        elif isinstance(found, random.Random):
            self._put_back.append(functools.partial(found.setstate, found.getstate()))
        elif isinstance(found, torch.Generator):
            noise, state = found, found.get_state()

            def put_back() -> None:
                noise.set_state(state)

            self._put_back.append(put_back)
        elif isinstance(found, np.random.Generator):
            bits, numbers = found.bit_generator, found.bit_generator.state
            self._put_back.append(lambda: setattr(bits, "state", numbers))
        elif isinstance(found, nn.Module):
            forward = getattr(type(found), "forward", None)
            return [*self._keep_container(vars(found)), forward]
        elif type(found).__module__.partition(".")[0] not in CLOSED_PACKAGES:
            return self._keep_container(getattr(found, "__dict__", {}))
        return []

    def _keep_container(self, held: Any) -> list[Any]:
        if isinstance(held, dict):
            before = dict(held)
            inside = list(before.values())

            def is_same() -> bool:
                return held.keys() == before.keys() and _are_same(held.values(), inside)

            def fill() -> None:
                held.update(before)
        else:
            inside = list(held)

            def is_same() -> bool:
                return len(held) == len(inside) and _are_same(held, inside)

            def fill() -> None:
                (held.update if isinstance(held, set) else held.extend)(inside)

        def put_back() -> None:
            if not is_same():
                held.clear()
                fill()

        self._is_same.append(is_same)
        self._put_back.append(put_back)
        return inside if len(inside) <= MAX_ELEMENTS else []

    def _keep_function(self, function: FunctionType) -> list[Any]:
        # Globals that a function names: numbers and containers are what it would count in.
        values = function.__globals__
        named = {name: values[name] for name in function.__code__.co_names if name in values}
        plain = {name: value for name, value in named.items() if isinstance(value, PLAIN)}
        if plain:
            self._put_back.append(lambda: values.update(plain))
            self._is_same.append(lambda: _are_same(map(values.get, plain), plain.values()))
        inside = [
            value for value in named.values()
            if isinstance(value, (dict, list, set, deque, random.Random, np.random.Generator))
            or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
        ]
        cells = list(function.__closure__ or ())
        contents = [(cell, cell.cell_contents) for cell in cells if not _is_empty(cell)]

        def put_back() -> None:
            for cell, content in contents:
                cell.cell_contents = content

        if contents:
            self._put_back.append(put_back)
            held = [content for _, content in contents]
            self._is_same.append(lambda: _are_same((c.cell_contents for c, _ in contents), held))
        closed_over = [content for _, content in contents]
        return [*inside, *closed_over, vars(function), function.__defaults__]

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or tensor.grad_fn is not None or tensor.is_meta:
            return
        value, version = tensor.detach().clone(), tensor._version

        def put_back() -> None:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)

        self._put_back.append(put_back)


def _are_same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(
        a is b or (type(a) is type(b) and isinstance(a, PLAIN) and bool(a == b))
        for a, b in zip(now, before, strict=True)
    )


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - it raises where nothing is in it
    except ValueError:
        return True
    return False
