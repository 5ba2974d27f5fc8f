"""What a loss function returns beside the loss, when the batch runs in microbatches.

Tensors with a row for each row of the batch (logits, predictions, losses per sample) are put
together again. What has no rows (an accuracy, a mean norm) says something of a whole batch, and how
the microbatches' numbers would make it up is not known: then a batch runs as a whole.
"""

from __future__ import annotations

from typing import Any

import torch

from packlight.capture.batch import rebuilt, tensors_of
from packlight.capture.returned import extras_of, loss_of, with_items
from packlight.errors import MicrobatchError
from packlight.moves.microbatch.independence import FewRows
from packlight.torch_internals.storages import storage_identity

HINT = "return it as one number for each row, or let the batch run as a whole (moves=)"


def check_extras(few: FewRows) -> None:
    """Compare what a few rows give beside the loss with what their parts give, row by row.

    Args:
        few: those rows.

    Raises:
        MicrobatchError: something has no rows, or other ones.
    """
    _, whole = few.whole()
    if not whole:
        return
    _refuse_without_rows(whole, few.batch, few.num_rows)
    for cut in few.cuts:
        parts = [few.of(part, name)[1] for part, name in few.parts(cut)]
        for (path, value), *of_parts in zip(whole, *parts, strict=True):
            if not _is_made_of(value, [part for _, part in of_parts], few.tolerance):
                raise MicrobatchError(
                    f"what loss_fn returns at {path} beside the loss is another for the same "
                    "rows in other company",
                    hint=HINT,
                )


def _refuse_without_rows(extras: list[tuple[str, Any]], batch: Any, rows: int) -> None:
    inputs = {storage_identity(tensor) for tensor in tensors_of(batch)}
    for path, value in extras:
        if not isinstance(value, torch.Tensor):
            continue
        shape = tuple(value.shape)
        if shape[:1] != (rows,):
            raise MicrobatchError(
                f"loss_fn returns at {path} beside the loss a tensor of shape {shape}, which has "
                f"no row for each of {rows} rows",
                hint=HINT,
            )
        if storage_identity(value) in inputs:
            raise MicrobatchError(
                f"loss_fn returns at {path} beside the loss what the batch holds, too", hint=HINT
            )


def _is_made_of(value: Any, parts: list[Any], tolerance: float) -> bool:
    if not isinstance(value, torch.Tensor):
        return all(type(part) is type(value) and bool(part == value) for part in parts)
    joined = torch.cat(parts) if all(p.shape[1:] == value.shape[1:] for p in parts) else None
    if joined is None or joined.dtype != value.dtype or joined.shape != value.shape:
        return False
    if not value.is_floating_point():
        return torch.equal(joined, value)
    scale = float(value.abs().nan_to_num().max()) if value.numel() else 0.0
    return torch.allclose(joined, value, rtol=0, atol=tolerance * scale, equal_nan=True)


class Gathered:
    """Puts together what microbatches return.

    Args:
        num_rows: of the whole batch.
        has_extras: whether anything is returned beside the loss.
    """

    def __init__(self, num_rows: int, has_extras: bool) -> None:
        self.num_rows, self.has_extras = num_rows, has_extras
        self._whole: Any = None
        self._tensors: list[torch.Tensor] = []
        self._start = 0

    def add(self, returned: Any, rows: int) -> torch.Tensor:
        """Take the rows of one microbatch's extras, and return its loss."""
        extras = [value for _, value in extras_of(returned)]
        if self._whole is None:
            wholes = [self._like(v) if isinstance(v, torch.Tensor) else v for v in extras]
            leaves = iter(wholes)
            self._whole = returned
            if extras:
                items = [rebuilt(item, leaves) for item in returned[1:]]
                self._whole = with_items(returned, [returned[0], *items])
            self._tensors = [v for v in wholes if isinstance(v, torch.Tensor)]
        pieces = (v for v in extras if isinstance(v, torch.Tensor))
        for whole, piece in zip(self._tensors, pieces, strict=True):
            whole[self._start : self._start + rows] = piece
        self._start += rows
        return loss_of(returned)

    def leave_out(self, microbatch_index: int) -> None:
        """Refuse to leave a microbatch out whose extras are asked for."""
        if self.has_extras:
            raise MicrobatchError(
                f"nothing in microbatch {microbatch_index} counts for the loss, so what it would "
                "return beside the loss is not computed",
                hint="return the loss alone, or leave such rows out of the batch",
            )

    def result(self, loss: torch.Tensor) -> Any:
        """Return the whole batch's loss with its extras."""
        if isinstance(self._whole, (tuple, list)):
            return with_items(self._whole, [loss, *self._whole[1:]])
        return loss

    def _like(self, piece: torch.Tensor) -> torch.Tensor:
        return piece.new_empty((self.num_rows, *piece.shape[1:]))
