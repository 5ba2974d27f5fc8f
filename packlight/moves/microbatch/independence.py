"""Whether a model's rows look at one another: observed on a few of them.

Contrastive losses, load balancing, statistics of the batch: no list of operators would name all
that makes the loss of one row depend on another. So the loss of a few rows is compared with the
weighted losses of their parts. Noise that the loss draws is held still meanwhile: every random
number of a call is the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.capture.batch import fresh
from packlight.capture.returned import loss_of
from packlight.capture.step_capture import LossFunction
from packlight.capture.undisturbed import PythonState, undisturbed
from packlight.errors import BatchError, MicrobatchError
from packlight.moves.microbatch.denominator import Denominator
from packlight.moves.microbatch.gradient_sums import folded_gradients, largest_difference
from packlight.moves.microbatch.split import (
    LossWeight,
    loss_weights,
    num_rows,
    take_rows,
    tensor_leaves,
)

WeightsFunction = Callable[[Sequence[Any]], Sequence[float]]

# Of the largest number compared, by the lowest precision in which anything was computed.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MAX_ROWS_LOOKED_AT = 16


def check_rows_independent(
    model: nn.Module,
    loss_fn: LossFunction,
    batch_of_few_rows: Any,
    weights_fn: WeightsFunction,
    *,
    looks_back: bool = True,
) -> None:
    """Compare the loss of a few rows with the weighted losses of their parts, cut at two places.

    Gradients of parameters are compared with those of single rows. Runs in eval mode (batch norm in
    training mode is `batch_statistics`' business). All that the loss changes in Python, or in
    tensors other than parameters, is put back.

    Args:
        model: any.
        loss_fn: `loss_fn(model, batch)` returns a scalar.
        batch_of_few_rows: 2 to 4 rows that count, from `few_rows`.
        weights_fn: from microbatches to their weights, such as `loss_weights` of a denominator.
        looks_back: compare gradients, too, which may be something else than derivatives.

    Raises:
        MicrobatchError: they differ; says by how much.

    Cost: forward passes over three times the rows; to look back, forward and backward passes over
    twice of them besides.
    """
    rows = num_rows(batch_of_few_rows)
    if rows < 2:
        raise BatchError("batch", None, "has 1 row; 2 are needed to compare", "")
    cuts = dict.fromkeys([(rows + 1) // 2, 1])  # halves, then the first row and the rest
    with undisturbed(model, loss_fn), evaluating(model), StillNoise() as noise:
        few = _FewRows(model, loss_fn, batch_of_few_rows, rows, weights_fn, noise)
        with torch.no_grad():
            whole = few.loss(batch_of_few_rows, f"all {rows} rows")
            state = PythonState(model, loss_fn)  # as it is after the first call
            for cut in cuts:
                few.compare_losses(whole, cut)
            if not state.is_same:
                raise MicrobatchError(
                    "each call of the loss changes attributes, lists or variables in Python (a "
                    "counter, perhaps), which every microbatch would do anew",
                    hint="do that outside of the loss",
                )
        if looks_back:
            with torch.enable_grad():
                few.compare_gradients()


@dataclass(frozen=True)
class _FewRows:
    """The rows that are looked at, and what is compared."""

    model: nn.Module
    loss_fn: LossFunction
    batch: Any
    num_rows: int
    weights_fn: WeightsFunction
    noise: StillNoise

    def loss(self, batch: Any, name: str) -> torch.Tensor:
        """Return the loss of some of the rows, with the same noise every time."""
        self.noise.rewind()
        return _loss(self.model, self.loss_fn, batch, name)

    def parts(self, *cuts: int) -> list[tuple[Any, float, str]]:
        """Return the parts of the rows between cuts, their weights, and what they are called."""
        bounds = list(pairwise((0, *cuts, self.num_rows)))
        parts = [take_rows(self.batch, slice(*bound)) for bound in bounds]
        names = [_rows_name(*bound) for bound in bounds]
        return list(zip(parts, self.weights_fn(parts), names, strict=True))

    def compare_losses(self, whole: torch.Tensor, cut: int) -> None:
        """Raise if the weighted losses of the parts do not add up to the whole's."""
        expected, terms = float(whole), []
        for part, weight, name in self.parts(cut):
            terms.append((weight, float(self.loss(part, name)) if weight else 0.0))
        total = sum(weight * loss for weight, loss in terms)
        scale = max(abs(expected), *(abs(weight * loss) for weight, loss in terms))
        difference, tolerance = abs(expected - total), self._tolerance
        if not difference <= tolerance * scale:
            described = " + ".join(f"{weight:.6g} * {loss:.7g}" for weight, loss in terms)
            raise MicrobatchError(
                f"{self.num_rows} rows have the loss {expected:.7g}, but cut before row {cut} "
                f"their parts add up to {described} = {total:.7g} ({difference / scale:.2g} off, "
                f"{tolerance:g} allowed): rows depend on one another, or the weights are wrong",
                hint="if rows are meant to (contrastive loss, load balancing), a batch has to "
                "run as a whole; if not, pass loss_weight=, " + MicrobatchError.WEIGHTS,
            )

    def compare_gradients(self) -> None:
        """Raise if the gradients of the rows' weighted losses do not add up to the whole's."""
        whole = (self.batch, 1.0, f"all {self.num_rows} rows")
        found = [
            folded_gradients(self.model, self.loss(part, name), weight)
            for part, weight, name in (whole, *self.parts(*range(1, self.num_rows)))
            if weight
        ]
        tolerance = math.sqrt(self._tolerance)  # ties may fall otherwise
        worst = largest_difference(found[0], found[1:], tolerance)
        if worst is not None:
            raise MicrobatchError(
                f"{self.num_rows} rows have the loss of the rows alone, but their gradient of "
                f"{worst[0]!r} is another ({worst[1]:.2g} off, {tolerance:.2g} allowed): rows "
                "depend on one another in the backward",
                hint="where a hook or a backward of one's own looks at the batch, or gradients of "
                "an embedding are divided by how often an index occurs, it has to run as a whole",
            )

    @property
    def _tolerance(self) -> float:
        return TOLERANCES.get(self.noise.precision, 3e-2)


def alternatives(loss_weight: LossWeight) -> list[LossWeight]:
    """Return a loss weight as the candidates that it leaves open, for `settle`."""
    if isinstance(loss_weight, Denominator):
        return [replace(loss_weight, alternatives=()), *loss_weight.alternatives]
    return [loss_weight]


def settle(
    model: nn.Module,
    loss_fn: LossFunction,
    batch_of_few_rows: Any,
    loss_weight: LossWeight,
    *,
    looks_back: bool = True,
) -> LossWeight:
    """Return the loss weight, or the alternative of a denominator, that holds for a few rows.

    Args and errors: as `check_rows_independent`.
    """
    holding: list[LossWeight] = []
    errors: list[MicrobatchError] = []
    for candidate in alternatives(loss_weight):
        weights_fn = partial(loss_weights, candidate)
        try:
            check_rows_independent(
                model, loss_fn, batch_of_few_rows, weights_fn, looks_back=looks_back
            )
            holding.append(candidate)
        except MicrobatchError as error:
            errors.append(error)
    if not holding:
        raise errors[0]
    if len(holding) > 1:
        raise MicrobatchError("the loss of a few rows is 0: a mean cannot be told from a sum")
    return holding[0]


def few_rows(batch: Any, loss_weight: LossWeight, max_rows: int = 4) -> Any:
    """Return a batch of a few rows for `check_rows_independent`: different ones, and one again.

    If there is a row that weighs nothing, it comes first: that its loss is nothing is checked, too.

    Args:
        batch: its first 16 rows are looked at.
        loss_weight: among the rows that weigh something, different weights are preferred.
        max_rows: how many at most, at least 2, or 3 if a row weighs nothing.

    Raises:
        BatchError: fewer than two rows count.
    """
    indices = range(min(num_rows(batch), MAX_ROWS_LOOKED_AT))
    singles = [take_rows(batch, slice(i, i + 1)) for i in indices]
    weights = loss_weights(loss_weight, singles)
    counting = [i for i in indices if weights[i] > 0]
    leaves = [tensor_leaves(single) for single in singles]
    different: list[int] = []
    for i in counting:
        if not any(all(map(torch.equal, leaves[i], leaves[j])) for j in different):
            different.append(i)
    kept = different if len(different) > 1 else counting
    if len(kept) < 2:
        raise BatchError("batch", None, f"has {len(kept)} rows that count; 2 are needed", "")
    kept = sorted(kept, key=lambda i: weights[i])
    weightless = [i for i in indices if weights[i] == 0][:1]
    room = max_rows - len(weightless)
    # Where there are three, the last is the first one again: what counts equal values (an index
    # that occurs twice, a label) would see no other row in a few.
    last = max(1, min(room - 1, len(kept)) - 1)
    chosen = sorted(kept[round(k * (len(kept) - 1) / last)] for k in range(last + 1))
    again = chosen[:1] if room > len(chosen) else []
    return take_rows(batch, torch.tensor(weightless + chosen + again))


def _rows_name(start: int, stop: int) -> str:
    return f"row {start}" if stop == start + 1 else f"rows {start} to {stop - 1}"


def _loss(model: nn.Module, loss_fn: LossFunction, batch: Any, name: str) -> torch.Tensor:
    try:
        loss = loss_of(loss_fn(model, fresh(batch)))
    except Exception as error:
        raise MicrobatchError(
            f"loss_fn fails on {name} alone: {type(error).__name__}: {error}", hint=""
        ) from error
    if not abs(value := float(loss.detach())) < math.inf:
        raise MicrobatchError(f"the loss of {name} is {value}: nothing can be compared")
    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model run in eval mode in full precision; modes are put back by `undisturbed`."""
    precision = torch.get_float32_matmul_precision()
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            torch.set_float32_matmul_precision("highest")
            model.eval()
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class StillNoise(TorchDispatchMode):
    """Lets the k-th random call give one number for all elements, the same after each `rewind`.

    Also notes the lowest precision in which anything was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.precision = torch.float64
        self.numbers: list[Any] = []
        self.num_calls = 0

    def rewind(self) -> None:
        """Have the next call's random numbers begin anew."""
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                known = TOLERANCES.get(tensor.dtype, 3e-2)
                if known > TOLERANCES[self.precision]:
                    self.precision = tensor.dtype if tensor.dtype in TOLERANCES else torch.bfloat16
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        # A permutation of rows cannot be held still: rows are mixed, and that has to be seen.
        if is_random and isinstance(result, torch.Tensor) and func._opname != "randperm":
            if self.num_calls == len(self.numbers):
                self.numbers.append(result.flatten()[:1].clone())
            result.copy_(self.numbers[self.num_calls].expand(result.numel()).view(result.shape))
            self.num_calls += 1
        return result
