"""A dimension of samples that is cut over ranks, and layers that know who has which of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence

from packlight.errors import UnsupportedModelError
from packlight.ranks.exchange import exchange_rows, join_rows, own_numbers
from packlight.ranks.peers import Peers
from packlight.ranks.rows import RowMap, bounds_of
from packlight.torch_internals.storages import version


@dataclass(frozen=True)
class Axis:
    """A dimension of tensors (batch, channels, *spatial) that lies with several ranks.

    Attributes:
        dim: which one, from 2.
        peers: the ranks.
        name: of the mesh's dimension.
        far_halos: whether rows may be asked of ranks that are no neighbours.
    """

    dim: int
    peers: Peers
    name: str
    far_halos: bool = False

    @property
    def place(self) -> int:
        """Which of a layer's spatial dimensions it is."""
        return self.dim - 2

    @property
    def group_name(self) -> str:
        """By which operators know the ranks."""
        return str(self.peers.group.group_name)

    def bounds(self, size: int) -> tuple[int, int]:
        """Return this rank's rows [start, end) of a dimension of this many."""
        return bounds_of(size, self.peers.size)[self.peers.rank]

    def num_rows(self, size: int) -> int:
        """Return how many rows this rank has of a dimension of this many."""
        start, end = self.bounds(size)
        return end - start


@dataclass(frozen=True)
class Rows:
    """What a layer does along one axis: rows that it needs, and what else it has to know.

    Attributes:
        map: who needs which rows of whom.
        size: of the input, on all ranks together.
        out_size: of the result; None if that is whole on all ranks.
        before: for each rank, how many rows of what it makes lie before its own.
        constants: names of the layer's buffers with numbers for rows.
        table: the map as operators are given it.
        is_own: whether every rank needs the rows that it has, and nothing else.
        is_alone: whether no rank needs a row of another.
    """

    map: RowMap
    size: int
    out_size: int | None
    before: tuple[int, ...] = ()
    constants: tuple[str, ...] = ()
    table: tuple[int, ...] = ()
    is_own: bool = True
    is_alone: bool = True

    def ready(self) -> Rows:
        """Return it with what follows from the map, which is asked in every forward."""
        rows = self.map
        return replace(
            self, table=tuple(rows.encoded()), is_own=rows.is_identity,
            is_alone=rows.most_received == 0,
        )


def for_all_ranks(numbers: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return numbers for rows as (ranks, most rows of any, ...), zeros where a rank has fewer.

    >>> for_all_ranks(torch.tensor([1, 2, 3]), 2).tolist()
    [[1, 2], [3, 0]]
    """
    return pad_sequence(list(numbers.tensor_split(num_ranks)), batch_first=True)


class SplitLayer(nn.Module):
    """A layer on this rank's rows; mixed into the class of the layer that it was.

    Attributes:
        axes: the dimensions that are cut.
        path: the layer's, in its model.
        num_dims: how many spatial dimensions its input has.
        fill: what lies in rows of padding.
        known: what it does along each axis, by how many rows this rank has along each.
        numbers: for rows of all ranks, by the name of the buffer in which they lie.
    """

    axes: tuple[Axis, ...]
    path: str
    num_dims: int
    fill: float = 0.0
    is_whole_after: ClassVar[bool] = False
    known: dict[tuple[int, ...], tuple[Rows, ...]]
    numbers: dict[str, torch.Tensor]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # settings of the layer that it was

    def check(self) -> None:
        """Raise where a setting of the layer has no meaning on rows, or is not there yet.

        Raises:
            UnsupportedModelError: says which.
        """

    def rows_along(self, axis: Axis, size: int, out_size: int) -> Rows:
        """Return what the layer does along an axis, for sizes on all ranks together."""
        raise NotImplementedError

    def on_rows(self, x: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
        """Return this rank's rows of the layer's result."""
        raise NotImplementedError

    def learn(self, sizes: Sequence[int], out_sizes: Sequence[int]) -> tuple[Rows, ...]:
        """Prepare for samples of one size.

        Args:
            sizes: of the input along the axes, on all ranks together.
            out_sizes: of the result.

        Raises:
            UnsupportedModelError: it cannot be cut.
        """
        found = []
        for axis, size, out_size in zip(self.axes, sizes, out_sizes, strict=True):
            rows = self.rows_along(axis, size, out_size)
            needed = {"comes in": size} | ({} if rows.out_size is None else {"goes out": out_size})
            for way, num_rows in needed.items():
                if num_rows < axis.peers.size:
                    raise UnsupportedModelError(
                        f"{num_rows} rows along dimension {axis.dim} of what {way} are too few "
                        f"for {axis.peers.size} ranks"
                    )
            if not axis.far_halos:
                refuse_far(rows.map, axis)
            found.append(rows.ready())
        self._refuse_confusion(sizes)
        key = tuple(a.num_rows(size) for a, size in zip(self.axes, sizes, strict=True))
        self.known[key] = tuple(found)
        return tuple(found)

    def _refuse_confusion(self, sizes: Sequence[int]) -> None:
        """Raise where a rank could not tell two sizes by its own rows."""
        for other in self.known.values():
            cuts = [
                {b - a for a, b in bounds_of(size, axis.peers.size)}
                & {b - a for a, b in bounds_of(rows.size, axis.peers.size)}
                for axis, size, rows in zip(self.axes, sizes, other, strict=True)
            ]
            if all(cuts) and [rows.size for rows in other] != [*sizes]:
                raise UnsupportedModelError(
                    f"inputs of {[r.size for r in other]} and {[*sizes]} rows leave a rank the "
                    "same rows, so that it cannot tell them apart\nhint: sizes that all ranks can "
                    "share evenly differ everywhere"
                )

    def keep_numbers(self) -> None:
        """Have numbers for rows go where the layer goes; they are no part of its state.

        They are the same on all ranks: DistributedDataParallel broadcasts buffers.
        """
        device = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).device
        for name, values in self.numbers.items():
            self.register_buffer(name, values.to(device), persistent=False)

    def own(self, name: str, axis: Axis, size: int) -> torch.Tensor:
        """Return numbers for this rank's rows of a dimension of this many."""
        found: torch.Tensor = own_numbers(
            getattr(self, name), axis.num_rows(size), axis.group_name
        )
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of the result.

        Raises:
            UnsupportedModelError: the input has other sizes than were prepared for.
        """
        key = tuple([int(x.shape[axis.dim]) for axis in self.axes])
        rows = self.known.get(key)
        if rows is None:
            raise UnsupportedModelError(
                f"{self.path}: this rank has {key} rows of the input, but samples were announced "
                f"of which it has {sorted(self.known)}\nhint: parallelize_convolutions(..., "
                "example=) takes an example of every size, and the model this rank's part"
            )
        return self.on_rows(x, rows)

    def over_rows(
        self, x: torch.Tensor, rows: Sequence[Rows], layer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return what a layer makes of the rows that this rank needs.

        Autograd keeps this rank's own rows and those that came over the network for the layer's
        backward, and joins them again: what else reads this rank's rows keeps the same memory. In a
        captured step that is the plan's choice.
        """
        parts: list[tuple[torch.Tensor, Axis, Rows]] = []
        taken = x
        for axis, each in zip(self.axes, rows, strict=True):
            if each.is_own:
                continue
            given = axis.dim, each.table, axis.group_name
            received = x.new_empty(0) if each.is_alone else exchange_rows(taken.detach(), *given)
            parts.append((received, axis, each))
            taken = join_rows(taken, received, *given[:2], self.fill, axis.group_name)
        if not parts or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return layer(taken)
        return _keeping_parts(x, taken, parts, self.fill, layer)


def refuse_far(rows: RowMap, axis: Axis) -> None:
    """Raise where a rank needs rows of one that is no neighbour.

    Raises:
        UnsupportedModelError: says whose halo is how wide, and how many rows its neighbour has.
    """
    num_ranks = len(rows.owned)
    for rank in range(num_ranks):
        for piece in rows.received(rank):
            distance = (piece.owner - rank) % num_ranks
            if distance in (1, num_ranks - 1):
                continue
            is_below = distance <= num_ranks // 2
            between = (rank + (1 if is_below else -1)) % num_ranks
            width = sum(
                p.count for p in rows.received(rank)
                if ((p.owner - rank) % num_ranks <= num_ranks // 2) == is_below
            )
            raise UnsupportedModelError(
                f"rank {rank} needs a halo of {width} rows along dimension {axis.dim}, wider than "
                f"the {rows.num_owned(between)} rows of its neighbour, rank {between}\nhint: fewer "
                "ranks along it, or Spatial(far_halos=True), which asks ranks further away"
            )


def _keeping_parts(
    x: torch.Tensor, taken: torch.Tensor, parts: Sequence[tuple[torch.Tensor, Axis, Rows]],
    fill: float, layer: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run a layer whose input, if autograd keeps it, is kept as what it was joined of."""
    own, seen = x.detach(), version(x)
    address, shape = taken.data_ptr(), taken.shape

    def pack(value: torch.Tensor) -> Any:
        is_taken = value.data_ptr() == address and value.shape == shape and address
        return None if is_taken else value

    def unpack(kept: Any) -> torch.Tensor:
        if kept is not None:
            return kept  # type: ignore[no-any-return]
        if version(x_again := own) != seen:
            raise RuntimeError("a layer's input was changed in place before its backward")
        for received, axis, rows in parts:
            x_again = join_rows(
                x_again, received, axis.dim, rows.table, fill, axis.group_name
            )
        return x_again

    with saved_tensors_hooks(pack, unpack):
        return layer(taken)
