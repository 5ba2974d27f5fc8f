"""One random loop beside the same in eager PyTorch."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

import packlight
from packlight.capture.batch import plain_leaves, tensors_of
from packlight.capture.returned import loss_of
from packlight.errors import InfeasibleBudgetError, NonFiniteLossError, PacklightError
from tests.fuzz.models import BREAKING, LAYERS, LOSSES, Net, batch_of, read

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.02),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, fused=True),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), 1e-3, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, centered=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 1e-3),
    "two": lambda m: [
        torch.optim.SGD([p for p in m.parameters() if p.ndim == 2], 0.02),
        torch.optim.AdamW([p for p in m.parameters() if p.ndim != 2], 1e-3),
    ],
}
CONTAINERS = ("dict", "tuple", "named tuple", "nested", "popped")
# What happens between two steps.
EVENTS = (
    "", "", "", "rows", "length", "both sizes", "eval", "train", "freeze", "unfreeze", "hook",
    "rate", "evaluate", "not finite", "gradients",
)
MOVES = (packlight.EXACT_MOVES, (), ("update-in-backward",), packlight.MOVES)


@dataclass(frozen=True)
class Trial:
    """What is tried; the first value of each kind is the simplest."""

    layers: tuple[str, ...] = ("linear",)
    max_norm: bool = False
    is_tied: bool = False
    loss: str = "cross entropy"
    container: str = "dict"
    optimizer: str = "sgd"
    moves: int = 0
    clip: str = ""
    # Batches whose gradients are added up before an update; 0 for steps that do all at once.
    batches: int = 0
    # Between the smallest budget and the plain peak; None for no budget.
    tightness: float | None = None
    rows: int = 4
    length: int = 6
    events: tuple[str, ...] = ("", "")


def drawn(seed: int) -> Trial:
    """Return a random trial."""
    random = Random(seed)
    layers = [random.choice(list(LAYERS)) for _ in range(random.randint(1, 5))]
    return Trial(
        tuple(layers),
        random.random() < 0.15,
        random.random() < 0.2,
        random.choice(list(LOSSES)),
        random.choice(CONTAINERS),
        random.choice(list(OPTIMIZERS)),
        random.choice((0, 0, 1, 2, 3)),
        random.choice(("", "", "norm", "value")),
        random.choice((0, 0, 0, 1, 2)),
        random.choice((None, 0.0, 0.0, 0.3, 0.7)),
        random.choice((2, 4, 7)),
        random.choice((3, 6, 16)),
        tuple(random.choice(EVENTS) for _ in range(random.randint(2, 6))),
    )


def simpler(trial: Trial) -> Iterator[Trial]:
    """Yield trials that differ in one thing, which is simpler."""
    plain = Trial()
    for name in ("layers", "events"):
        for place in range(len(getattr(trial, name))):
            left = (*getattr(trial, name)[:place], *getattr(trial, name)[place + 1 :])
            if left:
                yield replace(trial, **{name: left})
    for field in fields(Trial):
        if field.name not in ("layers", "events"):
            if getattr(trial, field.name) != getattr(plain, field.name):
                yield replace(trial, **{field.name: getattr(plain, field.name)})


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        problem: what is wrong: a raw error, bits, bytes; "" if nothing is.
        said: an error of Packlight's that ended it.
        num_steps: that were compared.
    """

    problem: str = ""
    said: str = ""
    num_steps: int = 0


@contextmanager
def own_cache() -> Iterator[None]:
    """Nothing that was seen before is known: errors on a cold cache are users' first ones."""
    before = os.environ.get("PACKLIGHT_CACHE")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PACKLIGHT_CACHE"] = directory
        try:
            yield
        finally:
            os.environ.pop("PACKLIGHT_CACHE")
            if before is not None:
                os.environ["PACKLIGHT_CACHE"] = before


def outcome_of(trial: Trial) -> Outcome:
    """Run a trial."""
    outcome = Outcome()
    with own_cache(), warnings.catch_warnings(action="ignore"):
        try:
            _Loop(trial, outcome).run()
        except PacklightError as error:
            outcome.said = f"{type(error).__name__}: {error}".partition("\n")[0]
        except Exception as error:
            outcome.problem = f"raw {type(error).__name__}: {str(error)[:300]}"
    return outcome


class _Loop:
    def __init__(self, trial: Trial, outcome: Outcome) -> None:
        self.trial, self.outcome = trial, outcome
        torch.manual_seed(0)
        self.mine = Net(trial.layers, trial.max_norm, trial.is_tied)
        torch.manual_seed(0)
        self.eager = Net(trial.layers, trial.max_norm, trial.is_tied)
        make = OPTIMIZERS[trial.optimizer]
        self.my_optimizers, self.eager_optimizers = make(self.mine), make(self.eager)
        self.rows, self.length = trial.rows, trial.length
        self.held: list[torch.Tensor] = []
        self.is_exact = True
        # A step in pieces has no graph of all of it: nothing says whether its bits are eager's (but
        # they are), and a budget holds once it was planned as one, after two steps of a kind.
        self.is_whole = not BREAKING.intersection(trial.layers)
        self.num_alike = 0

    def loss_fn(self, model: Any, batch: Any) -> Any:
        return LOSSES[self.trial.loss](model, *read(self.trial.container, batch))

    def batch(self, seed: int) -> Any:
        return batch_of(self.trial.container, seed, self.rows, self.length)

    def run(self) -> None:
        step = self.fitted()
        self.note_bits(step)
        for seed, event in enumerate(self.trial.events):
            self.num_alike = 0 if event else self.num_alike + 1
            self.change(event, step)
            seeds = [seed + 100 * number for number in range(max(1, self.trial.batches))]
            batches, twins = ([self.batch(s) for s in seeds] for _ in range(2))
            if event == "not finite":
                for one in (batches[-1], twins[-1]):
                    tensors_of(one)[0][0, 0, 0] = torch.nan
            step = self.prepared(step, seed)
            self.compare(step, seed, batches, twins)
            if self.outcome.problem:
                return
            self.outcome.num_steps += 1

    def note_bits(self, step: Any) -> None:
        if self.is_whole:
            self.is_exact = self.is_exact and step.way.is_bit_exact

    def arguments(self, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what `fit` is given before the budget, and its options."""
        trial = self.trial
        options: dict[str, Any] = {"moves": MOVES[trial.moves], "progress": False}
        if trial.batches:
            options["accumulate"] = True
        if trial.clip:
            options[f"clip_grad_{trial.clip}"] = 0.1
        return (self.mine, self.loss_fn, self.my_optimizers, self.batch(seed)), options

    def fitted(self) -> Any:
        tightness, budget = self.trial.tightness, None
        arguments, options = self.arguments(0)
        if tightness is not None and not self.is_whole:
            budget = int((0.7 + 0.5 * tightness) * self.eager_bytes())
        elif tightness is not None:
            plain = packlight.fit(*arguments, **options).peak_bytes
            try:
                packlight.plan(*arguments, 1, **options)
            except InfeasibleBudgetError as error:
                smallest = error.smallest_bytes
            budget = int(smallest + tightness * max(0, plain - smallest))
        return self.fitted_within(budget, 0)

    def eager_bytes(self) -> int:
        """Return what a forward and backward holds in eager PyTorch, with all that is there."""
        model, batch = copy.deepcopy(self.eager), self.batch(0)
        peak = packlight.measure_peak(lambda: loss_of(self.loss_fn(model, batch)).backward())
        return peak.peak_bytes + sum(self.resident([self.batch(0)]).values())

    def fitted_within(self, budget: int | None, seed: int) -> Any:
        """Fit within a budget that an error has named, or a larger one."""
        arguments, options = self.arguments(seed)
        try:
            return packlight.fit(*arguments, budget, **options)
        except InfeasibleBudgetError as error:
            if not self.is_whole:
                return packlight.fit(*arguments, error.smallest_bytes, **options)
            raise AssertionError(f"the budget {budget} was named, and refused: {error}") from error

    def prepared(self, step: Any, seed: int) -> Any:
        """Return what trains the next batch: where that needs more, the budget is what it needs."""
        try:
            step.prepare(self.batch(seed))
        except InfeasibleBudgetError as error:
            self.outcome.said = f"InfeasibleBudgetError: {error}".partition("\n")[0]
            step = self.fitted_within(error.smallest_bytes, seed)
            self.note_bits(step)
        return step

    def change(self, event: str, step: Any) -> None:
        if event in ("rows", "both sizes"):
            self.rows = {2: 3, 3: 5, 4: 6, 7: 5}.get(self.rows, 2)
        if event in ("length", "both sizes"):
            self.length = {3: 4, 6: 5, 16: 13, 4: 9}.get(self.length, 7)
        for model in (self.mine, self.eager):
            if event in ("eval", "train"):
                model.train(event == "train")
            elif event in ("freeze", "unfreeze"):
                model.body.requires_grad_(event == "unfreeze")
            elif event == "hook":
                model.head.weight.register_hook(lambda gradient: gradient * 0.5)
            elif event == "gradients":
                for parameter in model.parameters():
                    parameter.grad = None
        for optimizers in (self.my_optimizers, self.eager_optimizers):
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                for group in optimizer.param_groups if event == "rate" else ():
                    group["lr"] *= 0.5
        if event == "evaluate" and self.trial.loss != "penalty":  # which no_grad does not let
            step.evaluate(self.batch(99))
            modes = [(module, module.training) for module in self.eager.modules()]
            self.eager.eval()
            with torch.no_grad():
                self.loss_fn(self.eager, self.batch(99))
            for module, mode in modes:
                module.training = mode

    def my_step(self, step: Any, batches: list[Any]) -> tuple[list[Any], int]:
        """Return what the calls of a step return, and the most bytes that one of them held."""
        if not self.trial.batches:
            result, held = self.measured(lambda: step(batches[0]), batches)
            return [result], held
        results, most = [], 0
        for batch in batches:
            weight = 1 / len(batches)
            result, held = self.measured(partial(step.backward, batch, weight), [batch])
            results.append(result)
            most = max(most, held)
        return results, max(most, self.measured(step.update, [])[1])

    def measured(self, call: Callable[[], Any], batches: list[Any]) -> tuple[Any, int]:
        """Run a call; return its result and the most bytes that it held, with all that was there.

        The allocator's log does not know when something goes that was there before it began: what
        a module had on an attribute and has replaced counts as gone from the start.
        """
        before = self.resident(batches)
        peak = packlight.measure_peak(call)
        after = self.resident(batches)
        there = sum(size for place, size in before.items() if place in after)
        return peak.result, there + peak.peak_bytes

    def compare(self, step: Any, seed: int, batches: list[Any], twins: list[Any]) -> None:
        before = copy.deepcopy(self.eager.state_dict())
        states = copy.deepcopy(self.states(self.eager_optimizers))
        torch.manual_seed(seed)
        expected, error = self.eager_step(twins)
        torch.manual_seed(seed)
        try:
            step.prepare(batches[0])
            ready = step.ready if self.is_whole else None
            results, total = self.my_step(step, batches)
        except NonFiniteLossError:
            if error is None and all(bool(torch.isfinite(loss_of(r))) for r in expected):
                self.outcome.problem = f"step {seed}: the loss is finite in eager PyTorch"
            # Nothing was updated; eager's step is taken back.
            self.eager.load_state_dict(before)
            self.restore(self.eager_optimizers, states)
            self.mine.load_state_dict(before)
            return
        except PacklightError:
            raise
        except Exception as raised:
            if error is None:
                words = f"{type(raised).__name__}: {str(raised)[:300]}"
                self.outcome.problem = f"step {seed}: raw {words}"
            self.eager.load_state_dict(before)
            self.mine.load_state_dict(before)
            self.restore(self.eager_optimizers, states)
            return
        if error is not None:
            self.outcome.problem = f"step {seed}: eager raises {error!r}, this does not"
            return
        # Where a guard fails, the step is planned in between, which is not what is measured.
        is_planned = ready is step.ready if self.is_whole else self.num_alike > 3
        if is_planned and step.budget_bytes is not None and total > step.budget_bytes:
            self.outcome.problem = f"step {seed}: {total} bytes, budget {step.budget_bytes}"
        self.note_bits(step)
        self.held = [v for v in leaves(results[-1]) if isinstance(v, torch.Tensor)]
        mine = [v for v in leaves(results) if isinstance(v, torch.Tensor)]
        del results
        self.same(seed, mine, [v for v in leaves(expected) if isinstance(v, torch.Tensor)])
        del mine
        ours, theirs = self.mine.state_dict(), self.eager.state_dict()
        self.same(seed, list(ours.values()), list(theirs.values()), list(ours))

    def same(self, seed: int, ours: Any, theirs: Any, names: Any = None) -> None:
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            equal = torch.equal(a, b) or (
                a.is_floating_point() and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
            )
            if not equal and not self.is_exact and a.is_floating_point():
                equal = torch.allclose(a, b, rtol=1e-2, atol=1e-3)
            if not equal and not self.is_exact and not a.is_floating_point():
                equal = True  # an argmax may be another
            if not equal and not self.outcome.problem:
                what = names[index] if names else f"result {index}"
                self.outcome.problem = f"step {seed}: {what} differs"

    def eager_step(self, batches: list[Any]) -> tuple[list[Any], Exception | None]:
        optimizers = self.eager_optimizers
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        results = []
        try:
            for batch in batches:
                results.append(self.loss_fn(self.eager, batch))
                (loss_of(results[-1]) * (1 / len(batches))).backward()
        except Exception as error:
            self.eager.zero_grad()
            return [], error
        held = [p for p in self.eager.parameters() if p.requires_grad]
        if self.trial.clip == "norm":
            nn.utils.clip_grad_norm_(held, 0.1, foreach=False)
        elif self.trial.clip == "value":
            nn.utils.clip_grad_value_(held, 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return results, None

    def states(self, optimizers: Any) -> Any:
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        return [optimizer.state_dict() for optimizer in optimizers]

    def restore(self, optimizers: Any, states: Any) -> None:
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def resident(self, batches: list[Any]) -> dict[int, int]:
        """Return where the storages of all that is there lie, and their bytes."""
        optimizers = self.my_optimizers
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        states = [s for o in optimizers for held in o.state.values() for s in held.values()]
        attributes = [v for m in self.mine.modules() for v in vars(m).values()]
        everything = [
            *self.mine.parameters(), *self.mine.buffers(), *self.held, *states, *attributes,
            *(parameter.grad for parameter in self.mine.parameters()),
            *(tensor for batch in batches for tensor in tensors_of(batch)),
        ]
        storages = [t.untyped_storage() for t in everything if isinstance(t, torch.Tensor)]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}


def leaves(returned: Any) -> list[Any]:
    """Return all that a loss function returns."""
    return [value for _, value in plain_leaves(returned)]
