"""Sparse weights while they train: patterns change after steps, optimizer state follows."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from packlight.after_step import AfterStep
from packlight.errors import SparsityError
from packlight.sparse import ops
from packlight.sparse.method import Change, Method, Run
from packlight.sparse.state import check_movable, move_state, state_bytes
from packlight.sparse.weight import SparseWeight
from packlight.units import format_bytes


class Sparsity:
    """The sparse weights of a model, and how they change. Made by `sparsify`.

    Attributes:
        method: with its settings.
        weights: by name, each once.
        run: what the method knows of the training.
        left: names of layers with weights that stay dense, and why.
        history: (step, number of nonzeros of each weight) at the start and after changes.
    """

    def __init__(
        self, method: Method, weights: dict[str, SparseWeight], run: Run, left: dict[str, str]
    ) -> None:
        self.method, self.weights, self.run, self.left = method, weights, run, left
        self.history: list[tuple[int, list[int]]] = []
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._observed: list[int] = []  # addresses of indices
        weakref.finalize(self, _forget, self._observed)
        self._note_history()

    @property
    def num_nonzeros(self) -> int:
        """Of all sparse weights."""
        return sum(weight.num_nonzeros for weight in self.weights.values())

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that is stored now."""
        return self.num_nonzeros / sum(weight.numel() for weight in self.weights.values())

    def attach(self, *optimizers: torch.optim.Optimizer) -> Sparsity:
        """Change patterns after steps of these optimizers, and their state with it; return self.

        A step is over when the last of them has stepped.

        Raises:
            SparsityError: values that none of them holds, an optimizer whose state cannot follow,
                attached already.
        """
        if self._optimizers:
            raise SparsityError("these sparse weights are attached to an optimizer already")
        held = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
        for name, weight in self.weights.items():
            if id(weight.values) not in held:
                given = ", ".join(type(o).__name__ for o in optimizers) or "no optimizer"
                raise SparsityError(
                    f"{given} does not hold the values of {name!r}\nhint: make the optimizer of "
                    "model.parameters() after sparsify, and attach all that train the model"
                )
            check_movable(name, held[id(weight.values)], weight.values)
        self._optimizers = optimizers
        optimizers[-1].register_step_post_hook(AfterStep(self.after_step))
        self._watch()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Do what the method does after an optimizer's step; called by the attached optimizer."""
        self.run.step += 1
        weights = list(self.weights.values())
        self.method.after_step(weights, self.run, [self._group(w).get("lr", 0.0) for w in weights])
        if self.method.is_due(self.run.step):
            self.rewire()
        self._watch()

    @torch.no_grad()
    def rewire(self) -> None:
        """Change all patterns as the method says, now.

        Raises:
            SparsityError: a layer would lose all its weights, or the state of an optimizer cannot
                follow; nothing has changed.
        """
        refuse_ranks()
        weights = list(self.weights.values())
        changes = self.method.changes(weights, self.run)
        for (name, weight), change in zip(self.weights.items(), changes, strict=True):
            if change is None:
                continue
            if not int(change.kept.sum()) + len(change.grown):
                raise SparsityError(
                    f"all weights of {name!r} were pruned at step {self.run.step}\nhint: exclude "
                    "the layer, raise density=, or prune less at a time "
                    f"(settings of {type(self.method).__name__})"
                )
            check_movable(name, self._optimizer(weight), weight.values)
        for weight, change in zip(weights, changes, strict=True):
            if change is not None:
                self._apply(weight, change)
        self._note_history()

    def _apply(self, weight: SparseWeight, change: Change) -> None:
        kept = change.kept.nonzero().reshape(-1)
        positions = torch.cat([weight.positions()[kept], change.grown])
        positions, order = positions.sort()
        source = torch.cat([kept, torch.full((len(change.grown),), -1)])[order]
        optimizer = self._optimizer(weight)
        if optimizer is not None:
            move_state(optimizer, weight.values, source)
        weight.rearrange(source, positions)
        self.method.after_change(weight, source < 0, self.run)

    def _watch(self) -> None:
        """Show the method the gradients of the next step if patterns change after it."""
        _forget(self._observed)
        if not self.method.is_due(self.run.step + 1):
            return
        for weight in self.weights.values():
            observe = self.method.observer(weight, self.run)
            if observe is not None:
                self._observed.append(weight.index.data_ptr())
                ops.OBSERVERS[weight.index.data_ptr()] = observe

    def _optimizer(self, weight: SparseWeight) -> torch.optim.Optimizer | None:
        for optimizer in self._optimizers:
            if any(p is weight.values for g in optimizer.param_groups for p in g["params"]):
                return optimizer
        return None

    def _group(self, weight: SparseWeight) -> Mapping[str, Any]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(p is weight.values for p in group["params"]):
                    return group
        return {"lr": 0.0}

    def _note_history(self) -> None:
        counts = [weight.num_nonzeros for weight in self.weights.values()]
        self.history.append((self.run.step, counts))

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """Return what, with the model's and the optimizer's states, continues the same run."""
        return {
            "method": self.method.name,
            "step": self.run.step,
            "generator": self.run.generator.get_state(),
            "numbers": dict(self.run.numbers),
            "history": [(step, list(counts)) for step, counts in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run was saved; load the model and the optimizer, too.

        Raises:
            SparsityError: it is the state of another method.
        """
        if state["method"] != self.method.name:
            raise SparsityError(
                f"the saved state is of the method {state['method']!r}, this one is "
                f"{self.method.name!r}"
            )
        self.run.step = state["step"]
        self.run.generator.set_state(state["generator"])
        self.run.numbers = dict(state["numbers"])
        self.history = [(step, list(counts)) for step, counts in state["history"]]
        self._watch()

    # -- looking

    def bytes_held(self) -> dict[str, int]:
        """Return bytes of values, index, optimizer state, and of what the method remembers."""
        weights = list(self.weights.values())
        return {
            "values": sum(w.values.nbytes for w in weights),
            "index": sum(w.index.nbytes for w in weights),
            "optimizer state": sum(state_bytes(self._optimizer(w), w.values) for w in weights),
            "method": sum(b.nbytes for w in weights for b in w.buffers() if b is not w.index),
        }

    def describe(self) -> str:
        """Return a few lines: how dense each layer is, and what is held in how many bytes."""
        lines = [
            f"{type(self.method).__name__}, {self.density:.2%} of "
            f"{sum(w.numel() for w in self.weights.values())} elements in "
            f"{len(self.weights)} weights, step {self.run.step}"
        ]
        lines += [
            f"  {name:<32} {tuple(w.shape)!s:<20} {w.num_nonzeros / w.numel():7.2%}"
            for name, w in self.weights.items()
        ]
        lines += [f"  {name:<32} stays dense: {why}" for name, why in self.left.items()]
        held = self.bytes_held().items()
        lines += [f"{name:<22}{format_bytes(size):>12}" for name, size in held if size]
        return "\n".join(lines)


def _forget(observed: list[int]) -> None:
    """Show nobody the gradients at these addresses any more."""
    for address in observed:
        ops.OBSERVERS.pop(address, None)
    observed.clear()


def refuse_ranks() -> None:
    """Refuse to train sparse weights on several ranks, which might grow in different places."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1:
            raise SparsityError(
                f"sparse weights on {distributed.get_world_size()} ranks: their patterns would "
                "have to change together, which is not supported\nhint: train on one rank"
            )
