"""A batch in k microbatches whose weighted losses add up to the loss of the whole.

    loss(batch) = sum over i of  w_i * loss(microbatch i)

`split` makes the microbatches, `loss_weights` the w_i. Where these come from is found in the
captured loss (loss_weight.py) or said by the user. That it holds for a model is observed on
a few rows (independence.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from packlight.capture.batch import children, rebuilt
from packlight.errors import BatchError, MicrobatchError
from packlight.moves.microbatch.denominator import Denominator, Measure
from packlight.torch_internals.storages import storage_identity

LossWeight = Denominator | Literal["rows", "sum"] | Callable[[Any], Any]


# -- batches


def split(batch: Any, num_microbatches: int) -> list[Any]:
    """Return the batch's rows in that many parts, as equal as possible, larger ones first.

    Args:
        batch: any nesting of mappings, sequences and dataclasses. Its tensors are cut along their
            first dimension; the parts hold views. Plain values and 0-dimensional tensors are
            shared.
        num_microbatches: at most the number of rows.

    Raises:
        BatchError: there are fewer rows, or tensors disagree on how many there are.

    >>> [part["x"].tolist() for part in split({"x": torch.arange(5)}, 2)]
    [[0, 1, 2], [3, 4]]
    """
    rows = num_rows(batch)
    if not 1 <= num_microbatches <= rows:
        raise BatchError(
            "batch",
            None,
            f"of {rows} rows cannot be cut into {num_microbatches} microbatches",
            f"ask for 1 to {rows} microbatches",
        )
    size, num_larger = divmod(rows, num_microbatches)
    parts, start = [], 0
    for index in range(num_microbatches):
        stop = start + size + (index < num_larger)
        parts.append(take_rows(batch, slice(start, stop)))
        start = stop
    return parts


def num_rows(batch: Any) -> int:
    """Return the size of the first dimension, on which a batch's tensors have to agree.

    Raises:
        BatchError: they do not, or there are none.
    """
    tensors = [(p, x) for p, x in _leaves(batch, "batch") if _has_rows(x)]
    if not tensors:
        raise BatchError(
            "batch", None, "holds no tensor with rows", "put tensors into tuples, lists or dicts"
        )
    sizes = Counter(x.shape[0] for _, x in tensors)
    rows = int(sizes.most_common(1)[0][0])
    for path, tensor in tensors:
        if tensor.shape[0] != rows:
            other, example = next((p, x) for p, x in tensors if x.shape[0] == rows)
            raise BatchError(
                path,
                tuple(tensor.shape),
                f"has {tensor.shape[0]} rows, {sizes[rows]} other{'s' * (sizes[rows] > 1)} "
                f"{rows} ({other} of shape {tuple(example.shape)})",
                "the first dimension of every tensor in a batch counts its rows; keep what has "
                "none (class weights, ...) in the model",
            )
    return rows


def tensor_leaves(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of a batch, in an order that its microbatches have, too."""
    return [x for _, x in _leaves(batch, "batch") if isinstance(x, torch.Tensor)]


def leaves_of_primals(real_inputs: Sequence[Any], batch: Any) -> dict[int, int]:
    """Return which primals are tensors of the batch: index -> index in `tensor_leaves`.

    Args:
        real_inputs: real tensors behind the primals of the step captured with this batch.
        batch: that batch itself, not a copy.
    """
    leaf_of = {_place(leaf): i for i, leaf in reversed(list(enumerate(tensor_leaves(batch))))}
    return {
        index: leaf_of[_place(real)]
        for index, real in enumerate(real_inputs)
        if isinstance(real, torch.Tensor) and _place(real) in leaf_of
    }


def take_rows(batch: Any, rows: slice | torch.Tensor) -> Any:
    """Return a batch of some rows: views for a slice, copies for an index tensor."""
    leaves = iter(
        [
            x[rows if isinstance(rows, slice) else rows.to(x.device)] if _has_rows(x) else x
            for _, x in _leaves(batch, "batch")
        ]
    )
    return rebuilt(batch, leaves)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    shape = tuple(tensor.shape), tensor.stride(), tensor.dtype
    if tensor.numel() == 0:
        return id(tensor), *shape
    return storage_identity(tensor), tensor.storage_offset(), *shape


def _leaves(batch: Any, path: str) -> Iterator[tuple[str, Any]]:
    held = children(batch)
    if held is None:
        if not isinstance(batch, torch.Tensor):
            _refuse_hidden_tensors(batch, path)
        yield path, batch
        return
    for place, _, value in held:
        yield from _leaves(value, path + place)


def _refuse_hidden_tensors(leaf: Any, path: str) -> None:
    for name, value in getattr(leaf, "__dict__", {}).items():
        if isinstance(value, torch.Tensor):
            raise BatchError(
                path,
                None,
                f"is a {type(leaf).__name__}, whose tensor {name!r} cannot be cut",
                "put the tensors into a dict, a tuple, a list or a dataclass",
            )


# -- weights


def loss_weights(denominator: LossWeight, microbatches: Sequence[Any]) -> list[float]:
    """Return the weights with which the microbatches' losses add up to the whole batch's.

    A weight of 0 says that nothing in the microbatch counts: leave it out, its loss may be 0/0.

    Args:
        denominator: from `find_denominator`; or "rows" for a mean over rows, "sum" for a sum; or a
            function that returns, for a microbatch, what its loss is divided by.
        microbatches: from `split`.

    Raises:
        MicrobatchError: no weights are right for these microbatches.

    >>> loss_weights("rows", split(torch.zeros(5), 2))
    [0.6, 0.4]
    """
    return weights_of(denominator, [measured(denominator, m) for m in microbatches])


def measured(denominator: LossWeight, part: Any) -> Measure | float:
    """Return what a part of a batch adds to what the loss divides by.

    Raises:
        MicrobatchError: the denominator is none.
    """
    if isinstance(denominator, Denominator):
        return denominator.measure(tensor_leaves(part))
    if denominator == "sum":
        return 1.0
    if denominator == "rows":
        return float(num_rows(part))
    if not callable(denominator):
        raise MicrobatchError(f"loss_weight={denominator!r} is neither a name nor a function")
    with torch.no_grad():
        return float(denominator(part))


def weights_of(denominator: LossWeight, parts: Sequence[Measure | float]) -> list[float]:
    """Return the weights with which the losses of measured parts add up to the whole batch's.

    Raises:
        MicrobatchError: no weights are right for these parts.
    """
    if isinstance(denominator, Denominator):
        return denominator.weights([p for p in parts if isinstance(p, Measure)])
    values = [p for p in parts if isinstance(p, float)]
    if denominator == "sum":
        return values
    total = sum(values)
    if not all(0 <= v < math.inf for v in values) or total == 0:
        raise MicrobatchError(
            f"loss_weight of the microbatches is {values}",
            hint="it has to count what the loss is divided by: nowhere negative, not 0 everywhere",
        )
    return [v / total for v in values]
