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
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.capture.batch import fresh
from packlight.capture.returned import extras_of, loss_of
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

# What is returned beside a loss, by path.
Extras = list[tuple[str, Any]]
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
    with FewRows.looked_at(model, loss_fn, batch_of_few_rows) as few:
        few.compare(weights_fn, looks_back=looks_back)


@dataclass
class FewRows:
    """The rows that are looked at, and what a model makes of them and of their parts.

    Attributes:
        batch: of those rows.
        num_rows: how many.
    """

    model: nn.Module
    loss_fn: LossFunction
    batch: Any
    num_rows: int
    noise: StillNoise
    _seen: dict[str, tuple[float, Extras]] = field(default_factory=dict)
    _after_first: PythonState | None = None

    @classmethod
    @contextmanager
    def looked_at(cls, model: nn.Module, loss_fn: LossFunction, batch: Any) -> Iterator[FewRows]:
        """Look at a batch of two or more rows; all that its losses change is put back at the end.

        Each part runs once, whatever is compared.
        """
        if num_rows(batch) < 2:
            raise BatchError("batch", None, "has 1 row; 2 are needed to compare", "")
        with undisturbed(model, loss_fn), evaluating(model), StillNoise() as noise:
            yield cls(model, loss_fn, batch, num_rows(batch), noise)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where parts are cut: in halves, then between the first row and the rest."""
        return tuple(dict.fromkeys([(self.num_rows + 1) // 2, 1]))

    @property
    def tolerance(self) -> float:
        """Of the largest number compared."""
        return TOLERANCES.get(self.noise.precision, 3e-2)

    def whole(self) -> tuple[float, Extras]:
        """Return the loss of all of them, and what comes with it."""
        return self.of(self.batch, f"all {self.num_rows} rows")

    def of(self, batch: Any, name: str) -> tuple[float, Extras]:
        """Return the loss of some of the rows, and what is returned beside it."""
        if name not in self._seen:
            self.noise.rewind()
            with torch.no_grad():
                returned = _returned(self.model, self.loss_fn, batch, name)
            self._after_first = self._after_first or PythonState(self.model, self.loss_fn)
            self._seen[name] = float(loss_of(returned).detach()), extras_of(returned)
        return self._seen[name]

    def parts(self, *cuts: int) -> list[tuple[Any, str]]:
        """Return the parts of the rows between cuts, and what they are called."""
        bounds = pairwise((0, *cuts, self.num_rows))
        return [(take_rows(self.batch, slice(*bound)), _rows_name(*bound)) for bound in bounds]

    def compare(self, weights_fn: WeightsFunction, *, looks_back: bool) -> None:
        """Raise if weighted losses, or gradients, of parts do not add up to the whole's."""
        for cut in self.cuts:
            self._compare_losses(weights_fn, cut)
        if self._after_first is not None and not self._after_first.is_same:
            raise MicrobatchError(
                "each call of the loss changes attributes, lists or variables in Python (a "
                "counter, perhaps), which every microbatch would do anew",
                hint="do that outside of the loss",
            )
        if looks_back:
            with torch.enable_grad():
                self._compare_gradients(weights_fn)

    def _compare_losses(self, weights_fn: WeightsFunction, cut: int) -> None:
        (expected, _), parts, terms = self.whole(), self.parts(cut), []
        for (part, name), weight in zip(parts, weights_fn([p for p, _ in parts]), strict=True):
            terms.append((weight, self.of(part, name)[0] if weight else 0.0))
        total = sum(weight * loss for weight, loss in terms)
        scale = max(abs(expected), *(abs(weight * loss) for weight, loss in terms))
        difference, tolerance = abs(expected - total), self.tolerance
        if not difference <= tolerance * scale:
            described = " + ".join(f"{weight:.6g} * {loss:.7g}" for weight, loss in terms)
            raise MicrobatchError(
                f"{self.num_rows} rows have the loss {expected:.7g}, but cut before row {cut} "
                f"their parts add up to {described} = {total:.7g} ({difference / scale:.2g} off, "
                f"{tolerance:g} allowed): rows depend on one another, or the weights are wrong",
                hint="if rows are meant to (contrastive loss, load balancing), a batch has to "
                "run as a whole; if not, pass loss_weight=, " + MicrobatchError.WEIGHTS,
            )

    def _compare_gradients(self, weights_fn: WeightsFunction) -> None:
        singles = self.parts(*range(1, self.num_rows))
        weights = [1.0, *weights_fn([part for part, _ in singles])]
        found = []
        for weight, (part, name) in zip(
            weights, [(self.batch, f"all {self.num_rows} rows"), *singles], strict=True
        ):
            if weight:
                self.noise.rewind()
                loss = loss_of(_returned(self.model, self.loss_fn, part, name))
                found.append(folded_gradients(self.model, loss, weight))
        tolerance = math.sqrt(self.tolerance)  # ties may fall otherwise
        worst = largest_difference(found[0], found[1:], tolerance)
        if worst is not None:
            raise MicrobatchError(
                f"{self.num_rows} rows have the loss of the rows alone, but their gradient of "
                f"{worst[0]!r} is another ({worst[1]:.2g} off, {tolerance:.2g} allowed): rows "
                "depend on one another in the backward",
                hint="where a hook or a backward of one's own looks at the batch, or gradients of "
                "an embedding are divided by how often an index occurs, it has to run as a whole",
            )


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
    check_first: Callable[[FewRows], None] | None = None,
) -> LossWeight:
    """Return the loss weight, or the alternative of a denominator, that holds for a few rows.

    Args and errors: as `check_rows_independent`; `check_first` is called with the rows before their
    losses are compared.
    """
    holding: list[LossWeight] = []
    errors: list[MicrobatchError] = []
    with FewRows.looked_at(model, loss_fn, batch_of_few_rows) as few:
        if check_first is not None:
            check_first(few)
        for candidate in alternatives(loss_weight):
            try:
                few.compare(partial(loss_weights, candidate), looks_back=looks_back)
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


def _returned(model: nn.Module, loss_fn: LossFunction, batch: Any, name: str) -> Any:
    try:
        returned = loss_fn(model, fresh(batch))
    except Exception as error:
        raise MicrobatchError(
            f"loss_fn fails on {name} alone: {type(error).__name__}: {error}", hint=""
        ) from error
    if not abs(value := float(loss_of(returned).detach())) < math.inf:
        raise MicrobatchError(f"the loss of {name} is {value}: nothing can be compared")
    return returned


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
