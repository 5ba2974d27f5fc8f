"""Linear layers' inputs as sketches of fewer rows: weights' gradients are right on average."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from packlight.lossy import sketch
from packlight.moves.lossy.rewrite import Writers
from packlight.moves.lossy.saved import Read, SavedValue

_aten = torch.ops.aten
_ops = torch.ops.packlight
_OPERATORS = (sketch.sketch_rows, sketch.sketch_again)  # importing registers them


@dataclass(frozen=True)
class Sketched:
    """Of a linear layer's input a sketch is kept, by winner-take-all row sampling.

    Attributes:
        fraction: of the rows.
        kind: of the sketch.
    """

    technique: ClassVar[str] = "randomized-matmul"

    fraction: float
    kind: str = "winners"

    @property
    def name(self) -> str:
        """Of the setting."""
        return f"{self.kind}-{self.fraction}"

    def suits(self, value: SavedValue) -> bool:
        """Whether all that reads a value are gradients of weights: y^T x with x of that value."""
        return all(
            read.reader.target is _aten.mm.default and read.place == 1
            and _argument(value, read).meta["val"].shape == _matrix(value).shape
            for read in value.reads
        )

    def kept_bytes(self, value: SavedValue) -> int:
        """Return what is kept of a value."""
        matrix = _matrix(value)
        row_bytes = matrix.shape[1] * matrix.itemsize
        return sketch.kept_bytes(len(matrix), row_bytes, self.fraction, self.kind)

    def keep(self, value: SavedValue, writers: Writers, seed: int) -> _Sketch:
        """Write the sketch."""
        return _Sketch(value, writers, self, seed)


class _Sketch:
    def __init__(
        self, value: SavedValue, writers: Writers, setting: Sketched, seed: int
    ) -> None:
        self._writers, early = writers, writers.early
        matrix = _matrix(value)
        shaped = writers.viewed(value.reads[0], writers.copies[value.node], early)
        self._setting = (sketch.num_kept_rows(len(matrix), setting.fraction), setting.kind)
        made = early.call(value.node, _ops.sketch_rows.default, (shaped, *self._setting, seed))
        self._sketch, self._state, self._factors = (
            early.call(value.node, operator.getitem, (made, place)) for place in range(3)
        )

    def argument(self, read: Read) -> fx.Node:
        """Never asked for: there is a result."""
        raise AssertionError

    def result(self, read: Read, gradient: fx.Node) -> fx.Node | None:
        """Write the weight's gradient."""
        late, reader = self._writers.late, read.reader
        rows = late.call(reader, _aten.t.default, (gradient,))
        rows = late.call(
            reader, _ops.sketch_again.default,
            (rows, *self._setting, self._state, self._factors),
        )
        columns = late.call(reader, _aten.t.default, (rows,))
        return late.call(reader, _aten.mm.default, (columns, self._sketch))


def _argument(value: SavedValue, read: Read) -> fx.Node:
    return read.views[-1] if read.views else value.node


def _matrix(value: SavedValue) -> torch.Tensor:
    matrix: torch.Tensor = _argument(value, value.reads[0]).meta["val"]
    return matrix
