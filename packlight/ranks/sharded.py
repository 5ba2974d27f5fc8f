"""Parameters that lie in pieces with all ranks, and are gathered around their uses.

Between steps a parameter is this rank's piece: a tensor with some of its rows, as FSDP2's local
tensors are. In a step it is a tensor of the whole shape without memory; the planned step gathers
it where it is needed and drops it behind that, and gives the optimizer the piece to update
(ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from packlight.errors import UnsupportedModelError
from packlight.ranks.group import Ranks, Sent
from packlight.ranks.pieces import Pieces
from packlight.torch_internals.storages import num_storage_references

Sharding = Mapping[nn.Parameter, Pieces]
Key = tuple[str, int]


@dataclass
class _Place:
    """One parameter.

    Attributes:
        parameter: its object, which stays the same.
        pieces: who has which rows.
        own: this rank's.
        absent: of the whole shape and layout, without memory.
        whole: while it is gathered.
        sent: what of it is under way.
        references: of the storage of `whole` where nobody sends it.
    """

    parameter: nn.Parameter
    pieces: Pieces
    own: torch.Tensor
    absent: torch.Tensor
    whole: torch.Tensor | None = None
    sent: tuple[Sent, ...] = ()
    references: int = 0


class ShardedParameters:
    """The parameters of a model that are in pieces; the calls of a tier, by key.

    Everything but `own` and `drop` talks to the other ranks: all of them do it, in one order.

    Args:
        ranks: all of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._places: dict[Key, _Place] = {}
        self._first: Sharding = {}

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return key_of(parameter) in self._places

    @property
    def parameters(self) -> dict[nn.Parameter, Pieces]:
        """Those that are in pieces, and how."""
        return {place.parameter: place.pieces for place in self._places.values()}

    @property
    def own_bytes(self) -> int:
        """Size of this rank's pieces."""
        return sum(place.own.nbytes for place in self._places.values())

    def arrange(
        self, wanted: Sharding, cut_states: Callable[[Sharding, int], None] = lambda *_: None
    ) -> None:
        """Between steps: have what is wanted in pieces.

        Args:
            wanted: the same in all steps.
            cut_states: has the optimizer's states, which may be there already, be those of a rank's
                pieces; called at the first time.

        Raises:
            UnsupportedModelError: other parameters were in pieces before, with their optimizer
                states.
        """
        if self._first and wanted != self._first:
            raise UnsupportedModelError(
                f"{len(self._first)} parameters lie in pieces, with their optimizer states, and "
                f"another {len(wanted)} could now: hooks were added, or memory is looked at\n"
                "hint: save what was trained (step.save), and fit anew"
            )
        if wanted and not self._first:
            cut_states(wanted, self._ranks.rank)
            self._first = wanted
        for parameter, pieces in wanted.items():
            if parameter not in self:
                self._cut(parameter, pieces)

    def gather_all(self) -> None:
        """Between steps: have all parameters whole, until the next `arrange`."""
        for place in self._places.values():
            self._note_own(place)
            place.parameter.data = self._gathered(place)
        self._places.clear()

    def _cut(self, parameter: nn.Parameter, pieces: Pieces) -> None:
        first, end = pieces.rows[self._ranks.rank]
        own = parameter.data[first:end].clone()
        # (Memory that numpy has seen, as that of the values compared between ranks, cannot shrink.)
        absent = torch.empty_like(parameter.data)
        absent.untyped_storage().resize_(0)
        self._places[key_of(parameter)] = _Place(parameter, pieces, own, absent)
        parameter.data = own

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters whole for a while; what is written to them meanwhile stays.

        Every rank has to write the same.
        """
        places = [*self._places.values()]
        for place in places:
            self._note_own(place)
            place.parameter.data = self._gathered(place)
        try:
            yield
        finally:
            for place in places:
                first, end = place.pieces.rows[self._ranks.rank]
                place.own.copy_(place.parameter.data[first:end])
                place.parameter.data = place.own

    def _gathered(self, place: _Place) -> torch.Tensor:
        key = key_of(place.parameter)
        whole = self.fetch(key)
        self.wait_fetched(key)
        return whole

    # -- a step

    def begin_step(self) -> None:
        """Have all of them away, each of its whole shape: what a traced step expects."""
        for place in self._places.values():
            self._note_own(place)
            place.parameter.data = place.absent

    def end_step(self) -> None:
        """Let everybody see the pieces."""
        for place in self._places.values():
            place.whole, place.sent = None, ()
            place.parameter.data = place.own

    def _note_own(self, place: _Place) -> None:
        """Take over a piece that somebody has put in the old one's place."""
        found = place.parameter.data
        if found.data_ptr() != place.own.data_ptr() and found.shape == place.own.shape:
            place.own = found

    @contextmanager
    def own(self, parameter: nn.Parameter) -> Iterator[None]:
        """Have a parameter be this rank's piece, to be updated."""
        place = self._places[key_of(parameter)]
        parameter.data = place.own
        try:
            yield
        finally:
            parameter.data = place.absent

    def fetch(self, key: Key) -> torch.Tensor:
        """Start gathering a parameter: whole, and nothing besides, is allocated."""
        place, rank = self._places[key], self._ranks.rank
        whole = torch.empty_strided(
            place.absent.shape, place.absent.stride(), dtype=place.own.dtype,
            device=place.own.device,
        )
        first, end = place.pieces.rows[rank]
        whole[first:end].copy_(place.own)
        place.references = num_storage_references(whole)
        place.sent = tuple(
            self._ranks.start_sharing(whole[first:end], owner)
            for owner, (first, end) in enumerate(place.pieces.rows)
            if first < end
        )
        place.whole = whole
        return whole

    def wait_fetched(self, key: Key) -> None:
        """Wait until all rows are there, and nobody but the step holds the memory."""
        place = self._places[key]
        if place.whole is None or not place.sent:
            return
        sent, place.sent = place.sent, ()
        for one in sent:
            self._ranks.wait(one)
        del sent, one
        whole, place.whole = place.whole, None
        self._ranks.wait_let_go(whole, place.references)

    def drop(self, key: Key) -> None:
        """Let go of a gathered parameter."""
        self._places[key].whole = None

    def updating(self, key: Key) -> None:
        """Do nothing: what is gathered is never updated."""

    def offload(self, key: Key) -> None:
        """Never called: pieces are up to date."""
        raise AssertionError("a gathered parameter is written nowhere")

    def wait_written(self, key: Key) -> None:
        """Never called: see `offload`."""
        raise AssertionError("a gathered parameter is written nowhere")


def key_of(parameter: torch.Tensor) -> Key:
    """Return what a parameter is called here."""
    return "shard", id(parameter)
