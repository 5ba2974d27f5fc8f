"""Any optimizer, one parameter at a time, the moment its gradient is complete.

The bits are those of `optimizer.step()` after the backward, the state is the optimizer's own. What
a step allocates for a moment is bounded: a large parameter is stepped in slices, where slices were
seen to give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import ceil
from typing import Any

import torch

from packlight.after_step import hooks_after_step
from packlight.costs.measure import median_seconds, real_tensors
from packlight.errors import UnsupportedModelError
from packlight.torch_internals.optimizers import mark_stepped
from packlight.updates.accounting import TwoSteps, tensors_bytes
from packlight.updates.copies import Slices, measure_copies, measure_copy, step_one
from packlight.updates.observe import (
    Kind,
    SliceFacts,
    observe_pieces,
    observe_slices,
    why_not_alone,
)
from packlight.updates.remembered import RememberedSteps
from packlight.updates.slices import like_eager, rows_of_slices
from packlight.updates.twin import (
    interception,
    kinds_of_settings,
    state_tensors,
    step_several,
    trainable,
)

# Slices of AdamW are then 1 MiB, which stay in cache from one pass over them to the next.
DEFAULT_WORKSPACE_BYTES = 4 * 2**20
LARGE_ELEMENTS = 2**20  # larger parameters have the same states (none is too small for few bits)


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """What updating one parameter costs.

    Attributes:
        state_bytes: what the optimizer keeps for it.
        workspace_bytes: the most that an update allocates beyond that for a moment.
        seconds: median duration of an update once the state exists.
        num_slices: in how many slices it is updated once the state exists.
    """

    state_bytes: int
    workspace_bytes: int
    seconds: float
    num_slices: int


class ParameterUpdates:
    """Steps a user's optimizer for one parameter at a time, bit for bit as `optimizer.step()`.

    The optimizer stays the user's: its state is read and written, its hyperparameters are read anew
    at every update, so schedulers, several groups and `load_state_dict` work as always.

    Attributes:
        optimizer: the user's.
        max_workspace_bytes: what an update may allocate for a moment where slices allow it. A
            single row of a parameter may need more, and so may the fewest that fill whole vectors,
            where bits depend on that.
        refusal: why this optimizer cannot be stepped one parameter at a time, in words for a plan's
            report; None if it can.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> updates = ParameterUpdates(torch.optim.SGD([weight], lr=0.5))
    >>> updates.begin_step()
    >>> updates.apply(weight, torch.tensor([0.0, 1.0, 2.0]))
    >>> weight.tolist(), weight.grad
    ([1.0, 0.5, 0.0], None)
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_workspace_bytes: int | None = None
    ) -> None:
        self.optimizer = optimizer
        self.max_workspace_bytes = (
            DEFAULT_WORKSPACE_BYTES if max_workspace_bytes is None else max_workspace_bytes
        )
        self._num_states = 0
        self._has_applied = False
        self._remembered = RememberedSteps(optimizer)
        self._observe()

    def cost(
        self,
        parameter: torch.Tensor,
        gradient_stride: tuple[int, ...] | None = None,
        num_rows: int | None = None,
    ) -> UpdateCost:
        """Return what updating a parameter costs, measured on copies and remembered.

        Args:
            parameter: one of the optimizer's that needs a gradient.
            gradient_stride: strides of the gradients to come; the parameter's if None. A gradient
                in another layout is copied (by slices) to the layout that eager would give it.
            num_rows: of a piece of it that is updated in its place (see `piece_unit`).

        Raises:
            UnsupportedModelError: see `refusal`.
        """
        if self.refusal is not None:
            raise UnsupportedModelError(self.refusal)
        index = self._group_index[parameter]
        value = parameter if num_rows is None else parameter.detach()[:num_rows]
        stride = value.stride() if gradient_stride is None else tuple(gradient_stride)
        key = (_key(index, value), stride)
        if key not in self._measured:
            self._slices_of(index, value)  # a promise, kept also where its cost is remembered
            question = ("cost", self.max_workspace_bytes, *key)
            seen = self._remembered.seen(question, lambda: self._measure(index, value, stride))
            self._measured[key] = (TwoSteps(*seen[:3]), *seen[3:])
        steps, seconds, num_slices = self._measured[key]
        state = None if num_rows is not None else self.optimizer.state.get(parameter)
        existing = state_tensors(state)
        if existing:
            return UpdateCost(tensors_bytes(existing), steps.later_bytes, seconds, num_slices)
        return UpdateCost(steps.state_bytes, steps.workspace_bytes, seconds, num_slices)

    def cost_together(
        self, parameters: Sequence[torch.Tensor], strides: Sequence[tuple[int, ...]]
    ) -> UpdateCost:
        """Return what updating several parameters with one step costs, as `cost` does.

        Args:
            parameters: none of them sliced.
            strides: of the gradients to come.
        """
        indices = [self._group_index[p] for p in parameters]
        pairs = [*zip(parameters, strides, strict=True)]
        keys = [(_key(i, p), s) for i, (p, s) in zip(indices, pairs, strict=True)]

        def measure() -> list[Any]:
            with real_tensors():
                copies = measure_copies(self.optimizer, indices, pairs)
                return [*astuple(copies.bytes), median_seconds(copies.step, parameters[0].device)]

        *seen, seconds = self._remembered.seen(("together", keys), measure)
        steps = TwoSteps(*seen)
        has_state = [bool(state_tensors(self.optimizer.state.get(p))) for p in parameters]
        workspace_bytes = steps.later_bytes if all(has_state) else steps.workspace_bytes
        return UpdateCost(steps.state_bytes, workspace_bytes, seconds, 1)

    def is_sliced(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is updated slice by slice."""
        return self._slices_of(self._group_index[parameter], parameter) is not None

    def piece_unit(self, parameter: torch.Tensor) -> int | None:
        """Return where a parameter can be cut into pieces that are stepped with the whole's bits.

        Each piece is a parameter of its own then, with a state of its own.

        Returns:
            Pieces begin at multiples of so many elements; None where it has to stay whole.
        """
        if not parameter.is_contiguous():
            return None
        index, kind = self._group_index[parameter], Kind.of(parameter)

        def observe() -> int | None:
            with real_tensors():
                return observe_pieces(self.optimizer, self.optimizer.param_groups[index], kind)

        unit = self._remembered.seen(("pieces", index, kind), observe)
        # Threads split a parameter at places that pieces would move.
        is_split = kind.device.type == "cpu" and torch.get_num_threads() > 1
        return None if unit is not None and unit > 1 and is_split else unit

    def keeps_form(self, parameter: torch.Tensor, num_rows: int) -> bool:
        """Whether a piece of so many rows has the states of the whole: none is too small."""
        index = self._group_index[parameter]
        enough = ceil(LARGE_ELEMENTS / max(1, parameter[0].numel()))

        def form(rows: int) -> Any:
            value = parameter.detach()[: min(rows, enough)]

            def observe() -> list[list[str]]:
                group = self.optimizer.param_groups[index]
                with real_tensors():
                    copy = measure_copy(self.optimizer, group, value, value.stride(), None)
                return sorted([name, str(kind)] for name, kind, _ in copy.state_form)

            return self._remembered.seen(("form", *_key(index, value)), observe)

        return bool(form(len(parameter)) == form(num_rows))

    def kind(self, parameter: torch.Tensor) -> str:
        """Return what tells an update of a parameter from those of other optimizers."""
        return f"{type(self.optimizer)} {kinds_of_settings(self.optimizer)}"

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is one of the optimizer's."""
        return parameter in self._group_index

    def begin_step(self) -> None:
        """Say that a step of the optimizer starts; call it before the step's first `apply`.

        Raises:
            UnsupportedModelError: the optimizer cannot be stepped one parameter at a time, or was
                changed since that was observed.
        """
        reason = self.refusal or self._in_words(interception(self.optimizer))
        if reason is not None:
            raise UnsupportedModelError(
                f"{reason}\nhint: remove what was added, or step the optimizer after the backward"
            )
        if self._observed != self._fingerprint():
            self._observe_again()
        mark_stepped(self.optimizer)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update a parameter; its `grad` is left as it was.

        Args:
            parameter: one of the optimizer's that needs a gradient.
            gradient: the complete gradient, of the parameter's shape and dtype, in any layout. The
                optimizer may overwrite it.
        """
        self._has_applied = True
        group_index = self._group_index[parameter]
        group = self.optimizer.param_groups[group_index]
        slices = self._slices_of(group_index, parameter)
        step_one(self.optimizer, group, parameter, gradient, self.optimizer.state, slices)

    def apply_together(self, given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Update several parameters, those that are not sliced with one step of the optimizer.

        Args:
            given: parameters with their complete gradients (see `apply`).
        """
        self._has_applied = True
        whole: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for parameter, gradient in given:
            index = self._group_index[parameter]
            if self._slices_of(index, parameter) is None:
                pair = parameter, like_eager(gradient, parameter)
                whole.setdefault(index, []).append(pair)
            else:
                self.apply(parameter, gradient)
        param_groups = self.optimizer.param_groups
        groups = [(param_groups[i], [p for p, _ in pairs]) for i, pairs in whole.items()]
        gradients = [gradient for pairs in whole.values() for _, gradient in pairs]
        if gradients:
            step_several(self.optimizer, groups, gradients, self.optimizer.state)

    def end_step(self) -> None:
        """Say that all parameters were updated.

        New states are put in the order in which `optimizer.step()` makes them, which is the order
        in `state_dict()` and so in checkpoints. Hooks that need no gradients are called.
        """
        self._order_states()
        if self._has_applied:  # else `optimizer.step()` has called them
            self._has_applied = False
            for hook in hooks_after_step(self.optimizer):
                hook.call()

    def _order_states(self) -> None:
        states = self.optimizer.state
        if len(states) == self._num_states:
            return
        place = {id(parameter): place for place, parameter in enumerate(self._group_index)}
        in_order = sorted(states.items(), key=lambda item: place.get(id(item[0]), -1))
        states.clear()
        states.update(in_order)
        self._num_states = len(states)

    def _observe(self) -> None:
        self._num_states = 0  # in their order
        groups = self.optimizer.param_groups
        self._group_index: dict[torch.Tensor, int] = {
            p: i for i, group in enumerate(groups) for p in group["params"]
        }
        self._observed = self._fingerprint()
        self._facts: dict[tuple[int, Kind], SliceFacts | None] = {}
        self._slices: dict[Any, Slices | None] = {}
        self._measured: dict[Any, tuple[TwoSteps, float, int]] = {}
        kinds = [list(dict.fromkeys(map(Kind.of, trainable(group)))) for group in groups]

        def observe() -> str | None:
            with real_tensors():
                return why_not_alone(self.optimizer)

        reason = interception(self.optimizer)
        if reason is None:
            reason = self._remembered.seen(("why not alone", kinds), observe)
        self.refusal = self._in_words(reason)

    def _observe_again(self) -> None:
        """See whether what was planned still holds for an optimizer that was changed meanwhile."""
        promised = self._slices
        self._observe()
        self._slices = promised
        observed, self._observed = self._observed, []  # to be looked at again should this raise
        if self.refusal is not None:
            raise UnsupportedModelError(
                f"{self.refusal}\nhint: its hyperparameters were changed since the step was planned"
            )
        for key, slices in promised.items():
            if slices is not None and not self._may_slice(key[0], Kind(len(key[1]), *key[3:])):
                raise UnsupportedModelError(
                    f"{type(self.optimizer).__name__} can no longer step a parameter of shape "
                    f"{tuple(key[1])} in slices: its hyperparameters or the number of threads "
                    "changed since the step was planned\nhint: set them before the first step"
                )
        self._observed = observed

    def _fingerprint(self) -> list[Any]:
        members = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        return [torch.get_num_threads(), members, kinds_of_settings(self.optimizer)]

    def _in_words(self, reason: str | None) -> str | None:
        if reason is None:
            return None
        return f"{type(self.optimizer).__name__} cannot step one parameter at a time: {reason}"

    # -----------------------------------------------------------------------------------------
    # Slices

    def _slices_of(self, group_index: int, parameter: torch.Tensor) -> Slices | None:
        """Return how a parameter (or a piece of one) is sliced, None if it is stepped whole."""
        key = _key(group_index, parameter)
        if key not in self._slices:

            def observe() -> Any:
                with real_tensors():
                    chosen = self._choose_slices(group_index, parameter)
                return chosen and [chosen.first_rows, chosen.rows, sorted(chosen.split_names)]

            seen = self._remembered.seen(("slices", self.max_workspace_bytes, *key), observe)
            self._slices[key] = seen and Slices(seen[0], seen[1], frozenset(seen[2]))
        return self._slices[key]

    def _choose_slices(self, group_index: int, parameter: torch.Tensor) -> Slices | None:
        if parameter.ndim == 0 or parameter.shape[0] < 2 or not parameter.is_contiguous():
            return None
        num_rows = parameter.shape[0]
        row_bytes = max(parameter.nbytes // num_rows, 1)
        # A piece shows what a row needs; all that is sliced is elementwise.
        trial_rows = self.max_workspace_bytes // (2 * row_bytes)
        trial_rows = min(rows_of_slices(parameter, trial_rows, False), num_rows)
        group = self.optimizer.param_groups[group_index]
        piece = parameter.detach()[:trial_rows]
        trial = measure_copy(self.optimizer, group, piece, piece.stride(), None)
        if trial.bytes.workspace_bytes * num_rows <= self.max_workspace_bytes * trial_rows:
            return None
        kind = Kind.of(parameter)
        if not self._may_slice(group_index, kind):
            return None
        facts = self._facts[group_index, kind]
        assert facts is not None
        if trial.state_form != facts.state_form:
            return None
        # The first step also makes a slice's state, and the gradient may have to be copied.
        first_rows, rows = (
            rows_of_slices(
                parameter,
                trial_rows * self.max_workspace_bytes // (peak + piece.nbytes),
                facts.needs_alignment,
            )
            for peak in (trial.bytes.first_bytes, trial.bytes.later_bytes)
        )
        return Slices(first_rows, rows, facts.split_names)

    def _may_slice(self, group_index: int, kind: Kind) -> bool:
        if (group_index, kind) not in self._facts:
            group = self.optimizer.param_groups[group_index]
            with real_tensors():
                self._facts[group_index, kind] = observe_slices(self.optimizer, group, kind)
        facts = self._facts[group_index, kind]
        # Threads split a parameter at places that slices would move.
        is_split = kind.device.type == "cpu" and torch.get_num_threads() > 1
        return facts is not None and not (facts.needs_alignment and is_split)

    def _measure(
        self, group_index: int, parameter: torch.Tensor, gradient_stride: tuple[int, ...]
    ) -> list[Any]:
        """Return what `TwoSteps` has, seconds, and the number of slices."""
        slices = self._slices_of(group_index, parameter)
        group = self.optimizer.param_groups[group_index]
        with real_tensors():
            copy = measure_copy(self.optimizer, group, parameter, gradient_stride, slices)
            seconds = median_seconds(copy.step, parameter.device)
        num_slices = 1 if slices is None else ceil(parameter.shape[0] / slices.rows)
        return [*astuple(copy.bytes), seconds, num_slices]


def _key(group_index: int, parameter: torch.Tensor) -> tuple[Any, ...]:
    return group_index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device
